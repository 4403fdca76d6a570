"""The tiny policy: a checkpoint like any other, whose tokenizer loses nothing it knows."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_jax.config import PolicyConfig
from dpo4rec_jax.weights import Policy, load_policy
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny, make_tokenizer, words_of

TEXTS = [
    "The user likes sci-fi, drama (mostly 1990s).\nRated: Alien 5/5!",
    "They don't like horror;  two spaces \u2014 and na\u00efve d\u00e9j\u00e0-vu.",
]
MESSAGES = [{"role": "system", "content": "drama"}, {"role": "user", "content": "likes horror"}]
CONFIG = PolicyConfig(tiny_width=16, tiny_layers=2, tiny_heads=2, dtype="float32")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_tiny(CONFIG, words_of(TEXTS), jax.random.key(0))


@pytest.mark.parametrize("text", TEXTS)
def test_known_text_decodes_to_itself(text: str, policy: Policy) -> None:
    ids = policy.tokenizer.encode(text)
    assert policy.tokenizer.unk_token_id not in ids
    assert policy.tokenizer.decode(ids) == text


KNOWN = make_tokenizer(words_of(TEXTS))


@given(st.lists(st.sampled_from(words_of(TEXTS)), max_size=12))
def test_any_sequence_of_known_words_decodes_to_itself(words: list[str]) -> None:
    text = " ".join(words)
    assert KNOWN.decode(KNOWN.encode(text)) == text


@given(st.text(max_size=40))
def test_any_text_encodes_to_ids_of_the_vocabulary(text: str) -> None:
    assert all(0 <= token < len(KNOWN) for token in KNOWN.encode(text))


def test_chat_template_marks_each_turn_and_opens_the_reply(policy: Policy) -> None:
    ids = policy.chat_ids(MESSAGES)
    expected = "<|system|>drama<|end|><|user|>likes horror<|end|><|assistant|>"
    assert policy.tokenizer.decode(ids) == expected
    assert policy.stop_ids == (policy.tokenizer.eos_token_id,)
    assert policy.tokenizer.decode(ids, skip_special_tokens=True) == "dramalikes horror"


def test_saved_tiny_policy_loads_as_any_checkpoint(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "tiny")
    again = load_policy(tmp_path / "tiny")
    assert again.config == policy.config
    assert again.chat_ids(MESSAGES) == policy.chat_ids(MESSAGES)
    assert again.stop_ids == policy.stop_ids
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
