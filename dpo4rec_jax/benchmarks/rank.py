"""Training of re-rankers: seconds an epoch on the config's data, one seed and all, with knowledge
and without.

An epoch is all that a run pays for one: its shuffle, its steps and the scoring of the validation
lists. Vectors are random numbers of the encoder's length: what they say costs nothing.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from dpo4rec_jax.benchmarks.machine import Machine
from dpo4rec_jax.benchmarks.policies import policy_of
from dpo4rec_jax.config import Config, RankConfig
from dpo4rec_jax.data import TRAIN, Prepared, build
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.rehearsal.ranking import features_of
from dpo4rec_jax.stages.arms import lists_in, lists_of
from dpo4rec_jax.stages.fitting import fit_arm

TIMED = 3  # epochs after the first, which compiles


def measure(config: Config, machine: Machine) -> dict[str, Any]:
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    figures: dict[str, Any] = {
        "backbone": config.rank.backbone,
        "train_lists": len(lists_in(prepared, TRAIN)),
        "batch_lists": config.rank.batch_lists,
    }
    for name, knowledge in (("without", None), ("with", _knowledge(config, prepared))):
        for seeds in sorted({1, config.rank.seeds}):
            rank = config.rank.model_copy(update={"seeds": seeds})
            figures[f"{name}_knowledge_{seeds}_seeds"] = _epochs(prepared, knowledge, rank)
    return figures


def _epochs(prepared: Prepared, knowledge: Knowledge | None, rank: RankConfig) -> dict[str, float]:
    """Times of the first epoch, which compiles, and of the median one after it."""
    rank = rank.model_copy(update={"epochs": 1 + TIMED, "patience": 1 + TIMED})
    lists = lists_of(prepared, knowledge, rank)
    at = [time.perf_counter()]
    fit_arm(prepared, lists, rank, 0, on_epoch=lambda *_: at.append(time.perf_counter()))
    first, *later = np.diff(at).tolist()
    epoch = statistics.median(later)
    lists_an_epoch = rank.seeds * len(lists_in(prepared, TRAIN))
    return {
        "epoch_seconds": epoch,
        "compile_seconds": first - epoch,
        "lists_per_second": lists_an_epoch / epoch,
    }


def _knowledge(config: Config, prepared: Prepared) -> Knowledge:
    """One text a user, as a round without alignment has."""
    random = np.random.default_rng(config.seed)
    users, items = len(prepared.user_id), len(prepared.item_id)
    policy = policy_of(config).config if config.encode.encoder == "policy" else None
    features = features_of(config, policy)
    return Knowledge(
        random.normal(size=(users, 1, features)).astype(np.float32),
        np.ones(users, np.int32),
        random.normal(size=(items, features)).astype(np.float32),
        [*prepared.user_id],
        [*prepared.item_id],
    )
