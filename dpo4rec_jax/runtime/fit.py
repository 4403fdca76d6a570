"""Training of many small models at once: an epoch is one compiled program over device data (on a
CPU, one for each model).

The members (axis R: seeds, and folds that must not see some examples) differ in their first
parameters, their keys and the examples that they draw; the step is the same function for all. An
epoch shuffles each member's examples on the device and scans over batches of indices. The best
parameters by a validation metric stay on the device, kept by member.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.mesh import MEMBERS, on_host, place
from dpo4rec_jax.runtime.optimizer import learning_rate_schedule

Tree = Any

# A program's static capacity is rounded up to this, so that few epochs compile anew.
CAPACITY_STEP = 128


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


@dataclass(frozen=True)
class Fitted:
    """The best parameters of every member, and how they got there."""

    params_R: Tree
    best_R: Float[np.ndarray, " R"]
    best_epoch_R: Int[np.ndarray, " R"]
    loss_ER: Float[np.ndarray, "E R"]
    validation_ER: Float[np.ndarray, "E R"]
    skipped_R: Int[np.ndarray, " R"]  # steps whose loss or gradient was not finite


class Diverged(InputError):
    """A member whose loss or gradient was not finite in too many steps in a row.

    `batches` are those steps, newest last: {"member", "epoch", "step", "examples"}; `fitted` is
    what all members were worth until then.
    """

    def __init__(self, batches: list[dict[str, Any]], fitted: Fitted):
        where = f"up to step {batches[-1]['step']} of epoch {batches[-1]['epoch']}"
        super().__init__(f"loss or gradient not finite in {len(batches)} steps in a row, {where}")
        self.batches, self.fitted = batches, fitted


def fit(
    problem: Problem,
    params_R: Tree,
    data: Tree,
    draws_RL: Bool[np.ndarray, "R L"],
    key: jax.Array,
    schedule: Schedule,
    on_epoch: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    max_skipped: int = 5,
    mesh: Mesh | None = None,
) -> Fitted:
    """Trains all members until each has run out of patience or of epochs.

    `draws_RL` says which of the L examples each member may see. Every member takes the same number
    of steps an epoch; one with fewer examples has batches padded with examples of weight 0, and its
    losses are means over the real ones. A member out of patience no longer changes its best, so
    its result does not depend on who trains beside it.

    A step whose loss or gradient is not finite leaves a member as it was; after `max_skipped` in a
    row Diverged is raised.

    On a `mesh` each device trains its share of the members, with all the data and without a word
    to the others.
    """
    num_members = len(draws_RL)
    pool_RT, steps = _pools(draws_RL, schedule.batch)
    state = first_state(params_R, key, schedule.optimizer(steps))
    if mesh is not None:
        pool_RT, state, data = _spread(mesh, num_members, pool_RT, state, data)

    def of_members(value: Tree) -> Any:
        return jax.tree.map(lambda leaf: leaf[:num_members], on_host(value))

    losses, validations, capacity = [], [], 0
    skipped = _Skipped(num_members, max_skipped)

    def fitted() -> Fitted:
        return Fitted(
            params_R=of_members(state.best_params),
            best_R=of_members(state.best),
            best_epoch_R=of_members(state.best_epoch),
            loss_ER=np.stack(losses),
            validation_ER=np.stack(validations),
            skipped_R=skipped.count_R,
        )

    for epoch in range(schedule.epochs):
        number = np.int32(epoch)
        fresh = problem.refresh(data, number)
        order_RSB = _shuffled(pool_RT, state.key, number, steps, mesh)
        before = capacity
        if problem.demand is not None:
            need = int(on_host(_largest_demand(problem.demand, fresh, order_RSB, mesh)).max())
            capacity = max(capacity, -(-need // CAPACITY_STEP) * CAPACITY_STEP)
        program = partial(run_epoch, problem, schedule, steps, capacity, mesh=mesh)
        state, loss_R, skipped_RS, validation_R = _run(
            program, state, fresh, order_RSB, number, mesh, new=epoch == 0 or capacity != before
        )
        losses.append(of_members(loss_R))
        validations.append(of_members(validation_R))
        if batches := skipped.too_many(epoch, of_members(skipped_RS), of_members(order_RSB)):
            raise Diverged(batches, fitted())
        if on_epoch is not None:
            on_epoch(epoch, losses[-1], validations[-1])
        if (of_members(state.stale) >= schedule.patience).all():
            break
    return fitted()


class _Skipped:
    """Counts skipped steps, in all and in a row, over the epochs."""

    def __init__(self, members: int, most: int):
        self.count_R = np.zeros(members, np.int64)
        self._most = most
        self._rows: list[list[dict[str, Any]]] = [[] for _ in range(members)]  # in a row, up to now

    def too_many(
        self, epoch: int, skipped_RS: np.ndarray, order_RSB: np.ndarray
    ) -> list[dict[str, Any]]:
        """The batches of a member that skipped too many in a row by now; empty without one."""
        self.count_R += skipped_RS.sum(1)
        for member, skipped_S in enumerate(skipped_RS):
            row = self._rows[member]
            if not skipped_S.any():
                row.clear()
                continue
            for step, skipped in enumerate(skipped_S):
                if not skipped:
                    row.clear()
                    continue
                index_B = order_RSB[member, step]
                examples = index_B[index_B >= 0].tolist()
                named = {"member": member, "epoch": epoch, "step": step, "examples": examples}
                row.append(named)
                if len(row) == self._most:
                    return row
        return []


def _spread(
    mesh: Mesh, num_members: int, pool_RT: jax.Array, state: Member, data: Tree
) -> tuple[jax.Array, Member, Tree]:
    """Members over the devices, as many on each: copies of the first ones fill up. Data whole."""
    size = -(-num_members // mesh.size) * mesh.size
    index_R = np.arange(size) % num_members
    own, whole = NamedSharding(mesh, MEMBERS), NamedSharding(mesh, PartitionSpec())

    def spread(value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return place(np.asarray(value)[index_R], own)
        bits = place(np.asarray(jax.random.key_data(value))[index_R], own)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(value))

    placed = jax.tree.map(lambda value: place(value, whole), data)
    return spread(pool_RT), jax.tree.map(spread, state), placed


def _each_device(function: Callable, mesh: Mesh | None, whole: int) -> Callable:
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


def _pools(draws_RL: np.ndarray, batch: int) -> tuple[jax.Array, int]:
    """Each member's example indices, padded with -1 to a whole number of batches."""
    largest = int(draws_RL.sum(1).max(initial=0))
    assert largest > 0, "no member has an example to learn from"
    batch = min(batch, largest)
    steps = -(-largest // batch)
    pool_RT = np.full((len(draws_RL), steps * batch), -1, np.int32)
    for pool_T, draws_L in zip(pool_RT, draws_RL, strict=True):
        own = np.flatnonzero(draws_L)
        pool_T[: len(own)] = own
    return jnp.asarray(pool_RT), steps


@partial(jax.jit, static_argnums=(3, 4))
def _shuffled(
    pool_RT: jax.Array, key_R: jax.Array, epoch: jax.Array, steps: int, mesh: Mesh | None
) -> jax.Array:
    """Batches of an epoch; the padding is shuffled in, so that all batches are about as full."""

    def one(pool_T, key, epoch):
        bits_T = jax.random.bits(jax.random.fold_in(key, 2 * epoch), pool_T.shape)
        return jax.lax.sort_key_val(bits_T, pool_T)[1].reshape(steps, -1)

    shuffle = jax.vmap(one, in_axes=(0, 0, None))
    return _each_device(shuffle, mesh, whole=1)(pool_RT, key_R, epoch)


@partial(jax.jit, static_argnums=(0, 3))
def _largest_demand(
    demand: Callable, data: Tree, order_RSB: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """The largest of each device's members."""

    def largest(order_RSB: jax.Array, data: Tree) -> jax.Array:
        flat = order_RSB.reshape(-1, order_RSB.shape[-1])
        need_x = jax.lax.map(lambda index_B: demand(data, jnp.maximum(index_B, 0)), flat)
        return need_x.max(keepdims=True)

    return _each_device(largest, mesh, whole=1)(order_RSB, data)


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
    return _each_device(train_all, mesh, whole=2)(state_R, order_RSB, data, epoch)


def _run(
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
