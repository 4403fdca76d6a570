"""Checkpoints of a training run (orbax), and small named arrays as safetensors."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.workspace import write_safetensors

Tree = Any
Nested = Mapping[str, Any]

# Orbax raises what goes wrong in its threads, and logs its traceback as well: once is enough.
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


class Checkpoints:
    """Numbered checkpoints of (state, position of the data iterator) under one directory.

    Each is written in the background, by every process its part, and appears whole or not at all;
    the newest `keep` stay. It may be restored onto another mesh and by other processes.
    Arrays are copied off the device before `save` returns, so the state may be donated.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=this().count > 1,  # all see the same newest one
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, number: int, state: Tree, position: Mapping[str, Any]) -> None:
        if number == self.latest():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        self._manager.save(number, args=args)

    def restore_newest(self, like: Tree) -> tuple[int, Tree, dict[str, Any]]:
        """Number, state and position of the newest checkpoint that is whole.

        Raises InputError where none is.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        for number in numbers:
            try:
                return number, *self.restore(number, like)
            except InputError:
                if number == numbers[-1]:
                    raise
        raise AssertionError("no checkpoint to restore")

    def restore(self, number: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """State (shapes, dtypes and shardings as in `like`) and position of a checkpoint.

        Raises InputError where the checkpoint is damaged or holds another tree than `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
        )
        try:
            kept: Any = self._manager.restore(number, args=args)
        except Exception as error:  # orbax raises bare ones where a file is damaged
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            where = Path(str(self._manager.directory)) / str(number)
            raise InputError(
                f"{where}: damaged, or not a checkpoint of this run ({reason}); delete it or run "
                "without --resume"
            ) from error
        return kept.state, dict(kept.position)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def discard(directory: Path) -> None:
    """Removes checkpoints whose result is kept elsewhere, once every process is done with them."""
    this().barrier("checkpoints served")
    if this().main:
        shutil.rmtree(directory, ignore_errors=True)


def save_arrays(path: Path, tree: Nested, metadata: Mapping[str, str] | None = None) -> None:
    """Writes nested dicts of arrays as one safetensors file, names joined by "/", atomically."""
    write_safetensors(path, dict(_flatten(tree)), metadata)


def load_arrays(path: Path) -> dict[str, Any]:
    """Reads what `save_arrays` wrote. Raises InputError for a missing or damaged file."""
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot read the arrays: {error}; rerun its stage") from None
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = array
    return tree


def _flatten(tree: Nested, prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in tree.items():
        assert isinstance(name, str) and "/" not in name, f"cannot keep the name {name!r}"
        if isinstance(value, Mapping):
            leaves += _flatten(value, f"{prefix}{name}/")
        else:
            leaves.append((prefix + name, np.asarray(value)))
    return leaves
