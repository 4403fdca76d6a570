"""A checkpoint of 8 devices comes back on other meshes, adapters and whole policies alike."""

from __future__ import annotations

import pytest
from process_group import on_eight_devices

CODE = """
import sys, tempfile
from functools import partial
import jax, numpy as np
from pathlib import Path
from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.runtime import mesh as meshes, state as training
from dpo4rec_jax.runtime.checkpoint import Checkpoints
from dpo4rec_jax.runtime.optimizer import adamw, learning_rate_schedule

method = sys.argv[1]
config = llama.LlamaConfig(96, 48, 80, 2, 4, 2, 12)
schedule = learning_rate_schedule(1e-2, 10)
optimizer = adamw(schedule, max_grad_norm=1.0)

def loss(trainable, frozen, batch, key):
    total = sum((leaf.astype("float32") ** 2).sum() for leaf in jax.tree.leaves(trainable))
    return training.Sums(total * batch["scale"], batch["scale"], {})

def fresh(mesh):
    if method == "lora":
        trainable = lora.init(config, LoraConfig(rank=4), jax.random.key(0))
    else:
        trainable = llama.init(config, jax.random.key(0))
    if mesh is not None:
        trainable = meshes.place(trainable, meshes.shardings(trainable, mesh))
    state = training.create(trainable, optimizer, 3, figures=())
    return meshes.place_state(state, mesh)

# Compiled, as in a run: of single operations more would be in flight than a CPU's devices take.
accumulate = jax.jit(partial(training.accumulate, loss))
update = jax.jit(partial(training.update, optimizer, schedule))

def one_step(state):
    return update(accumulate(state, None, {"scale": np.float32(0.5)}))[0]

def spread(mesh):
    return None if mesh is None else dict(mesh.shape)

source = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
state = one_step(fresh(source))
moved = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim and np.asarray(leaf).any()]
assert moved, "the optimizer has nothing to restore"
directory = Path(tempfile.mkdtemp())
with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, state, {"next_index": 1})
devices = jax.devices()
targets = [
    None,
    meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices[:4]),
    meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}),
    meshes.make_mesh({"data": 4, "fsdp": 2, "tensor": 1}),
]
for mesh in targets:
    like = fresh(mesh)
    with Checkpoints(directory) as checkpoints:
        back, position = checkpoints.restore(1, like)
    assert position == {"next_index": 1}
    for (path, want), got, place in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(back), jax.tree.leaves(like)
    ):
        name = (jax.tree_util.keystr(path), spread(mesh))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=str(name))
        assert got.sharding.is_equivalent_to(place.sharding, got.ndim), name
    for want, got in zip(jax.tree.leaves(one_step(state)), jax.tree.leaves(one_step(back))):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-7)
q = state.trainable["layers"]["q"]
leaf = q["b"] if method == "lora" else q["kernel"]
assert "tensor" in leaf.sharding.spec, leaf.sharding
print("restored")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpoint_of_eight_devices_is_restored_on_other_meshes(method: str) -> None:
    """On 1 device, 2 x 2, 4 x 2 and the other way round; optimizer state included."""
    assert "restored" in on_eight_devices(CODE, method)
