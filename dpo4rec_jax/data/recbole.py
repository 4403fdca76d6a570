"""RecBole atomic files: `.inter`, `.item`, `.user`, tab-separated under typed headers.

Any data set of RecBole's collection opens: the prefix of the file names is found, and columns are
told by common names or `data.columns`.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from dpo4rec_jax.config import ColumnsConfig, DataConfig, InputError
from dpo4rec_jax.data.columns import check_header, pick, pick_attributes, require, values
from dpo4rec_jax.data.delimited import read_delimited
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.movielens import profile_1m, profile_100k
from dpo4rec_jax.data.ratings import RawData, Select, natural_title, no_items, no_users

TYPES = ("token", "token_seq", "float", "float_seq")
PROFILE = ("gender", "age", "occupation")
# Users of the cross-domain collection carry the name of their MovieLens in front of their id.
MERGED = r"^(1m|100k)_"


def is_recbole(files: Files) -> bool:
    return bool(files.named(".inter"))


def read(files: Files, config: DataConfig, select: Select) -> RawData:
    """Raises InputError, with file and line, for a header or a line of another form."""
    found = files.named(".inter")
    if len(found) > 1:
        raise InputError(
            f"{files.path}: expected one .inter file, got {', '.join(found)}; "
            "point data.path at one of them in its own directory"
        )
    prefix = found[0].removesuffix(".gz").removesuffix(".inter")
    kept = select(_interactions(files, found[0], config.columns))
    item_file, user_file = files.first(f"{prefix}.item"), files.first(f"{prefix}.user")
    items = _items(files, item_file, config.columns) if item_file else no_items()
    users = _users(files, user_file, config.columns) if user_file else no_users()
    return RawData(kept, items, users)


def _interactions(files: Files, name: str, columns: ColumnsConfig) -> pl.DataFrame:
    header, data = _split(files, name)
    where = files.where(name)
    user = require("user", columns, list(header), where)
    item = require("item", columns, list(header), where)
    floats = [column for column, type in header.items() if type == "float"]
    time, rating = (pick(role, columns, floats, where) for role in ("time", "rating"))
    numbers = [column for column in (time, rating) if column]
    table = _read(data, where, header, [user, item, *numbers], numbers)
    row = table.select((pl.col(user).is_null() | pl.col(item).is_null()).arg_true().first()).item()
    if row is not None:
        raise InputError(f"{where}:{row + 2}: {user}, {item}: expected ids, got an empty field")
    if time:
        late = table.select((pl.col(time).abs() >= 2.0**63).arg_true().first()).item()
        if late is not None:
            value = table[time][late]
            raise InputError(f"{where}:{late + 2}: {time}: expected seconds, got {value:g}")
    return table.select(
        user=_user_ids(user),
        item=pl.col(item),
        time=pl.col(time).cast(pl.Int64) if time else pl.lit(0, pl.Int64),
        rating=pl.col(rating).cast(pl.Float32) if rating else pl.lit(None, pl.Float32),
    )


def _items(files: Files, name: str, columns: ColumnsConfig) -> pl.DataFrame:
    header, data = _split(files, name)
    where, names = files.where(name), list(header)
    item = require("item", columns, names, where)
    title, year = pick("title", columns, names, where), pick("year", columns, names, where)
    attributes = pick_attributes(columns, names, where)
    wanted = list(dict.fromkeys(filter(None, (item, title, year, *attributes.values()))))
    table = _read(data, where, header, wanted)
    called = pl.col(title or item)
    if year:
        dated = called.str.contains(r"\(\d{4}\)") | pl.col(year).is_null()
        shown = pl.format("{} ({})", called, pl.col(year).str.strip_suffix(".0"))
        called = pl.when(dated).then(called).otherwise(shown)
    return table.select(
        item=pl.col(item),
        title=natural_title(called),
        **{
            attribute: values(pl.col(column), _separator(header[column], attribute))
            for attribute, column in attributes.items()
        },
    )


def _users(files: Files, name: str, columns: ColumnsConfig) -> pl.DataFrame:
    header, data = _split(files, name)
    where = files.where(name)
    user = require("user", columns, list(header), where)
    present = [column for column in PROFILE if column in header]
    table = _read(data, where, header, [user, *present])
    if present != list(PROFILE):
        return table.select(_user_ids(user).alias("user"), *present)
    coded = table["occupation"].str.contains(r"^\d+$").all()
    return table.select(user=_user_ids(user), **(profile_1m if coded else profile_100k)(*PROFILE))


def _user_ids(column: str) -> pl.Expr:
    ids = pl.col(column)
    return pl.when(ids.str.contains(MERGED).all()).then(ids.str.replace(MERGED, "")).otherwise(ids)


def _separator(type: str, attribute: str) -> str:
    """Values of a sequence stand between blanks; genres do even where the type denies it."""
    return " " if type == "token_seq" or attribute == "genre" else "\t"


def _split(files: Files, name: str) -> tuple[dict[str, str], bytes]:
    """The header as column -> type, and the lines below it."""
    where = files.where(name)
    first, _, data = files.read(name).partition(b"\n")
    try:
        fields = first.decode("utf-8-sig").rstrip("\r").split("\t")
    except UnicodeDecodeError:
        raise InputError(f"{where}:1: expected UTF-8 text, got other bytes") from None
    pairs = [field.rpartition(":") for field in fields]
    for field, (column, _, type) in zip(fields, pairs, strict=True):
        if not column or type not in TYPES:
            raise InputError(
                f"{where}:1: expected headers such as user_id:token (types {', '.join(TYPES)}), "
                f"got {field!r}"
            )
    check_header([column for column, _, _ in pairs], where)
    return {column: type for column, _, type in pairs}, data


def _read(
    data: bytes,
    where: str,
    header: dict[str, str],
    columns: list[str],
    numbers: Sequence[str] = (),
) -> pl.DataFrame:
    schema = {column: float if column in numbers else str for column in header}
    return read_delimited(data, where, schema, separator="\t", columns=columns, first_line=2)
