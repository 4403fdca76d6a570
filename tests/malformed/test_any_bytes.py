"""Whatever stands in a file, a reader gives a value or one line; never another exception."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import formats
import gguf_files
import jax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import DataConfig, InputError, PolicyConfig
from dpo4rec_jax.data import build
from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny

LOG = formats.make_log(users=12, items=14, events=8)
# What tends to break parsers, where it is put into a sound file.
TOKENS = (b"", b"\n", b"\t", b"::", b",", b":token", b":float", b"\r\n", b"\xff", b"\x00", b"nan")
TOKENS += (b"inf", b"1e400", b"9" * 30, b'"', b"'", b"{", b"}", b"[", b"(", b"null", b"\\ud800")
TOKENS += (b"{1: 2}", b"[" * 3000, b"-(" * 300, b"0x", b"1_", b"\\x00", b"...", b"{}.a", b"f''")
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(TOKENS) | st.binary(max_size=4), st.integers(0, 9)),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage: list[tuple[float, bytes, int]]) -> bytes:
    """Puts bytes in place of as many others as are told, at shares of the length."""
    for share, new, replaced in damage:
        at = int(share * len(content))
        content = content[:at] + new + content[at + replaced :]
    return content


def value_or_line(path: Path) -> None:
    try:
        build(DataConfig(name="toy", path=str(path)), 0, path)
    except InputError as error:
        assert "\n" not in str(error)


@functools.cache
def sound(layout: str) -> Path:
    return formats.WRITERS[layout](Path(tempfile.mkdtemp(prefix="sound-")), LOG)


@settings(max_examples=60, deadline=None)
@example([(0.0, b"[" * 3000, 0)], "toy.inter")
@given(DAMAGE, st.sampled_from(["toy.inter", "toy.item", "toy.user"]))
def test_any_recbole_file(damage: list, name: str) -> None:
    path = sound("recbole")
    content = (path / name).read_bytes()
    try:
        (path / name).write_bytes(damaged(content, damage))
        value_or_line(path)
    finally:
        (path / name).write_bytes(content)


@settings(max_examples=60, deadline=None)
@given(DAMAGE)
def test_any_recbole_header(damage: list) -> None:
    path = sound("recbole")
    content = (path / "toy.inter").read_bytes()
    header, _, rest = content.partition(b"\n")
    try:
        (path / "toy.inter").write_bytes(damaged(header, damage) + b"\n" + rest)
        value_or_line(path)
    finally:
        (path / "toy.inter").write_bytes(content)


@settings(max_examples=100, deadline=None)
@example([(0.1, b"{1: 2}", 9)])
@given(DAMAGE)
def test_any_dict_literal_of_amazon(damage: list) -> None:
    path = sound("amazon-2018")
    entry = {"asin": LOG.items[0], "title": "It's \u00e9", "categories": [["All", "X"]]}
    (path / "meta_All_Beauty.json.gz").unlink(missing_ok=True)
    (path / "meta.json").write_bytes(damaged(repr(entry).encode(), damage) + b"\n")
    value_or_line(path)


@settings(max_examples=60, deadline=None)
@given(DAMAGE)
def test_any_review_of_amazon(damage: list) -> None:
    path = sound("amazon-2023")
    review = {"user_id": "1", "parent_asin": "2", "rating": 4.0, "timestamp": 5000}
    lines = [json.dumps(review | {"user_id": str(n)}).encode() for n in range(4)]
    (path / "All_Beauty.jsonl.gz").unlink(missing_ok=True)
    (path / "reviews.jsonl").write_bytes(damaged(b"\n".join(lines), damage))
    value_or_line(path)


@functools.cache
def gguf_file() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="sound-"))
    sizes = PolicyConfig(tiny_width=32, tiny_layers=1, tiny_heads=2, dtype="float32")
    save_policy(make_tiny(sizes, [f"w{n}" for n in range(60)], jax.random.key(0)), directory / "hf")
    return gguf_files.write(directory / "sound.gguf", directory / "hf")


LENGTHS = st.sampled_from([0, 1, 3, 2**31, 2**32, 2**40, 2**56, 2**63, 2**64 - 1])
GGUF_DAMAGE = st.lists(
    st.tuples(
        st.integers(0, 3200),
        st.binary(min_size=1, max_size=4) | LENGTHS.map(lambda n: n.to_bytes(8, "little")),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@example([(8, (2**63).to_bytes(8, "little"))])
@given(GGUF_DAMAGE)
def test_any_gguf_header(tmp_path_factory: pytest.TempPathFactory, damage: list) -> None:
    content = bytearray(gguf_file().read_bytes())
    for at, new in damage:
        content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(content)
    try:
        load_policy(path)
    except InputError as error:
        assert "\n" not in str(error)
