"""JSONL of texts: those the policy wrote (`TextRecord`), and those written elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.files import bounded
from dpo4rec_jax.workspace import parse_json, write_jsonl

Kind = Literal["user", "item"]
T = TypeVar("T")


@dataclass(frozen=True)
class TextRecord:
    """A sampled text with the exact ids it was sampled from and as.

    `prompt_tokens` and `completion_tokens` are empty for texts that no policy of ours wrote;
    `logps` (nats, one a completion token) is kept where `reason.logps` asks for it.
    """

    kind: Kind
    id: str
    text: str
    sample: int = 0
    prompt_tokens: tuple[int, ...] = ()
    completion_tokens: tuple[int, ...] = ()
    finish: Literal["stop", "length"] = "stop"
    logps: tuple[float, ...] | None = None


def write_records(path: Path, records: Iterable[TextRecord]) -> None:
    """Writes `users.jsonl` or `items.jsonl` of a round's `reason`, whole or not at all."""
    write_jsonl(path, map(record_line, records))


def record_line(record: TextRecord) -> dict[str, Any]:
    line = {
        record.kind: record.id,
        "sample": record.sample,
        "text": record.text,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "finish": record.finish,
    }
    return line if record.logps is None else {**line, "logps": record.logps}


def read_records(path: Path) -> list[TextRecord]:
    """Reads what `write_records` wrote, in file order."""
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[TextRecord]:
    """The same one at a time: the ids of all prompts and texts together can fill the memory."""
    return (record for _, record in _parsed(path, _record))


def read_texts(
    path: str | Path, kind: Kind, known: Collection[str] | None = None
) -> dict[str, list[str]]:
    """Texts written elsewhere, by raw id: JSONL, plain or gz, of `{"user": id, "text": ...}`.

    Lines of the other kind are passed over, and so are ids outside `known` (None: every id is
    known). Several texts of one id stand in the order of their `sample`, which defaults to their
    order in the file.

    Raises InputError, with file and line, for a line of another form or a sample given twice.
    """
    path, known = Path(path), None if known is None else set(known)
    found: dict[str, dict[int, str]] = {}
    for number, (line_kind, id, sample, text) in _parsed(path, _foreign):
        if line_kind != kind or (known is not None and id not in known):
            continue
        samples = found.setdefault(id, {})
        place = len(samples) if sample is None else sample
        if place in samples:
            raise InputError(f"{path}:{number}: {kind} {id!r}: sample {place} given twice")
        samples[place] = text
    return {id: [samples[place] for place in sorted(samples)] for id, samples in found.items()}


def _foreign(line: dict[str, Any]) -> tuple[str, str, int | None, str]:
    kinds = [kind for kind in ("user", "item") if kind in line]
    if len(kinds) != 1:
        raise ValueError(f"expected a key user or item, got keys {', '.join(line) or 'none'}")
    id, text, sample = line[kinds[0]], line.get("text"), line.get("sample")
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise ValueError(f"{kinds[0]}: expected a raw id, got {id!r}")
    if not isinstance(text, str):
        raise ValueError(f"text: expected a string, got {text!r}")
    if sample is not None and (not isinstance(sample, int) or sample < 0):
        raise ValueError(f"sample: expected a whole number from 0, got {sample!r}")
    return kinds[0], str(id), sample, text


def _record(line: dict[str, Any]) -> TextRecord:
    kind, id, sample, text = _foreign(line)
    logps = line.get("logps")
    for name in ("prompt_tokens", "completion_tokens", "logps"):
        if not isinstance(line.get(name), list | None):
            raise ValueError(f"{name}: expected a list of numbers, got {line[name]!r:.40}")
    return TextRecord(
        kind="user" if kind == "user" else "item",
        id=id,
        text=text,
        sample=sample or 0,
        prompt_tokens=tuple(line.get("prompt_tokens", ())),
        completion_tokens=tuple(line.get("completion_tokens", ())),
        finish=line.get("finish", "stop"),
        logps=None if logps is None else tuple(logps),
    )


def _parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[int, T]]:
    """Line numbers and parsed lines; blank ones are passed over."""
    number = 0
    try:
        with path.open("rb") as raw:
            unpacked = bounded(raw, path.stat().st_size, str(path), gz=path.suffix == ".gz")
            file = io.TextIOWrapper(unpacked, encoding="utf-8-sig")  # editors may put a mark first
            for number, text in enumerate(file, 1):
                if text.isspace():
                    continue
                line = parse_json(text)
                if not isinstance(line, dict):
                    raise ValueError(f"expected an object, got {type(line).__name__}")
                yield number, parse(line)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: truncated or damaged gz, after line {number}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot read the texts: {reason}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}:{number + 1}: expected UTF-8 text, got other bytes") from None
    except ValueError as error:
        raise InputError(f"{path}:{number}: {error}") from None
