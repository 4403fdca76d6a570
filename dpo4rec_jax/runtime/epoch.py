"""An epoch of many small models as one compiled program over device data (on a CPU, one for each
model).

The members (axis R) differ in their parameters, their keys and the examples that they draw; the
step is the same function for all. The best parameters by a validation metric stay on the device,
kept by member.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from dpo4rec_jax.runtime.mesh import MEMBERS
from dpo4rec_jax.runtime.optimizer import learning_rate_schedule

Tree = Any


@dataclass(frozen=True)
class Problem:
    """What is fitted, as pure functions of one member. Hashable, so programs are compiled once.

    `loss(params, data, drawn, index_B, key, capacity) -> loss_B` of the examples at `index_B`.
    `validate(params, data) -> scalar`, larger is better.
    `refresh(data, epoch) -> data`, once an epoch for all members: `fit`'s data, drawn anew.
    `draw(data, key) -> drawn`, once an epoch: what its random choices need.
    `demand(data, index_B) -> integer` is the static size that a batch needs (distinct items, say);
    the largest of an epoch, rounded up, is the `capacity` that `loss` is compiled for.
    """

    loss: Callable[..., jax.Array]
    validate: Callable[..., jax.Array]
    refresh: Callable[[Tree, np.int32], Tree] = lambda data, epoch: data
    draw: Callable[[Tree, jax.Array], Tree] = lambda data, key: ()
    demand: Callable[..., jax.Array] | None = None


@dataclass(frozen=True)
class Schedule:
    """How long, how fast. `patience` is in epochs without a better validation metric."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    patience: int = 3

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        schedule = learning_rate_schedule(
            self.learning_rate,
            steps * self.epochs,
            warmup_fraction=self.warmup_fraction,
            decay=self.decay,
        )
        # On one flat vector: a kernel instead of one a leaf, in compiling as in running.
        return optax.flatten(optax.adamw(schedule, weight_decay=self.weight_decay))


@struct.dataclass
class Member:
    """All that one member carries from epoch to epoch; stacked over members on axis 0."""

    params: Tree
    optimizer: Tree
    best_params: Tree
    best: jax.Array  # best validation metric so far
    best_epoch: jax.Array
    stale: jax.Array  # epochs since the best
    key: jax.Array


def each_device(function: Callable, mesh: Mesh | None, whole: int) -> Callable:
    """A function of stacked members, on a mesh run by each device on its own; the last `whole`
    arguments are the same for all of them."""
    if mesh is None:
        return function

    def on_devices(*arguments: Any) -> Any:
        own = [MEMBERS] * (len(arguments) - whole)
        specs = (*own, *[PartitionSpec()] * whole)
        # No collective is in it, so there is nothing to check (and flax's scans fail the check).
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=MEMBERS, check_vma=False
        )(*arguments)

    return on_devices


def first_state(params_R: Tree, key: jax.Array, optimizer: optax.GradientTransformation) -> Member:
    """All members before their first epoch; the parameters given stay the caller's."""
    num_members = len(jax.tree.leaves(params_R)[0])
    return Member(
        params=jax.tree.map(jnp.copy, params_R),  # donated to the first epoch
        optimizer=jax.vmap(optimizer.init)(params_R),
        best_params=jax.tree.map(jnp.copy, params_R),
        best=jnp.full((num_members,), -jnp.inf, jnp.float32),
        best_epoch=jnp.full((num_members,), -1, jnp.int32),
        stale=jnp.zeros((num_members,), jnp.int32),
        key=jax.random.split(key, num_members),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="mesh", donate_argnums=4)
def run_epoch(
    problem: Problem,
    schedule: Schedule,
    steps: int,
    capacity: int,
    state_R: Member,
    data: Tree,
    order_RSB: jax.Array,
    epoch: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Member, jax.Array, jax.Array, jax.Array]:
    """One pass of every member over its batches: the new state, mean losses of the steps taken,
    which steps were skipped, validation metrics."""
    optimizer = schedule.optimizer(steps)

    def train(state: Member, order_SB: jax.Array, data: Tree, epoch: jax.Array):
        epoch_key = jax.random.fold_in(state.key, 2 * epoch + 1)
        drawn = problem.draw(data, epoch_key)

        def batch_loss(params, index_B, step_key):
            real_B = index_B >= 0
            loss_B = problem.loss(params, data, drawn, jnp.maximum(index_B, 0), step_key, capacity)
            return jnp.where(real_B, loss_B, 0.0).sum() / jnp.maximum(real_B.sum(), 1)

        def step(carry, now):
            params, moments = carry
            index_B, number = now
            step_key = jax.random.fold_in(epoch_key, number + 1)
            loss, grads = jax.value_and_grad(batch_loss)(params, index_B, step_key)
            updates, moved = optimizer.update(grads, moments, params)
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            new = (optax.apply_updates(params, updates), moved)
            kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, carry)
            return kept, (loss, finite)

        carry = (state.params, state.optimizer)
        numbered = (order_SB, jnp.arange(steps))
        (params, moments), (loss_S, finite_S) = jax.lax.scan(step, carry, numbered)
        validation = problem.validate(params, data)
        state = replace(state, params=params, optimizer=moments)
        state = _keep_best(state, validation, epoch, schedule.patience)
        loss = jnp.where(finite_S, loss_S, 0.0).sum() / finite_S.sum()
        return state, loss, ~finite_S, validation

    train_all = jax.vmap(train, in_axes=(0, 0, None, None))
    return each_device(train_all, mesh, whole=2)(state_R, order_RSB, data, epoch)


def run_members(
    program: Callable[..., tuple[Member, jax.Array, jax.Array, jax.Array]],
    state_R: Member,
    data: Tree,
    order_RSB: jax.Array,
    epoch: np.int32,
    mesh: Mesh | None,
    *,
    new: bool,
) -> tuple[Member, jax.Array, jax.Array, jax.Array]:
    """`run_epoch` of all members: one program, but on a CPU one for each, as many at once as there
    are cores. A member's products are too small to be split, so that one program of all leaves the
    other cores idle. A `new` program is compiled by the first member alone.
    """
    members = len(order_RSB)
    if mesh is not None or members == 1 or jax.default_backend() != "cpu":
        return program(state_R, data, order_RSB, epoch)

    def one(member: int) -> tuple[Member, jax.Array, jax.Array, jax.Array]:
        own = slice(member, member + 1)
        state, order_1SB = jax.tree.map(lambda leaf: leaf[own], (state_R, order_RSB))
        return jax.block_until_ready(program(state, data, order_1SB, epoch))

    first = [one(0)] if new else []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = [*first, *pool.map(one, range(len(first), members))]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def _keep_best(state: Member, validation: jax.Array, epoch: jax.Array, patience: int) -> Member:
    better = (validation > state.best) & (state.stale < patience)
    kept = jax.tree.map(
        lambda new, old: jnp.where(better, new, old), state.params, state.best_params
    )
    return replace(
        state,
        best_params=kept,
        best=jnp.where(better, validation, state.best),
        best_epoch=jnp.where(better, epoch, state.best_epoch),
        stale=jnp.where(better, 0, state.stale + 1),
    )
