"""What decides whether a stage that is complete runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_jax.config import Config
from dpo4rec_jax.stages.plan import inputs_of, plan
from dpo4rec_jax.workspace import Workspace


@pytest.fixture
def inputs(monkeypatch, tmp_path: Path):
    """`inputs(stage, round, config)`, all that is upstream being complete."""
    monkeypatch.setattr(Workspace, "manifest", lambda *_: {"outputs_digest": "0"})

    def of(stage: str, round: int, **sections):
        config = Config.model_validate({"rounds": 1, **sections})
        (step,) = (s for s in plan(config) if (s.stage, s.round) == (stage, round))
        return inputs_of(step, config, Workspace(tmp_path))

    return of


def test_judges_are_trained_where_a_later_round_is_asked_for(inputs) -> None:
    """Those of what was the last round have no folds."""
    assert inputs("rank", 1, rounds=1) != inputs("rank", 1, rounds=2)
    assert inputs("rank", 0, rounds=1) == inputs("rank", 0, rounds=2)


def test_another_policy_is_another_encoder_where_it_encodes(inputs) -> None:
    def of(encoder: str, path: str):
        sections = {"encode": {"encoder": encoder}, "policy": {"path": path}}
        return inputs("encode", 0, **sections)

    assert of("policy", "one") != of("policy", "other")
    assert of("hashing", "one") == of("hashing", "other")


def test_no_alignment_is_upstream_of_the_encoder(inputs) -> None:
    upstream = inputs("encode", 1, encode={"encoder": "policy"})["upstream"]
    assert not [name for name in upstream if name.startswith("align")]
