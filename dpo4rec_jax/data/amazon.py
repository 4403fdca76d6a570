"""Amazon reviews and metadata in their 2014, 2018 and 2023 forms, streamed, plain or gz.

Reviews are JSON lines in all three; 2023 names its fields anew, identifies products by their
parent and counts milliseconds. Metadata is JSON lines too, but for 2014's Python dict literals.
"""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import polars as pl

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.columns import UNKNOWN
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.ratings import RawData, Select, no_items, no_users
from dpo4rec_jax.workspace import parse_json

# user, item, time, rating by form: 2014 and 2018, then 2023.
FORMS = (
    ("reviewerID", "asin", "unixReviewTime", "overall"),
    ("user_id", "parent_asin", "timestamp", "rating"),
)
CHUNK_BYTES = 32 * 2**20

_ASIN = re.compile(rb"""['"](parent_asin|asin)['"]: ?['"]([^'"]+)['"]""")
# 2014's largest field holds nothing but ids; without it a literal parses three times as fast.
_RELATED = re.compile(rb"'related': \{[^{}]*\}")


def is_amazon(files: Files) -> bool:
    return bool(files.named(".json", ".jsonl"))


def read(files: Files, select: Select) -> RawData:
    """Metadata is parsed only for the items of the interactions that `select` keeps.

    Raises InputError, with file and line, for whatever does not fit the forms.
    """
    reviews: list[tuple[str, tuple[str, str, str, str]]] = []
    metadata: list[str] = []
    for name in files.named(".json", ".jsonl"):
        keys = _first_keys(files, name)
        form = next((form for form in FORMS if form[0] in keys), None)
        if form is not None:
            reviews.append((name, form))
        elif keys & {"asin", "parent_asin"}:
            metadata.append(name)
    if not reviews:
        raise InputError(
            f"{files.path}: no Amazon reviews among {', '.join(files.names)}; expected JSON lines "
            "with reviewerID (2014, 2018) or user_id and parent_asin (2023)"
        )
    frames = [frame for name, form in reviews for frame in _reviews(files, name, form)]
    kept = select(pl.concat(frames))
    del frames
    items = set(kept["item"].unique())
    rows = [row for name in metadata for row in _metadata(files, name, items)]
    table = pl.DataFrame(rows, schema=ITEMS, orient="row") if rows else no_items()
    return RawData(kept, table, no_users())


ITEMS = {
    "item": pl.String,
    "title": pl.String,
    "category": pl.List(pl.String),
    "brand": pl.List(pl.String),
}


def _first_keys(files: Files, name: str) -> set[str]:
    with files.open(name) as file:
        line = file.readline()
    if not line.strip():
        raise InputError(f"{files.where(name)}: expected data, got an empty file")
    return set(_object(line, files.where(name), 1))


def _reviews(files: Files, name: str, form: tuple[str, str, str, str]) -> Iterator[pl.DataFrame]:
    user, item, time, rating = form
    schema = {user: pl.String, item: pl.String, time: pl.Int64, rating: pl.Float64}
    where, line = files.where(name), 1
    with files.open(name) as file, closing(_chunks(file)) as chunks:
        for chunk in chunks:
            try:
                frame = pl.read_ndjson(io.BytesIO(chunk), schema=schema)
            except pl.exceptions.PolarsError as error:
                raise _diagnosed(chunk, where, line, form, str(error)) from None
            fit = pl.all_horizontal(pl.all().is_not_null(), pl.col(rating).is_finite())
            if not frame.select(fit.all()).item():
                raise _diagnosed(chunk, where, line, form, "a field is missing")
            line += chunk.count(b"\n")
            yield frame.select(
                user=user, item=item, time=time, rating=pl.col(rating).cast(pl.Float32)
            )


def _chunks(file: io.BufferedIOBase) -> Generator[bytes]:
    """Whole lines, about CHUNK_BYTES at a time; the next is unpacked while one is parsed."""
    rest = b""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(file.read, CHUNK_BYTES)
        while block := coming.result():
            coming = reader.submit(file.read, CHUNK_BYTES)
            lines, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = tail
            else:
                rest += block
    if rest.strip():
        yield rest


def _diagnosed(
    chunk: bytes, where: str, first_line: int, form: tuple[str, str, str, str], otherwise: str
) -> InputError:
    """Goes through the lines one by one, slowly, for the first that is malformed."""
    user, item, time, rating = form
    expected = {user: "an id", item: "an id", time: "a whole number", rating: "a number"}
    types = {user: (str, int), item: (str, int), time: int, rating: (int, float)}
    for number, line in enumerate(chunk.split(b"\n"), first_line):
        if not line.strip():
            continue
        try:
            review = _object(line, where, number)
        except InputError as error:
            return error
        for field, kind in types.items():
            value = review.get(field)
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:
                got = repr(value) if field in review else "none"
                return InputError(
                    f"{where}:{number}: {field}: expected {expected[field]}, got {got}"
                )
    return InputError(f"{where}: from line {first_line}: {otherwise.splitlines()[0]}")


def _metadata(files: Files, name: str, items: set[str]) -> Iterator[tuple[Any, ...]]:
    where, first_line = files.where(name), 1
    with files.open(name) as file, closing(_chunks(file)) as chunks:
        for chunk in chunks:
            for number, line in enumerate(chunk.split(b"\n"), first_line):
                if _names_none_of(line, items) or not line.strip():
                    continue
                entry = _object(line, where, number)
                item = entry.get("parent_asin") or entry.get("asin")
                if isinstance(item, str) and item in items:
                    yield item, _title(entry), _category(entry), _brand(entry)
            first_line += chunk.count(b"\n")


def _names_none_of(line: bytes, items: set[str]) -> bool:
    """True where the line's first product id tells that nobody needs it, as nearly all do."""
    found = _ASIN.search(line)
    return found is not None and found[2].decode() not in items


def _object(line: bytes, where: str, number: int) -> dict[str, Any]:
    """A JSON object or, as in 2014's metadata, a Python dict literal."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}:{number}: expected UTF-8 text, got other bytes") from None
    try:
        value = parse_json(text)
    except ValueError as error:
        value = _literal(line)
        if value is None:
            reason = getattr(error, "msg", error)
            raise InputError(f"{where}:{number}: not a JSON object: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}:{number}: expected an object, got {type(value).__name__}")
    return value


def _literal(line: bytes) -> Any:
    for text in (_RELATED.sub(b"'related': {}", line), line):
        try:
            with warnings.catch_warnings(action="ignore"):
                value = ast.literal_eval(text.decode().strip())
            if b"\\ud" in text.lower():  # half a surrogate pair cannot be kept
                json.dumps(value, ensure_ascii=False, default=str).encode()
            return value
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None


def _title(entry: dict[str, Any]) -> str | None:
    title = entry.get("title")
    return title.strip() or None if isinstance(title, str) else None


def _category(entry: dict[str, Any]) -> list[str]:
    """The levels of the category path; 2014 lists several paths, whose levels are joined."""
    levels = entry.get("categories") or entry.get("category") or []
    return list(dict.fromkeys(_strings(levels)))


def _brand(entry: dict[str, Any]) -> list[str]:
    brand = entry.get("brand") or entry.get("store")
    return [name for name in _strings(brand) if name.lower() not in UNKNOWN]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
