"""Delimited text to tables, at polars speed, with the line number of whatever is malformed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping

import polars as pl

from dpo4rec_jax.config import InputError

# Stands in for separators of several characters, which polars does not split at.
UNIT_SEPARATOR = "\x1f"

# Field names in their order, each str, int or float.
Schema = Mapping[str, type]
POLARS = {str: pl.String, int: pl.Int64, float: pl.Float64}


def read_delimited(
    data: bytes,
    where: str,
    schema: Schema,
    *,
    separator: str,
    columns: Iterable[str] | None = None,
    encoding: str = "utf-8",
    first_line: int = 1,
) -> pl.DataFrame:
    """Lines of `len(schema)` fields without quoting, of which `columns` are kept (default all).

    Numbers must be finite; an empty field of a String column becomes null. `first_line` is the
    number, in messages, of the first line of `data`.

    Raises InputError, with file and line, for a line with another count of fields, a field that is
    no number where one is expected, or text in another encoding; and where there are no lines.
    """
    columns = list(schema if columns is None else columns)
    lines = data.replace(b"\r\n", b"\n").rstrip(b"\n") if b"\r" in data else data.rstrip(b"\n")
    if not lines:
        raise InputError(f"{where}: expected data, got an empty file")
    if encoding != "utf-8":
        lines = lines.decode(encoding).encode()
    split = separator if len(separator) == 1 else UNIT_SEPARATOR
    text = lines if split == separator else lines.replace(separator.encode(), split.encode())
    # polars refuses a line with too many fields and pads one with too few, so the sum tells.
    if text.count(split.encode()) != (text.count(b"\n") + 1) * (len(schema) - 1):
        raise _diagnosed(lines, where, schema, separator, first_line, "field counts differ")
    try:
        table = pl.read_csv(
            io.BytesIO(text),
            has_header=False,
            schema={name: POLARS[kind] for name, kind in schema.items()},
            columns=[list(schema).index(name) for name in columns],
            separator=split,
            quote_char=None,
        )
    except pl.exceptions.PolarsError as error:
        fault = str(error).splitlines()[0]
        raise _diagnosed(lines, where, schema, separator, first_line, fault) from None
    numbers = table.select(name for name in columns if schema[name] is not str)
    finite = numbers.select(pl.all().cast(pl.Float64).is_finite().fill_null(False).all())
    if not all(finite.row(0) if numbers.width else ()):
        raise _diagnosed(lines, where, schema, separator, first_line, "a field is not a number")
    return table


def _diagnosed(
    text: bytes, where: str, schema: Schema, separator: str, first_line: int, otherwise: str
) -> InputError:
    """Goes through the lines one by one, slowly, for the first that is malformed."""
    for number, raw in enumerate(text.split(b"\n"), first_line):
        try:
            fault = _fault(raw.decode(), schema, separator)
        except UnicodeDecodeError:
            fault = "expected UTF-8 text, got other bytes"
        if fault:
            return InputError(f"{where}:{number}: {fault}")
    return InputError(f"{where}: {otherwise}")


def _fault(line: str, schema: Schema, separator: str) -> str | None:
    fields = line.split(separator)
    if len(fields) != len(schema):
        return (
            f"expected {len(schema)} fields ({', '.join(schema)}) separated by {separator!r}, got "
            f"{len(fields)}: {line[:60]!r}"
        )
    for (name, kind), field in zip(schema.items(), fields, strict=True):
        if kind is not str and not _is_number(field, kind):
            expected = "whole" if kind is int else "finite"
            return f"{name}: expected a {expected} number, got {field!r}"
    return None


def _is_number(field: str, kind: type) -> bool:
    try:
        return math.isfinite(kind(field))
    except ValueError:
        return False
