"""What the report shows besides the table: pairs, texts, training curves, times."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_jax import __version__
from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.texts import iterate_records
from dpo4rec_jax.stages.plan import Step
from dpo4rec_jax.stages.report_rewards import RewardChange, load_reward_change
from dpo4rec_jax.workspace import Workspace, iterate_lines

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")
NUM_EXAMPLES = 3
CurvesByRound = dict[int, dict[str, tuple[list[int], list[float]]]]  # steps and values by name


@dataclass(frozen=True)
class PairExample:
    """A pair of texts of one user; `rank` 1 has the widest gap in score."""

    user: str
    prompt: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float
    rank: int


@dataclass(frozen=True)
class Pairs:
    """Of one round's pairs: the gaps in reward and in tokens, chosen minus rejected."""

    round: int
    score_gap_x: np.ndarray
    length_gap_x: np.ndarray
    examples: list[PairExample]


@dataclass(frozen=True)
class BeforeAfter:
    """One user's first text in the round before and after an alignment, with their rewards; the
    prompt of both, empty where prepare/ does not hold it any more."""

    user: str
    round: int
    before: str
    after: str
    reward_before: float
    reward_after: float
    prompt: str = ""


@dataclass(frozen=True)
class TextCounts:
    """The texts of a round, by what could go wrong with them."""

    round: int
    texts: int
    users: int
    distinct: int
    mean_tokens: float
    cut: int


@dataclass(frozen=True)
class Evidence:
    pairs: list[Pairs]
    rewards: list[RewardChange]
    before_after: list[BeforeAfter]
    texts: list[TextCounts]
    curves: CurvesByRound = field(repr=False)


def gather(workspace: Workspace, rounds: int) -> Evidence:
    """Reads the rounds' artifacts. Raises InputError for a damaged one."""
    user_id = _user_ids(workspace.stage_dir("prepare") / "sequences.npz")
    texts = [
        read_round(workspace.stage_dir("reason", round) / "users.jsonl", round)
        for round in range(rounds + 1)
    ]
    rewards = [
        load_reward_change(workspace.stage_dir("evaluate", round) / "rewards.npz", user_id)
        for round in range(1, rounds + 1)
    ]
    return Evidence(
        pairs=[
            read_pairs(workspace.stage_dir("prefer", round) / "pairs.jsonl", round)
            for round in range(rounds)
        ],
        rewards=rewards,
        before_after=_with_prompts(
            workspace.stage_dir("prepare") / "prompts.jsonl",
            [
                example
                for round, change in enumerate(rewards, start=1)
                for example in before_after(round, change, texts[round - 1][1], texts[round][1])
            ],
        ),
        texts=[counts for counts, _ in texts],
        curves=read_curves(workspace.path / "metrics.jsonl"),
    )


def read_pairs(path: Path, round: int) -> Pairs:
    """Examples stand at even ranks of the score gap, the widest first: not a best-of."""
    lines = list(_lines(path))
    gap_x = np.array([line["score_chosen"] - line["score_rejected"] for line in lines])
    length_x = np.array([_length(line, "chosen") - _length(line, "rejected") for line in lines])
    order = np.argsort(-gap_x, kind="stable")
    ranks = np.unique(np.linspace(0, len(lines) / 2, NUM_EXAMPLES).astype(int)) if lines else []
    examples = [
        _pair_example(lines[order[rank]], int(rank) + 1) for rank in ranks if rank < len(lines)
    ]
    return Pairs(round, gap_x, length_x, examples)


def _length(line: dict[str, Any], side: str) -> int:
    """Tokens of a text; words of one that no policy of ours wrote."""
    return len(line[f"{side}_tokens"]) or len(line[side][-1]["content"].split())


def _pair_example(line: dict[str, Any], rank: int) -> PairExample:
    return PairExample(
        user=line["user"],
        prompt=_content(line["prompt"]),
        chosen=line["chosen"][-1]["content"],
        rejected=line["rejected"][-1]["content"],
        score_chosen=line["score_chosen"],
        score_rejected=line["score_rejected"],
        rank=rank,
    )


def before_after(
    round: int, change: RewardChange, text_before: dict[str, str], text_after: dict[str, str]
) -> list[BeforeAfter]:
    """Training users evenly spaced among those with both; none is picked by his texts."""
    ids = [id for id in change.ids_with_both() if id in text_before and id in text_after]
    places = np.unique(np.linspace(0, len(ids) - 1, NUM_EXAMPLES + 2)[1:-1].astype(int))
    return [
        BeforeAfter(id, round, text_before[id], text_after[id], *change.of_first_text(id))
        for id in (ids[place] for place in (places if ids else []))
    ]


def _with_prompts(path: Path, examples: list[BeforeAfter]) -> list[BeforeAfter]:
    wanted = {example.user for example in examples}
    prompts = {
        line["id"]: _content(line["messages"])
        for line in (_lines(path) if path.exists() else ())
        if line["kind"] == "user" and line["id"] in wanted
    }
    return [replace(example, prompt=prompts.get(example.user, "")) for example in examples]


def _content(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def read_round(path: Path, round: int) -> tuple[TextCounts, dict[str, str]]:
    """The counts of a round's texts, and every user's first text."""
    first: dict[str, str] = {}
    users, distinct, lengths, cut = set(), set(), [], 0
    for record in iterate_records(path):
        users.add(record.id)
        distinct.add(record.text)
        lengths.append(len(record.completion_tokens) or len(record.text.split()))
        cut += record.finish == "length"
        if record.sample == 0:
            first[record.id] = record.text
    mean_tokens = float(np.mean(lengths)) if lengths else 0.0
    counts = TextCounts(round, len(lengths), len(users), len(distinct), mean_tokens, cut)
    return counts, first


def read_curves(path: Path) -> CurvesByRound:
    """What stage align logged: steps and values of each figure, by round."""
    curves: CurvesByRound = {}
    for text in iterate_lines(path) if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # a killed run may have cut its last line
        if line.get("stage") != "align" or line.get("round") is None:
            continue
        named = curves.setdefault(line["round"], {})
        for name, value in line.items():
            if name not in ("time", "stage", "round", "step") and value is not None:
                steps, values = named.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(float(value))
    return curves


def seconds_by_step(workspace: Workspace, steps: list[Step]) -> dict[str, float]:
    """Seconds that each complete step took when it ran, as `reason` or `round0/reason`."""
    seconds = {}
    for step in steps:
        manifest = workspace.manifest(step.stage, step.round)
        if manifest is not None:
            where = workspace.stage_dir(step.stage, step.round).relative_to(workspace.path)
            seconds[str(where)] = manifest["seconds"]
    return seconds


def versions() -> dict[str, str]:
    import jax

    found = {"dpo4rec_jax": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform.lower() not in kind.lower():
        kind = f"{kind} ({device.platform})"
    return found | {"devices": f"{jax.device_count()} x {kind}"}


def _user_ids(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["user_id"].tolist()
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run stage prepare again") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield json.loads(text)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: damaged: {error.msg}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run its stage again") from None
