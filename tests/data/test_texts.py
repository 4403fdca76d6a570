from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": "1", "text": ', r"t\.jsonl:2: not JSON"),
        ("[1]", r"t\.jsonl:2: expected an object, got list"),
        ('{"text": "x"}', r"t\.jsonl:2: expected a key user or item, got keys text"),
        ('{"user": "1", "item": "1", "text": "x"}', r"t\.jsonl:2: expected a key user or item"),
        ('{"user": "1"}', r"t\.jsonl:2: text: expected a string, got None"),
        ('{"user": null, "text": "x"}', r"t\.jsonl:2: user: expected a raw id, got None"),
        ('{"user": "1", "text": "x", "sample": -1}', r"t\.jsonl:2: sample: expected a whole"),
        ('{"user": "1", "text": "x", "sample": 0}', r"t\.jsonl:2: user '1': sample 0 given twice"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "t.jsonl", '{"user": "1", "text": "fine"}', line)
    with pytest.raises(InputError, match=message):
        read_texts(path, "user", ["1"])


def test_a_missing_a_cut_and_a_foreign_file_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the texts: No such file"):
        read_texts(tmp_path / "none.jsonl", "user", ["1"])
    whole = gzip.compress(b'{"user": "1", "text": "fine"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: truncated or damaged gz"):
        read_texts(tmp_path / "cut.jsonl.gz", "user", ["1"])
    (tmp_path / "latin.jsonl").write_bytes(b'{"user": "1", "text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:1: expected UTF-8"):
        read_texts(tmp_path / "latin.jsonl", "user", ["1"])
