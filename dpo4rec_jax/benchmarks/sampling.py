"""Sampling: prefill and decode apart, the parts of a decode step, and a whole job.

The floor of each is what the machine's measured peaks allow for its arithmetic and its traffic:
every weight read once a step, each resident prompt's keys and values once, each row's own once.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo4rec_jax.benchmarks.machine import Machine, seconds
from dpo4rec_jax.benchmarks.policies import policy_of
from dpo4rec_jax.config import Config
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.sampling import Figures, Layout, filters, plan_layout, steps, stream
from dpo4rec_jax.sampling.cache import Decode
from dpo4rec_jax.sampling.layout import bytes_token
from dpo4rec_jax.sampling.schedule import Schedule
from dpo4rec_jax.weights import Policy

PROMPT_TOKENS = 520  # an ML-1M prompt with a window of 30
STEPS = 8  # of a timed decode call


def measure(config: Config, machine: Machine) -> dict[str, Any]:
    policy = policy_of(config)
    length = min(PROMPT_TOKENS, config.policy.max_prompt_tokens)
    rows = config.reason.slots or 32
    num_prompts = max(2 * rows // config.reason.samples, 1)
    layout = plan_layout(
        policy.config,
        [length] * num_prompts,
        config.reason.samples,
        config.reason.max_new_tokens,
        slots=rows,
        memory_gib=config.reason.memory_gib,
    )
    return {
        "layout": vars(layout),
        "prefill": _prefill(policy, layout, machine),
        "decode": _decode(policy, layout, machine, config),
        "job": _job(policy, layout, config, length, num_prompts),
    }


def _prefill(policy: Policy, layout: Layout, machine: Machine) -> dict[str, Any]:
    """One call of each size, at the end of a prompt."""
    config, params = policy.config, llama.split_layers(policy.params)
    figures = {}
    for size, jobs in layout.chunks:
        prefix = steps.empty(config, layout, None)[0]
        offset = max(layout.prompt_tokens - size, 0)
        if size > layout.prompt_tokens:
            continue
        tokens_1JT = np.zeros((1, jobs, size), np.int32)
        slot_1J = np.arange(jobs)[None] % layout.prompts
        place = (slot_1J, np.full((1, jobs), offset), np.ones((1, jobs), bool))

        def run(tokens_1JT=tokens_1JT, place=place, held=[prefix]) -> Any:  # noqa: B006
            held[0] = steps.prefill(config, params, held[0], tokens_1JT, *place)
            return held[0]

        began = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - began
        taken = seconds(run)
        flops = jobs * size * (_layer_flops(config) + _attention_flops(config, offset + size // 2))
        floor = machine.floor(flops, _layer_bytes(config))
        figures[f"chunk_{size}"] = {
            "compile_seconds": first - taken,
            "seconds": taken,
            "tokens_per_second": jobs * size / taken,
            "flops_per_second": flops / taken,
            "share_of_floor": floor / taken,
        }
    return figures


def _decode(policy: Policy, layout: Layout, machine: Machine, config: Config) -> dict[str, Any]:
    """A step with every row running, half of its suffix filled; and what its parts take alone."""
    state = _Step(policy, layout, config)
    architecture, rows = policy.config, layout.rows
    context = layout.prompt_tokens + layout.new_tokens // 2
    unembed_flops = 2 * architecture.width * architecture.vocab_size
    per_row = _layer_flops(architecture) + _attention_flops(architecture, context) + unembed_flops
    item = jnp.dtype(architecture.param_dtype).itemsize
    weights = _layer_bytes(architecture) + architecture.width * architecture.vocab_size * item
    resident = min(-(-rows // layout.samples), layout.prompts)
    tokens = resident * layout.prompt_tokens + rows * layout.new_tokens // 2
    moved = weights + tokens * bytes_token(architecture)
    whole = state.seconds(Decode, unembed=True, draw=True)
    layers = state.seconds(_NoAttention, unembed=False, draw=False)
    attended = state.seconds(Decode, unembed=False, draw=False)
    unembedded = state.seconds(_NoAttention, unembed=True, draw=False)
    return {
        "compile_seconds": state.compile_seconds,
        "step_seconds": whole,
        "tokens_per_second": rows / whole,
        "flops_per_second": rows * per_row / whole,
        "bytes_per_second": moved / whole,
        "share_of_floor": machine.floor(rows * per_row, moved) / whole,
        "parts_seconds": {
            "projections": layers,
            "attention": attended - layers,
            "unembedding": unembedded - layers,
            "drawing": whole - attended - (unembedded - layers),
        },
    }


@flax.struct.dataclass
class _NoAttention(Decode):
    """Keeps every projection alive and attends to nothing."""

    def __call__(self, query_BTHd, key_BTKd, value_BTKd, position_BT, cache_layer, window=None):
        own_BT11 = (key_BTKd + value_BTKd).sum(axis=(2, 3), keepdims=True)
        return query_BTHd + own_BT11, cache_layer[1]


class _Step:
    """Times decode steps of which parts are left out."""

    def __init__(self, policy: Policy, layout: Layout, config: Config):
        self._config, self._layout = policy.config, layout
        self._params = llama.split_layers(policy.params)
        self._prefix, self._suffix, _ = steps.empty(policy.config, layout, None)
        schedule = Schedule(layout, [layout.prompt_tokens] * layout.prompts)
        while schedule.prefill_jobs():
            pass
        schedule.start_rows()
        self._turn = steps.idle_turn(schedule)
        reason = config.reason
        self._settings = filters.Settings.of(reason.temperature, reason.top_p, reason.top_k)
        self.compile_seconds = 0.0

    def seconds(self, attention: type[Decode], *, unembed: bool, draw: bool) -> float:
        """Of one step."""

        def run() -> Array:
            self._suffix, token_B = _steps(
                self._config,
                attention,
                (unembed, draw),
                self._params,
                self._prefix,
                self._suffix,
                self._turn,
                self._settings,
            )
            return token_B

        began = time.perf_counter()
        run().block_until_ready()
        first = time.perf_counter() - began
        taken = seconds(run)
        self.compile_seconds = max(self.compile_seconds, first - taken)
        return taken / STEPS


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _steps(config, attention, parts, params, prefix, suffix, turn, settings):
    unembed, draw = parts
    shape_XB = turn.lane_of_row_XB.shape
    half = suffix[0].key_XGKdS.shape[-1] // 2
    key_B = jax.random.split(jax.random.key(0), turn.lane_of_row_XB.size)

    def step(index: Array, state: tuple[Any, Array]) -> tuple[Any, Array]:
        suffix, token_B = state
        length_XB = jnp.full(shape_XB, half)
        strategy = attention(
            turn.row_of_lane_XL, turn.lane_of_row_XB, turn.prefix_length_XG, length_XB
        )
        position_B1 = jnp.full((token_B.size, 1), half)
        caches = tuple(zip(prefix, suffix, strict=True))
        hidden, suffix = llama.apply(
            config, params, token_B[:, None], position_B1, strategy, caches
        )
        if not unembed:
            return suffix, jnp.abs(hidden[:, 0, 0]).astype(jnp.int32) % config.vocab_size
        logits_BV = llama.unembed(config, params, hidden[:, 0])
        if not draw:
            return suffix, jnp.abs(logits_BV.max(axis=-1)).astype(jnp.int32) % config.vocab_size
        token_B = filters.draw(logits_BV, jax.vmap(jax.random.fold_in)(key_B, token_B), settings)
        margin_B = filters.token_margins(logits_BV, token_B)
        return suffix, jnp.where(margin_B > 0, 0, token_B)

    token_B = jnp.zeros(turn.lane_of_row_XB.size, jnp.int32)
    return jax.lax.fori_loop(0, STEPS, step, (suffix, token_B))


def _job(
    policy: Policy, layout: Layout, config: Config, length: int, num_prompts: int
) -> dict[str, Any]:
    """Everything from ids to texts, compiled before; no row stops before its limit."""
    rng = np.random.default_rng(config.seed)
    prompts = rng.integers(0, policy.config.vocab_size, (num_prompts, length)).tolist()
    reason, figures = config.reason, Figures()
    settings = {"temperature": reason.temperature, "top_p": reason.top_p, "top_k": reason.top_k}
    limit_PN = np.full((num_prompts, layout.samples), layout.new_tokens)
    list(stream(policy, prompts[:1], layout, limit_PN=np.ones((1, layout.samples), int)))
    began = time.perf_counter()
    for _ in stream(policy, prompts, layout, limit_PN=limit_PN, figures=figures, **settings):
        pass
    taken = time.perf_counter() - began
    return {
        "prompts": num_prompts,
        "seconds": taken,
        "tokens_per_second": figures.tokens / taken,
        "slots_in_use": figures.tokens / (figures.decode_steps * layout.rows),
    }


def _layer_parameters(config: LlamaConfig) -> int:
    """Weights of all matrix products but the unembedding."""
    attention = config.width * config.head_dim * 2 * (config.heads + config.kv_heads)
    return config.layers * (attention + 3 * config.width * config.hidden)


def _layer_flops(config: LlamaConfig) -> int:
    """Of one token."""
    return 2 * _layer_parameters(config)


def _layer_bytes(config: LlamaConfig) -> int:
    return _layer_parameters(config) * jnp.dtype(config.param_dtype).itemsize


def _attention_flops(config: LlamaConfig, context: int) -> int:
    """Of one token that sees so many."""
    return 4 * config.layers * config.heads * config.head_dim * context
