"""MovieLens-1M (`.dat`) and MovieLens-100K (`u.*`) as GroupLens distributes them.

The same `.dat` files make up MovieLens-10M, which has no `users.dat`. Item and user files may be
missing: titles and profiles are then unknown.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.delimited import read_delimited
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.ratings import (
    RawData,
    Select,
    natural_title,
    no_items,
    no_users,
    out_of_bounds,
)

RATINGS = {"user": str, "item": str, "rating": float, "time": int}

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip

AGES_1M = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
OCCUPATIONS_1M = (
    None, "academic or educator", "artist", "clerical or administrative", "college student",
    "customer service", "doctor or health care", "executive or managerial", "farmer", "homemaker",
    "K-12 student", "lawyer", "programmer", "retired", "sales or marketing", "scientist",
    "self-employed", "technician or engineer", "tradesman or craftsman", "unemployed", "writer",
)  # fmt: skip
GENDERS = {"F": "female", "M": "male"}
STARS = (0.5, 5.0)


def is_movielens(files: Files) -> bool:
    return bool(files.named("ratings.dat", "u.data"))


def read(files: Files, select: Select) -> RawData:
    """Raises InputError, with file and line, for whatever does not fit the two layouts."""
    if files.named("ratings.dat"):
        interactions = _ratings(files, "ratings.dat", "::")
        items = _table(files, "movies.dat", _movies_1m, no_items())
        users = _table(files, "users.dat", _users_1m, no_users())
    else:
        interactions = _ratings(files, "u.data", "\t")
        items = _table(files, "u.item", _movies_100k, no_items())
        users = _table(files, "u.user", _users_100k, no_users())
    return RawData(select(interactions), items, users)


def _ratings(files: Files, ending: str, separator: str) -> pl.DataFrame:
    name = files.named(ending)[0]
    where = files.where(name)
    table = read_delimited(files.read(name), where, RATINGS, separator=separator)
    row = out_of_bounds(table, *STARS)
    if row is not None:
        rating = table["rating"][row]
        raise InputError(f"{where}:{row + 1}: rating: expected 0.5 to 5 stars, got {rating:g}")
    return table.select("user", "item", "time", pl.col("rating").cast(pl.Float32))


def _table(
    files: Files, ending: str, read: Callable[[bytes, str], pl.DataFrame], missing: pl.DataFrame
) -> pl.DataFrame:
    name = files.first(ending)
    return missing if name is None else read(files.read(name), files.where(name))


def _movies_1m(data: bytes, where: str) -> pl.DataFrame:
    schema = {"item": str, "title": str, "genre": str}
    try:
        data.decode()
        encoding = "utf-8"  # as in ML-10M
    except UnicodeDecodeError:
        encoding = "latin-1"
    table = read_delimited(data, where, schema, separator="::", encoding=encoding)
    return table.with_columns(natural_title(pl.col("title")), pl.col("genre").str.split("|"))


def _movies_100k(data: bytes, where: str) -> pl.DataFrame:
    described = ("item", "title", "released", "released on video", "address")
    schema = {**dict.fromkeys(described, str), **dict.fromkeys(GENRES_100K, int)}
    table = read_delimited(data, where, schema, separator="|", encoding="latin-1")
    flagged = [
        pl.when(pl.col(genre) == 1).then(pl.lit(genre))
        for genre in GENRES_100K
        if genre != "unknown"
    ]
    return table.select(
        "item", natural_title(pl.col("title")), genre=pl.concat_list(flagged).list.drop_nulls()
    )


def _users_1m(data: bytes, where: str) -> pl.DataFrame:
    names = ("user", "gender", "age", "occupation", "zip")
    table = read_delimited(data, where, dict.fromkeys(names, str), separator="::")
    return table.select("user", **profile_1m("gender", "age", "occupation"))


def _users_100k(data: bytes, where: str) -> pl.DataFrame:
    names = ("user", "age", "gender", "occupation", "zip")
    table = read_delimited(data, where, dict.fromkeys(names, str), separator="|")
    return table.select("user", **profile_100k("gender", "age", "occupation"))


def profile_1m(gender: str, age: str, occupation: str) -> dict[str, pl.Expr]:
    """MovieLens-1M's codes in words; codes out of the table stay as they are."""
    jobs = {str(code): job for code, job in enumerate(OCCUPATIONS_1M)}
    return {
        "gender": pl.col(gender).replace(GENDERS),
        "age": pl.col(age).replace(AGES_1M),
        "occupation": pl.col(occupation).replace(jobs),
    }


def profile_100k(gender: str, age: str, occupation: str) -> dict[str, pl.Expr]:
    """MovieLens-100K's profile: an age in years, an occupation in words."""
    job = pl.col(occupation)
    return {
        "gender": pl.col(gender).replace(GENDERS),
        "age": pl.col(age),
        "occupation": pl.when(~job.is_in(["none", "other"])).then(job),
    }
