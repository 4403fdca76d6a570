from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.delimited import read_delimited

WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\t:|"), min_size=1
)
ROWS = st.lists(
    st.tuples(WORDS, st.integers(-(2**62), 2**62), st.floats(-1e30, 1e30)), min_size=1, max_size=20
)
SCHEMA = {"word": str, "whole": int, "real": float}


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS, separator=st.sampled_from(["\t", "|", "::"]), ending=st.sampled_from(["\n", "\r\n"])
)
def test_what_was_written_is_read(rows, separator, ending) -> None:
    text = ending.join(separator.join(map(str, row)) for row in rows)
    table = read_delimited(text.encode(), "f", SCHEMA, separator=separator)
    assert table.rows() == rows


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS,
    place=st.integers(0, 19),
    damage=st.sampled_from(["fewer", "more", "word for a number", "infinite", "empty", "bytes"]),
)
def test_the_damaged_line_is_the_one_named(rows, place, damage) -> None:
    assume(place < len(rows))
    lines = ["::".join(map(str, row)).encode() for row in rows]
    lines[place] = {
        "fewer": b"a::1",
        "more": b"a::1::2::3",
        "word for a number": b"a::one::2",
        "infinite": b"a::1::inf",
        "empty": b"a::::2",
        "bytes": b"\xff::1::2",
    }[damage]
    try:
        read_delimited(b"\n".join(lines), "f", SCHEMA, separator="::", first_line=2)
    except InputError as error:
        assert str(error).startswith(f"f:{place + 2}: ")
    else:
        raise AssertionError("read without complaint")


def test_quotes_are_ordinary_characters() -> None:
    table = read_delimited(b'"a|1|2\nb"c|3|4', "f", SCHEMA, separator="|")
    assert table["word"].to_list() == ['"a', 'b"c']
