from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_jax.config import ColumnsConfig, DataConfig, InputError
from dpo4rec_jax.data import recbole
from dpo4rec_jax.data.files import Files

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "1\ta\t5\t881250949\n1\tb\t3.5\t8.8125095e8\n2\ta\t1\t881250951\n"


def write(directory: Path, **files: str) -> Path:
    for ending, content in files.items():
        (directory / f"set.{ending}").write_text(content, encoding="utf-8")
    return directory


def read(directory: Path, **columns):
    config = DataConfig(columns=ColumnsConfig(**columns))
    return recbole.read(Files(directory), config, lambda interactions: interactions)


def test_floats_become_whole_seconds(tmp_path: Path) -> None:
    table = read(write(tmp_path, inter=INTER + ROWS)).interactions
    assert table["time"].to_list() == [881250949, 881250950, 881250951]
    assert table["rating"].to_list() == [5, 3.5, 1]


def test_data_without_times_and_ratings_keep_file_order_and_have_none(tmp_path: Path) -> None:
    header = "session_id:token\tproduct_id:token\tclicks:float\n"
    table = read(write(tmp_path, inter=header + "s\tx\t7\ns\ty\t1\n")).interactions
    assert table.rows() == [("s", "x", 0, None), ("s", "y", 0, None)]


def test_columns_are_named_by_the_config_where_guessing_fails(tmp_path: Path) -> None:
    files = {"inter": "who:token\twhat:token\tliking:float\nu\ti\t4\nu\tj\t2\n"}
    with pytest.raises(InputError, match=r"no column of user ids among who, what, liking"):
        read(write(tmp_path, **files))
    table = read(tmp_path, user="who", item="what", rating="liking").interactions
    assert table.rows() == [("u", "i", 0, 4.0), ("u", "j", 0, 2.0)]
    with pytest.raises(InputError, match=r"data\.columns\.user: no column 'whom' in .*set\.inter"):
        read(tmp_path, user="whom", item="what")


def test_sequences_and_quoted_lists_become_values(tmp_path: Path) -> None:
    item = (
        "item_id:token\ttitle:token_seq\tclass:token_seq\tcategories:token_seq\tbrand:token\n"
        "a\tTwo Words\tAction Sci-Fi\t'Movies & TV', \"Kids' Films\"\tSome Co\n"
        "b\t\tDrama\t\tunknown\n"
    )
    items = read(write(tmp_path, inter=INTER + ROWS, item=item)).items
    assert items["genre"].to_list() == [["Action", "Sci-Fi"], ["Drama"]]
    assert items["category"].to_list() == [["Movies & TV", "Kids' Films"], []]
    assert items["brand"].to_list() == [["Some Co"], []]
    assert items["title"].to_list() == ["Two Words", None]


def test_a_year_beside_the_title_is_shown_after_it(tmp_path: Path) -> None:
    item = (
        "item_id:token\tmovie_title:token_seq\trelease_year:float\n"
        "a\tUsual Suspects, The\t1995.0\nb\tHeat (1995)\t1995\nc\tLost\t\n"
    )
    items = read(write(tmp_path, inter=INTER + ROWS, item=item)).items
    assert items["title"].to_list() == ["The Usual Suspects (1995)", "Heat (1995)", "Lost"]


def test_users_of_the_merged_movielens_get_their_own_ids_back(tmp_path: Path) -> None:
    rows = "1m_1\ta\t5\t1\n1m_1\tb\t5\t2\n"
    user = "user_id:token\tage:float\tgender:token\toccupation:float\n1m_1\t1\tF\t10\n"
    raw = read(write(tmp_path, inter=INTER + rows, user=user))
    assert raw.interactions["user"].to_list() == ["1", "1"]
    assert raw.users.rows() == [("1", "female", "under 18", "K-12 student")]
