"""Writes reviews and metadata as Amazon's are laid out (2014, 2018 or 2023), of any size.

    python tools/make_amazon.py --form 2014 --reviews 2000000 --to books
    python -m dpo4rec_jax.train --config configs/amazon-books-llama31-8b-prm.yaml \\
        --stages prepare --set data.path=books

Counts of users, items and metadata lines stand to the reviews as in the 5-core of Books (8.9
million reviews by 603,668 users of 367,982 items, 2.4 million metadata lines); a few users and
items have most of the reviews. Texts are words at random, as long as real ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

USERS, ITEMS, LINES = 603_668 / 8.9e6, 367_982 / 8.9e6, 2.4e6 / 8.9e6  # a review
CHUNK = 100_000
STARS = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
SHARE_OF_STARS = np.array([0.04, 0.05, 0.11, 0.25, 0.55])
START, YEARS = 1_000_000_000, 12 * 365 * 24 * 3600
POOL = 4096  # texts that reviews draw from

REVIEWS = {  # what each form calls user, item, time, rating, text, title; ticks a second
    "2014": (("reviewerID", "asin", "unixReviewTime", "overall", "reviewText", "summary"), 1),
    "2018": (("reviewerID", "asin", "unixReviewTime", "overall", "reviewText", "summary"), 1),
    "2023": (("user_id", "parent_asin", "timestamp", "rating", "text", "title"), 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--form", choices=REVIEWS, default="2014")
    parser.add_argument("--reviews", type=int, default=2_000_000)
    parser.add_argument("--lines", type=int, help="lines of metadata (as many a review as Books)")
    parser.add_argument("--words", type=int, default=140, help="mean words of a review's text")
    parser.add_argument("--gz", action="store_true", help="pack both files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.to.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(options.seed)
    lines = options.lines if options.lines is not None else round(options.reviews * LINES)
    ending = ".json.gz" if options.gz else ".json"
    write(options.to / f"reviews{ending}", reviews(options.form, options, random))
    write(options.to / f"meta{ending}", metadata(options.form, lines, random))


def write(path: Path, blocks: Iterator[bytes]) -> None:
    with (
        gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file
    ):
        for block in blocks:
            file.write(block)
    print(f"{path}: {path.stat().st_size:,} bytes")


def reviews(form: str, options: argparse.Namespace, random: np.random.Generator) -> Iterator[bytes]:
    """Every review is of a user and an item of long-tailed counts; pairs may repeat, as they do."""
    names, tick = REVIEWS[form]
    texts = pl.Series(texts_of(random, POOL, options.words))
    titles = pl.Series(texts_of(random, POOL, 4))
    users = drawn(random, max(3, round(options.reviews * USERS)), options.reviews)
    items = drawn(random, max(20, round(options.reviews * ITEMS)), options.reviews)
    for start in range(0, options.reviews, CHUNK):
        at = slice(start, start + CHUNK)
        count = len(users[at])
        time = START + random.integers(0, YEARS, count)
        frame = pl.DataFrame(
            {
                names[0]: ids("A", users[at]),
                names[1]: ids("B", items[at]),
                names[2]: time * tick,
                names[3]: random.choice(STARS, count, p=SHARE_OF_STARS),
                names[4]: texts.gather(random.integers(0, POOL, count)),
                names[5]: titles.gather(random.integers(0, POOL, count)),
            }
        )
        yield extended(frame, form).write_ndjson().encode()


def extended(frame: pl.DataFrame, form: str) -> pl.DataFrame:
    """With the fields that nobody reads."""
    if form == "2014":
        return frame.with_columns(reviewerName=pl.lit("A. Reader"), helpful=pl.lit([1, 2]))
    if form == "2018":
        return frame.with_columns(verified=pl.lit(True), reviewerName=pl.lit("A. Reader"))
    return frame.with_columns(
        asin=pl.col("parent_asin"), helpful_vote=pl.lit(0), verified_purchase=pl.lit(True)
    )


def drawn(random: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    """Indices whose frequencies fall off as a power of their rank."""
    weights = (np.arange(kinds) + 10.0) ** -0.8
    edges = np.cumsum(weights / weights.sum())
    index = np.searchsorted(edges, random.random(count), side="right")
    return np.minimum(index, kinds - 1)


def ids(letter: str, index: np.ndarray) -> pl.Series:
    """Neighbours in rank are not neighbours in id."""
    scrambled = (index.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    return letter + pl.Series(scrambled).cast(pl.String).str.zfill(10)


def texts_of(random: np.random.Generator, count: int, words: int) -> list[str]:
    vocabulary = np.array(
        [
            "".join(random.choice(list("etaoinshrdlu"), length))
            for length in random.integers(2, 10, 3000)
        ]
    )
    lengths = np.maximum(1, random.geometric(1 / words, count))
    return [" ".join(vocabulary[random.integers(0, 3000, length)]) for length in lengths]


def metadata(form: str, lines: int, random: np.random.Generator) -> Iterator[bytes]:
    """2014's lines are Python literals, the others' JSON; the first ones are of reviewed items."""
    titles, about = texts_of(random, POOL, 6), texts_of(random, POOL, 80)
    brands = texts_of(random, 500, 2)
    for start in range(0, lines, CHUNK):
        index = np.arange(start, min(start + CHUNK, lines))
        item = ids("B", index).to_list()
        draws = random.integers(0, POOL, (len(index), 3))
        related = ids("B", random.integers(0, lines, 30 * 64)).to_list()
        rows = []
        for id, (title, text, brand) in zip(item, draws.tolist(), strict=True):
            also = related[30 * (text % 64) : 30 * (text % 64) + 30]
            entry = entry_of(form, id, titles[title], about[text], brands[brand % 500], also)
            rows.append(repr(entry) if form == "2014" else json.dumps(entry))
        yield "".join(f"{row}\n" for row in rows).encode()


def entry_of(
    form: str, id: str, title: str, about: str, brand: str, also: list[str]
) -> dict[str, Any]:
    levels = ["Books", f"Genre {len(about) % 40}", f"Shelf {len(about) % 700}"]
    if form == "2014":
        return {
            "asin": id,
            "title": title,
            "price": 9.99,
            "imUrl": f"http://images.example/{id}.jpg",
            "related": {"also_bought": also, "buy_after_viewing": also[:4]},
            "salesRank": {"Books": len(about)},
            "brand": brand,
            "categories": [levels],
            "description": about,
        }
    if form == "2018":
        return {
            "category": levels,
            "description": [about],
            "title": title,
            "also_buy": also,
            "brand": brand,
            "rank": f"{len(about)} in Books",
            "price": "$9.99",
            "asin": id,
        }
    return {
        "main_category": "Books",
        "title": title,
        "average_rating": 4.5,
        "features": [about[:80]],
        "description": [about],
        "price": 9.99,
        "images": [{"large": f"http://images.example/{id}.jpg"}],
        "store": brand,
        "categories": levels,
        "details": {"Publisher": brand},
        "parent_asin": id,
    }


if __name__ == "__main__":
    main()
