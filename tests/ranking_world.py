"""A small world with planted tastes, and the artifacts that stages before rank would leave.

Text 0 of a user says what the user likes (its vector is his taste over the items' attributes), the
others ever less of it. Item vectors are the items' attributes.
"""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from dpo4rec_jax import data
from dpo4rec_jax.config import Config, DataConfig, SyntheticConfig, dump_config
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.texts import TextRecord, write_records
from dpo4rec_jax.runtime.progress import MetricsLog, Progress
from dpo4rec_jax.stages import rank
from dpo4rec_jax.workspace import Stage, Workspace

SAMPLES = 3
USERS = 80
RANK = {
    "backbone": "prm",
    "adaptor": "mlp",
    "seeds": 2,
    "epochs": 3,
    "batch_lists": 64,
    "learning_rate": 5e-3,
}
PREFER = {"folds": 2}


def make_prepared(users: int = USERS) -> data.Prepared:
    world = SyntheticConfig(users=users, items=60, interactions=24, noise=0.1)
    return data.build(DataConfig(synthetic=world), seed=0, cache_dir="unused")


def item_attributes(prepared: data.Prepared) -> np.ndarray:
    """Multi-hot rows of the items' attributes."""
    blocks = []
    for a, size in enumerate(prepared.attribute_sizes):
        ids = prepared.attribute_IAM[:, a]
        blocks.append((ids[:, :, None] == np.arange(size)[None, None]).any(1))
    return np.concatenate(blocks, axis=1).astype(np.float32)


def tastes(prepared: data.Prepared) -> np.ndarray:
    """Attributes of the items that each user rated, weighted by rating above his mean."""
    attribute_IF = item_attributes(prepared)
    rows = []
    for u in range(len(prepared.user_id)):
        own = slice(prepared.offset_U1[u], prepared.offset_U1[u + 1])
        rating = prepared.rating_E[own] - prepared.rating_E[own].mean()
        rows.append((rating[:, None] * attribute_IF[prepared.item_E[own]]).mean(0))
    return np.stack(rows).astype(np.float32)


def make_knowledge(prepared: data.Prepared, strength: float = 1.0) -> Knowledge:
    """Text c holds the taste times (1 - c / 2), plus noise; non-training users have text 0."""
    random = np.random.default_rng(0)
    taste_UF = tastes(prepared)
    shares = strength * (1.0 - np.arange(SAMPLES) / 2)
    noise = random.normal(scale=0.05, size=(len(taste_UF), SAMPLES, taste_UF.shape[1]))
    user_UCF = 4.0 * (taste_UF[:, None] * shares[None, :, None] + noise).astype(np.float32)
    count_U = np.where(prepared.split_U == data.TRAIN, SAMPLES, 1).astype(np.int32)
    user_UCF *= (np.arange(SAMPLES)[None] < count_U[:, None])[..., None]
    return Knowledge(
        user_UCF, count_U, item_attributes(prepared), [*prepared.user_id], [*prepared.item_id]
    )


def make_records(prepared: data.Prepared, round: int = 0) -> list[TextRecord]:
    """Texts of growing length; sample order is not file order."""
    return [
        TextRecord(
            "user",
            id,
            f"text {sample} of {id} in round {round}",
            sample,
            prompt_tokens=(1, 2, u),
            completion_tokens=tuple(range(10, 13 + sample)),
        )
        for sample in reversed(range(SAMPLES))
        for u, id in enumerate(prepared.user_id)
        if sample == 0 or prepared.split_U[u] == data.TRAIN
    ]


def make_workspace(path: Path, prepared: data.Prepared, rounds: int = 1) -> Workspace:
    """Artifacts of prepare, and of reason and encode of every round (texts better by round)."""
    workspace = Workspace(path)
    prepared.save(workspace.stage_dir("prepare"))
    for round in range(rounds + 1):
        records = make_records(prepared, round)
        write_records(workspace.stage_dir("reason", round) / "users.jsonl", records)
        knowledge = make_knowledge(prepared, strength=1.0 + round)
        knowledge.save(workspace.stage_dir("encode", round) / "vectors.npz")
    return workspace


def make_stage(workspace: Workspace, name: str, round: int, **sections) -> Stage:
    config = Config.model_validate({"rank": RANK, "prefer": PREFER, "rounds": 1} | sections)
    directory = workspace.stage_dir(name, round)
    directory.mkdir(parents=True, exist_ok=True)
    progress = Progress(Console(file=io.StringIO()))
    log = MetricsLog(workspace.path, name, round)
    return Stage(config, workspace, name, round, directory, log, progress)


@functools.cache
def ranked() -> tuple[Workspace, data.Prepared]:
    """A workspace of two rounds whose re-rankers are trained, once a test process; not to be
    written to outside prefer/ and evaluate/."""
    prepared = make_prepared()
    workspace = make_workspace(Path(tempfile.mkdtemp(prefix="ranked-")), prepared)
    for round in (0, 1):
        rank.run(make_stage(workspace, "rank", round))
    return workspace, prepared


@functools.cache
def finished() -> Workspace:
    """`ranked` with the config that `predict` reads; its encoder makes vectors of their length."""
    workspace, prepared = ranked()
    write_config(workspace, prepared)
    return workspace


def write_config(workspace: Workspace, prepared: data.Prepared, **sections) -> None:
    features = item_attributes(prepared).shape[1]
    encode = {"encoder": "hashing", "features": features}
    stage = make_stage(workspace, "evaluate", 1, encode=encode, **sections)
    (workspace.path / "config.yaml").write_text(dump_config(stage.config))
