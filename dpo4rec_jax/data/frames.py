"""CSV, TSV and Parquet files as tables of strings, with places for messages."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field

import polars as pl

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.columns import check_header
from dpo4rec_jax.data.files import Files

PARQUET = (".parquet", ".pq")
ENDINGS = (".csv", ".tsv", *PARQUET)
# Damaged Parquet makes polars panic, which is no Exception of Python's.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
NO_PARQUET = "not a readable Parquet file"
SEPARATORS = ("\t", ";", ",")


@dataclass(frozen=True)
class Table:
    """A file and its columns; `separator` is None for Parquet."""

    name: str
    where: str
    header: list[str]
    separator: str | None
    data: bytes = field(repr=False)


def open_table(files: Files, name: str) -> Table:
    """Reads the bytes and the header.

    Raises InputError for an empty file, bytes that are no UTF-8 or no Parquet, and for a header
    that names a column twice or not at all.
    """
    where, data = files.where(name), files.read(name)
    if not data.strip():
        raise InputError(f"{where}: expected a table, got an empty file")
    if name.removesuffix(".gz").endswith(PARQUET):
        try:
            header, separator = list(pl.read_parquet_schema(io.BytesIO(data))), None
        except UNREADABLE as error:
            fault = str(error).splitlines()[0]
            raise InputError(f"{where}: {NO_PARQUET}: {fault}; get it again") from None
    else:
        try:
            first = data.partition(b"\n")[0].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{where}:1: expected UTF-8 text, got other bytes") from None
        separator = next((mark for mark in SEPARATORS if mark in first), ",")
        header = next(csv.reader([first], delimiter=separator))
    check_header(header, where)
    return Table(name, where, header, separator, data)


def load(table: Table, columns: Iterable[str | None]) -> pl.DataFrame:
    """The columns as strings (lists of strings where Parquet holds lists), dates as seconds.

    Raises InputError, with file and line, for a line with more fields than the header, or bytes
    that are no UTF-8.
    """
    wanted = list(dict.fromkeys(column for column in columns if column is not None))
    try:
        if table.separator is None:
            frame = pl.read_parquet(io.BytesIO(table.data), columns=wanted)
            frame = frame.select(_as_text(frame[column]) for column in wanted)
        else:
            frame = pl.read_csv(
                io.BytesIO(table.data),
                columns=wanted,
                separator=table.separator,
                infer_schema=False,
            ).select(wanted)
    except UNREADABLE as error:
        raise _diagnosed(table, str(error).splitlines()[0]) from None
    if frame.is_empty():
        raise InputError(f"{table.where}: expected rows below the header, got none")
    return frame


def place_of(table: Table, row: int) -> str:
    """File and line of a row counted from 0; Parquet has rows only."""
    if table.separator is None:
        return f"{table.where}: row {row + 1}"
    reader = _reader(table)
    for _ in range(row + 2):
        next(reader)
    return f"{table.where}:{reader.line_num}"


def _as_text(column: pl.Series) -> pl.Series:
    if column.dtype.is_temporal():
        column = column.cast(pl.Datetime("us")).dt.epoch("s")
    nested = isinstance(column.dtype, pl.List)
    return column.cast(pl.List(pl.String) if nested else pl.String)


def _diagnosed(table: Table, otherwise: str) -> InputError:
    """Goes through the lines one by one, slowly, for the first that is malformed."""
    if table.separator is None:
        return InputError(f"{table.where}: {NO_PARQUET}: {otherwise}; get it again")
    for number, line in enumerate(table.data.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return InputError(f"{table.where}:{number}: expected UTF-8 text, got other bytes")
    reader = _reader(table)
    for fields in reader:
        if len(fields) > len(table.header):
            return InputError(
                f"{table.where}:{reader.line_num}: expected {len(table.header)} fields "
                f"({', '.join(table.header)}), got {len(fields)}"
            )
    return InputError(f"{table.where}: {otherwise}")


def _reader(table: Table):
    text = io.StringIO(table.data.decode("utf-8-sig", errors="replace"), newline="")
    return csv.reader(text, delimiter=table.separator or ",")
