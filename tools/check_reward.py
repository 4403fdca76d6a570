"""Is the reward about the user, and is it memory? Asked by the stages' own functions.

    python tools/check_reward.py --prepared P --vectors runs/x/round0/encode/vectors.npz

Re-rankers are trained with every user's own text: members on all training users, and one a fold
that never saw the fold's users. Then each user's lists are judged with the own text and with
--others texts of other users of the same split:

- held-out (validation and test) users, by the members: reward of the own text against the mean of
  the others', paired by user (10,000 sign flips);
- training users, by the members (in sample) and by their fold's judge (cross-fitted): how often
  another text comes out best, and how often that is the own one.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpo4rec_jax.config import RankConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.objectives.statistics import sign_flip_p_values
from dpo4rec_jax.stages.arms import folds_of, lists_of, shuffled_users
from dpo4rec_jax.stages.fitting import fit_arm
from dpo4rec_jax.stages.judging import Rewards, judge

OWN = 0  # the column of the own text; the others' follow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepared", type=Path, required=True, help="directory of stage prepare")
    parser.add_argument("--vectors", type=Path, required=True, help="vectors.npz of stage encode")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=v", help="keys of rank")
    parser.add_argument("--others", type=int, default=3, help="texts of other users")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=5, help="the reward is NDCG@k")
    options = parser.parse_args()
    print(json.dumps(check(options)))


def check(options: argparse.Namespace) -> dict[str, Any]:
    prepared = Prepared.load(options.prepared, prompts=False)
    knowledge = Knowledge.load(options.vectors)
    changes = {key: yaml.safe_load(value) for key, value in (s.split("=", 1) for s in options.set)}
    rank = RankConfig.model_validate({"seeds": 1} | changes)
    own = dataclasses.replace(
        knowledge,
        user_UCF=knowledge.user_UCF[:, :1],
        count_U=np.minimum(knowledge.count_U, 1),
    )
    fold_U = folds_of(prepared, options.folds, options.seed)
    members, fitted = fit_arm(
        prepared, lists_of(prepared, own, rank, options.seed), rank, options.seed, fold_U
    )
    in_sample = dataclasses.replace(
        members, params_R=members.seed_params, seeds=members.seeds, folds=0
    )
    lists = lists_of(prepared, with_others(own, prepared, options), rank, options.seed)
    training = prepared.split_U[prepared.user_L] == TRAIN
    held_out_L, train_L = np.flatnonzero(~training), np.flatnonzero(training)
    held_out = judge(in_sample, lists, held_out_L, fold_U, options.k)
    choices = {
        name: chosen(judge(judges, lists, train_L, fold_U, options.k))
        for name, judges in (("in_sample", in_sample), ("cross_fitted", members))
    }
    return {
        "validation_ndcg": float(fitted.best_R.mean()),
        **of_held_out(held_out, options.seed),
        "training_users": len(choices["in_sample"]),
        "choice_changes": float(np.mean(choices["in_sample"] != choices["cross_fitted"])),
        **{f"own_chosen_{name}": float(np.mean(best == OWN)) for name, best in choices.items()},
    }


def with_others(own: Knowledge, prepared: Prepared, options: argparse.Namespace) -> Knowledge:
    """Each user's text, then those of as many others, of which every one is somebody's once."""
    orders = [shuffled_users(prepared.split_U, options.seed + 1 + n) for n in range(options.others)]
    user_UCF = np.concatenate([own.user_UCF, *(own.user_UCF[order] for order in orders)], axis=1)
    # A user without a text, or shown one of none, is left as he is: nothing to compare.
    whole_U = np.all([own.count_U[order] > 0 for order in (slice(None), *orders)], axis=0)
    return dataclasses.replace(
        own, user_UCF=user_UCF, count_U=np.where(whole_U, user_UCF.shape[1], 0).astype(np.int32)
    )


def of_held_out(rewards: Rewards, seed: int) -> dict[str, float]:
    ndcg_UC = rewards.ndcg_UC[rewards.mask_UC.all(-1)]
    difference_U1 = (ndcg_UC[:, OWN] - ndcg_UC[:, OWN + 1 :].mean(-1))[:, None]
    (p_value,) = sign_flip_p_values(difference_U1, resamples=10_000, seed=seed)
    return {
        "held_out_users": len(ndcg_UC),
        "reward_own": float(ndcg_UC[:, OWN].mean()),
        "reward_others": float(ndcg_UC[:, OWN + 1 :].mean()),
        "p_value": float(p_value),
    }


def chosen(rewards: Rewards) -> np.ndarray:
    """The best text of each user by reward, by log-likelihood where rewards are equal."""
    whole_U = rewards.mask_UC.all(-1)
    ndcg_UC, logp_UC = rewards.ndcg_UC[whole_U], rewards.logp_UC[whole_U]
    tied_UC = ndcg_UC == ndcg_UC.max(-1, keepdims=True)
    return np.where(tied_UC, logp_UC, -np.inf).argmax(-1)


if __name__ == "__main__":
    main()
