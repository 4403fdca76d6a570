"""The two compiled programs of sampling and the state they work on.

`prefill` runs one chunk of prompts into their prefix slots. `decode` draws up to `Turn.steps`
tokens for every row slot inside one while_loop and returns early once enough rows have finished
for the host to refill them. Both update their donated caches in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from dpo4rec_jax.models import llama
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.sampling import filters
from dpo4rec_jax.sampling.cache import Decode, KeyValues, Prefill
from dpo4rec_jax.sampling.layout import Layout
from dpo4rec_jax.sampling.schedule import Schedule

STEPS = 16  # tokens of a row between two looks of the host, at the most
IDLE_SHARE = 16  # the host is called when one row in so many is idle and others wait

PRNG = "threefry2x32"  # the same draws whatever jax's default

State = TypeVar("State")
Caches = tuple[KeyValues, ...]  # one a layer


@flax.struct.dataclass
class Rows:
    """The state of the row slots."""

    token_XB: Int[Array, "X B"]  # fed at the next step
    position_XB: Int[Array, "X B"]
    length_XB: Int[Array, "X B"]  # tokens drawn
    limit_XB: Int[Array, "X B"]
    active_XB: Bool[Array, "X B"]
    key_XB2: UInt32[Array, "X B 2"]
    tokens_XBT: Int[Array, "X B T"]
    logps_XBT: Float[Array, "X B T"]  # where they are asked for, else margins

    @classmethod
    def idle(cls, layout: Layout) -> Rows:
        shape = (layout.shards, layout.rows)
        zeros = functools.partial(jnp.zeros, shape, jnp.int32)
        return cls(
            token_XB=zeros(),
            position_XB=zeros(),
            length_XB=zeros(),
            limit_XB=zeros(),
            active_XB=jnp.zeros(shape, bool),
            key_XB2=jnp.zeros((*shape, 2), jnp.uint32),
            tokens_XBT=jnp.zeros((*shape, layout.new_tokens), jnp.int32),
            logps_XBT=jnp.zeros((*shape, layout.new_tokens), jnp.float32),
        )


@flax.struct.dataclass
class Job:
    """What holds for all rows; traced, so another job of the same sizes compiles nothing."""

    settings: filters.Settings
    stop_ids_N: Int[Array, " N"]
    key_2: UInt32[Array, 2]  # of the seed and the round

    @classmethod
    def of(
        cls, settings: filters.Settings, stop_ids: tuple[int, ...], seed: int, round: int
    ) -> Job:
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), round)
        return cls(settings, jnp.array(stop_ids or (-1,), jnp.int32), jax.random.key_data(key))


@flax.struct.dataclass
class Turn:
    """What the host says at the start of a decode call: rows that begin, and who shares what."""

    fresh_XB: Bool[Any, "X B"]
    token_XB: Int[Any, "X B"]
    position_XB: Int[Any, "X B"]
    limit_XB: Int[Any, "X B"]
    prompt_id_XB: Int[Any, "X B"]  # with the sample and the job's key, what the draws come from
    sample_XB: Int[Any, "X B"]
    row_of_lane_XL: Int[Any, "X L"]
    lane_of_row_XB: Int[Any, "X B"]
    prefix_length_XG: Int[Any, "X G"]
    steps: Int[Any, ""]
    idle_rows: Int[Any, ""]  # return once so many rows have finished


def idle_turn(schedule: Schedule) -> Turn:
    """The host's word as the schedule stands, no row starting yet."""
    shape = schedule.lane_of_row_XB.shape
    waiting, num_rows = schedule.num_waiting > 0, schedule.lane_of_row_XB.size
    return Turn(
        fresh_XB=np.zeros(shape, bool),
        token_XB=np.zeros(shape, np.int32),
        position_XB=np.zeros(shape, np.int32),
        limit_XB=np.zeros(shape, np.int32),
        prompt_id_XB=np.zeros(shape, np.int32),
        sample_XB=np.zeros(shape, np.int32),
        # Copies: the device may still read these when the schedule writes its own.
        row_of_lane_XL=schedule.row_of_lane_XL.copy(),
        lane_of_row_XB=schedule.lane_of_row_XB.copy(),
        prefix_length_XG=schedule.prefix_length_XG.copy(),
        steps=np.int32(STEPS),
        idle_rows=np.int32(max(num_rows // IDLE_SHARE, 1) if waiting else num_rows),
    )


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How state lies on a mesh: shards along data and fsdp, key heads along tensor."""

    mesh: jax.sharding.Mesh

    @property
    def shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def of(self, leaf: Any) -> NamedSharding:
        """Of any array with the shards in front; caches are those with five axes."""
        batch = ("data", "fsdp")
        if leaf.ndim < 5 or leaf.shape[2] % self.mesh.shape["tensor"]:
            return NamedSharding(self.mesh, PartitionSpec(batch))
        return NamedSharding(self.mesh, PartitionSpec(batch, None, "tensor"))


def constrain(state: State, sharding: Sharding | None) -> State:
    """Keeps the state where it lies, so that donated buffers fit what comes back."""
    if sharding is None:
        return state
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding.of(leaf)), state
    )


@functools.partial(jax.jit, static_argnames=("config", "layout", "sharding"))
def empty(
    config: LlamaConfig, layout: Layout, sharding: Sharding | None
) -> tuple[Caches, Caches, Rows]:
    """Prefixes, suffixes and rows before a job; nothing larger than a shard is ever allocated."""
    state = (
        _caches(config, layout.shards, layout.prompts, layout.prompt_tokens),
        _caches(config, layout.shards, layout.rows, layout.new_tokens),
        Rows.idle(layout),
    )
    return constrain(state, sharding)


@functools.partial(jax.jit, static_argnames=("config", "layout", "sharding"))
def parking(config: LlamaConfig, layout: Layout, sharding: Sharding | None) -> Caches:
    """The parked prefix slots before a job."""
    caches = _caches(config, layout.shards, layout.parked, layout.prompt_tokens)
    return constrain(caches, sharding)


def _caches(config: LlamaConfig, shards: int, owners: int, tokens: int) -> Caches:
    size = (shards, owners, config.kv_heads, tokens, config.head_dim)
    return tuple(KeyValues.zeros(*size, config.dtype) for _ in range(config.layers))


@functools.partial(jax.jit, static_argnames=("config", "sharding"), donate_argnames="prefix")
def prefill(
    config: LlamaConfig,
    params: Any,
    prefix: Caches,
    tokens_XJT: Int[Array, "X J T"],
    slot_XJ: Int[Array, "X J"],
    offset_XJ: Int[Array, "X J"],
    valid_XJ: Bool[Array, "X J"],
    sharding: Sharding | None = None,
) -> Caches:
    """Writes one chunk of each of J prompts a shard into `slot_XJ` from token `offset_XJ` on."""
    T = tokens_XJT.shape[-1]
    position_BT = offset_XJ.reshape(-1, 1) + jnp.arange(T)[None]
    attention = Prefill(slot_XJ, offset_XJ, valid_XJ)
    prefix = llama.apply(config, params, tokens_XJT.reshape(-1, T), position_BT, attention, prefix)[
        1
    ]
    return constrain(prefix, sharding)


@functools.partial(jax.jit, static_argnames=("tokens", "sharding"), donate_argnames="prefix")
def spread(prefix: Caches, tokens: int, sharding: Sharding | None = None) -> Caches:
    """Gives every prefix slot the first so many tokens of slot 0 of its shard."""
    spread = tuple(
        KeyValues(
            key_XGKdS=one.key_XGKdS.at[..., :tokens].set(one.key_XGKdS[:, :1, ..., :tokens]),
            value_XGKSd=one.value_XGKSd.at[..., :tokens, :].set(
                one.value_XGKSd[:, :1, ..., :tokens, :]
            ),
        )
        for one in prefix
    )
    return constrain(spread, sharding)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="prefix")
def move(
    parked: Caches,
    prefix: Caches,
    source_X: Int[Array, " X"],
    target_X: Int[Array, " X"],
    valid_X: Bool[Array, " X"],
    sharding: Sharding | None = None,
) -> Caches:
    """Copies a parked prompt of each shard into a prefix slot, where `valid_X`."""

    def copy(parked_G: Array, prefix_G: Array, source: Array, target: Array, valid: Array) -> Array:
        held = jax.lax.dynamic_index_in_dim(prefix_G, target, keepdims=False)
        new = jnp.where(valid, parked_G[source], held)
        return jax.lax.dynamic_update_index_in_dim(prefix_G, new, target, axis=0)

    def copy_all(parked_XG: Array, prefix_XG: Array) -> Array:
        return jax.vmap(copy)(parked_XG, prefix_XG, source_X, target_X, valid_X)

    moved = jax.tree.map(copy_all, parked, prefix)
    return constrain(moved, sharding)


@functools.partial(
    jax.jit, static_argnames=("config", "sharding", "logps"), donate_argnames=("suffix", "rows")
)
def decode(
    config: LlamaConfig,
    params: Any,
    prefix: Caches,
    suffix: Caches,
    rows: Rows,
    turn: Turn,
    job: Job,
    sharding: Sharding | None = None,
    logps: bool = False,
) -> tuple[Caches, Rows, Array]:
    """Starts the turn's fresh rows and draws tokens until one of its limits.

    Returns suffixes and rows as they are then, and the number of steps taken.
    """
    rows = _begin(rows, turn, job)
    num_active = rows.active_XB.sum()

    def step(state: tuple[Array, Caches, Rows]) -> Any:
        index, suffix, rows = state
        suffix, rows = constrain((suffix, rows), sharding)
        attention = Decode(
            turn.row_of_lane_XL, turn.lane_of_row_XB, turn.prefix_length_XG, rows.length_XB
        )
        hidden_B1D, suffix = llama.apply(
            config,
            params,
            rows.token_XB.reshape(-1, 1),
            rows.position_XB.reshape(-1, 1),
            attention,
            tuple(zip(prefix, suffix, strict=True)),
        )
        logits_BV = llama.unembed(config, params, hidden_B1D[:, 0])
        return index + 1, suffix, _advance(rows, logits_BV, job, logps)

    def proceed(state: tuple[Array, Caches, Rows]) -> Array:
        index, _, rows = state
        now_active = rows.active_XB.sum()
        return (index < turn.steps) & (now_active > 0) & (num_active - now_active < turn.idle_rows)

    taken, suffix, rows = jax.lax.while_loop(proceed, step, (jnp.int32(0), suffix, rows))
    return *constrain((suffix, rows), sharding), taken


def _begin(rows: Rows, turn: Turn, job: Job) -> Rows:
    def row_key(prompt_id: Array, sample: Array) -> Array:
        key = jax.random.wrap_key_data(job.key_2, impl=PRNG)
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, prompt_id), sample))

    def renew(new: Array, old: Array) -> Array:
        fresh = turn.fresh_XB if new.ndim == 2 else turn.fresh_XB[..., None]
        return jnp.where(fresh, new, old)

    return dataclasses.replace(
        rows,
        token_XB=renew(turn.token_XB, rows.token_XB),
        position_XB=renew(turn.position_XB, rows.position_XB),
        length_XB=renew(jnp.zeros_like(rows.length_XB), rows.length_XB),
        limit_XB=renew(turn.limit_XB, rows.limit_XB),
        active_XB=rows.active_XB | turn.fresh_XB,
        key_XB2=renew(jax.vmap(jax.vmap(row_key))(turn.prompt_id_XB, turn.sample_XB), rows.key_XB2),
    )


def _advance(rows: Rows, logits_BV: Array, job: Job, logps: bool) -> Rows:
    """Draws a token for every active row; the others stand still."""
    shape_XB = rows.token_XB.shape
    key_B = jax.random.wrap_key_data(rows.key_XB2.reshape(-1, 2), impl=PRNG)
    key_B = jax.vmap(jax.random.fold_in)(key_B, rows.length_XB.reshape(-1))
    token_B = filters.draw(logits_BV, key_B, job.settings)
    token_XB = token_B.reshape(shape_XB)
    said = filters.token_logps if logps else filters.token_margins
    logp_XB = said(logits_BV, token_B).reshape(shape_XB)

    one_XB = rows.active_XB.astype(jnp.int32)
    length_XB = rows.length_XB + one_XB
    stopped_XB = (token_XB[..., None] == job.stop_ids_N[None, None]).any(axis=-1)
    index_11T = jnp.arange(rows.tokens_XBT.shape[-1])[None, None]
    here_XBT = (index_11T == rows.length_XB[..., None]) & rows.active_XB[..., None]
    return dataclasses.replace(
        rows,
        token_XB=jnp.where(rows.active_XB, token_XB, rows.token_XB),
        position_XB=rows.position_XB + one_XB,
        length_XB=length_XB,
        active_XB=rows.active_XB & ~stopped_XB & (length_XB < rows.limit_XB),
        tokens_XBT=jnp.where(here_XBT, token_XB[..., None], rows.tokens_XBT),
        logps_XBT=jnp.where(here_XBT, logp_XB[..., None], rows.logps_XBT),
    )
