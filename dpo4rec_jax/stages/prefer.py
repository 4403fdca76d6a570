"""Stage prefer: the judges score every text of every training user; best and worst become pairs.

Texts are ordered by reward, and by log-likelihood where rewards are equal. There is no pair where
the two texts are the same, where their gap in reward is within `prefer.min_gap`, or where nothing
tells them apart; a gap in log-likelihood alone makes a pair only at `min_gap` 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo4rec_jax.config import Config, InputError, PreferConfig
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.data.texts import TextRecord, read_records
from dpo4rec_jax.stages.arms import arms_of, judge_name, knowledge_of, lists_in, lists_of, owners
from dpo4rec_jax.stages.judging import Rewards, judge
from dpo4rec_jax.weights.reranker import load_members
from dpo4rec_jax.workspace import Stage, write_jsonl, write_npz

EQUAL_TEXTS, OTHER_LENGTH, WITHIN_GAP, FEW_TEXTS = (
    "equal texts",
    "of too different length",
    "within min_gap",
    "fewer than two texts each",
)


def run(stage: Stage) -> None:
    """Leaves scores.npz and pairs.jsonl. Raises InputError where no pair is left."""
    assert stage.round is not None
    config, workspace = stage.config.prefer, stage.workspace
    prepared = Prepared.load(workspace.stage_dir("prepare"))
    records = texts_by_user(
        read_records(workspace.stage_dir("reason", stage.round) / "users.jsonl"), prepared
    )
    rewards = _judged(stage, prepared)
    reward_UC = rewards.logp_UC if config.reward == "likelihood" else rewards.ndcg_UC
    scores = {
        "user_U": rewards.user_U,
        "reward_UC": reward_UC.astype(np.float32),
        "ndcg_UC": rewards.ndcg_UC.astype(np.float32),
        "logp_UC": rewards.logp_UC.astype(np.float32),
        "mask_UC": rewards.mask_UC,
        "tokens_UC": _num_tokens(records, rewards),
    }
    write_npz(stage.directory / "scores.npz", scores)

    pairs, dropped = choose_pairs(
        rewards, reward_UC, records, config, seed=stage.config.seed + stage.round
    )
    stage.log.write(0, _figures(rewards, reward_UC, pairs, dropped))
    if not pairs:
        reasons = ", ".join(f"{n} {why}" for why, n in dropped.most_common()) or FEW_TEXTS
        why = dropped.most_common(1)[0][0] if dropped else FEW_TEXTS
        raise InputError(
            f"prefer: no pair among {len(rewards.user_U)} users ({reasons}); "
            f"{_knob(why, stage.config)}"
        )
    write_jsonl(stage.directory / "pairs.jsonl", pair_lines(pairs, rewards, records, prepared))
    lost = f" ({', '.join(f'{n} {why}' for why, n in dropped.most_common())})" if dropped else ""
    stage.progress.say(f"  {len(pairs)} pairs of {len(rewards.user_U)} users{lost}")


def _judged(stage: Stage, prepared: Prepared) -> Rewards:
    assert stage.round is not None
    workspace, name = stage.workspace, judge_name(stage.round)
    arm = next(a for a in arms_of(stage.config, workspace, stage.round) if a.name == name)
    members = load_members(arm.file(workspace, stage.round))
    with np.load(workspace.stage_dir("rank", stage.round) / "fold.npz", allow_pickle=False) as file:
        fold_U = file["fold_U"]
    if stage.config.prefer.folds > 1 and not members.folds:
        raise InputError(
            f"{arm.file(workspace, stage.round)}: expected {stage.config.prefer.folds} folds for "
            "cross-fitting, got none; run stage rank again"
        )
    lists = lists_of(prepared, knowledge_of(arm, prepared), stage.config.rank, stage.config.seed)
    if lists.user_UCF is None:
        raise InputError(
            "rank.knowledge: item: re-rankers that never see a user's text cannot judge it; "
            "set rank.knowledge: both, or rounds: 0"
        )
    index_L = lists_in(prepared, TRAIN)
    with stage.progress.track("judge texts", len(index_L), "lists") as task:
        rewards = judge(members, lists, index_L, fold_U, stage.config.prefer.k, task.advance)
    return rewards.by_owner(owners(prepared, stage.config.rank, stage.config.seed))


def texts_by_user(records: list[TextRecord], prepared: Prepared) -> dict[int, list[TextRecord]]:
    """Records by user index in the order of their samples: record c is vector c's text."""
    index = {id: number for number, id in enumerate(prepared.user_id)}
    found: dict[int, list[TextRecord]] = {}
    for record in sorted(records, key=lambda record: record.sample):
        if record.id in index:
            found.setdefault(index[record.id], []).append(record)
    return found


@dataclass(frozen=True)
class Pair:
    """Two texts of the user at row `row` of the rewards, by their places among his texts."""

    row: int
    chosen: int
    rejected: int
    score_chosen: float
    score_rejected: float


def choose_pairs(
    rewards: Rewards,
    reward_UC: np.ndarray,
    records: dict[int, list[TextRecord]],
    config: PreferConfig,
    seed: int,
) -> tuple[list[Pair], Counter[str]]:
    """The pairs, and how many candidates were dropped for which reason."""
    random = np.random.default_rng([seed, 13])
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for row, user in enumerate(rewards.user_U.tolist()):
        valid = np.flatnonzero(rewards.mask_UC[row])
        texts = records.get(user, [])
        assert len(texts) >= len(valid), f"user {user}: {len(valid)} vectors, {len(texts)} texts"
        # Worst first; equal rewards by log-likelihood.
        order = valid[np.lexsort((rewards.logp_UC[row, valid], reward_UC[row, valid]))]
        if config.choice == "random":
            order = random.permutation(valid)
        for n in range(min(config.pairs_per_user, len(order) // 2)):
            chosen, rejected = int(order[-1 - n]), int(order[n])
            score = reward_UC[row, chosen], reward_UC[row, rejected]
            likelihood_gap = rewards.logp_UC[row, chosen] - rewards.logp_UC[row, rejected]
            fault = _fault(texts[chosen], texts[rejected], score, likelihood_gap, config)
            if fault is None:
                pairs.append(Pair(row, chosen, rejected, float(score[0]), float(score[1])))
            else:
                dropped[fault] += 1
    if config.max_pairs is not None and len(pairs) > config.max_pairs:
        gaps = [pair.score_chosen - pair.score_rejected for pair in pairs]
        kept = np.sort(np.argsort(gaps, kind="stable")[::-1][: config.max_pairs])
        dropped["beyond max_pairs"] = len(pairs) - config.max_pairs
        pairs = [pairs[i] for i in kept]
    return pairs, dropped


def _fault(
    chosen: TextRecord,
    rejected: TextRecord,
    score: tuple[float, float],
    likelihood_gap: float,
    config: PreferConfig,
) -> str | None:
    """Why two texts make no pair, or None."""
    same_tokens = chosen.completion_tokens == rejected.completion_tokens
    if chosen.text.strip() == rejected.text.strip() or (chosen.completion_tokens and same_tokens):
        return EQUAL_TEXTS
    length_gap = abs(text_length(chosen) - text_length(rejected))
    if config.max_length_gap is not None and length_gap > config.max_length_gap:
        return OTHER_LENGTH
    if config.choice == "random":
        return None
    gap = score[0] - score[1]
    told_apart = gap > config.min_gap or (config.min_gap == gap == 0.0 and likelihood_gap > 0.0)
    return None if told_apart else WITHIN_GAP


def _knob(why: str, config: Config) -> str:
    """What to turn where texts make no pairs for this reason."""
    reason, prefer = config.reason, config.prefer
    if why == FEW_TEXTS:
        return f"raise reason.samples (now {reason.samples})"
    if why == EQUAL_TEXTS:
        return (
            f"raise reason.temperature (now {reason.temperature:g}), reason.top_p (now "
            f"{reason.top_p:g}) or reason.samples (now {reason.samples})"
        )
    if why == OTHER_LENGTH:
        return f"raise prefer.max_length_gap (now {prefer.max_length_gap})"
    return (
        f"lower prefer.min_gap (now {prefer.min_gap:g}), or raise reason.samples (now "
        f"{reason.samples}) or reason.temperature (now {reason.temperature:g})"
    )


def text_length(record: TextRecord) -> int:
    """Tokens of a text; words of one that no policy of ours wrote."""
    return len(record.completion_tokens) or len(record.text.split())


def pair_lines(
    pairs: list[Pair],
    rewards: Rewards,
    records: dict[int, list[TextRecord]],
    prepared: Prepared,
) -> Iterator[dict[str, Any]]:
    """Lines of pairs.jsonl: TRL's preference format beside the exact ids that were sampled."""
    for pair in pairs:
        user = int(rewards.user_U[pair.row])
        chosen, rejected = records[user][pair.chosen], records[user][pair.rejected]
        yield {
            "user": prepared.user_id[user],
            "prompt": list(prepared.user_prompts[user].messages),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "score_chosen": pair.score_chosen,
            "score_rejected": pair.score_rejected,
            "prompt_tokens": list(chosen.prompt_tokens),
            "chosen_tokens": list(chosen.completion_tokens),
            "rejected_tokens": list(rejected.completion_tokens),
        }


def _num_tokens(records: dict[int, list[TextRecord]], rewards: Rewards) -> np.ndarray:
    tokens_UC = np.zeros(rewards.mask_UC.shape, np.int32)
    for row, user in enumerate(rewards.user_U.tolist()):
        for place, record in enumerate(records.get(user, [])[: rewards.mask_UC.shape[1]]):
            tokens_UC[row, place] = text_length(record)
    return tokens_UC


def _figures(
    rewards: Rewards, reward_UC: np.ndarray, pairs: list[Pair], dropped: Counter[str]
) -> dict[str, float]:
    mask_UC = rewards.mask_UC
    gaps = [pair.score_chosen - pair.score_rejected for pair in pairs]
    best_U = np.where(mask_UC, reward_UC, -np.inf).max(1)[mask_UC.any(1)]
    return {
        "pairs": float(len(pairs)),
        "dropped": float(sum(dropped.values())),
        "reward": float(reward_UC[mask_UC].mean()) if mask_UC.any() else 0.0,
        "reward_best": float(best_U.mean()) if len(best_U) else 0.0,
        "gap": float(np.mean(gaps)) if gaps else 0.0,
        "tied": float(np.mean([gap == 0.0 for gap in gaps])) if gaps else 0.0,
    }
