"""Stage rank: trains the re-rankers of every arm of a round, selected on validation users."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.models.backbones import backbone_of
from dpo4rec_jax.runtime.checkpoint import save_arrays
from dpo4rec_jax.runtime.fit import Diverged, Fitted
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.stages.arms import Arm, arms_of, folds_of, knowledge_of, lists_of
from dpo4rec_jax.stages.fitting import fit_arm
from dpo4rec_jax.stages.tuning import mesh_of
from dpo4rec_jax.weights.reranker import Members, load_members, save_members
from dpo4rec_jax.workspace import Stage, write_json, write_npz


def run(stage: Stage) -> None:
    """Leaves {arm}.safetensors and {arm}.json for every arm, and fold.npz.

    An arm whose two files an interrupted run left is kept.
    """
    assert stage.round is not None
    config = stage.config
    prepared = Prepared.load(stage.workspace.stage_dir("prepare"), prompts=False)
    folds = config.prefer.folds if config.prefer.folds > 1 else 0
    fold_U = folds_of(prepared, folds, config.seed) if folds else None
    none = np.full(len(prepared.user_id), -1, np.int32)
    write_npz(stage.directory / "fold.npz", {"fold_U": none if fold_U is None else fold_U})
    arms = arms_of(config, stage.workspace, stage.round)
    done = this().from_main(lambda: [_is_whole(stage.directory, arm.name) for arm in arms])
    waiting = [arm for arm, whole in zip(arms, done, strict=True) if not whole]
    mesh = mesh_of(config)

    def train(arm: Arm) -> None:
        members, fitted = _fit(stage, arm, prepared, fold_U if arm.judge else None, mesh)
        save_members(stage.directory / f"{arm.name}.safetensors", members)
        write_json(stage.directory / f"{arm.name}.json", _summary(members, fitted))

    backbone_of(config.rank.backbone)  # imported before the threads would import it together
    # On one CPU device an arm compiles (on one core) while another trains; on several devices all
    # processes must start the same programs in the same order.
    at_once = len(waiting) if mesh is None and jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        list(pool.map(train, waiting))


def _is_whole(directory: Path, arm: str) -> bool:
    try:
        load_members(directory / f"{arm}.safetensors")
        json.loads((directory / f"{arm}.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):
        return False
    return True


def _fit(
    stage: Stage, arm: Arm, prepared: Prepared, fold_U: np.ndarray | None, mesh: Mesh | None
) -> tuple[Members, Fitted]:
    rank = stage.config.rank
    knowledge = knowledge_of(arm, prepared)
    if knowledge is not None and rank.user_text == "best" and stage.round:
        knowledge = _best_of_last_round(stage, knowledge, prepared)
    lists = lists_of(prepared, knowledge, rank, stage.config.seed)
    with stage.progress.track(
        f"{arm.name}: {rank.backbone}", rank.epochs, "epochs", lockstep=True
    ) as task:

        def on_epoch(epoch: int, loss_R: np.ndarray, validation_R: np.ndarray) -> None:
            seeds = slice(0, rank.seeds)
            figures = {
                "loss": float(loss_R[seeds].mean()),
                "ndcg@5": float(validation_R[seeds].mean()),
            }
            stage.log.write(epoch, {f"{arm.name}/{k}": v for k, v in figures.items()})
            task.advance(1, **figures)

        # The same seeds in every arm and round: their difference is then the knowledge's.
        arguments = prepared, lists, rank, stage.config.seed, fold_U, on_epoch
        try:
            members, fitted = fit_arm(*arguments, stage.config.runtime.max_skipped, mesh)
        except Diverged as diverged:
            raise InputError(_diagnosed(stage, arm, diverged)) from None
    if skipped := int(fitted.skipped_R.sum()):
        stage.progress.say(
            f"  {arm.name}: {skipped} steps skipped, their loss or gradient was not finite; "
            f"lower rank.learning_rate (now {rank.learning_rate:g})"
        )
    return members, fitted


def _diagnosed(stage: Stage, arm: Arm, diverged: Diverged) -> str:
    """Writes which lists were skipped last, and the best parameters so far; returns the message."""
    message = (
        f"rank: {arm.name}: {diverged}; lower rank.learning_rate (now "
        f"{stage.config.rank.learning_rate:g})"
    )
    path = stage.directory / f"{arm.name}-diagnosis.json"
    lists = [
        {**{k: v for k, v in batch.items() if k != "examples"}, "lists": batch["examples"]}
        for batch in diverged.batches
    ]
    write_json(path, {"message": message, "skipped": lists})
    if (diverged.fitted.best_epoch_R >= 0).any():
        save_arrays(
            stage.directory / f"{arm.name}-last-good.safetensors",
            jax.device_get(diverged.fitted.params_R),
        )
    return f"{message} ({path} lists the batches, by their row in prepare/lists.npz)"


def _best_of_last_round(stage: Stage, knowledge: Knowledge, prepared: Prepared) -> Knowledge:
    """Training users shown by the best text of the last round, as its judges scored them.

    The feedback of the paper's bidirectional step. Users without a score keep their own texts;
    round 0 has no scores and draws from all texts.
    """
    assert stage.round
    last = stage.round - 1
    path = stage.workspace.stage_dir("prefer", last) / "scores.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            user_U, reward_UC, mask_UC = file["user_U"], file["reward_UC"], file["mask_UC"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: no scores ({error}); run stage prefer of round {last}") from None
    before = Knowledge.load(stage.workspace.stage_dir("encode", last) / "vectors.npz")
    user_UCF, count_U = knowledge.user_UCF.copy(), knowledge.count_U.copy()
    scored_U = mask_UC.any(1) & (prepared.split_U[user_U] == TRAIN)
    best_U = np.where(mask_UC, reward_UC, -np.inf).argmax(1)[scored_U]
    user_UCF[user_U[scored_U], 0] = before.user_UCF[user_U[scored_U], best_U]
    count_U[user_U[scored_U]] = 1
    return Knowledge(user_UCF, count_U, knowledge.item_IF, knowledge.user_id, knowledge.item_id)


def _summary(members: Members, fitted: Fitted) -> dict[str, object]:
    seeds = slice(0, members.seeds)
    return {
        "backbone": members.config.backbone,
        "seeds": members.seeds,
        "folds": members.folds,
        "selected_by": "ndcg@5 of validation users",
        "validation_ndcg@5": fitted.best_R[seeds].tolist(),
        "steps_skipped": fitted.skipped_R.tolist(),
        "best_epoch": fitted.best_epoch_R[seeds].tolist(),
        "folds_validation_ndcg@5": fitted.best_R[members.seeds :].tolist(),
        "folds_best_epoch": fitted.best_epoch_R[members.seeds :].tolist(),
        "loss_by_epoch": [  # null: an epoch of which every step was skipped
            [loss if np.isfinite(loss) else None for loss in loss_R]
            for loss_R in fitted.loss_ER.tolist()
        ],
        "validation_by_epoch": fitted.validation_ER.tolist(),
    }
