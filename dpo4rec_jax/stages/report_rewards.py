"""Whether an alignment moved the reward: the same judges on the texts before it and after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dpo4rec_jax.config import InputError
from dpo4rec_jax.objectives import statistics


@dataclass(frozen=True)
class RewardChange:
    """Rewards of the training users' fresh texts; `user_id` are their raw ids."""

    user_id: list[str]
    before_UC: Float[np.ndarray, "U C"]
    after_UC: Float[np.ndarray, "U D"]
    mask_before_UC: Bool[np.ndarray, "U C"]
    mask_after_UC: Bool[np.ndarray, "U D"]

    def of_first_text(self, id: str) -> tuple[float, float]:
        """A user's rewards for sample 0 before and after."""
        row = self.user_id.index(id)
        return float(self.before_UC[row, 0]), float(self.after_UC[row, 0])

    def ids_with_both(self) -> list[str]:
        both_U = self.mask_before_UC[:, 0] & self.mask_after_UC[:, 0]
        return [id for id, both in zip(self.user_id, both_U, strict=True) if both]

    def test(self, *, resamples: int, seed: int) -> dict[str, Any]:
        """Relative change of the mean reward, with its interval and p over users."""
        both_U = self.mask_before_UC.any(1) & self.mask_after_UC.any(1)
        before_U = _means(self.before_UC, self.mask_before_UC)[both_U]
        after_U = _means(self.after_UC, self.mask_after_UC)[both_U]
        if not len(before_U) or not before_U.mean():
            return {"reward_relative_gain": None, "reward_ci95": None, "reward_p_value": None}
        totals_RX = statistics.bootstrap_sums(
            np.stack([before_U, after_U], axis=1), resamples=resamples, seed=seed
        )
        # Log-likelihoods are negative: relative to their size, so that a rise stays a gain.
        gain_R = (totals_RX[:, 1] - totals_RX[:, 0]) / np.abs(totals_RX[:, 0])
        (p_value,) = statistics.sign_flip_p_values(
            (after_U - before_U)[:, None], resamples=resamples, seed=seed
        )
        return {
            "reward_relative_gain": float((after_U - before_U).sum() / abs(before_U.sum())),
            "reward_ci95": list(statistics.interval95(gain_R)),
            "reward_p_value": float(p_value),
        }


def load_reward_change(path: Path, user_id: list[str]) -> RewardChange:
    """Reads a round's rewards.npz. Raises InputError where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return RewardChange(
                user_id=[user_id[user] for user in file["user_U"]],
                before_UC=file["reward_before_UC"],
                after_UC=file["reward_after_UC"],
                mask_before_UC=file["mask_before_UC"],
                mask_after_UC=file["mask_after_UC"],
            )
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run stage evaluate again") from None


def _means(
    reward_UC: Float[np.ndarray, "U C"], mask_UC: Bool[np.ndarray, "U C"]
) -> Float[np.ndarray, " U"]:
    return (reward_UC * mask_UC).sum(1) / np.maximum(mask_UC.sum(1), 1)
