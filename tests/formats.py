"""Small extracts of one log in every layout the readers open.

`WRITERS[format](directory, log)` writes files and returns what goes into `data.path`. The layouts
cannot all say the same: ids, titles and ratings are those of the log in each, attributes and
profiles where the layout has them.
"""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

GENRES = ("Action", "Comedy", "Drama", "Horror")
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip


@dataclass(frozen=True)
class Log:
    """Raw events in file order: (user, item, rating 1 to 5, seconds); items are numbered from 1."""

    events: list[tuple[str, str, int, int]]
    users: list[str]
    items: list[str]

    def genre(self, item: str) -> str:
        return GENRES[self.items.index(item) % len(GENRES)]

    def title(self, item: str) -> str:
        return f"Tale {self.items.index(item)} (19{50 + self.items.index(item) % 50})"


def make_log(users: int = 24, items: int = 40, events: int = 12, seed: int = 0) -> Log:
    """Every user meets `events` distinct items; a user who likes a genre rates it 5, others 1-3."""
    rng = np.random.default_rng(seed)
    user_ids, item_ids = [str(u + 1) for u in range(users)], [str(i + 1) for i in range(items)]
    log = []
    for u, user in enumerate(user_ids):
        met = rng.choice(items, size=events, replace=False)
        for time, i in enumerate(met):
            liked = i % len(GENRES) == u % len(GENRES)
            rating = 5 if liked or rng.random() < 0.2 else int(rng.integers(1, 4))
            log.append((user, item_ids[i], rating, 900_000_000 + 86_400 * time))
    shuffled = [log[place] for place in rng.permutation(len(log))]
    return Log(shuffled, user_ids, item_ids)


def write_ml_1m(directory: Path, log: Log) -> Path:
    return _write(directory / "ml-1m", _ml_1m_files(log))


def write_ml_1m_zip(directory: Path, log: Log) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / "ml-1m.zip", "w") as archive:
        for name, content in _ml_1m_files(log).items():
            archive.writestr(f"ml-1m/{name}", content)
    return directory / "ml-1m.zip"


def write_ml_100k(directory: Path, log: Log) -> Path:
    flags = {item: [int(g == log.genre(item)) for g in GENRES_100K] for item in log.items}
    return _write(
        directory / "ml-100k",
        {
            "u.data": _lines("\t".join(map(str, event)) for event in log.events),
            "u.item": _lines(
                "|".join([item, log.title(item), "01-Jan-1995", "", "http://x", *map(str, row)])
                for item, row in flags.items()
            ),
            "u.user": _lines(f"{user}|{20 + int(user)}|M|writer|55105" for user in log.users),
        },
    )


def write_recbole(directory: Path, log: Log) -> Path:
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    inter += [f"{user}\t{item}\t{rating}\t{time}" for user, item, rating, time in log.events]
    item = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    item += [f"{i}\t{log.title(i)[:-7]}\t{log.title(i)[-5:-1]}\t{log.genre(i)}" for i in log.items]
    user = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    user += [f"{user}\t{20 + int(user)}\tM\twriter\t55105" for user in log.users]
    files = {"toy.inter": _lines(inter), "toy.item": _lines(item), "toy.user": _lines(user)}
    return _write(directory / "toy", files)


def write_amazon_2014(directory: Path, log: Log, category: str = "Beauty") -> Path:
    reviews = [
        {"reviewerID": u, "asin": i, "reviewText": "fine", "overall": float(r), "unixReviewTime": t}
        for u, i, r, t in log.events
    ]
    metadata = [
        {
            "asin": i,
            "title": log.title(i),
            "categories": [["All", log.genre(i)]],
            "brand": 'It\'s & "Co"',
            "related": {"also_bought": ["7"]},
        }
        for i in log.items
    ]
    files = {
        f"reviews_{category}_5.json.gz": _lines(map(json.dumps, reviews)),
        f"meta_{category}.json.gz": _lines(map(repr, metadata)),
    }
    return _write(directory / "amazon-2014", files)


def write_amazon_2018(directory: Path, log: Log, category: str = "All_Beauty") -> Path:
    reviews = [
        {"overall": float(r), "verified": True, "reviewerID": u, "asin": i, "unixReviewTime": t}
        for u, i, r, t in log.events
    ]
    metadata = [
        {"category": ["All", log.genre(i)], "title": log.title(i), "brand": "Co", "asin": i}
        for i in log.items
    ]
    files = {
        f"{category}_5.json": _lines(map(json.dumps, reviews)),
        f"meta_{category}.json.gz": _lines(map(json.dumps, metadata)),
    }
    return _write(directory / "amazon-2018", files)


def write_amazon_2023(directory: Path, log: Log, category: str = "All_Beauty") -> Path:
    reviews = [
        {"rating": float(r), "title": "ok", "asin": f"x{i}", "parent_asin": i, "user_id": u}
        | {"timestamp": 1000 * t, "helpful_vote": 0, "verified_purchase": True}
        for u, i, r, t in log.events
    ]
    metadata = [
        {"main_category": "All", "title": log.title(i), "store": "Co", "parent_asin": i}
        | {"categories": ["All", log.genre(i)], "details": {"asin": "none of ours"}}
        for i in log.items
    ]
    files = {
        f"{category}.jsonl.gz": _lines(map(json.dumps, reviews)),
        f"meta_{category}.jsonl.gz": _lines(map(json.dumps, metadata)),
    }
    return _write(directory / "amazon-2023", files)


def write_csv(directory: Path, log: Log) -> Path:
    target = directory / "csv"
    target.mkdir(parents=True, exist_ok=True)
    with gzip.open(target / "interactions.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "rating", "timestamp"), *log.events])
    with (target / "items.csv").open("w", newline="") as file:
        rows = [(i, log.title(i), f"All > {log.genre(i)}", "Unknown") for i in log.items]
        csv.writer(file).writerows([("item_id", "title", "categories", "brand"), *rows])
    return target


def write_parquet(directory: Path, log: Log) -> Path:
    target = directory / "parquet"
    target.mkdir(parents=True, exist_ok=True)
    users, items, ratings, times = zip(*log.events, strict=True)
    moments = pl.from_epoch(pl.Series(times), time_unit="s")
    interactions = {"user": users, "item": items, "rating": ratings, "time": moments}
    pl.DataFrame(interactions).write_parquet(target / "interactions.parquet")
    titles = {"item": log.items, "title": [log.title(i) for i in log.items]}
    genres = [[log.genre(i)] for i in log.items]
    pl.DataFrame({**titles, "genres": genres}).write_parquet(target / "items.parquet")
    return target


WRITERS: dict[str, Callable[[Path, Log], Path]] = {
    "ml-1m": write_ml_1m,
    "ml-1m-zip": write_ml_1m_zip,
    "ml-100k": write_ml_100k,
    "recbole": write_recbole,
    "amazon-2014": write_amazon_2014,
    "amazon-2018": write_amazon_2018,
    "amazon-2023": write_amazon_2023,
    "csv": write_csv,
    "parquet": write_parquet,
}


def _ml_1m_files(log: Log) -> dict[str, bytes]:
    return {
        "ratings.dat": _lines("::".join(map(str, event)) for event in log.events),
        "movies.dat": _lines(f"{i}::{log.title(i)}::{log.genre(i)}" for i in log.items),
        "users.dat": _lines(f"{user}::F::25::20::55105" for user in log.users),
    }


def _lines(lines) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("latin-1")


def _write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        packed = gzip.compress(content) if name.endswith(".gz") else content
        (directory / name).write_bytes(packed)
    return directory
