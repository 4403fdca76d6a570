"""A table of interactions and, beside it, one of items and one of users: CSV, TSV or Parquet.

Which file is which is told from the columns: interactions name users and items, items only items,
users only users. The columns are told by common names or `data.columns`.
"""

from __future__ import annotations

import polars as pl

from dpo4rec_jax.config import ColumnsConfig, DataConfig, InputError
from dpo4rec_jax.data.columns import (
    UNKNOWN,
    known,
    pick,
    pick_attributes,
    require,
    values,
)
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.frames import ENDINGS, Table, load, open_table, place_of
from dpo4rec_jax.data.ratings import RawData, Select, natural_title, no_items, no_users

PROFILE = ("gender", "age", "occupation")


def is_table(files: Files) -> bool:
    return bool(files.named(*ENDINGS))


def read(files: Files, config: DataConfig, select: Select) -> RawData:
    """Raises InputError, with file and line where there is one, for tables it cannot tell apart,
    columns that are missing or named twice, and values that are no id, time or rating.
    """
    columns = config.columns
    tables = [open_table(files, name) for name in files.named(*ENDINGS)]
    for role in ("user", "item"):
        given = getattr(columns, role)
        if given is not None and not any(given in table.header for table in tables):
            raise InputError(
                f"data.columns.{role}: no column {given!r} in any table ({_headers(tables)})"
            )
    holding: dict[tuple[bool, bool], list[Table]] = {}
    for table in tables:
        holds = (_has(table, "user", columns), _has(table, "item", columns))
        holding.setdefault(holds, []).append(table)
    interactions = holding.get((True, True), [])
    if not interactions and len(tables) == 1:
        for role in ("user", "item"):
            require(role, columns, tables[0].header, tables[0].where)
    if len(interactions) != 1:
        found = ", ".join(table.name for table in interactions) or "none"
        raise InputError(
            f"{files.path}: expected one table with a column of users and one of items, got "
            f"{found} ({_headers(tables)}); name the columns in data.columns"
        )
    items, users = (_only(files, holding.get(what, [])) for what in ((False, True), (True, False)))
    _check_items(items, columns, f"{files.path}: {_headers(tables)}")
    return RawData(
        select(_interactions(interactions[0], columns)),
        _items(items, columns) if items else no_items(),
        _users(users, columns) if users else no_users(),
    )


def _check_items(items: Table | None, columns: ColumnsConfig, where: str) -> None:
    """Raises InputError where the config names columns of a table of items that is not there."""
    named = {
        "title": columns.title,
        "attributes": ", ".join(columns.attributes or ()) or None,
    }
    for role, given in named.items():
        if items is None and given is not None:
            raise InputError(
                f"data.columns.{role}: {given} needs a table of items, with a column of item ids "
                f"and none of user ids; there is none ({where})"
            )


def _headers(tables: list[Table]) -> str:
    return "; ".join(f"{table.name}: {', '.join(table.header)}" for table in tables)


def _has(table: Table, role: str, columns: ColumnsConfig) -> bool:
    given = getattr(columns, role)
    if given is not None:
        return given in table.header
    return pick(role, columns, table.header, table.where) is not None


def _only(files: Files, tables: list[Table]) -> Table | None:
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise InputError(f"{files.path}: cannot tell which table to take: {names}; move one away")
    return tables[0] if tables else None


def _interactions(table: Table, columns: ColumnsConfig) -> pl.DataFrame:
    header, where = table.header, table.where
    user = require("user", columns, header, where)
    item = require("item", columns, header, where)
    time, rating = (pick(role, columns, header, where) for role in ("time", "rating"))
    frame = load(table, [user, item, time, rating])
    parsed = frame.select(
        user=pl.col(user),
        item=pl.col(item),
        time=_seconds(frame[time]) if time else pl.lit(0, pl.Int64),
        rating=_number(pl.col(rating)) if rating else pl.lit(None, pl.Float64),
    )
    unfit = {
        user: (parsed["user"].is_null(), "an id"),
        item: (parsed["item"].is_null(), "an id"),
    }
    if time:
        unfit[time] = (parsed["time"].is_null(), "a number or a date")
    if rating:
        finite = parsed["rating"].is_finite().fill_null(False)
        unfit[rating] = (frame[rating].is_not_null() & ~finite, "a finite number")
    for column, (bad, expected) in unfit.items():
        if bad.any():
            row = int(bad.arg_max() or 0)
            got = frame[column][row]
            raise InputError(f"{place_of(table, row)}: {column}: expected {expected}, got {got!r}")
    return parsed.with_columns(pl.col("rating").cast(pl.Float32))


def _items(table: Table, columns: ColumnsConfig) -> pl.DataFrame:
    header, where = table.header, table.where
    item, title = require("item", columns, header, where), pick("title", columns, header, where)
    attributes = pick_attributes(columns, header, where)
    frame = load(table, [item, title, *attributes.values()])
    called = natural_title(pl.col(title)) if title else pl.lit(None, pl.String)
    listed = {name: _attribute(frame[column]) for name, column in attributes.items()}
    return frame.select(item=pl.col(item), title=called, **listed)


def _users(table: Table, columns: ColumnsConfig) -> pl.DataFrame:
    user = require("user", columns, table.header, table.where)
    present = [column for column in PROFILE if column in table.header]
    frame = load(table, [user, *present])
    missing = pl.col(present).str.to_lowercase().is_in(list(UNKNOWN))
    profile = frame.select(pl.when(~missing).then(pl.col(present))) if present else frame.select()
    return profile.insert_column(0, frame[user].alias("user"))


def _attribute(column: pl.Series) -> pl.Expr:
    """Splits paths (`A > B`) and alternatives (`A|B`); other strings are one value."""
    if column.dtype == pl.List(pl.String):
        return known(pl.col(column.name))
    marks = (mark for mark in (" > ", "|") if column.str.contains(mark, literal=True).any())
    return values(pl.col(column.name), next(marks, "\n"))


def _number(column: pl.Expr) -> pl.Expr:
    return column.str.strip_chars().cast(pl.Float64, strict=False)


def _seconds(column: pl.Series) -> pl.Expr:
    """Numbers as they are; dates, and dates with times, in seconds since 1970."""
    text = pl.col(column.name).str.strip_chars()
    number = text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)
    first = column.drop_nulls().head(1).cast(pl.Float64, strict=False)
    if not len(first) or first[0] is not None:
        return number
    return text.str.to_datetime(strict=False, time_unit="us").dt.epoch("s")
