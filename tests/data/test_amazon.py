from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import amazon, build
from dpo4rec_jax.data.files import Files

REVIEW = {"reviewerID": "u", "asin": "a", "overall": 4.0, "unixReviewTime": 5, "reviewText": "é\n"}


def read(directory: Path, select=lambda interactions: interactions):
    return amazon.read(Files(directory), select)


def lines(*values: object, write=json.dumps) -> bytes:
    return "".join(
        f"{value if isinstance(value, str) else write(value)}\n" for value in values
    ).encode()


def test_metadata_literals_are_read_without_being_run(tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(lines(REVIEW, REVIEW | {"asin": "b"}))
    ran = tmp_path / "ran"
    (tmp_path / "meta.json").write_bytes(
        lines(
            {"asin": "a", "title": "It's &amp; 'that'", "brand": "None"},
            f"{{'asin': 'b', 'title': open({str(ran)!r}, 'w').name}}",
            write=repr,
        )
    )
    with pytest.raises(InputError, match=r"meta\.json:2: not a JSON object"):
        read(tmp_path)
    assert not ran.exists()
    (tmp_path / "meta.json").write_bytes(
        lines({"asin": "a", "title": "It's &amp; 'that'"}, write=repr)
    )
    assert read(tmp_path).items["title"].to_list() == ["It's &amp; 'that'"]


def test_metadata_of_items_nobody_kept_is_not_even_parsed(tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(lines(REVIEW, REVIEW | {"asin": "b"}))
    (tmp_path / "meta.json").write_bytes(
        lines(
            {"asin": "a", "title": "A", "categories": [["X", "Y"], ["X", "Z"]]}, '{"asin": "b", !'
        )
    )
    raw = read(tmp_path, lambda table: table.head(1))
    assert raw.items.rows() == [("a", "A", ["X", "Y", "Z"], [])]


def test_a_product_named_inside_another_field_does_not_hide_an_item(tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(lines(REVIEW, REVIEW | {"asin": "b"}))
    meta = {"title": "A", "related": {"also_bought": ["x"]}, "asin": "a"}
    (tmp_path / "meta.json").write_bytes(lines(meta, write=repr))
    assert read(tmp_path).items["item"].to_list() == ["a"]


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = [REVIEW | {"asin": str(i), "unixReviewTime": i} for i in range(500)]
    metadata = [{"asin": str(i), "title": f"T{i}"} for i in range(500)]
    (tmp_path / "reviews.json").write_bytes(lines(*reviews).rstrip())
    (tmp_path / "meta.json").write_bytes(lines(*metadata, write=repr))
    whole = read(tmp_path)
    monkeypatch.setattr(amazon, "CHUNK_BYTES", 257)
    parts = read(tmp_path)
    assert parts.interactions.equals(whole.interactions)
    assert parts.items.equals(whole.items)
    assert whole.items.height == 500
    (tmp_path / "reviews.json").write_bytes(lines(*reviews, REVIEW | {"overall": "x"}))
    with pytest.raises(InputError, match=r"reviews\.json:501: overall: expected a number, got 'x'"):
        read(tmp_path)


def test_books_take_kar_s_k_core_by_name(tmp_path: Path) -> None:
    reviews = [
        REVIEW | {"reviewerID": f"u{u}", "asin": f"i{i}", "unixReviewTime": i, "overall": 5.0}
        for u in range(45)
        for i in range(61 if u < 41 else 59)
    ]
    (tmp_path / "reviews.json").write_bytes(lines(*reviews))
    prepared = build(DataConfig(name="amazon-books", path=str(tmp_path)), 0, tmp_path)
    assert prepared.counts["users"] == 41
    assert prepared.counts["items"] == 61
    assert "book" in prepared.user_prompts[0].messages[0]["content"]
    assert prepared.window_U.tolist() == [15] * 41
