"""The programs of the loop, of abstract arrays: the stages' own functions, nothing allocated.

Each of `sampling`, `alignment` and `reranking` gives the programs of a part at one batch size, so
that the largest that fits can be searched.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.models.attention import choose
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.rehearsal import ranking, theory
from dpo4rec_jax.rehearsal.chips import Machine
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.loader import Shape, batch_of
from dpo4rec_jax.runtime.loop import Programs, lower
from dpo4rec_jax.runtime.mesh import (
    BATCH,
    make_mesh,
    sampling_mesh,
    shardings,
    state_shardings,
)
from dpo4rec_jax.sampling import plan_layout, steps
from dpo4rec_jax.sampling.filters import Settings
from dpo4rec_jax.sampling.layout import Layout
from dpo4rec_jax.sampling.schedule import Schedule
from dpo4rec_jax.stages import align
from dpo4rec_jax.stages.tuning import Tuning
from dpo4rec_jax.weights.policy import Policy, shapes

Tree = Any
ROUNDED = 16  # padded lengths are multiples of it, as in runtime/loader.py


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function and what it stands for.

    `units` of `unit` are taken in by one call on all devices of the mesh, which runs `calls` times
    a step; `model_flops` is what the method needs for a call, recomputation left out, on all
    devices; `kernel_flops` what kernels compute that HLO does not show; `beside` are bytes a device
    that lie in memory meanwhile and are no argument of it.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    mesh: Mesh
    unit: str
    units: int
    model_flops: float
    calls: int = 1
    beside: float = 0.0
    kernel_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Part:
    """The programs of one part of the loop at one size, and the sizes that there are."""

    programs: tuple[Program, ...]
    what: str  # the size counts: the config key that sets it
    size: int
    multiple: int
    most: int


def abstract(tree: Tree, sharding_of: Any) -> Tree:
    """Shapes with shardings: a tree of those, or a function of a leaf."""
    if not callable(sharding_of):
        return jax.tree.map(_struct, tree, sharding_of)
    return jax.tree.map(lambda leaf: _struct(leaf, sharding_of(leaf)), tree)


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def bytes_a_device(tree: Tree) -> float:
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def alignment(
    config: Config, architecture: LlamaConfig, machine: Machine, size: int | None = None
) -> Part:
    """The DPO step over the longest rows that the config allows; the size is a microbatch's pairs.

    `size` None is the config's.
    """
    settings = config.align
    lora_config = settings.lora if settings.method == "lora" else None
    if lora_config is None:
        architecture = dataclasses.replace(architecture, param_dtype="float32")
    mesh = make_mesh(config.runtime.mesh, machine.devices)
    params = abstract(shapes(architecture), shardings(shapes(architecture), mesh))
    tuning = Tuning(
        policy=Policy(architecture, params, None, (), {}, {}),
        lora=lora_config,
        mesh=mesh,
        implementation=choose(config.runtime.attention, architecture, machine.platform),
        remat=settings.remat,
    )
    if size is not None:
        most = max(settings.batch_pairs, size)
        settings = settings.model_copy(update={"microbatch_pairs": size, "batch_pairs": most})
    size = align.microbatch_rows(settings, tuning)
    microbatches = math.ceil(settings.batch_pairs / size)
    schedule, optimizer = align.optimizer_of(settings, steps=1000)
    state = _training_state(tuning, optimizer, accumulating=microbatches > 1)
    frozen = None if lora_config is None else params
    batch = _batch_of_pairs(config, mesh, size)
    needed = theory.flops_of_pairs(architecture, _longest(config), size, full=lora_config is None)
    attention = size * theory.flops_of_attention_kernels(
        architecture, _longest(config), tuning.implementation, remat=settings.remat != "none"
    )
    functions = Programs(align.preference_loss(tuning, settings), optimizer, schedule).functions(
        accumulating=microbatches > 1
    )
    programs = []
    for name, function in functions.items():
        takes_in = name != "update"
        arguments = (state, frozen, batch) if takes_in else (state,)
        programs.append(
            Program(
                name=f"dpo {name}",
                lower=functools.partial(lower, function, *arguments),
                mesh=mesh,
                unit="pairs",
                units=size if takes_in else 0,
                model_flops=needed if takes_in else 0.0,
                calls=microbatches if takes_in else 1,
                beside=0.0 if takes_in else bytes_a_device(frozen),
                kernel_flops=attention if takes_in else 0.0,
            )
        )
    return Part(tuple(programs), "align.microbatch_pairs", size, tuning.row_multiple, 4096)


def _training_state(
    tuning: Tuning, optimizer: optax.GradientTransformation, accumulating: bool
) -> training.TrainState:
    """The state as `training.create` makes it, lying as `Tuning.place_state` places it."""
    assert tuning.mesh is not None
    architecture, params = tuning.policy.config, tuning.policy.params
    trainable = params
    if tuning.lora is not None:
        init = functools.partial(lora.init, architecture, tuning.lora)
        adapter = jax.eval_shape(init, jax.random.key(0))
        trainable = abstract(adapter, shardings(adapter, tuning.mesh))
    create = functools.partial(
        training.create,
        optimizer=optimizer,
        seed=0,
        figures=align.FIGURES if accumulating else None,
    )
    state = jax.eval_shape(create, trainable)
    return abstract(state, state_shardings(state, tuning.mesh))


def _longest(config: Config) -> Shape:
    """Tokens of the longest prompt and completion that the config allows, padded."""
    lengths = (config.policy.max_prompt_tokens, config.reason.max_new_tokens)
    return Shape(*(-(-length // ROUNDED) * ROUNDED for length in lengths))


def _batch_of_pairs(config: Config, mesh: Mesh, size: int) -> Tree:
    shape = _longest(config)
    pair = align.Pair(
        "", (0,) * shape.prompt, (0,) * shape.completion, (0,) * shape.completion, 0.0
    )
    rows = align.rows_of([pair])
    reference_BP = np.zeros((1, 2), np.float32)
    rows = dataclasses.replace(rows, extra={**rows.extra, "logp_reference_BP": reference_BP})
    return abstract(batch_of(rows, [0], shape, size), lambda _: NamedSharding(mesh, BATCH))


def sampling(
    config: Config, architecture: LlamaConfig, machine: Machine, size: int | None = None
) -> Part:
    """Prefill and decoding of one process on its own devices; the size is the rows of a shard.

    `size` None is what `reason.slots` or `reason.memory_gib` say.
    """
    mesh = sampling_mesh(config.runtime.mesh, machine.host)
    layout = _layout(config, architecture, mesh, size)
    params = _split(architecture, mesh)
    where = steps.Sharding(mesh) if mesh.size > 1 else None
    alone = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    state = jax.eval_shape(functools.partial(steps.empty, architecture, layout, None))
    prefix, suffix, rows = abstract(state, where.of if where else lambda _: alone)
    on_host = functools.partial(abstract, sharding_of=lambda _: None)
    # The sampler splits the stacks into layers, and the stage still holds the stacks.
    stacks = abstract(shapes(architecture), shardings(shapes(architecture), mesh))["layers"]

    programs = []
    for chunk, jobs in layout.chunks:
        if chunk > layout.prompt_tokens:
            continue
        shape = (layout.shards, jobs)
        indices = (np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
        chunks = on_host((np.zeros((*shape, chunk), np.int32), *indices))
        programs.append(
            Program(
                name=f"prefill of {jobs} x {chunk} tokens",
                lower=functools.partial(
                    steps.prefill.lower, architecture, params, prefix, *chunks, where
                ),
                mesh=mesh,
                unit="tokens",
                units=layout.shards * jobs * chunk,
                model_flops=theory.flops_of_prefill(
                    architecture, layout.prompt_tokens, chunk, layout.shards * jobs
                ),
                beside=bytes_a_device((suffix, rows, stacks)),
            )
        )
    turn = on_host(steps.idle_turn(Schedule(layout, [layout.prompt_tokens], [1])))
    job = on_host(jax.eval_shape(lambda: steps.Job.of(Settings.of(1.0, 0.9, 0), (0, 1, 2), 0, 0)))
    texts = layout.shards * layout.rows
    programs.append(
        Program(
            name="decode, a token",
            lower=functools.partial(
                steps.decode.lower, architecture, params, prefix, suffix, rows, turn, job, where
            ),
            mesh=mesh,
            unit="tokens",
            units=texts,
            model_flops=theory.flops_of_token(
                architecture, layout.prompt_tokens + layout.new_tokens // 2
            )
            * texts,
            beside=bytes_a_device(stacks),
        )
    )
    most = 4 * 256 if config.reason.slots is None else layout.rows
    return Part(tuple(programs), "rows a shard (reason.slots / shards)", layout.rows, 8, most)


def _layout(config: Config, architecture: LlamaConfig, mesh: Mesh, rows: int | None) -> Layout:
    """Of a job of full prompts, as many as keep all rows busy for several turns."""
    settings, shards = config.reason, mesh.shape["data"] * mesh.shape["fsdp"]
    slots = settings.slots if rows is None else rows * shards
    return plan_layout(
        architecture,
        [config.policy.max_prompt_tokens] * 512 * shards,
        settings.samples,
        settings.max_new_tokens,
        slots=slots,
        memory_gib=settings.memory_gib if rows is None else 1 << 20,
        mesh=mesh,
    )


def _split(architecture: LlamaConfig, mesh: Mesh) -> Tree:
    """Parameters as the sampler holds them: one dict a layer, each lying as in its stack, and
    kernels by rows."""
    stacked = shapes(architecture)
    where = shardings(stacked, mesh)
    split = jax.eval_shape(llama.split_layers, stacked)

    def of_layer(stack: Tree) -> Tree:
        if not isinstance(stack, dict):
            return NamedSharding(mesh, PartitionSpec(*stack.spec[1:]))
        lie = {name: of_layer(leaf) for name, leaf in stack.items()}
        if "kernel" in lie:
            by_column = lie.pop("kernel")
            lie["kernel_rows"] = NamedSharding(mesh, PartitionSpec(*reversed(by_column.spec)))
        return lie

    layer = of_layer(where["layers"])
    return {
        name: abstract(tree, layer if name.startswith("layer_") else where[name])
        for name, tree in split.items()
    }


def reranking(
    config: Config, architecture: LlamaConfig, machine: Machine, size: int | None = None
) -> Part:
    """An epoch of all re-rankers of an arm with knowledge, one device; the size: lists a batch."""
    device = machine.host[0]
    mesh = make_mesh({"data": 1}, [device])
    wanted = config.rank.batch_lists if size is None else size
    function, arguments, lists, steps = ranking.epoch(config, architecture, device, wanted)
    program = Program(
        name=f"rank, an epoch of {steps} steps",
        lower=functools.partial(function.lower, *arguments),
        mesh=mesh,
        unit="lists",
        units=lists,
        model_flops=0.0,
    )
    return Part((program,), "rank.batch_lists", wanted, 8, lists)


PARTS: dict[str, Callable[..., Part]] = {
    "sampling": sampling,
    "dpo": alignment,
    "rank": reranking,
}


def parts_of(names: str | None) -> list[str]:
    """Raises InputError for a part that is none."""
    chosen = list(PARTS) if names is None else names.split(",")
    for name in chosen:
        if name not in PARTS:
            raise InputError(f"--what {name}: unknown part; known: {', '.join(PARTS)}")
    return chosen
