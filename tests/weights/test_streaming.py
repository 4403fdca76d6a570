"""Checkpoints straight into their sharding: the same numbers, and how much the host holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
from process_group import on_eight_devices

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import lora
from dpo4rec_jax.weights import load_policy, peft, streaming

TOKENS_BT = np.random.default_rng(3).integers(0, hf_models.VOCAB, (4, 8))
LENGTH_B = np.full(4, 8)

SHARDED = """
import sys
import jax, numpy as np
from dpo4rec_jax.runtime.mesh import make_mesh
from dpo4rec_jax.weights import load_policy, streaming
streaming.HOST_BYTES = int(sys.argv[2])
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
policy = load_policy(sys.argv[1], adapters=[sys.argv[6]], mesh=mesh)
up = policy.params["layers"]["up"]["kernel"]
assert len(up.sharding.device_set) == 8, up.sharding
assert up.addressable_shards[0].data.shape == (2, 24, 40), up.addressable_shards[0].data.shape
logits = policy.logits(np.load(sys.argv[3]), np.full(4, 8))
np.save(sys.argv[4], np.asarray(logits))
np.save(sys.argv[5], np.asarray(up))
"""

MEASURED = """
import json, sys
import jax, jax.numpy as jnp
from dpo4rec_jax.runtime.mesh import make_mesh
from dpo4rec_jax.weights import hf_config, huggingface, streaming
from dpo4rec_jax.weights.policy import place, shapes
from pathlib import Path
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
directory = Path(sys.argv[1])
values = hf_config.read_json(directory / "config.json")
config = hf_config.parse_config(values, "here", dtype="bfloat16", param_dtype="bfloat16")
mesh = make_mesh({"fsdp": 8, "data": 1})
where = place(shapes(config), mesh)
slots = huggingface.slots(config)
tensors = huggingface.stored_tensors(directory, config.tied)
jax.block_until_ready(jnp.zeros(8) + 1)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
params = jax.block_until_ready(streaming.stream(slots, tensors, shapes(config), where))
print(json.dumps({"before": before, "after": resident("VmRSS"), "peak": resident("VmHWM")}))
"""


def test_eight_devices_hold_and_compute_what_one_does(tmp_path: Path) -> None:
    directory = hf_models.save_model(hf_models.make_model("qwen-2"), tmp_path / "model")
    base = load_policy(directory)
    config = base.config
    adapter = lora.init(config, LoraConfig(rank=2), jax.random.key(0))
    # Small enough that float32 itself is exact to 2e-6 here: a larger one makes an attention score
    # so steep that torch in float32 is 3e-5 off torch in float64.
    adapter = jax.tree.map(lambda leaf: leaf + 0.02, adapter)
    peft.save_adapter(tmp_path / "adapter", config, adapter, LoraConfig(rank=2))
    policy = load_policy(directory, adapters=[tmp_path / "adapter"])
    np.save(tmp_path / "tokens.npy", TOKENS_BT)
    files = [tmp_path / f"{name}.npy" for name in ("tokens", "logits", "up")]
    on_eight_devices(SHARDED, directory, 0, *files, tmp_path / "adapter")
    up = policy.params["layers"]["up"]["kernel"]
    np.testing.assert_allclose(np.load(tmp_path / "up.npy"), up, atol=1e-6, rtol=0)
    ours = policy.logits(TOKENS_BT, LENGTH_B)
    assert np.abs(ours - base.logits(TOKENS_BT, LENGTH_B)).max() > 0.01
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours, atol=1e-5, rtol=0)


def test_filling_on_the_device_equals_filling_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = hf_models.save_model(hf_models.make_model("llama-3.2"), tmp_path)
    on_host = load_policy(directory, param_dtype="bfloat16")
    monkeypatch.setattr(streaming, "HOST_BYTES", 0)
    on_device = load_policy(directory, param_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, on_host.params, on_device.params)


@pytest.mark.slow
def test_loading_two_gigabytes_holds_little_more_than_the_sharded_copy(tmp_path: Path) -> None:
    values = {
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    total, largest = write_random_checkpoint(tmp_path, values)
    assert total > 1.9e9
    measured = json.loads(on_eight_devices(MEASURED, tmp_path).splitlines()[-1])
    above = measured["peak"] - measured["before"] - total
    print(f"checkpoint {total}, largest tensor {largest}, peak above the sharded copy {above}")
    assert above < 1.3 * largest


def write_random_checkpoint(directory: Path, values: dict[str, Any]) -> tuple[int, int]:
    """A sharded bfloat16 checkpoint written tensor by tensor; returns total and largest bytes."""
    from dpo4rec_jax.weights import export, hf_config, huggingface
    from dpo4rec_jax.weights.streaming import Slot

    slots = huggingface.slots(hf_config.parse_config(values, "here"))
    generator = np.random.default_rng(0)
    files: dict[str, list[str]] = {}
    for index, name in enumerate(slots):
        files.setdefault(f"model-{index // 50 + 1:05d}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {}
        for name in names:
            shape = slots[name].shape
            value = generator.integers(0, 2**14, shape, np.uint16).view("V2")
            import ml_dtypes

            tensors[name] = (Slot((name,), shape), {name: value.view(ml_dtypes.bfloat16)})
        with (directory / file).open("wb") as out:
            export.write_safetensors(out, tensors)
    index = {name: file for file, names in files.items() for name in names}
    (directory / huggingface.INDEX).write_text(json.dumps({"weight_map": index}))
    sizes = [2 * int(np.prod(slot.shape)) for slot in slots.values()]
    return sum(sizes), max(sizes)
