"""Which stages a config asks for, in which order, and what each of them reads.

The data flows one way: raw log -> sequences -> prompt -> tokens -> text -> vector -> score -> pair
-> policy. A stage runs again exactly when something in its `inputs` differs from its manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo4rec_jax import __version__
from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.workspace import Workspace, digest_of_path, step_name, warms_up

STAGES = (
    "prepare",
    "warmup",
    "reason",
    "encode",
    "rank",
    "prefer",
    "align",
    "evaluate",
    "report",
)

# The stages that all processes of a run take part in; the main one takes the others alone.
TOGETHER = ("warmup", "reason", "encode", "rank", "align")

SECTIONS = {
    "prepare": ("data",),
    "warmup": ("policy", "warmup"),
    "reason": ("policy", "reason"),
    "encode": ("encode",),
    "rank": ("rank", "prefer"),
    "prefer": ("prefer",),
    "align": ("policy", "align"),
    "evaluate": ("prefer",),
    "report": ("evaluate",),
}


# What a stage leaves at the top of the workspace rather than in its own directory.
OUTSIDE = {"report": ("report.json", "report.md", "report.html")}


@dataclass(frozen=True)
class Step:
    """One stage of one round (round None: once a run) and the steps whose artifacts it reads."""

    stage: str
    round: int | None
    needs: tuple[Step, ...]

    def __str__(self) -> str:
        return self.stage if self.round is None else f"{self.stage} (round {self.round})"


def has_policy(config: Config) -> bool:
    """Whether an LLM of this run writes anything."""
    written = (config.reason.user_texts, config.reason.item_texts)
    return config.rounds > 0 or "policy" in written or config.encode.encoder == "policy"


def has_warmup(config: Config) -> bool:
    return has_policy(config) and warms_up(config)


def plan(config: Config) -> list[Step]:
    """Every step of the run in the order they are taken."""
    prepare = Step("prepare", None, ())
    steps = [prepare]
    policy: tuple[Step, ...] = ()
    if has_warmup(config):
        policy = (Step("warmup", None, (prepare,)),)
        steps += policy
    start = policy  # of round 0, which encodes where the encoder is the policy
    before: dict[str, Step] = {}
    items: tuple[Step, ...] = ()  # texts and vectors of items are those of round 0
    for round in range(config.rounds + 1):
        earlier = (before["reason"],) if round else ()
        reason = Step("reason", round, (prepare, *policy, *earlier))
        encode = Step("encode", round, (prepare, reason, *start, *items))
        items = items or (reason, encode)
        best = (before["prefer"],) if round else ()
        rank = Step("rank", round, (prepare, reason, encode, *best))
        judge = (before["rank"], before["prefer"], before["encode"]) if round else ()
        drift = (before["align"],) if round else ()
        evaluate = Step("evaluate", round, (prepare, reason, encode, rank, *judge, *drift))
        steps += [reason, encode, rank, evaluate]
        before = {"reason": reason, "encode": encode, "rank": rank, "evaluate": evaluate}
        if round < config.rounds:
            prefer = Step("prefer", round, (prepare, reason, encode, rank))
            align = Step("align", round, (prepare, prefer, *policy))
            steps += [prefer, align]
            before |= {"prefer": prefer, "align": align}
            policy = (*policy, align)
    read_by_report = ("prepare", "reason", "prefer", "align", "evaluate")
    steps.append(Step("report", None, tuple(s for s in steps if s.stage in read_by_report)))
    return steps


def selected(steps: list[Step], stages: Sequence[str] | None) -> list[Step]:
    """The steps of the named stages, of all rounds (`rank`) or of one (`round0/rank`).

    Raises InputError for a name that is no stage of the run.
    """
    if stages is None:
        return steps
    known = {*STAGES, *(step_name(step.stage, step.round) for step in steps)}
    for name in stages:
        if name not in known:
            raise InputError(
                f"--stages {name}: unknown stage; known: {', '.join(STAGES)}, and of one round "
                "such as round0/rank"
            )
    return [s for s in steps if {s.stage, step_name(s.stage, s.round)} & set(stages)]


def inputs_of(step: Step, config: Config, workspace: Workspace) -> dict[str, Any]:
    """What decides the artifact of a step: config sections, upstream artifacts, files, code.

    Raises InputError where an upstream step is not complete.
    """
    read = SECTIONS[step.stage]
    if step.stage == "encode" and config.encode.encoder == "policy":
        read = (*read, "policy")
    sections: dict[str, Any] = {
        name: getattr(config, name).model_dump(mode="json") for name in read
    }
    if step.stage == "rank":  # the last round's judges have no folds: nothing is judged by them
        sections["judges"] = step.round is not None and step.round < config.rounds
    upstream = {}
    for need in step.needs:
        manifest = workspace.manifest(need.stage, need.round)
        if manifest is None:
            raise InputError(
                f"{workspace.path}: stage {step} reads {need}, which is not complete; "
                f"run it first: --stages {step_name(need.stage, need.round)}"
            )
        upstream[str(need)] = manifest["outputs_digest"]
    return {
        "seed": config.seed,
        "config": sections,
        "upstream": upstream,
        "files": {path: digest_of_path(Path(path).expanduser()) for path in _files(step, config)},
        "code": __version__,
    }


def _files(step: Step, config: Config) -> list[str]:
    """Local files outside the workspace that a step reads."""
    read: dict[str, tuple[str | None, ...]] = {
        "prepare": (config.data.path,),
        "warmup": (config.policy.path, config.warmup.texts),
        "reason": (config.policy.path, config.reason.texts),
        "encode": (_encoder_path(config), config.evaluate.external_texts),
        "align": (config.policy.path,),
    }
    named = [path for path in read.get(step.stage, ()) if path is not None]
    return [path for path in named if Path(path).expanduser().exists()]


def _encoder_path(config: Config) -> str | None:
    encoder = config.encode.encoder
    return config.policy.path if encoder == "policy" else encoder
