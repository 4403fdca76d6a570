"""Adapters between us and Hugging Face's peft, both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo4rec_jax.config import InputError, LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.weights import Policy, load_policy, peft

TOKENS_BT = np.random.default_rng(2).integers(0, hf_models.VOCAB, (2, 12))
LENGTH_B = np.array([12, 12])
LORA = LoraConfig(rank=3, alpha=5.0, targets=["q", "o", "up", "down"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save_model(hf_models.make_model("non-square"), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(base: Path) -> Policy:
    return load_policy(base)


@pytest.fixture(scope="module")
def adapter(policy: Policy) -> Any:
    fresh = lora.init(policy.config, LORA, jax.random.key(0))
    return jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape) / 10, fresh)


@pytest.fixture
def saved(policy: Policy, adapter: Any, base: Path, tmp_path: Path) -> Path:
    peft.save_adapter(tmp_path / "ours", policy.config, adapter, LORA, base=str(base))
    return tmp_path / "ours"


def torch_model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


def by_peft(base: Path, directory: Path, **options: Any) -> Any:
    """A fresh adapter of peft's own, made random and saved; returns peft's model."""
    import peft as theirs
    import torch

    config = theirs.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"], **options
    )
    model = theirs.get_peft_model(torch_model(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) / 10
    model.save_pretrained(directory)
    return model


def test_peft_loads_our_adapter_with_the_same_logits(
    saved: Path, base: Path, policy: Policy, adapter: Any
) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(torch_model(base), saved)
    merged = lora.merge(policy.params, adapter, LORA)
    ours = load_policy(base, adapters=[saved])
    jax.tree.map(np.testing.assert_array_equal, ours.params, merged)
    logits = ours.logits(TOKENS_BT, LENGTH_B)
    assert np.abs(logits - policy.logits(TOKENS_BT, LENGTH_B)).max() > 0.1
    expected = hf_models.hf_logits(theirs, TOKENS_BT)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_adapter_by_peft_loads_with_the_same_logits(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    theirs = by_peft(base, tmp_path, **options)
    ours = load_policy(base, adapters=[tmp_path])
    expected = hf_models.hf_logits(theirs, TOKENS_BT)
    got = ours.logits(TOKENS_BT, LENGTH_B)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_gradients_of_an_adapter_equal_torchs(base: Path, policy: Policy, tmp_path: Path) -> None:
    import torch

    theirs = by_peft(base, tmp_path)
    logits = theirs(torch.tensor(TOKENS_BT)).logits[:, :-1].flatten(0, 1)
    targets = torch.tensor(TOKENS_BT[:, 1:]).flatten()
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = {
        name.replace(".default", ""): value.grad.numpy()
        for name, value in theirs.named_parameters()
        if value.grad is not None
    }
    adapter, lora_config = peft.load_adapter(tmp_path, policy.config)

    def loss(adapter: Any) -> jax.Array:
        position_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
        hidden_BTD, _ = llama.apply(
            policy.config,
            policy.params,
            jnp.asarray(TOKENS_BT),
            position_BT,
            Causal(jnp.asarray(LENGTH_B)),
            lora=adapter,
            lora_config=lora_config,
            remat="full",
        )
        logp_BTV = jax.nn.log_softmax(llama.unembed(policy.config, policy.params, hidden_BTD))
        picked_BT1 = jnp.take_along_axis(logp_BTV[:, :-1], jnp.asarray(TOKENS_BT)[:, 1:, None], -1)
        return -picked_BT1.mean()

    gradient = jax.jit(jax.grad(loss))(adapter)
    slots = peft.slots(policy.config, 4, list(gradient["layers"]))
    assert slots.keys() == expected.keys()
    for name, slot in slots.items():
        ours = np.asarray(gradient["layers"][slot.path[1]][slot.path[2]][slot.layer]).T
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=1e-4 * scale, rtol=0, err_msg=name)


def test_adapter_round_trip_is_bitwise(saved: Path, policy: Policy, adapter: Any) -> None:
    again, lora_config = peft.load_adapter(saved, policy.config)
    assert lora_config == LORA
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_adapters_merge_in_order(saved: Path, base: Path, policy: Policy, adapter: Any) -> None:
    twice = load_policy(base, adapters=[saved, saved])
    once = lora.merge(policy.params, adapter, LORA)
    expected = lora.merge(once, adapter, LORA)
    jax.tree.map(np.testing.assert_array_equal, twice.params, expected)


def test_sum_of_adapters_is_one_adapter(policy: Policy, adapter: Any) -> None:
    other = jax.tree.map(lambda leaf: 2 * leaf[:, ::-1], adapter)
    both, config = peft.combine([(adapter, LORA), (other, LORA)])
    assert config.rank == 6
    expected = lora.merge(lora.merge(policy.params, adapter, LORA), other, LORA)
    got = lora.merge(policy.params, both, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def setting(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        held = load_file(path / "adapter_model.safetensors")
        change(held)
        save_file(held, path / "adapter_model.safetensors")

    return apply


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (setting(peft_type="LOHA"), r"peft_type: expected LORA, got 'LOHA'"),
        (setting(use_dora=True), r"use_dora: a variant we do not compute, got True"),
        (setting(rank_pattern={"q_proj": 9}), r"rank_pattern: a variant we do not compute"),
        (setting(bias="all"), r"bias: expected 'none', got 'all'"),
        (setting(r=5), r"q_proj\.lora_A\.weight: expected \[5, 48\], got \[3, 48\]"),
        (setting(lora_alpha=None), r"expected r and lora_alpha, got 3 and None"),
        (tensors(lambda held: held.pop(A)), r"q_proj\.lora_A\.weight: expected .* no such tensor"),
        (
            tensors(lambda held: held.update({"base_model.model.score": np.ones(2, np.float32)})),
            r"base_model\.model\.score: not a LoRA matrix of a projection that we adapt",
        ),
        (tensors(lambda held: held[A].__setitem__((0, 0), np.inf)), r"expected finite numbers"),
        (
            lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"),
            r"expected adapter_model\.safetensors; a pickled adapter_model\.bin is never read",
        ),
        (lambda path: (path / "adapter_config.json").unlink(), r"adapter_config\.json: not there"),
    ],
)
def test_damaged_adapter_stops_the_load_in_one_line(
    damage: Callable[[Path], Any], says: str, saved: Path, policy: Policy
) -> None:
    damage(saved)
    with pytest.raises(InputError) as caught:
        peft.load_adapter(saved, policy.config)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)
