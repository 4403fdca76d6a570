"""A workspace as the stages before report leave it, with planted effects and awkward texts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from dpo4rec_jax.config import Config
from dpo4rec_jax.data.texts import TextRecord, write_records
from dpo4rec_jax.runtime.progress import MetricsLog, Progress
from dpo4rec_jax.workspace import Stage, Workspace, write_json, write_jsonl, write_npz

AWKWARD = '<script>alert("x")</script> & <b>90s</b> {{ action }} — 東京'
METRICS = [
    f"{name}@{k}{kind}" for name in ("ndcg", "map") for k in (1, 3, 5, 7) for kind in ("", "_std")
]
TRAIN_USERS, SAMPLES = 60, 4


def make_stage(path: Path, *, rounds: int = 1, users: int = 120, gains=None, **overrides) -> Stage:
    """`gains`: what each arm adds to every list's metrics, on top of noise its users share."""
    gains = gains or {"backbone": 0.0, "kar": 0.02} | {
        f"dpo4rec-{round}": 0.02 + 0.03 * round for round in range(1, rounds + 1)
    }
    values = {"rounds": rounds, "evaluate": {"resamples": 2000}}
    config = Config.model_validate(values | overrides)
    workspace = Workspace(path)
    random = np.random.default_rng(0)
    _write_metrics(workspace, gains, users, random)
    write_json(workspace.stage_dir("prepare") / "counts.json", COUNTS)
    ids = np.array([f"u{user}" for user in range(TRAIN_USERS)])
    write_npz(workspace.stage_dir("prepare") / "sequences.npz", {"user_id": ids})
    for round in range(rounds + 1):
        write_records(workspace.stage_dir("reason", round) / "users.jsonl", _texts(round))
    for round in range(rounds):
        pairs = [_pair(round, user, random) for user in range(TRAIN_USERS - 12 * round)]
        write_jsonl(workspace.stage_dir("prefer", round) / "pairs.jsonl", pairs)
        write_json(
            workspace.stage_dir("evaluate", round + 1) / "alignment.json",
            {
                "round": round + 1,
                "reward_mean_before": 0.512 + 0.04 * round,
                "reward_mean_after": 0.587 + 0.03 * round,
                "reward_accuracy": 0.71,
                "margin": 0.42,
                "kl": 1.3,
            },
        )
        _write_curves(path, round, random)
        rewards = _rewards(round, random)
        write_npz(workspace.stage_dir("evaluate", round + 1) / "rewards.npz", rewards)
    for directory in ["prepare", *(f"round{r}/{s}" for r in range(rounds + 1) for s in STAGES)]:
        manifest = {"inputs_digest": "", "outputs_digest": "", "files": {}}
        manifest["seconds"] = round_seconds(directory)
        write_json(path / directory / "manifest.json", manifest)
    directory = workspace.stage_dir("report")
    directory.mkdir(parents=True, exist_ok=True)
    log, progress = MetricsLog(path, "report", None), Progress(Console(file=io.StringIO()))
    return Stage(config, workspace, "report", None, directory, log, progress)


STAGES = ("reason", "encode", "rank", "evaluate", "prefer", "align")
COUNTS = {
    "users": 1200,
    "items": 300,
    "interactions": 52800,
    "ratings": True,
    "users_by_split": {"train": 960, "validation": 120, "test": 120},
    "lists": 6000,
    "lists_by_split": {"train": 4800, "validation": 600, "test": 600},
    "lists_without_positives": 311,
    "lists_without_positives_by_split": {"train": 250, "validation": 30, "test": 31},
    "positives": 11874,
}


def round_seconds(directory: str) -> float:
    return {"reason": 34.2, "rank": 21.7, "align": 41.0}.get(directory.split("/")[-1], 2.4)


def _write_metrics(workspace, gains, users: int, random) -> None:
    user_L = np.repeat(np.arange(users, dtype=np.int32), 5)
    base_L = np.clip(random.normal(0.5, 0.12, users), 0, 1)[user_L] + random.normal(
        0, 0.05, 5 * users
    )
    rounds: dict[int, dict[str, np.ndarray]] = {}
    empty_L = random.random(5 * users) < 0.05
    for arm, gain in gains.items():
        round = int(arm.rpartition("-")[2]) if arm.startswith("dpo4rec") else 0
        arrays = rounds.setdefault(round, {"user_L": user_L})
        for place, metric in enumerate(METRICS):
            seed_S1 = random.normal(0, 0.003, (5, 1))
            value_SL = (
                base_L
                + 0.01 * (place // 2)
                + gain
                + seed_S1
                + random.normal(0, 0.05, (5, 5 * users))
            )
            value_SL = np.clip(value_SL, 0, 1)
            if metric.endswith("_std"):
                value_SL[:, empty_L] = np.nan
            arrays[f"{arm}/{metric}"] = value_SL.astype(np.float32)
    for round, arrays in rounds.items():
        write_npz(workspace.stage_dir("evaluate", round) / "metrics.npz", arrays)


def _texts(round: int) -> list[TextRecord]:
    def text(user: int, sample: int) -> str:
        if (user, sample) == (18, 0):
            return AWKWARD
        taste = ("90s action with Arnold Schwarzenegger", "dry British comedies", "slow westerns")
        vague = "The user likes movies with good stories and interesting characters."
        precise = f"Prefers {taste[user % 3]} and avoids musicals; values tension over spectacle."
        return f"{precise if (user + sample + round) % 3 else vague} Text {user}.{sample}.{round}."

    return [
        TextRecord(
            "user", f"u{user}", text(user, sample), sample, (1, 2), tuple(range(20 + user % 9))
        )
        for user in range(TRAIN_USERS)
        for sample in range(SAMPLES)
    ]


def _pair(round: int, user: int, random) -> dict:
    gap = float(abs(random.normal(0, 0.08))) + 0.001
    chosen, rejected = random.integers(18, 40, 2)
    text = f"Prefers 90s action with Arnold Schwarzenegger over anything slow. User {user}. "
    return {
        "user": f"u{user}",
        "prompt": [
            {"role": "user", "content": f"History:\nTotal Recall (1990), 5 stars\n{AWKWARD}"}
        ],
        "chosen": [{"role": "assistant", "content": text + AWKWARD}],
        "rejected": [{"role": "assistant", "content": "Likes good movies & <i>stories</i>."}],
        "score_chosen": 0.5 + gap,
        "score_rejected": 0.5,
        "prompt_tokens": [1, 2, 3],
        "chosen_tokens": list(range(int(chosen))),
        "rejected_tokens": list(range(int(rejected))),
    }


def _rewards(round: int, random) -> dict[str, np.ndarray]:
    """After lies 0.06 above before; the last user has no text after."""
    before_UC = random.normal(0.5 + 0.04 * round, 0.1, (TRAIN_USERS, SAMPLES))
    after_UC = before_UC + 0.06 + random.normal(0, 0.05, before_UC.shape)
    mask_UC = np.ones(before_UC.shape, bool)
    mask_after_UC = mask_UC.copy()
    mask_after_UC[-1] = False
    return {
        "user_U": np.arange(TRAIN_USERS, dtype=np.int32),
        "reward_before_UC": before_UC,
        "reward_after_UC": after_UC,
        "mask_before_UC": mask_UC,
        "mask_after_UC": mask_after_UC,
    }


def _write_curves(path: Path, round: int, random) -> None:
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in range(0, 60, 5):
            values = {
                "loss": 0.693 - 0.004 * step + random.normal(0, 0.01),
                "margin": 0.008 * step + random.normal(0, 0.01),
                "accuracy": min(1.0, 0.5 + 0.006 * step + random.normal(0, 0.02)),
                "grad_norm": None,
            }
            line = {"time": 0.0, "stage": "align", "round": round, "step": step}
            file.write(json.dumps(line | values) + "\n")
            if step in (0, 55):
                held_out = {f"heldout/{name}": value for name, value in values.items()}
                file.write(json.dumps(line | held_out) + "\n")
