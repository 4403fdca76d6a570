from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.data.texts import TextRecord, read_records, read_texts, write_records

RECORDS = st.builds(
    TextRecord,
    kind=st.sampled_from(["user", "item"]),
    id=st.text(min_size=1),
    text=st.text(),
    sample=st.integers(0, 99),
    prompt_tokens=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    completion_tokens=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    finish=st.sampled_from(["stop", "length"]),
    logps=st.none() | st.lists(st.floats(-99, 0), max_size=4).map(tuple),
)


# beartype draws at random which element of a list it checks, under hypothesis' eyes.
@pytest.mark.filterwarnings("ignore:.*random.*")
@settings(max_examples=50, deadline=None)
@given(st.lists(RECORDS))
def test_records_come_back_as_they_were(tmp_path_factory, records) -> None:
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    write_records(path, records)
    assert read_records(path) == records


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_texts_of_known_ids_in_the_order_of_their_samples(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        '{"user": "1", "text": "second", "sample": 1}',
        '{"user": 1, "text": "first", "sample": 0}',
        '{"item": "1", "text": "an item"}',
        "",
        '{"user": "9", "text": "a stranger"}',
        '{"user": "2", "text": "a"}',
        '{"user": "2", "text": "b"}',
    )
    assert read_texts(path, "user", ["1", "2"]) == {"1": ["first", "second"], "2": ["a", "b"]}
    assert read_texts(path, "item", ["1"]) == {"1": ["an item"]}


def test_real_profiles_are_read_from_gz(shared_data: Path) -> None:
    path = shared_data / "chatgpt-profiles" / "ml-1m-users.jsonl.gz"
    texts = read_texts(path, "user", [str(user) for user in range(1, 6041)])
    assert len(texts) == 1000
    assert all(len(of_user) == 1 and of_user[0] for of_user in texts.values())
