"""Stage evaluate: the arms of a round on the test users' lists, touched here and only here."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TEST, TRAIN, VALIDATION, Prepared
from dpo4rec_jax.models.lists import Lists, map_lists
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.objectives import average_precision, ndcg
from dpo4rec_jax.stages.arms import arms_of, judge_name, knowledge_of, lists_in, lists_of, owners
from dpo4rec_jax.stages.judging import judge
from dpo4rec_jax.weights.reranker import load_members
from dpo4rec_jax.workspace import Stage, write_json, write_npz

CUTOFFS = (1, 3, 5, 7)
METRICS = {"ndcg": ndcg, "map": average_precision}
FROM_ALIGN = ("reward_accuracy", "margin", "kl")


def run(stage: Stage) -> None:
    """Leaves metrics.npz: `{arm}/{metric}` [seeds, test lists] and `user_L`, and from round 1 on
    alignment.json and rewards.npz, the training users' rewards before and after that alignment.

    `*_std` values are NaN for lists without positives, which they leave out.
    """
    assert stage.round is not None
    config, workspace = stage.config, stage.workspace
    prepared = Prepared.load(workspace.stage_dir("prepare"), prompts=False)
    test_L = lists_in(prepared, TEST)
    arrays: dict[str, np.ndarray] = {"user_L": prepared.user_L[test_L]}
    for arm in arms_of(config, workspace, stage.round):
        members = load_members(arm.file(workspace, stage.round))
        lists = lists_of(prepared, knowledge_of(arm, prepared), config.rank, config.seed)
        metrics = list_metrics(members.config, members.seed_params, lists, jnp.asarray(test_L))
        arrays |= {f"{arm.name}/{name}": np.asarray(value) for name, value in metrics.items()}
        means = {f"{arm.name}/{k}": float(np.nanmean(v)) for k, v in metrics.items() if "@5" in k}
        stage.log.write(0, means)
    if stage.round:
        write_json(stage.directory / "alignment.json", _alignment(stage, prepared))
    write_npz(stage.directory / "metrics.npz", arrays)


@partial(jax.jit, static_argnums=0)
def list_metrics(
    config: RerankerConfig, params_R: Any, lists: Lists, index_L: jax.Array
) -> dict[str, jax.Array]:
    """Every metric of every list by every member: {name: [R, L]}."""

    def reduce(score_BCN, label_BCN, mask_BCN):
        score_BN, label_BN, mask_BN = score_BCN[:, 0], label_BCN[:, 0], mask_BCN[:, 0]
        found = {}
        for name, metric in METRICS.items():
            for suffix, convention in (("", "kar"), ("_std", "standard")):
                at = partial(metric, score_BN, label_BN, where=mask_BN, convention=convention)
                value_KB = jax.vmap(lambda k, at=at: at(k=k))(jnp.array(CUTOFFS))
                found |= {f"{name}@{k}{suffix}": value_KB[i] for i, k in enumerate(CUTOFFS)}
        return found

    return jax.lax.map(lambda params: map_lists(config, params, lists, index_L, reduce), params_R)


def _alignment(stage: Stage, prepared: Prepared) -> dict[str, Any]:
    """What the last alignment moved: fresh texts before and after it, by the judges before it."""
    config, workspace = stage.config, stage.workspace
    assert stage.round
    last = stage.round - 1
    arm = next(a for a in arms_of(config, workspace, last) if a.name == judge_name(last))
    members = load_members(arm.file(workspace, last))
    with np.load(workspace.stage_dir("rank", last) / "fold.npz", allow_pickle=False) as file:
        fold_U = file["fold_U"]
    before = knowledge_of(arm, prepared)
    after = Knowledge.load(workspace.stage_dir("encode", stage.round) / "vectors.npz")
    assert before is not None
    by_likelihood = config.prefer.reward == "likelihood"
    found: dict[str, Any] = {"round": stage.round}
    arrays: dict[str, np.ndarray] = {}
    for name, knowledge in (("before", before), ("after", after)):
        # The judges know the items by the vectors that they were trained on.
        seen = Knowledge(
            knowledge.user_UCF,
            knowledge.count_U,
            before.item_IF,
            before.user_id,
            before.item_id,
        )
        lists = lists_of(prepared, seen, config.rank, config.seed)
        for split, suffix in ((TRAIN, ""), (VALIDATION, "_validation")):
            rewards = judge(members, lists, lists_in(prepared, split), fold_U, config.prefer.k)
            rewards = rewards.by_owner(owners(prepared, config.rank, config.seed))
            reward_UC = rewards.logp_UC if by_likelihood else rewards.ndcg_UC
            found[f"reward_mean{suffix}_{name}"] = _mean(reward_UC, rewards.mask_UC)
            if split == TRAIN:
                arrays |= {"user_U": rewards.user_U, f"reward_{name}_UC": reward_UC}
                arrays |= {f"mask_{name}_UC": rewards.mask_UC}
    write_npz(stage.directory / "rewards.npz", arrays)
    return found | _from_align(stage, last)


def _mean(reward_UC: np.ndarray, mask_UC: np.ndarray) -> float:
    """Mean over users of the mean over their texts."""
    count_U = mask_UC.sum(1)
    mean_U = (reward_UC * mask_UC).sum(1)[count_U > 0] / count_U[count_U > 0]
    return float(mean_U.mean())


def _from_align(stage: Stage, round: int) -> dict[str, float | None]:
    path = stage.workspace.stage_dir("align", round) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run stage align again") from None
    return {name: summary.get(name) for name in FROM_ALIGN}
