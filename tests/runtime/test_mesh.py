"""The mesh and the table of rules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dpo4rec_jax.config import InputError, LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.runtime import mesh as meshes
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.optimizer import adamw, learning_rate_schedule

MESH: Any = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": 8}, (1, 8, 1)),
    ],
)
def test_one_size_may_be_what_is_left(sizes: dict[str, int], expected: tuple[int, ...]) -> None:
    mesh = meshes.make_mesh(sizes, jax.devices() * 8)
    assert tuple(mesh.shape.values()) == expected


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0, "fsdp": 8}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected sizes that multiply to the 8 devices"):
        meshes.make_mesh(sizes, jax.devices() * 8)


def test_every_parameter_of_policy_and_adapter_has_a_rule() -> None:
    config = llama.LlamaConfig(
        *(96, 48, 80, 2, 4, 2, 12), attention_bias=True, output_bias=True, qk_norm=True
    )
    shapes = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    found = meshes.shardings(shapes, MESH)
    assert found["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert found["layers"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    adapter = jax.eval_shape(lambda: lora.init(config, LoraConfig(rank=4), jax.random.key(0)))
    assert meshes.shardings(adapter, MESH)["layers"]["o"]["a"].spec == PartitionSpec(
        None, "tensor", None
    )


def test_encoder_and_rerankers_lie_whole_on_every_device() -> None:
    encoder = {"token": jax.ShapeDtypeStruct((96, 48), "float32")}
    assert meshes.shardings(encoder, MESH, "bert/")["token"].spec == PartitionSpec()
    member = {"score": {"kernel": jax.ShapeDtypeStruct((5, 48, 1), "float32")}}
    found = meshes.shardings(member, MESH, "reranker/")
    assert found["score"]["kernel"].spec == PartitionSpec()


def test_dimension_that_its_axis_does_not_divide_stays_whole() -> None:
    assert meshes.spec("embed", (97, 48), MESH) == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("path", "shape"), [("layers/router/kernel", (2, 48, 8)), ("embed", (2, 97, 48))]
)
def test_parameter_without_a_rule_stops_with_the_rule_to_add(
    path: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=f"no sharding rule for parameter {path} .* add a line"):
        meshes.spec(path, shape, MESH)


def test_moments_and_gradients_lie_as_their_parameters_and_counters_everywhere() -> None:
    config = llama.LlamaConfig(96, 48, 80, 2, 4, 2, 12)
    optimizer = adamw(learning_rate_schedule(1e-3, 10), max_grad_norm=1.0)
    state = jax.eval_shape(
        lambda: training.create(
            llama.init(config, jax.random.key(0)), optimizer, 0, figures=("margin",)
        )
    )
    found = meshes.state_shardings(state, MESH)
    params = meshes.shardings(state.trainable, MESH)
    assert found.trainable == params
    assert found.pending.gradient == params
    moments = [s for s in jax.tree.leaves(found.optimizer) if s.spec == params["embed"].spec]
    assert len(moments) >= 2
    assert found.step.spec == found.pending.sums.loss.spec == PartitionSpec()


def test_state_without_a_rule_stops_with_the_rule_to_add() -> None:
    with pytest.raises(InputError, match=r"no sharding rule for parameter mu/router"):
        meshes.state_shardings({"mu": {"router": jax.ShapeDtypeStruct((4,), "float32")}}, MESH)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the arrangement of a mesh reads of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "H100"


@pytest.mark.parametrize(
    ("shape", "along"),
    [((2, 4, 2), 0), ((4, 2, 2), 0), ((1, 8, 2), 1), ((6, 1, 1), 0), ((3, 2, 1), 1)],
)
def test_slices_lie_along_data_then_fsdp_and_never_along_tensor(
    shape: tuple[int, int, int], along: int
) -> None:
    size = math.prod(shape)
    devices = [Device(n, slice_index=2 * n // size, process_index=n // 4) for n in range(size)]
    found = meshes.arranged(devices, shape)
    slices = np.vectorize(lambda device: device.slice_index)(found)
    for axis in range(3):
        varies = (slices != slices.take([0], axis)).any()
        assert varies == (axis == along)
    assert sorted(device.id for device in found.flat) == list(range(size))


def test_slices_that_fit_no_axis_are_refused() -> None:
    devices = [Device(n, slice_index=n // 2) for n in range(6)]
    with pytest.raises(InputError, match="divides into the 3 slices, got data: 1, fsdp: 2"):
        meshes.arranged(devices, (1, 2, 3))
