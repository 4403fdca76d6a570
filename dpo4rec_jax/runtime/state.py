"""The state of a training run, and the two pure functions that move it: accumulate and update.

A loss here is a sum over examples, together with the sum of their weights. Microbatches add sums;
the update divides by the global weight once. So a step is the same whether its examples came in one
batch or in unequal parts, on one device or on many (a mean of means would not be).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, UInt32

from dpo4rec_jax.runtime.mesh import on_host

Tree = Any
Batch = Mapping[str, Any]
Scalar = Any  # an array without axes; its shape or sharding where the tree describes those


class Sums(NamedTuple):
    """What one microbatch adds up: loss and figures over its examples, and their weight."""

    loss: Scalar
    weight: Scalar
    figures: dict[str, Scalar]


# (trainable, frozen, batch, key) -> sums over the batch's real examples; `frozen` gets no gradient,
# `key` is for dropout.
Loss = Callable[[Tree, Tree, Batch, Array], Sums]


@flax.struct.dataclass
class Pending:
    """The sums of a step's microbatches so far."""

    gradient: Tree
    sums: Sums


@flax.struct.dataclass
class TrainState:
    """All that decides the rest of a run, apart from the data iterator's position."""

    trainable: Tree
    optimizer: Tree
    seed: Scalar
    step: Scalar  # optimizer steps taken, skipped ones included
    microbatch: Scalar  # microbatches seen, over the whole run
    skipped: Scalar  # steps skipped for a loss or gradient that was not finite
    skipped_in_a_row: Scalar
    pending: Any = None  # Pending; None where every step is one microbatch


def create(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    figures: tuple[str, ...] | None = None,
) -> TrainState:
    """A fresh state. `figures` (the names in `Sums.figures`) makes room for accumulation."""

    def zero() -> Array:
        return jnp.zeros((), jnp.int32)  # one buffer each: the same one cannot be donated twice

    return TrainState(
        trainable=trainable,
        optimizer=optimizer.init(trainable),
        seed=jnp.asarray(seed, jnp.uint32),
        step=zero(),
        microbatch=zero(),
        skipped=zero(),
        skipped_in_a_row=zero(),
        pending=None if figures is None else _nothing_pending(trainable, figures),
    )


def _nothing_pending(trainable: Tree, figures: tuple[str, ...]) -> Pending:
    loss, weight, *rest = (jnp.zeros((), jnp.float32) for _ in range(2 + len(figures)))
    gradient = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), trainable)
    return Pending(gradient, Sums(loss, weight, dict(zip(figures, rest, strict=True))))


def accumulate(loss: Loss, state: TrainState, frozen: Tree, batch: Batch) -> TrainState:
    """Adds one microbatch's gradient and sums, float32, to what is pending."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.microbatch)

    def total(trainable: Tree) -> tuple[Array, Sums]:
        sums = loss(trainable, frozen, batch, key)
        return sums.loss, sums

    gradient, sums = jax.grad(total, has_aux=True)(state.trainable)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    pending = Pending(gradient, sums)
    if state.pending is not None:
        pending = jax.tree.map(jnp.add, state.pending, pending)
    return dataclasses.replace(state, pending=pending, microbatch=state.microbatch + 1)


def update(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, state: TrainState
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step from the pending sums; the new state has nothing pending.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and is
    counted. Figures returned: the means of the sums, `weight`, `grad_norm` (before clipping),
    `learning_rate`, `skipped`, `skipped_in_a_row`.
    """
    pending = state.pending
    assert pending is not None
    weight = jnp.maximum(pending.sums.weight, 1e-20)
    # A product, which compilers form where it is used; a quotient they would write to memory.
    share = 1.0 / weight
    gradient = jax.tree.map(lambda leaf: leaf * share, pending.gradient)
    mean_loss = pending.sums.loss / weight
    grad_norm = optax.tree.norm(pending.gradient) / weight
    finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)
    told = optax.with_extra_args_support(optimizer)
    updates, moved = told.update(gradient, state.optimizer, state.trainable, global_norm=grad_norm)
    figures = {name: value / weight for name, value in pending.sums.figures.items()}
    new_state = dataclasses.replace(
        state,
        trainable=_where(finite, optax.apply_updates(state.trainable, updates), state.trainable),
        optimizer=_where(finite, moved, state.optimizer),
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        pending=jax.tree.map(jnp.zeros_like, pending),
    )
    return new_state, figures | {
        "loss": mean_loss,
        "weight": pending.sums.weight,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }


def _where(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o).astype(o.dtype), new, old)


def step(
    loss: Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, Array]]]:
    """A whole step from one microbatch, for states without room for accumulation."""

    def one_step(
        state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        state, figures = update(optimizer, schedule, accumulate(loss, state, frozen, batch))
        return dataclasses.replace(state, pending=None), figures

    return one_step


def fingerprint(tree: Tree) -> str:
    """Digest of all values of a tree of arrays, computed where they lie.

    Every leaf's bits are summed modulo 2^32 under two position-dependent weights, which integers
    allow in any order: the digest is the same under every sharding, and only 8 bytes a leaf travel
    to the host. It tells weights apart that differ by accident, not by an adversary.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sums = on_host(_sum_of_bits(jnp.asarray(leaf)))
        name = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}"
        digest.update(name.encode() + sums.tobytes())
    return digest.hexdigest()


@jax.jit
def _sum_of_bits(leaf: Array) -> UInt32[Array, " two"]:
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    weight = (index * jnp.uint32(2654435761)) ^ (index >> 15)
    return jnp.stack([(bits * (weight | 1)).sum(), ((bits ^ weight) * (2 * index + 1)).sum()])
