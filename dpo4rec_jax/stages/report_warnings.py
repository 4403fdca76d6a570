"""What a reader should know before believing the table, each with the knob to turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dpo4rec_jax.config import Config
from dpo4rec_jax.stages.report_evidence import Evidence

FEW_SEEDS, FEW_USERS = 5, 100
LITTLE_NATS, MANY_NATS, NO_BETTER_THAN_CHANCE = 0.1, 5.0, 0.5


def warnings_of(document: Mapping[str, Any], evidence: Evidence, config: Config) -> list[str]:
    return [
        *_of_the_test(document, config),
        *_of_the_texts(evidence, config),
        *_of_the_pairs(evidence, config),
        *_of_the_alignment(document, config),
    ]


def _of_the_test(document: Mapping[str, Any], config: Config) -> Iterator[str]:
    if document["seeds"] < FEW_SEEDS:
        yield (
            f"Only {document['seeds']} re-ranker seed(s): the spread between seeds is not known "
            f"well. Set rank.seeds to {FEW_SEEDS} or more."
        )
    users = max((row["n_users"] for row in document["comparisons"]), default=FEW_USERS)
    if users < FEW_USERS:
        yield (
            f"Only {users} test users: small gains cannot show. Raise data.max_users or "
            "data.test_fraction."
        )
    if config.prefer.folds == 1:
        yield (
            "The reward was not cross-fitted (prefer.folds is 1): texts were judged by re-rankers "
            "that had trained on the same users."
        )


def _of_the_texts(evidence: Evidence, config: Config) -> Iterator[str]:
    for counts in evidence.texts:
        if counts.cut > 0.5 * counts.texts:
            yield (
                f"Round {counts.round}: {counts.cut / counts.texts:.0%} of the texts were cut off "
                f"at reason.max_new_tokens = {config.reason.max_new_tokens}. Raise it."
            )
        if counts.distinct >= 0.5 * counts.texts:
            continue
        if counts.round == config.rounds > 0:
            yield (
                f"After the last alignment only {counts.distinct:,} of {counts.texts:,} texts are "
                "distinct: the LLM writes to few patterns. Raise align.beta or lower "
                "align.learning_rate if that is narrower than the users are."
            )
        else:
            yield (
                f"Round {counts.round}: only {counts.distinct:,} of {counts.texts:,} texts are "
                "distinct; equal texts make no pairs. Raise reason.temperature or reason.top_p."
            )


def _of_the_pairs(evidence: Evidence, config: Config) -> Iterator[str]:
    lengths = {counts.round: counts.mean_tokens for counts in evidence.texts}
    for pairs in evidence.pairs:
        if not len(pairs.score_gap_x):
            yield (
                f"Round {pairs.round} gave no pairs: no user's texts differ by more than "
                f"prefer.min_gap = {config.prefer.min_gap}. Raise reason.samples or lower it."
            )
            continue
        mean_gap = float(np.mean(pairs.length_gap_x))
        if abs(mean_gap) > 0.1 * lengths[pairs.round] > 0:
            than = "longer" if mean_gap > 0 else "shorter"
            yield (
                f"Round {pairs.round}: chosen texts are {than} by {abs(mean_gap):.1f} tokens on "
                "average; part of the preference may be for length. Consider "
                "align.length_normalise."
            )


def _of_the_alignment(document: Mapping[str, Any], config: Config) -> Iterator[str]:
    for entry in document["alignment"]:
        margin = entry["margin"]
        if margin is not None and abs(margin) / config.align.beta < LITTLE_NATS:
            yield (
                f"Alignment {entry['round']} hardly moved the LLM: chosen gained "
                f"{margin / config.align.beta:.2g} nats on rejected texts. Raise "
                "align.learning_rate or align.epochs."
            )
        if entry["kl"] is not None and entry["kl"] > MANY_NATS:
            yield (
                f"Alignment {entry['round']} took the LLM far from where it began (KL "
                f"{entry['kl']:.1f} nats a text): what serves the re-ranker need not be true, nor "
                "read well. Read the texts below before you show them to anyone; raise align.beta "
                "to stay closer."
            )
        interval = entry.get("reward_ci95")
        if interval is not None and interval[1] < 0:
            yield (
                f"Alignment {entry['round']} made fresh texts worse: their mean reward fell from "
                f"{entry['reward_mean_before']:.4f} to {entry['reward_mean_after']:.4f}. Lower "
                "align.learning_rate or align.epochs, or raise align.beta."
            )
        accuracy = entry["reward_accuracy"]
        if accuracy is not None and accuracy < NO_BETTER_THAN_CHANCE:
            yield (
                f"Alignment {entry['round']} orders {accuracy:.0%} of held-out pairs as their "
                "rewards do, no better than chance: what it learned does not carry over. Lower "
                "align.epochs, or raise prefer.min_gap or data.max_users for clearer or more pairs."
            )
