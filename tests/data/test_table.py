from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dpo4rec_jax.config import ColumnsConfig, DataConfig, InputError
from dpo4rec_jax.data import build, table
from dpo4rec_jax.data.files import Files

ROWS = "user_id,item_id,rating,timestamp\n1,a,5,10\n1,b,3,9\n2,a,,11\n"


def read(directory: Path, **columns):
    config = DataConfig(columns=ColumnsConfig(**columns))
    return table.read(Files(directory), config, lambda interactions: interactions)


def write(directory: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (directory / name.replace("_", ".")).write_bytes(data)
    return directory


def test_beauty_pair_has_its_published_counts(shared_data: Path) -> None:
    path = shared_data / "amazon-beauty-2014"
    prepared = build(DataConfig(name="amazon-beauty", path=str(path)), 0, "unused")
    counts = prepared.counts
    assert (counts["interactions"], counts["users"], counts["items"]) == (198_502, 22_363, 12_101)
    assert not counts["ratings"]
    assert counts["lists_without_positives"] == 0
    # Without ratings every interaction after a window is positive, and nothing else is.
    length_U = np.diff(prepared.offset_U1)
    assert prepared.window_U.max() == 15
    assert counts["positives"] == (length_U - prepared.window_U).sum()
    brands = [item["attributes"]["brand"] for item in prepared.items]
    assert sum(map(bool, brands)) == 10_003 - 20  # 20 brands are the word Unknown
    assert ["Burt's Bees"] in brands
    assert prepared.user_id[0] == "A1YJEY40YUW4SE"
    assert "beauty" in prepared.user_prompts[0].messages[0]["content"]

    key_E = np.repeat(np.arange(len(length_U)), length_U) * 12_101 + prepared.item_E
    key_LN = prepared.user_L[:, None] * 12_101 + prepared.item_LN
    assert not np.isin(key_LN[prepared.label_LN == 0], key_E).any()
    assert np.isin(key_LN[prepared.label_LN == 1], key_E).all()


def test_empty_ratings_are_none(tmp_path: Path) -> None:
    assert read(write(tmp_path, log_csv=ROWS)).interactions["rating"].to_list() == [5, 3, None]


def test_a_semicolon_table_with_its_own_names_opens_by_config(tmp_path: Path) -> None:
    write(tmp_path, log_csv="kunde;ware;wann\nx;a;2020-01-02\ny;b;1970-01-01 00:01:00\n")
    with pytest.raises(InputError, match="no column of user ids among kunde, ware, wann"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"data\.columns\.user: no column 'kund' in any table"):
        read(tmp_path, user="kund", item="ware")
    with pytest.raises(InputError, match=r"data\.columns\.time: no column 'wan' in .*log\.csv"):
        read(tmp_path, user="kunde", item="ware", time="wan")
    raw = read(tmp_path, user="kunde", item="ware", time="wann")
    assert raw.interactions.rows() == [("x", "a", 1577923200, None), ("y", "b", 60, None)]


def test_quoted_fields_may_hold_separators_and_line_ends(tmp_path: Path) -> None:
    items = 'item_id,title,genres\na,"One, ""two""\nthree",X|Y\n'
    raw = read(write(tmp_path, log_csv=ROWS, items_csv=items))
    assert raw.items["title"].to_list() == ['One, "two"\nthree']
    assert raw.items["genre"].to_list() == [["X", "Y"]]


def test_users_of_their_own_table_have_profiles(tmp_path: Path) -> None:
    raw = read(write(tmp_path, log_csv=ROWS, people_csv="user_id,age,gender\n1,30,\n2,41,male\n"))
    assert raw.users.to_dicts() == [
        {"user": "1", "gender": None, "age": "30"},
        {"user": "2", "gender": "male", "age": "41"},
    ]


def test_parquet_keeps_whole_ids_and_lists(tmp_path: Path) -> None:
    pl.DataFrame({"user": [7, 7], "item": [1, 2], "stars": [1.5, 2.0]}).write_parquet(
        tmp_path / "log.parquet"
    )
    pl.DataFrame({"item": [1], "name": ["One"], "authors": [["A", "B", "A"]]}).write_parquet(
        tmp_path / "items.parquet"
    )
    raw = read(tmp_path)
    assert raw.interactions.rows() == [("7", "1", 0, 1.5), ("7", "2", 0, 2.0)]
    assert raw.items.rows() == [("1", "One", ["A", "B"])]
