"""Malformed texts, given to `train`; any bytes are texts, or lists of `predict`, or one line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from malformed_input import Malformed, check_refusal, rows, write

from dpo4rec_jax import train
from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.texts import read_records, read_texts
from dpo4rec_jax.predict import _lines

CONFIG = """
data: {synthetic: {users: 40, items: 30, interactions: 20}}
policy: {path: never-loaded}
reason: {item_texts: metadata}
"""
FINE = '{"user": "u1", "text": "fine"}'


def texts(*lines: str, name: str = "t.jsonl") -> Callable[[Path], list[str]]:
    content = "".join(f"{line}\n" for line in lines).encode()
    packed = gzip.compress(content) if name.endswith(".gz") else content
    return lambda d: ["--set", f"reason.texts={write(d, {name: packed}) / name}"]


def raw(content: bytes, name: str = "t.jsonl") -> Callable[[Path], list[str]]:
    return lambda d: ["--set", f"reason.texts={write(d, {name: content}) / name}"]


WHOLE = gzip.compress((FINE + "\n").encode() * 1000)
TEXTS = (
    Malformed("cut", texts(FINE, '{"user": "1", "text": '), r"t\.jsonl:2: not JSON"),
    Malformed("a list", texts(FINE, "[1]"), r"t\.jsonl:2: expected an object, got list"),
    Malformed(
        "no id", texts(FINE, '{"text": "x"}'), r":2: expected a key user or item, got keys te"
    ),
    Malformed(
        "two ids", texts('{"user": "1", "item": "1", "text": "x"}'), r":1: expected a key user"
    ),
    Malformed("no text", texts('{"user": "u1"}'), r"t\.jsonl:1: text: expected a string, got None"),
    Malformed(
        "null id", texts('{"user": null, "text": "x"}'), r":1: user: expected a raw id, got No"
    ),
    Malformed(
        "sample", texts('{"user": "u1", "text": "x", "sample": -1}'), r":1: sample: expected a"
    ),
    Malformed(
        "sample twice",
        texts(*['{"user": "u1", "text": "x", "sample": 0}'] * 2),
        r"t\.jsonl:2: user 'u1': sample 0 given twice",
    ),
    Malformed("deep", texts("[" * 9999), r"t\.jsonl:1: nested too deeply"),
    Malformed(
        "half a pair", texts(r'{"user": "u1", "text": "\ud800"}'), r":1: holds half a surrogate"
    ),
    Malformed("bytes", raw(b'{"user": "u1", "text": "caf\xe9"}\n'), r"t\.jsonl:1: expected UTF-8"),
    Malformed("cut gz", raw(WHOLE[:-20], "t.jsonl.gz"), r"t\.jsonl\.gz: truncated or damaged gz"),
    Malformed("no gz", raw(b"plain", "t.jsonl.gz"), r"t\.jsonl\.gz: truncated or damaged gz"),
    Malformed(
        "gz bomb",
        raw(gzip.compress(bytes(80 * 2**20)), "t.jsonl.gz"),
        r"jsonl\.gz: unpacks to more",
    ),
    Malformed(
        "no file", lambda d: ["--set", f"reason.texts={d / 'n.jsonl'}"], r"n\.jsonl: .*No such file"
    ),
    Malformed("of others", texts('{"user": "who", "text": "x"}'), r"t\.jsonl: no text of any user"),
)


@rows(*TEXTS)
def test_texts_are_one_line_and_status_2(
    row: Malformed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write(tmp_path, {"c.yaml": CONFIG}) / "c.yaml"
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "w"), *row.make(tmp_path)]
    status = train.main([*arguments, "--stages", "prepare,reason"])
    check_refusal(status, capsys.readouterr().err, row.says, tmp_path / "w")


PIECES = (b"{", b"}", b"[", b"]", b'"user"', b'"item"', b'"items"', b'"text"', b'"sample"', b":")
PIECES += (
    b",",
    b'"a"',
    b"1",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"\n",
    b"\xff",
    b'"\\ud800"',
)
PIECES += (b'"completion_tokens"', b'"logps"', b"[" * 2000)
BYTES = st.one_of(
    st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
)


@settings(max_examples=200, deadline=None)
@example(b'{"user": "a", "text": "b", "completion_tokens": 1}')
@given(BYTES)
def test_any_bytes_are_texts_or_one_line(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    for read in (lambda: read_texts(path, "user"), lambda: read_records(path)):
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(BYTES)
def test_any_bytes_are_lists_or_one_line(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-lists.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(line, dict) for line in _lines(path))
    except InputError as error:
        assert "\n" not in str(error)
