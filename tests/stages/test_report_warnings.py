"""What the report warns of, each with the knob to turn."""

from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_jax.config import Config
from dpo4rec_jax.stages.report_warnings import _of_the_alignment

SOUND = {
    "round": 1,
    "margin": 0.5,
    "kl": 1.5,
    "reward_accuracy": 0.7,
    "reward_mean_before": 0.41,
    "reward_mean_after": 0.44,
    "reward_ci95": [0.01, 0.09],
}


def warned(**changes: Any) -> list[str]:
    return list(_of_the_alignment({"alignment": [SOUND | changes]}, Config()))


def test_an_alignment_that_did_its_work_is_not_warned_of() -> None:
    assert warned() == []
    assert warned(reward_ci95=None, reward_accuracy=None, margin=None, kl=None) == []


@pytest.mark.parametrize(
    ("changes", "says", "knob"),
    [
        ({"margin": 1e-5}, "hardly moved the LLM", "Raise align.learning_rate"),
        (
            {"reward_ci95": [-0.2, -0.1], "reward_mean_after": 0.33},
            "their mean reward fell from 0.4100 to 0.3300",
            "Lower align.learning_rate",
        ),
        ({"kl": 8.21}, "far from where it began (KL 8.2 nats a text)", "raise align.beta"),
        ({"reward_accuracy": 0.4}, "orders 40% of held-out pairs", "Lower align.epochs"),
    ],
)
def test_a_reward_that_diverges_is_said_with_the_knob(changes: dict, says: str, knob: str) -> None:
    (line,) = warned(**changes)
    assert says in line and knob in line
