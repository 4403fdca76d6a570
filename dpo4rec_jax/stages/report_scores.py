"""The table and its comparisons: per-list metrics of every arm, resampled by test user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dpo4rec_jax.config import InputError
from dpo4rec_jax.objectives import statistics

TESTED = ("ndcg@5", "map@5")
LEVEL = 0.05
HIGHER, LOWER, UNDECIDED = "higher", "lower", "no difference shown"


@dataclass(frozen=True)
class Scores:
    """Per-list metrics of the test lists: `value_SL[arm][metric]`, arms in the table's order."""

    user_L: Int[np.ndarray, " L"]
    value_SL: Mapping[str, Mapping[str, Float[np.ndarray, "S L"]]]


def load_scores(paths: list[Path]) -> Scores:
    """Joins the metrics.npz of the rounds. Raises InputError for one that is damaged."""
    user_L: np.ndarray | None = None
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); run stage evaluate again") from None
        users = arrays.pop("user_L")
        if user_L is not None and not np.array_equal(user_L, users):
            raise InputError(f"{path}: other test lists than round 0's; run stage evaluate again")
        user_L = users
        for name, value in arrays.items():
            arm, _, metric = name.rpartition("/")
            found.setdefault(arm, {})[metric] = value
    assert user_L is not None, "a run has at least round 0"
    return Scores(user_L, {arm: found[arm] for arm in sorted(found, key=_place)})


def _place(arm: str) -> tuple[int, int]:
    fixed = ("backbone", "kar", "kar-external")
    return (fixed.index(arm), 0) if arm in fixed else (len(fixed), int(arm.rpartition("-")[2]))


def compared(arms: list[str]) -> list[tuple[str, str]]:
    """Which arm is held against which: each alignment against KAR, the round before it, KAR with
    someone else's texts and the backbone; the others against the backbone."""
    pairs = []
    for arm in (arm for arm in arms if arm.startswith("dpo4rec-")):
        round = int(arm.rpartition("-")[2])
        previous = [f"dpo4rec-{round - 1}"] if round > 1 else []
        pairs += [(arm, other) for other in ("kar", *previous, "kar-external", "backbone")]
    pairs += [(arm, "backbone") for arm in ("kar", "kar-external")]
    return [(a, b) for a, b in pairs if a in arms and b in arms]


class Resampled:
    """Every arm's metrics summed by user, and their totals under one set of resamples.

    `total_RS` are an (arm, metric)'s totals in each resample, one a seed; `count_R` how many lists
    of the metric that resample holds.
    """

    def __init__(self, scores: Scores, *, resamples: int, seed: int):
        self._seed, self._resamples = seed, resamples
        self.sums = {
            (arm, metric): statistics.user_sums(value_SL, scores.user_L)
            for arm, metrics in scores.value_SL.items()
            for metric, value_SL in metrics.items()
        }
        metrics = {metric: sums.count_U for (_, metric), sums in self.sums.items()}
        columns = [sums.sum_SU.T for sums in self.sums.values()]
        columns += [count_U[:, None] for count_U in metrics.values()]
        totals_RX = statistics.bootstrap_sums(
            np.concatenate(columns, axis=1), resamples=resamples, seed=seed
        )
        ends = np.cumsum([column.shape[1] for column in columns])
        blocks = np.split(totals_RX, ends[:-1], axis=1)
        self.total_RS = dict(zip(self.sums, blocks[: len(self.sums)], strict=True))
        counts = (block[:, 0] for block in blocks[len(self.sums) :])
        self.count_R = dict(zip(metrics, counts, strict=True))

    def metric(self, arm: str, metric: str) -> dict[str, Any]:
        """Mean over lists with its interval over users; the spread is over re-ranker seeds."""
        sums = self.sums[arm, metric]
        num_lists = sums.count_U.sum()
        if not num_lists:
            return {"mean": None, "std": None, "by_seed": [], "ci95": None}
        by_seed_S = sums.sum_SU.sum(1) / num_lists
        mean_R = _ratio(self.total_RS[arm, metric].mean(1), self.count_R[metric])
        return {
            "mean": float(by_seed_S.mean()),
            "std": float(by_seed_S.std(ddof=1)) if len(by_seed_S) > 1 else 0.0,
            "by_seed": by_seed_S.tolist(),
            "ci95": _interval(mean_R),
        }

    def comparisons(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Relative gains of a over b in the tested metrics, with Holm's correction over all."""
        tests = [(a, b, metric) for a, b in pairs for metric in TESTED]
        if not tests:
            return []
        difference_UX = np.stack(
            [
                self.sums[a, metric].sum_SU.mean(0) - self.sums[b, metric].sum_SU.mean(0)
                for a, b, metric in tests
            ],
            axis=1,
        )
        p_value_X = statistics.sign_flip_p_values(
            difference_UX, resamples=self._resamples, seed=self._seed
        )
        adjusted_X = statistics.holm(p_value_X)
        return [
            self._comparison(*test, float(p_value), float(adjusted))
            for test, p_value, adjusted in zip(tests, p_value_X, adjusted_X, strict=True)
        ]

    def _comparison(
        self, a: str, b: str, metric: str, p_value: float, adjusted: float
    ) -> dict[str, Any]:
        sums_a, sums_b = self.sums[a, metric], self.sums[b, metric]
        total_a_RS, total_b_RS = self.total_RS[a, metric], self.total_RS[b, metric]
        by_seed_a_S, by_seed_b_S = sums_a.sum_SU.sum(1), sums_b.sum_SU.sum(1)
        base = by_seed_b_S.mean()
        interval = _interval(_ratio(total_a_RS.mean(1), total_b_RS.mean(1)) - 1.0)
        # A seed starts the re-rankers of all arms alike, so both arms draw the same seeds.
        drawn_a_R, drawn_b_R = (
            statistics.draw_seeds(total_RS, seed=self._seed)
            for total_RS in (total_a_RS, total_b_RS)
        )
        both = _interval(_ratio(drawn_a_R, drawn_b_R) - 1.0)
        return {
            "a": a,
            "b": b,
            "metric": metric,
            "relative_gain": float(by_seed_a_S.mean() / base - 1.0) if base else None,
            "ci95": interval,
            "ci95_users_and_seeds": both,
            "p_value": p_value,
            "p_holm": adjusted,
            "n_users": int((sums_a.count_U > 0).sum()),
            "verdict": verdict(adjusted, interval, both),
        }


def verdict(p_holm: float, *intervals: list[float] | None) -> str:
    """Higher or lower only where the corrected test and every interval say so."""
    known = [interval for interval in intervals if interval is not None]
    if p_holm >= LEVEL or len(known) < len(intervals):
        return UNDECIDED
    if all(low > 0.0 for low, _ in known):
        return HIGHER
    return LOWER if all(high < 0.0 for _, high in known) else UNDECIDED


def _ratio(
    above_R: Float[np.ndarray, " R"], below_R: Float[np.ndarray, " R"]
) -> Float[np.ndarray, " R"]:
    """NaN where a resample holds nothing to divide by."""
    return np.where(below_R > 0, above_R / np.where(below_R > 0, below_R, 1.0), np.nan)


def _interval(value_R: Float[np.ndarray, " R"]) -> list[float] | None:
    return None if np.isnan(value_R).any() else list(statistics.interval95(value_R))
