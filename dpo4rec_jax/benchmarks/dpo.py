"""Alignment: a DPO step at the config's batch, its reference pass, and their distance to the floor.

MFU is the arithmetic that the method needs (rehearsal/theory.py: forward and backward of the real
tokens, recomputation left out, attention counted exactly) a second, over the machine's measured
peak. Bytes moved and memory are the compiled programs' own figures.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo4rec_jax.benchmarks.machine import Machine, seconds
from dpo4rec_jax.benchmarks.policies import policy_of
from dpo4rec_jax.config import AlignConfig, Config
from dpo4rec_jax.models.attention import choose
from dpo4rec_jax.rehearsal.theory import flops_of_pairs
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.loader import Rows, Shape, batch_of
from dpo4rec_jax.runtime.loop import Programs, compiled, lower
from dpo4rec_jax.runtime.state import TrainState
from dpo4rec_jax.stages import align
from dpo4rec_jax.stages.tuning import Tuning

PROMPT_TOKENS = 520  # an ML-1M prompt with a window of 30
ROUNDED = 16  # as padded lengths are, so that every token of the benchmark is real


def measure(config: Config, machine: Machine) -> dict[str, Any]:
    """Of one device. Donated state is handed from call to call, as in a run."""
    settings, tuning = config.align, _tuning(config)
    shape = Shape(
        _rounded(min(PROMPT_TOKENS, config.policy.max_prompt_tokens)),
        _rounded(config.reason.max_new_tokens),
    )
    size = align.microbatch_rows(settings, tuning)
    batch = tuning.place(_batch(config, tuning, shape, size))
    reference = tuning.compiled_policy_logps.lower(tuning.policy.params, batch).compile()
    reference_seconds = seconds(lambda: reference(tuning.policy.params, batch))
    figures = _step(settings, tuning, batch, shape, size, machine)
    return {
        "pairs_a_step": settings.batch_pairs,
        "pairs_a_microbatch": size,
        "prompt_tokens": shape.prompt,
        "completion_tokens": shape.completion,
        "reference_pairs_per_second": size / reference_seconds,
        **figures,
    }


def _rounded(tokens: int) -> int:
    return max(tokens // ROUNDED, 1) * ROUNDED


def _tuning(config: Config) -> Tuning:
    policy = policy_of(config)
    lora_config = config.align.lora if config.align.method == "lora" else None
    if lora_config is None:  # weights that move are held in float32
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), policy.params)
        architecture = dataclasses.replace(policy.config, param_dtype="float32")
        policy = dataclasses.replace(policy, params=params, config=architecture)
    implementation = choose(config.runtime.attention, policy.config)
    return Tuning(policy, lora_config, None, implementation, config.align.remat)


def _batch(config: Config, tuning: Tuning, shape: Shape, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(config.seed)
    vocabulary = tuning.policy.config.vocab_size
    prompts = rng.integers(0, vocabulary, (size, shape.prompt)).tolist()
    completions = rng.integers(0, vocabulary, (size, 2, shape.completion)).tolist()
    zeros = {"score_gap_B": np.zeros(size), "logp_reference_BP": np.zeros((size, 2))}
    extra = {name: value.astype(np.float32) for name, value in zeros.items()}
    return batch_of(Rows(prompts, completions, extra), range(size), shape, size)


def _step(
    settings: AlignConfig,
    tuning: Tuning,
    batch: dict[str, jax.Array],
    shape: Shape,
    size: int,
    machine: Machine,
) -> dict[str, Any]:
    """A whole optimizer step: its microbatches and its update."""
    microbatches = -(-settings.batch_pairs // size)
    schedule, optimizer = align.optimizer_of(settings, steps=1000)
    programs = Programs(align.preference_loss(tuning, settings), optimizer, schedule)
    trainable, frozen = tuning.start(0)
    pending = align.FIGURES if microbatches > 1 else None
    state = training.create(trainable, optimizer, 0, figures=pending)
    take_in, *update = programs.functions(accumulating=microbatches > 1).values()

    began = time.perf_counter()
    executables = [compiled(lower(take_in, state, frozen, batch))]
    executables += [compiled(lower(function, state)) for function in update]
    compile_seconds = time.perf_counter() - began
    held = [state]
    del state, trainable

    def taken(program: Any, *arguments: Any) -> float:
        def call() -> TrainState:
            held[0] = program(held[0], *arguments)[0]
            return held[0]

        jax.block_until_ready(call())
        return seconds(call, repeats=3)

    microbatch_seconds = taken(executables[0], frozen, batch)
    update_seconds = sum(map(taken, executables[1:]))
    step_seconds = microbatches * microbatch_seconds + update_seconds
    flops = flops_of_pairs(tuning.policy.config, shape, size, full=tuning.lora is None)
    pairs = microbatches * size
    moved = [_bytes_moved(program) for program in executables]
    return {
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "microbatch_seconds": microbatch_seconds,
        "update_seconds": update_seconds,
        "pairs_per_second": pairs / step_seconds,
        "tokens_per_second": pairs * (shape.prompt + 2 * shape.completion) / step_seconds,
        "model_flops_per_second": microbatches * flops / step_seconds,
        "mfu": microbatches * flops / step_seconds / machine.flops_per_second,
        "bytes_moved_a_step": microbatches * moved[0] + sum(moved[1:]),
        "peak_bytes": max(map(_peak_bytes, executables)),
    }


def _bytes_moved(program: Any) -> float:
    return program.cost_analysis()["bytes accessed"]


def _peak_bytes(program: Any) -> int:
    """Arguments, results that take no argument's place, and temporaries."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
