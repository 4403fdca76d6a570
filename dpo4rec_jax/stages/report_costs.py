"""What each step took, and what was done in that time: the report's table of costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo4rec_jax.config import Config
from dpo4rec_jax.stages.report_evidence import Evidence


@dataclass(frozen=True)
class Cost:
    """One step: seconds, and its work in words; `rate` is work a second."""

    step: str
    seconds: float
    work: str
    rate: str


def costs_of(document: Mapping[str, Any], evidence: Evidence, config: Config) -> list[Cost]:
    """Every step of `document["seconds"]` in the order it was taken."""
    work = dict(_work(document, evidence, config))
    return [
        Cost(step, seconds, *_in_words(work.get(step), seconds))
        for step, seconds in document["seconds"].items()
    ]


def device_hours(document: Mapping[str, Any]) -> float:
    """Hours of all stages times the devices that were there."""
    told = re.match(r"\d+", document["versions"].get("devices", ""))
    devices = int(told[0]) if told else 1
    return devices * sum(document["seconds"].values()) / 3600


def _in_words(work: tuple[int, str] | None, seconds: float) -> tuple[str, str]:
    if work is None:
        return "", ""
    amount, unit = work
    if seconds < 0.1:
        return f"{amount:,} {unit}", ""
    rate = amount / seconds
    return f"{amount:,} {unit}", f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _work(document: Mapping[str, Any], evidence: Evidence, config: Config):
    """(step, (amount, unit)) of the steps whose work can be counted."""
    if "lists" in document["data"]:
        yield "prepare", (document["data"]["lists"], "lists")
    yield "warmup", (config.warmup.steps * config.warmup.batch, "prompts")
    for texts in evidence.texts:
        at = f"round{texts.round}"
        yield f"{at}/reason", (round(texts.texts * texts.mean_tokens), "tokens of user texts")
        yield f"{at}/encode", (texts.texts, "user texts")
        arms = [row["method"] for row in document["rows"]]
        first = [arm for arm in arms if not arm.startswith("dpo4rec-")]
        judges = texts.round < config.rounds and config.prefer.folds > 1
        members = (1 if texts.round else len(first)) * config.rank.seeds
        yield f"{at}/rank", (members + judges * config.prefer.folds, "re-rankers")
    for pairs in evidence.pairs:
        amount = len(pairs.score_gap_x) * config.align.epochs
        yield f"round{pairs.round}/align", (amount, "pairs, epochs counted")
