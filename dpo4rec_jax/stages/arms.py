"""The arms that a round compares: which knowledge each shows its re-rankers, and where it lies.

Round 0 holds `backbone` (no knowledge), `kar` (texts of the policy as it came) and, where someone
else's texts are given, `kar-external`; round r holds `dpo4rec-{r}`. The arm of the policy's own
texts is the judge: its cross-fitting folds score texts in stage prefer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from dpo4rec_jax.config import Config, InputError, RankConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.models.backbones import reads_history
from dpo4rec_jax.models.lists import Lists
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.stages.affinities import affinities_of
from dpo4rec_jax.workspace import Workspace


@dataclass(frozen=True)
class Arm:
    """`vectors`: the file of its knowledge, None for the backbone; `judge`: trains folds too."""

    name: str
    vectors: Path | None
    judge: bool = False

    def file(self, workspace: Workspace, round: int) -> Path:
        return workspace.stage_dir("rank", round) / f"{self.name}.safetensors"


def judge_name(round: int) -> str:
    """The arm whose knowledge is the policy's own texts of the round."""
    return f"dpo4rec-{round}" if round else "kar"


def arms_of(config: Config, workspace: Workspace, round: int) -> list[Arm]:
    """The arms of a round, in the order of the report."""
    encoded = workspace.stage_dir("encode", round)
    own = Arm(judge_name(round), encoded / "vectors.npz", judge=round < config.rounds)
    if round:
        return [own]
    external = [Arm("kar-external", encoded / "external.npz")]
    return [Arm("backbone", None), own, *(external if config.evaluate.external_texts else [])]


def knowledge_of(arm: Arm, prepared: Prepared) -> Knowledge | None:
    """Raises InputError where vectors are missing, of other data, not finite or of no text."""
    if arm.vectors is None:
        return None
    knowledge = Knowledge.load(arm.vectors)
    if (knowledge.user_id, knowledge.item_id) != (prepared.user_id, prepared.item_id):
        raise InputError(
            f"{arm.vectors}: vectors of other users or items than prepare/ holds; run stage encode"
        )
    if not knowledge.count_U.any():
        raise InputError(
            f"{arm.vectors}: no user has a text; raise reason.max_new_tokens or check reason.texts"
        )
    for side in ("user_UCF", "item_IF"):
        if not np.isfinite(getattr(knowledge, side)).all():
            raise InputError(f"{arm.vectors}: {side} holds NaN or infinity; run stage encode again")
    return knowledge


def lists_of(
    prepared: Prepared, knowledge: Knowledge | None, rank: RankConfig, seed: int = 0
) -> Lists:
    """Lists and vectors on the device, with the ablation that `rank.knowledge` names.

    `shuffled` gives every user the texts of another user of the same split: whatever gain is left
    then does not come from what the texts say about the user.
    """
    arrays = {
        name: jnp.asarray(getattr(prepared, name))
        for name in ("user_L", "item_LN", "label_LN", "mask_LN", "attribute_IAM")
    }
    lists = Lists(**arrays)
    if rank.history or reads_history(rank.backbone):
        past_UH, rating_UH = windows(prepared)
        lists = replace(lists, past_UH=jnp.asarray(past_UH), rating_UH=jnp.asarray(rating_UH))
    if rank.ease is not None:
        lists = replace(lists, affinity_UI=jnp.asarray(affinities_of(prepared, rank.ease)))
    if knowledge is None:
        return lists
    user_UCF, count_U, item_IF = knowledge.user_UCF, knowledge.count_U, knowledge.item_IF
    if rank.knowledge == "shuffled":
        owner_U = owners(prepared, rank, seed)
        user_UCF, count_U = user_UCF[owner_U], count_U[owner_U]
    if rank.knowledge != "item":
        lists = replace(lists, user_UCF=jnp.asarray(user_UCF), count_U=jnp.asarray(count_U))
    if rank.knowledge != "user":
        lists = replace(lists, item_IF=jnp.asarray(item_IF))
    return lists


def owners(prepared: Prepared, rank: RankConfig, seed: int) -> Int32[np.ndarray, " U"]:
    """Whose texts each user is shown by: his own, or with `shuffled` another's."""
    if rank.knowledge == "shuffled":
        return shuffled_users(prepared.split_U, seed)
    return np.arange(len(prepared.user_id), dtype=np.int32)


def windows(
    prepared: Prepared,
) -> tuple[Int32[np.ndarray, "U H"], Int32[np.ndarray, "U H"]]:
    """Items of each user's knowledge window, oldest first, and their stars rounded to 1..5 (0:
    none). Padding is item 0 rated -1. What prompts may see, and so no candidate list holds."""
    longest = int(prepared.window_U.max(initial=1))
    place_H = np.arange(longest)
    real_UH = place_H[None] < prepared.window_U[:, None]
    event_UH = np.where(real_UH, prepared.offset_U1[:-1, None] + place_H[None], 0)
    stars_UH = np.nan_to_num(np.clip(np.rint(prepared.rating_E[event_UH]), 1, 5), nan=0.0)
    past_UH = np.where(real_UH, prepared.item_E[event_UH], 0)
    return past_UH.astype(np.int32), np.where(real_UH, stars_UH, -1).astype(np.int32)


def shuffled_users(split_U: np.ndarray, seed: int) -> Int32[np.ndarray, " U"]:
    """For each user another user of the same split (a cycle, so nobody keeps his own)."""
    random = np.random.default_rng([seed, 7])
    other_U = np.arange(len(split_U), dtype=np.int32)
    for split in np.unique(split_U):
        users = random.permutation(np.flatnonzero(split_U == split)).astype(np.int32)
        other_U[users] = np.roll(users, 1)
    return other_U


def reranker_config(rank: RankConfig, prepared: Prepared, lists: Lists) -> RerankerConfig:
    return RerankerConfig(
        backbone=rank.backbone,
        num_items=len(prepared.item_id),
        attribute_sizes=tuple(int(size) for size in prepared.attribute_sizes),
        list_length=prepared.item_LN.shape[1],
        user_features=0 if lists.user_UCF is None else lists.user_UCF.shape[-1],
        item_features=0 if lists.item_IF is None else lists.item_IF.shape[-1],
        adaptor=rank.adaptor,
        embedding=rank.embedding,
        dropout=rank.dropout,
        user_dropout=rank.user_dropout,
        history=rank.history,
        match=rank.match,
        ease=rank.ease,
        attributes=rank.attributes,
    )


def lists_in(prepared: Prepared, split: int) -> Int32[np.ndarray, " L"]:
    """Indices of the lists of a split. Raises InputError where it has none."""
    index = np.flatnonzero(prepared.split_U[prepared.user_L] == split).astype(np.int32)
    if not len(index):
        name = ("train", "validation", "test")[split]
        raise InputError(f"prepare: no candidate list of a {name} user; raise data.max_users")
    return index


def folds_of(prepared: Prepared, folds: int, seed: int) -> Int32[np.ndarray, " U"]:
    """The cross-fitting fold of each training user, of equal sizes at random; others -1."""
    fold_U = np.full(len(prepared.user_id), -1, np.int32)
    train = np.flatnonzero(prepared.split_U == TRAIN)
    if len(train) < folds:
        raise InputError(
            f"prefer.folds: {folds} folds for {len(train)} training users; lower it to "
            f"{max(1, len(train))} or raise data.max_users"
        )
    order = np.random.default_rng([seed, 11]).permutation(train)
    fold_U[order] = np.arange(len(order)) % folds
    return fold_U
