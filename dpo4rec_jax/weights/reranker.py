"""Re-rankers on disk: one safetensors file an arm, every leaf stacked over members, seeds first."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.backbones import BACKBONES
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.workspace import write_safetensors


@dataclass(frozen=True)
class Members:
    """R trained re-rankers of one architecture: `seeds` that saw every training user, then `folds`
    of which member f never saw the users of fold f."""

    config: RerankerConfig
    params_R: dict[str, Any]
    seeds: int
    folds: int = 0

    def slice(self, start: int, stop: int) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: leaf[start:stop], self.params_R)

    @property
    def seed_params(self) -> dict[str, Any]:
        return self.slice(0, self.seeds)

    @property
    def fold_params(self) -> dict[str, Any]:
        """The judges; without folds the seeds judge, in sample."""
        if not self.folds:
            return self.seed_params
        return self.slice(self.seeds, self.seeds + self.folds)


def save_members(path: Path, members: Members) -> None:
    """Writes the file whole or not at all, in the main process. Its metadata say what it is."""
    arrays: Any = traverse_util.flatten_dict(members.params_R, sep="/")
    about = {
        "config": dataclasses.asdict(members.config),
        "seeds": members.seeds,
        "folds": members.folds,
    }
    write_safetensors(path, arrays, {"members": json.dumps(about)})


def load_members(path: Path) -> Members:
    """Raises InputError where the file is missing, damaged, or not of the shapes of its config."""
    if not path.exists():
        raise InputError(f"{path}: missing; run stage rank")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["members"])
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values, seeds, folds = about["config"], about["seeds"], about["folds"]
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a file of re-rankers ({error}); run stage rank") from None
    values["attribute_sizes"] = tuple(values["attribute_sizes"])
    config = RerankerConfig(**values)
    if config.backbone not in BACKBONES:
        raise InputError(
            f"{path}: trained with backbone {config.backbone!r}, which is not registered here; "
            "import the module that registers it first (docs/extending.md)"
        )
    params = jax.eval_shape(lambda: reranker.init(config, jax.random.key(0)))
    wanted: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for name, leaf in wanted.items():
        shape = (seeds + folds, *leaf.shape)
        got = flat[name].shape if name in flat else None
        if got != shape:
            raise InputError(
                f"{path}: {name}: expected shape {shape}, got {got}; run stage rank again"
            )
    return Members(config, traverse_util.unflatten_dict(flat, sep="/"), seeds, folds)
