"""Which column means what, in files whose headers we did not choose."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from dpo4rec_jax.config import ColumnsConfig, InputError

# Common names, the preferred first; compared in lower case without `_`, `-` and blanks.
NAMES = {
    "user": (
        "userid", "user", "reviewerid", "customerid", "memberid", "uid", "sessionid", "useridx",
    ),
    "item": (
        "itemid", "item", "parentasin", "asin", "movieid", "bookid", "isbn", "productid",
        "businessid", "artistid", "venueid", "songid", "trackid", "gameid", "recipeid", "iid",
        "itemidx",
    ),
    "time": (
        "timestamp", "unixreviewtime", "time", "unixtime", "datetime", "date", "reviewtime", "ts",
    ),
    "rating": ("rating", "ratings", "stars", "star", "overall", "reviewscore"),
    "title": (
        "title", "movietitle", "booktitle", "productname", "producttitle", "itemname", "itemtitle",
        "name", "businessname", "artistname",
    ),
    "year": ("releaseyear", "year", "publicationyear"),
}  # fmt: skip
ATTRIBUTES = {
    "genre": ("genre", "genres", "class", "movieclass"),
    "category": ("categories", "category", "cates", "categoryname", "maincategory"),
    "brand": ("brand", "store", "salestype"),
    "author": ("author", "authors", "bookauthor", "artist"),
    "publisher": ("publisher", "developer"),
}
# Values that stand for none.
UNKNOWN = ("", "unknown", "none", "null", "nan", "n/a")


def pick(role: str, config: ColumnsConfig, header: Sequence[str], where: str) -> str | None:
    """The column that plays a role: the config's, or the first common name in the header.

    Raises InputError where the config names a column that is not there.
    """
    given = getattr(config, role, None)
    if given is not None:
        return _existing(given, f"data.columns.{role}", header, where)
    return _first(NAMES[role], header)


def require(role: str, config: ColumnsConfig, header: Sequence[str], where: str) -> str:
    """Like `pick`; raises InputError where nothing plays the role, too."""
    name = pick(role, config, header, where)
    if name is None:
        raise InputError(
            f"{where}: no column of {role} ids among {', '.join(header)}; "
            f"name it in data.columns.{role}"
        )
    return name


def pick_attributes(config: ColumnsConfig, header: Sequence[str], where: str) -> dict[str, str]:
    """Item attributes by name, and the columns they lie in."""
    if config.attributes is not None:
        key = "data.columns.attributes"
        for name in ("item", "title"):
            if name in config.attributes:
                raise InputError(f"{key}: {name!r} is no attribute; leave it out")
        return {name: _existing(name, key, header, where) for name in config.attributes}
    columns = {attribute: _first(names, header) for attribute, names in ATTRIBUTES.items()}
    return {attribute: column for attribute, column in columns.items() if column is not None}


def values(column: pl.Expr, separator: str) -> pl.Expr:
    """A list of an item's values from one string; blanks and words for none are left out.

    A string of quoted values (`'Movies & TV', 'Comedy'`) is split at the quotes.
    """
    quoted = r"""'[^']*'|"[^"]*\""""
    parts = (
        pl.when(column.str.contains(rf"^\[?({quoted})(, |\]|$)"))
        .then(column.str.extract_all(quoted))
        .otherwise(column.str.split(separator))
    )
    return known(parts.list.eval(pl.element().str.strip_chars(" \t'\"")))


def known(parts: pl.Expr) -> pl.Expr:
    """Distinct values of a list column, without blanks and words for none; null becomes []."""
    unknown = pl.element().str.to_lowercase().is_in(list(UNKNOWN))
    left = parts.list.eval(pl.element().filter(~unknown)).list.unique(maintain_order=True)
    return left.fill_null([])


def check_header(header: Sequence[str], where: str) -> None:
    """Raises InputError for a column named twice or without a name."""
    for place, name in enumerate(header):
        if not name.strip():
            raise InputError(f"{where}:1: column {place + 1} has no name in the header")
        if name in header[:place]:
            raise InputError(f"{where}:1: column {name!r} stands twice in the header")


def _existing(name: str, key: str, header: Sequence[str], where: str) -> str:
    if name not in header:
        raise InputError(f"{key}: no column {name!r} in {where}; there are {', '.join(header)}")
    return name


def _first(names: Sequence[str], header: Sequence[str]) -> str | None:
    found = {_plain(name): name for name in reversed(header)}
    return next((found[name] for name in names if name in found), None)


def _plain(name: str) -> str:
    return name.lower().translate({ord(mark): None for mark in "_- "})
