"""A policy in training, as stages align and warmup see it: what moves, what stays, how it is kept.

Either every weight moves, held in float32 and computed in the policy's dtype, or adapters move
beside a base that is never copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from dpo4rec_jax.config import Config, LoraConfig
from dpo4rec_jax.models import lora
from dpo4rec_jax.models.attention import Implementation, choose
from dpo4rec_jax.models.llama import Remat
from dpo4rec_jax.runtime import mesh as meshes
from dpo4rec_jax.runtime.loader import Microbatch, Rows, batch_of
from dpo4rec_jax.runtime.mesh import BATCH, make_mesh, shardings
from dpo4rec_jax.runtime.state import Batch, TrainState, Tree
from dpo4rec_jax.sampling.scoring import completion_token_logps
from dpo4rec_jax.weights import Policy, load_policy
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.peft import save_adapter
from dpo4rec_jax.weights.policy import resolve_dtypes


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`lora` None trains every weight. `mesh` None: one device."""

    policy: Policy
    lora: LoraConfig | None
    mesh: Mesh | None
    implementation: Implementation = "xla"
    remat: Remat = "full"

    def start(self, seed: int) -> tuple[Tree, Tree]:
        """(trainable, frozen) parameters; the policy they make is, exactly, the one given.

        Where every weight moves these are the policy's own buffers, not a copy: training donates
        them, and the policy given is no more.
        """
        if self.lora is None:
            return self.policy.params, None
        adapter = lora.init(self.policy.config, self.lora, jax.random.key(seed))
        if self.mesh is None:
            return jax.device_put(adapter, jax.local_devices()[0]), self.policy.params
        return meshes.place(adapter, shardings(adapter, self.mesh)), self.policy.params

    def token_logps(
        self, trainable: Tree, frozen: Tree, batch: Batch, key: Array | None = None
    ) -> Float[Array, "B C T"]:
        """Log-probabilities of a batch's completions (see `completion_token_logps`); a key turns
        the adapters' dropout on."""
        params, adapter = (trainable, None) if self.lora is None else (frozen, trainable)
        dropout = self.lora is not None and self.lora.dropout > 0
        return completion_token_logps(
            self.policy.config,
            params,
            batch["prompt_BT"],
            batch["completion_BCT"],
            batch["prompt_length_B"],
            batch["completion_length_BC"],
            batch.get("packed_BW"),
            lora=adapter,
            lora_config=self.lora,
            lora_key=key if dropout else None,
            remat=self.remat,
            implementation=self.implementation,
            mesh=self.mesh,
        )

    def policy_logps(self, params: Tree, batch: Batch) -> Float[Array, "B C"]:
        """Log-probabilities of whole completions under the policy as it was given.

        `params` are the policy's, handed in: a program that closed over them would hold them as
        constants, and take minutes to compile.
        """
        frozen = dataclasses.replace(self, lora=None)
        return frozen.token_logps(params, None, batch).sum(axis=-1)

    @functools.cached_property
    def compiled_policy_logps(self) -> jax.stages.Wrapped:
        """`policy_logps`, compiled once for each shape."""
        return jax.jit(self.policy_logps)

    @property
    def packs(self) -> bool:
        """Whether completions are to stand behind each other without padding between."""
        return self.implementation == "xla" and self.policy.config.sliding_window is None

    @property
    def row_multiple(self) -> int:
        """What the rows of a microbatch must divide by to be split over the devices."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def place(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices, rows split. Every process builds the whole of it, which is small,
        and keeps its part."""
        if self.mesh is None:
            return jax.device_put(dict(arrays))
        rows = NamedSharding(self.mesh, BATCH)
        return meshes.place(dict(arrays), dict.fromkeys(arrays, rows))

    def place_state(self, state: TrainState) -> TrainState:
        """Puts the state on the mesh, moments as their parameters, counters on all devices."""
        return meshes.place_state(state, self.mesh)

    def for_each(
        self,
        function: Callable[[Batch], Any],
        rows: Rows,
        microbatches: list[Microbatch],
        size: int,
        advance: Callable[[int], None],
    ) -> list[Any]:
        """Results of a function of batches, on the host, one microbatch behind the device."""
        results, waiting = [], None
        for microbatch in microbatches:
            batch = self.place(batch_of(rows, microbatch.rows, microbatch.shape, size))
            now = function(batch)
            if waiting is not None:
                results.append(meshes.on_host(waiting))
            waiting = now
            advance(len(microbatch.rows))
        return results if waiting is None else [*results, meshes.on_host(waiting)]

    def save(self, directory: Path, trainable: Tree, config: Config) -> None:
        """Leaves `adapter/` (PEFT's format) or `policy/` (a Hugging Face directory)."""
        if self.lora is not None:
            adapter, base = meshes.on_host(trainable), config.policy.path
            save_adapter(directory / "adapter", self.policy.config, adapter, self.lora, base=base)
            return
        save_policy(self.trained(trainable, config), directory / "policy")

    def trained(self, trainable: Tree, config: Config) -> Policy:
        """The policy with its new weights, in the dtype that policies are held in."""
        if self.lora is not None:
            params = lora.merge(self.policy.params, trainable, self.lora)
            return dataclasses.replace(self.policy, params=params)
        _, held = resolve_dtypes(config.policy.dtype, config.policy.param_dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(held), trainable)
        architecture = dataclasses.replace(self.policy.config, param_dtype=held)
        return dataclasses.replace(self.policy, params=params, config=architecture)


def mesh_of(config: Config) -> Mesh | None:
    """The config's mesh over all devices, None where there is one device."""
    mesh = make_mesh(config.runtime.mesh)
    return mesh if mesh.size > 1 else None


def load(
    config: Config, path: str, adapters: tuple[Path, ...], lora_config: LoraConfig | None
) -> Policy:
    """The policy to train: its weights in float32 where all of them will move."""
    settings = config.policy
    return load_policy(
        path,
        dtype=settings.dtype,
        param_dtype="float32" if lora_config is None else settings.param_dtype,
        tokenizer=settings.tokenizer,
        adapters=adapters,
        mesh=mesh_of(config),
        cache_dir=config.runtime.cache_dir,
    )


def tuning_of(
    config: Config, policy: Policy, lora_config: LoraConfig | None, *, remat: Remat
) -> Tuning:
    mesh = mesh_of(config)
    if mesh is not None:
        params = meshes.place(policy.params, shardings(policy.params, mesh))
        policy = dataclasses.replace(policy, params=params)
    return Tuning(
        policy=policy,
        lora=lora_config,
        mesh=mesh,
        implementation=choose(config.runtime.attention, policy.config),
        remat=remat,
    )


def seed_of(config: Config, *stream: int) -> int:
    """A seed of its own for each use of the config's."""
    return int(np.random.SeedSequence([config.seed, *stream]).generate_state(1)[0])


def weighted_sum(value_B: Array, mask_B: Array) -> Array:
    """Sum over the real rows; what stands in the others may be anything."""
    return jnp.where(mask_B, value_B.astype(jnp.float32), 0.0).sum()
