"""Training of many small models at once, from epoch to epoch.

The members (axis R: seeds, and folds that must not see some examples) are trained by `epoch`'s
program. What an epoch needs is drawn on the device while the one before runs: data anew, where a
problem draws it, and each member's examples, shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.epoch import (
    Member,
    Problem,
    Schedule,
    Tree,
    each_device,
    first_state,
    run_epoch,
    run_members,
)
from dpo4rec_jax.runtime.mesh import MEMBERS, on_host, place

T = TypeVar("T")

# A program's static capacity is rounded up to this, so that few epochs compile anew.
CAPACITY_STEP = 128


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

    key_R = jnp.copy(state.key)  # the state is donated
    draw = partial(_drawn, problem, data, pool_RT, key_R, steps=steps, mesh=mesh)
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

    for epoch, (fresh, order_RSB, need) in enumerate(_one_ahead(draw, schedule.epochs)):
        before = capacity
        if need is not None:
            largest = int(on_host(need).max())
            capacity = max(capacity, -(-largest // CAPACITY_STEP) * CAPACITY_STEP)
        program = partial(run_epoch, problem, schedule, steps, capacity, mesh=mesh)
        new = epoch == 0 or capacity != before
        state, loss_R, skipped_RS, validation_R = run_members(
            program, state, fresh, order_RSB, np.int32(epoch), mesh, new=new
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


def _drawn(
    problem: Problem,
    data: Tree,
    pool_RT: jax.Array,
    key_R: jax.Array,
    epoch: int,
    *,
    steps: int,
    mesh: Mesh | None,
) -> tuple[Tree, jax.Array, jax.Array | None]:
    """The data of an epoch, its batches, and what they demand."""
    number = np.int32(epoch)
    fresh = problem.refresh(data, number)
    order_RSB = _shuffled(pool_RT, key_R, number, steps, mesh)
    if problem.demand is None:
        return fresh, order_RSB, None
    return fresh, order_RSB, _largest_demand(problem.demand, fresh, order_RSB, mesh)


def _one_ahead(draw: Callable[[int], T], epochs: int) -> Iterator[T]:
    """What is drawn for each epoch, the next while one runs: from one thread a CPU would do one
    after the other."""
    with ThreadPoolExecutor(1) as ahead:
        drawn = ahead.submit(draw, 0)
        for epoch in range(epochs):
            now = drawn.result()
            if epoch + 1 < epochs:
                drawn = ahead.submit(draw, epoch + 1)
            yield now


@partial(jax.jit, static_argnums=(3, 4))
def _shuffled(
    pool_RT: jax.Array, key_R: jax.Array, epoch: jax.Array, steps: int, mesh: Mesh | None
) -> jax.Array:
    """Batches of an epoch; the padding is shuffled in, so that all batches are about as full."""

    def one(pool_T, key, epoch):
        bits_T = jax.random.bits(jax.random.fold_in(key, 2 * epoch), pool_T.shape)
        return jax.lax.sort_key_val(bits_T, pool_T)[1].reshape(steps, -1)

    shuffle = jax.vmap(one, in_axes=(0, 0, None))
    return each_device(shuffle, mesh, whole=1)(pool_RT, key_R, epoch)


@partial(jax.jit, static_argnums=(0, 3))
def _largest_demand(
    demand: Callable, data: Tree, order_RSB: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """The largest of each device's members."""

    def largest(order_RSB: jax.Array, data: Tree) -> jax.Array:
        flat = order_RSB.reshape(-1, order_RSB.shape[-1])
        need_x = jax.lax.map(lambda index_B: demand(data, jnp.maximum(index_B, 0)), flat)
        return need_x.max(keepdims=True)

    return each_device(largest, mesh, whole=1)(order_RSB, data)
