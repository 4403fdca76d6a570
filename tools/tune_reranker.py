"""Searches re-ranker settings on the validation users of a prepared data set; test is not touched.

    python tools/tune_reranker.py --prepared runs/x/prepare --set backbone=dlcm,prm dropout=0,0.1
    python tools/tune_reranker.py --prepared P --vectors runs/x/round0/encode/vectors.npz

Every combination of the values given is trained (`--draws N`: N of them at random); one JSON line
a trial goes to --output, and the table of all its lines is printed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpo4rec_jax.config import RankConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import Prepared
from dpo4rec_jax.stages.arms import lists_of
from dpo4rec_jax.stages.fitting import fit_arm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepared", type=Path, required=True, help="directory of stage prepare")
    parser.add_argument("--vectors", type=Path, help="vectors.npz; none: without knowledge")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=v,w", help="keys of rank")
    parser.add_argument("--draws", type=int, help="so many combinations at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("tuning.jsonl"))
    options = parser.parse_args()

    prepared = Prepared.load(options.prepared, prompts=False)
    knowledge = None if options.vectors is None else Knowledge.load(options.vectors)
    grid = {key: [yaml.safe_load(v) for v in values.split(",")] for key, values in _pairs(options)}
    trials = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if options.draws is not None:
        random.Random(options.seed).shuffle(trials)
        trials = trials[: options.draws]
    for number, trial in enumerate(trials, 1):
        line = run(prepared, knowledge, trial, options.seed)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(trials)} {_row(line)}", flush=True)
    lines = [json.loads(text) for text in options.output.read_text(encoding="utf-8").splitlines()]
    print(*map(_row, sorted(lines, key=lambda line: -line["ndcg@5"])), sep="\n")


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [tuple(one.split("=", 1)) for one in options.set]  # type: ignore[misc]


def run(
    prepared: Prepared, knowledge: Knowledge | None, trial: dict[str, Any], seed: int
) -> dict[str, Any]:
    rank = RankConfig.model_validate({"seeds": 1} | trial)
    epochs: list[float] = []
    began = time.monotonic()

    def on_epoch(epoch: int, loss_R: np.ndarray, validation_R: np.ndarray) -> None:
        epochs.append(float(validation_R.mean()))

    _, fitted = fit_arm(
        prepared, lists_of(prepared, knowledge, rank, seed), rank, seed, None, on_epoch
    )
    return {
        "set": trial,
        "knowledge": knowledge is not None,
        "ndcg@5": float(fitted.best_R.mean()),
        "std": float(fitted.best_R.std()),
        "best_epoch": fitted.best_epoch_R.tolist(),
        "by_epoch": epochs,
        "seconds": round(time.monotonic() - began, 1),
    }


def _row(line: dict[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in line["set"].items())
    epochs = " ".join(f"{value:.4f}" for value in line["by_epoch"])
    return f"{line['ndcg@5']:.4f} ±{line['std']:.4f}  {settings}  [{epochs}]  {line['seconds']} s"


if __name__ == "__main__":
    main()
