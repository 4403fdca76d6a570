"""Re-ranks candidate lists: python -m dpo4rec_jax.predict --workdir D --input L --output S

The input holds lines {"user": raw id, "items": [raw ids]}; the output the same lines with "scores",
one a candidate, and "order", the places of the candidates from the best to the worst. Users and
items are known from the run; new ones are described by a file of texts (--texts), lines {"user":
id, "text": ...} or {"item": id, "text": ...}.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_jax.command import exit_status
from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.texts import Kind, read_texts
from dpo4rec_jax.serving import CandidateList, load_reranker
from dpo4rec_jax.workspace import parse_json, write_jsonl

GZIP = b"\x1f\x8b"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="D", help="workspace of a finished run")
    parser.add_argument("--input", required=True, metavar="L", help="JSONL of candidate lists")
    parser.add_argument("--output", required=True, metavar="S", help="JSONL to write")
    parser.add_argument("--texts", metavar="T", help="JSONL of texts of new users and items")
    parser.add_argument("--arm", help="backbone, kar, dpo4rec-1, ... (the last round's)")
    parser.add_argument("--ensemble", action="store_true", help="mean over all seeds, not the best")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: predict(options))


def predict(options: argparse.Namespace) -> None:
    """Raises InputError, with file and line, for input that cannot be scored."""
    source = Path(options.input)
    if not source.is_file():
        raise InputError(f"{source}: no such file; check --input")
    loaded = load_reranker(options.workdir, arm=options.arm, ensemble=options.ensemble)
    if options.texts is not None:
        loaded.describe(_given(options.texts, "user"), _given(options.texts, "item"))
    shown, scored = itertools.tee(_lines(source))
    scores = loaded.stream(scored, source=f"{source}:")
    write_jsonl(Path(options.output), map(_line, shown, scores))
    print(f"scores: {options.output}")


def _given(path: str, kind: Kind) -> dict[str, str]:
    return {id: texts[0] for id, texts in read_texts(path, kind).items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = parse_json(text.decode("utf-8-sig"))  # some editors put a mark first
            except UnicodeDecodeError:
                packed = "; unpack it" if text.startswith(GZIP) else ""
                reason = f"expected UTF-8 text, got other bytes{packed}"
                raise InputError(f"{path}:{number}: {reason}") from None
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise InputError(f"{path}:{number}: not JSON: {reason}") from None
            if not isinstance(line, dict):
                raise InputError(f"{path}:{number}: expected an object, got {line!r:.40}")
            yield line
    if not number:
        raise InputError(f"{path}: expected candidate lists, got an empty file; check --input")


def _line(one: CandidateList, score_N: np.ndarray) -> dict[str, Any]:
    return {
        "user": one["user"],
        "items": one["items"],
        "scores": score_N.tolist(),
        "order": np.argsort(-score_N, kind="stable").tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
