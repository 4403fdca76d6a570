"""Stage align: direct preference optimisation of round r's policy on its pairs, into round r + 1's.

The reference is the policy that the stage starts from; its log-probabilities of all pairs are
computed once and stored. A share of the users is held out: their pairs are only evaluated, before
and after. Nothing is tokenised: pairs carry the ids that were sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dpo4rec_jax.config import AlignConfig, InputError
from dpo4rec_jax.objectives import dpo_loss
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.checkpoint import Checkpoints, discard
from dpo4rec_jax.runtime.loader import Feed, Microbatch, Rows, in_order, shuffled
from dpo4rec_jax.runtime.loop import Trainer
from dpo4rec_jax.runtime.optimizer import adamw, learning_rate_schedule
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.runtime.state import Batch, Loss, Sums, Tree
from dpo4rec_jax.stages.tuning import Tuning, load, seed_of, tuning_of, weighted_sum
from dpo4rec_jax.workspace import Stage, iterate_lines, write_json, write_npz

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "margin",
    "accuracy",
    "kl",
    "logps/chosen",
    "logps/rejected",
)
FEWEST_PAIRS_TO_HOLD_OUT = 10
MUCH_WORSE, MUCH_LESS_LIKELY = 1.1, 1.0  # a ratio of losses; of what is lost beta times nats

ORDER_STREAM, ADAPTER_STREAM, DROPOUT_STREAM, HELDOUT_STREAM = range(4)


@dataclass(frozen=True)
class Pair:
    user: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    score_gap: float


def run(stage: Stage) -> None:
    """Leaves adapter/ or policy/, summary.json, reference.npz. Raises InputError for pairs that
    cannot be read and for a run that diverges."""
    assert stage.round is not None
    config, align = stage.config, stage.config.align
    lora_config = align.lora if align.method == "lora" else None
    path, adapters = stage.workspace.policy_source(config, stage.round)
    pairs_path = stage.workspace.stage_dir("prefer", stage.round) / "pairs.jsonl"
    pairs = read_pairs(pairs_path)
    policy = load(config, path, adapters, lora_config)
    tuning = tuning_of(config, policy, lora_config, remat=align.remat)
    check_pairs(pairs, tuning, pairs_path)

    rows = rows_of(pairs)
    size = microbatch_rows(align, tuning)
    reference_BP = reference_logps(stage, tuning, rows, size)
    rows = dataclasses.replace(rows, extra={**rows.extra, "logp_reference_BP": reference_BP})
    held_out = held_out_rows(pairs, align.heldout_fraction, seed_of(config, HELDOUT_STREAM))
    trained_on = np.flatnonzero(~held_out).tolist()
    training_rows, names = rows.take(trained_on), [f"pairs.jsonl:{row + 1}" for row in trained_on]
    heldout_rows = rows.take(np.flatnonzero(held_out).tolist())
    stage.progress.say(f"  {len(training_rows)} pairs to train on, {len(heldout_rows)} held out")

    loss = preference_loss(tuning, align)
    trainable, frozen = tuning.start(seed_of(config, ADAPTER_STREAM, stage.round))
    before = _held_out_before(stage, tuning, loss, trainable, frozen, heldout_rows, size)
    state = _trained(stage, tuning, loss, trainable, frozen, training_rows, names, size)
    after = evaluate(stage, tuning, loss, state.trainable, frozen, heldout_rows, size)
    if after:
        stage.log.write(int(state.step), {f"heldout/{name}": v for name, v in after.items()})
    for doubt in doubts(before, after, align):
        stage.progress.say(f"  {doubt}")

    tuning.save(stage.directory, state.trainable, config)
    write_json(
        stage.directory / "summary.json",
        {
            "pairs": len(training_rows),
            "pairs_held_out": len(heldout_rows),
            "steps": int(state.step),
            "steps_skipped": int(state.skipped),
            "before": before,
            "after": after,
            # The drift and fit of the new policy, on pairs it was not trained on.
            "reward_accuracy": after.get("accuracy"),
            "margin": after.get("margin"),
            "kl": after.get("kl"),
        },
    )
    # They served to continue a killed run; what they would restore is saved above.
    discard(stage.directory / "checkpoints")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of pairs.jsonl. Raises InputError, with file and line, for one that is damaged."""
    try:
        lines = list(iterate_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; run stage prefer again") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            prompt, chosen, rejected = (
                tuple(map(int, value[f"{part}_tokens"])) for part in ("prompt", *_SIDES)
            )
            gap = float(value["score_chosen"]) - float(value["score_rejected"])
            user = str(value.get("user", value["prompt_tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}:{number}: not a pair ({reason})") from None
        if not (prompt and chosen and rejected):
            raise InputError(f"{path}:{number}: a prompt or completion without tokens")
        pairs.append(Pair(user, prompt, chosen, rejected, gap))
    if not pairs:
        raise InputError(f"{path}: no pairs to train on; run stage prefer again")
    return pairs


_SIDES = ("chosen", "rejected")


def check_pairs(pairs: Sequence[Pair], tuning: Tuning, path: Path) -> None:
    """Raises InputError for ids outside the vocabulary and rows beyond the policy's positions."""
    config = tuning.policy.config
    for number, pair in enumerate(pairs, start=1):
        ids = (*pair.prompt, *pair.chosen, *pair.rejected)
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise InputError(
                f"{path}:{number}: expected token ids below {config.vocab_size}, got {max(ids)}; "
                "the pairs are of another policy"
            )
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > config.max_position:
            raise InputError(
                f"{path}:{number}: {longest} tokens, the policy takes {config.max_position}; "
                "lower policy.max_prompt_tokens or reason.max_new_tokens"
            )


def rows_of(pairs: Sequence[Pair]) -> Rows:
    """Rows [prompt | chosen | rejected]."""
    gaps = np.array([pair.score_gap for pair in pairs], np.float32)
    return Rows(
        [pair.prompt for pair in pairs],
        [(pair.chosen, pair.rejected) for pair in pairs],
        {"score_gap_B": gaps},
    )


def held_out_rows(pairs: Sequence[Pair], fraction: float, seed: int) -> np.ndarray:
    """True for the pairs of a share of the users, drawn by the seed; none of too few pairs."""
    users = sorted({pair.user for pair in pairs})
    if fraction == 0 or len(users) < FEWEST_PAIRS_TO_HOLD_OUT:
        return np.zeros(len(pairs), bool)
    count = max(1, round(fraction * len(users)))
    drawn = set(np.random.default_rng(seed).permutation(users)[:count].tolist())
    return np.array([pair.user in drawn for pair in pairs])


def microbatch_rows(align: AlignConfig, tuning: Tuning) -> int:
    rows = min(align.microbatch_pairs or align.batch_pairs, align.batch_pairs)
    return math.ceil(rows / tuning.row_multiple) * tuning.row_multiple


def preference_loss(tuning: Tuning, align: AlignConfig) -> Loss:
    """The sum of the pairs' losses, their number as weight, and the figures that are logged."""

    def loss(trainable: Tree, frozen: Tree, batch: Batch, key: Array | None) -> Sums:
        logp_BP = tuning.token_logps(trainable, frozen, batch, key).sum(axis=-1)
        reference_BP, mask_B = batch["logp_reference_BP"], batch["mask_B"]
        loss_B, reward_BP = dpo_loss(
            logp_BP,
            reference_BP,
            beta=align.beta,
            loss=align.loss,
            label_smoothing=align.label_smoothing,
            length_BP=batch["completion_length_BC"],
            margin_B=align.margin * batch["score_gap_B"] if align.margin else None,
            nll_weight=align.nll_weight,
            length_normalise=align.length_normalise,
            reference_free=align.reference_free,
        )
        margin_B = reward_BP[:, 0] - reward_BP[:, 1]
        figures = {
            "rewards/chosen": reward_BP[:, 0],
            "rewards/rejected": reward_BP[:, 1],
            "margin": margin_B,
            "accuracy": (1 + jnp.sign(margin_B)) / 2,  # a tie is half right
            # Completions were drawn from the reference: an estimate of KL(reference, policy).
            "kl": (reference_BP - logp_BP).mean(axis=1),
            "logps/chosen": logp_BP[:, 0],
            "logps/rejected": logp_BP[:, 1],
        }
        sums = {name: weighted_sum(figures[name], mask_B) for name in FIGURES}
        return Sums(weighted_sum(loss_B, mask_B), mask_B.sum().astype(jnp.float32), sums)

    return loss


def reference_logps(stage: Stage, tuning: Tuning, rows: Rows, size: int) -> np.ndarray:
    """log p of every completion under the policy the round starts from, [pairs, 2], nats.

    Kept in reference.npz under the digest of weights and tokens, and computed once.
    """
    path, digest = stage.directory / "reference.npz", _digest(tuning.policy.params, rows)
    if this().from_main(lambda: _kept_digest(path)) == digest:
        with np.load(path, allow_pickle=False) as kept:
            return kept["logp_BP"]
    max_shapes = stage.config.align.max_shapes
    with stage.progress.track(
        "reference log-probabilities", len(rows), "pairs", lockstep=True
    ) as task:
        logp_BP = policy_logps(tuning, rows, size, max_shapes, task.advance)
    write_npz(path, {"digest": np.array(digest), "logp_BP": logp_BP})
    return logp_BP


def _kept_digest(path: Path) -> str | None:
    """What reference.npz was computed of; None where it is missing or damaged."""
    unreadable = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    with contextlib.suppress(*unreadable), np.load(path, allow_pickle=False) as kept:
        return str(kept["digest"]) if kept["logp_BP"].size else None


def policy_logps(
    tuning: Tuning, rows: Rows, size: int, max_shapes: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Log-probabilities of all completions of all rows under the policy given, before training."""
    microbatches = in_order(rows, size, max_shapes=max_shapes, pack=tuning.packs)
    compute = functools.partial(tuning.compiled_policy_logps, tuning.policy.params)
    results = tuning.for_each(compute, rows, microbatches, size, advance)
    logp_BP = np.zeros((len(rows), len(rows.completions[0])), np.float32)
    for microbatch, result in zip(microbatches, results, strict=True):
        logp_BP[list(microbatch.rows)] = result[: len(microbatch.rows)]
    return logp_BP


def _digest(params: Tree, rows: Rows) -> str:
    tokens = json.dumps(
        [list(map(list, rows.prompts)), [list(map(list, r)) for r in rows.completions]]
    )
    return hashlib.sha256((training.fingerprint(params) + tokens).encode()).hexdigest()


def evaluate(
    stage: Stage, tuning: Tuning, loss: Loss, trainable: Tree, frozen: Tree, rows: Rows, size: int
) -> dict[str, float]:
    """Means of loss and figures over pairs that are not trained on; empty without any."""
    if not len(rows):
        return {}
    compute = jax.jit(loss, static_argnums=3)
    most = stage.config.align.max_shapes
    microbatches = in_order(rows, size, max_shapes=most, pack=tuning.packs)
    with stage.progress.track("held-out pairs", len(rows), "pairs", lockstep=True) as task:
        results = tuning.for_each(
            lambda batch: compute(trainable, frozen, batch, None),
            rows,
            microbatches,
            size,
            task.advance,
        )
    total: Sums = jax.tree.map(lambda *each: float(sum(each)), *results)
    named = {"loss": total.loss} | total.figures
    return {name: value / total.weight for name, value in named.items()}


def _held_out_before(stage: Stage, *arguments: Any) -> dict[str, float]:
    """Evaluated before training; a continued run reads what its first part found."""
    path = stage.directory / "before.json"
    kept = this().from_main(lambda: _read_json(path))
    if kept is not None:
        return kept
    before = evaluate(stage, *arguments)
    if before:
        stage.log.write(0, {f"heldout/{name}": value for name, value in before.items()})
    write_json(path, before)
    return before


def _read_json(path: Path) -> dict[str, float] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def doubts(
    before: Mapping[str, float], after: Mapping[str, float], align: AlignConfig
) -> Iterator[str]:
    """What held-out pairs say against the new policy, each with the knob to turn."""
    if not before or not after:
        return
    if after["loss"] > MUCH_WORSE * before["loss"]:
        yield (
            f"the loss of held-out pairs rose from {before['loss']:.3f} to {after['loss']:.3f}: "
            "training diverges or overfits; lower align.learning_rate (now "
            f"{align.learning_rate:g}) or align.epochs (now {align.epochs})"
        )
    fallen = before["logps/chosen"] - after["logps/chosen"]
    if align.beta * fallen > MUCH_LESS_LIKELY:
        yield (
            f"chosen texts became less likely by {fallen:.0f} nats: "
            f"the policy drifts from all it was shown; lower align.learning_rate (now "
            f"{align.learning_rate:g}), or raise align.beta or align.nll_weight"
        )


def _trained(
    stage: Stage,
    tuning: Tuning,
    loss: Loss,
    trainable: Tree,
    frozen: Tree,
    rows: Rows,
    names: Sequence[str],
    size: int,
) -> training.TrainState:
    config, align = stage.config, stage.config.align
    assert stage.round is not None
    microbatches = shuffled(
        rows,
        seed=seed_of(config, ORDER_STREAM, stage.round),
        epochs=align.epochs,
        step_rows=align.batch_pairs,
        microbatch_rows=size,
        max_shapes=align.max_shapes,
        pack=tuning.packs,
    )
    schedule, optimizer = optimizer_of(align, _num_steps(microbatches))
    trainer = Trainer(
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        log=stage.log,
        progress=stage.progress,
        description=f"align (round {stage.round})",
        advice="lower align.learning_rate, or raise align.warmup_fraction",
        max_skipped=config.runtime.max_skipped,
        diagnosis=stage.directory / "diagnosis.json",
        row_names=names,
        log_every=align.log_every,
        save_every=align.save_every,
        place=tuning.place,
    )
    state = training.create(
        trainable,
        optimizer,
        seed_of(config, DROPOUT_STREAM, stage.round),
        figures=FIGURES if size < align.batch_pairs else None,
    )
    feed = Feed(rows, microbatches, size)
    with Checkpoints(stage.directory / "checkpoints") as checkpoints:
        return trainer.fit(tuning.place_state(state), frozen, feed, checkpoints)


def optimizer_of(
    align: AlignConfig, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate over a run of so many steps, and the optimiser that follows it."""
    schedule = learning_rate_schedule(
        align.learning_rate, steps, warmup_fraction=align.warmup_fraction, decay=align.decay
    )
    return schedule, adamw(
        schedule, max_grad_norm=align.max_grad_norm, weight_decay=align.weight_decay
    )


def _num_steps(microbatches: Sequence[Microbatch]) -> int:
    return sum(microbatch.ends_step for microbatch in microbatches)
