"""A policy's own promises: prompts by its template, ids within its vocabulary."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from dpo4rec_jax.config import InputError, PolicyConfig
from dpo4rec_jax.weights import Policy
from dpo4rec_jax.weights.tiny import make_tiny

CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def policy() -> Policy:
    sizes = PolicyConfig(tiny_width=16, tiny_layers=1, tiny_heads=2)
    return make_tiny(sizes, ["hello", "there"], jax.random.key(0))


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do(policy: Policy) -> None:
    tokenizer = make_tiny(PolicyConfig(), ["hello"], jax.random.key(0)).tokenizer
    tokenizer.chat_template = None
    bare = dataclasses.replace(policy, tokenizer=tokenizer)
    with pytest.raises(InputError, match="no chat template; name an instruction-tuned model"):
        bare.chat_ids(CHAT)


def test_a_template_that_refuses_a_role_is_one_line(policy: Policy) -> None:
    tokenizer = make_tiny(PolicyConfig(), ["hello"], jax.random.key(0)).tokenizer
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    strict = dataclasses.replace(policy, tokenizer=tokenizer)
    with pytest.raises(InputError, match="refuses: System role not supported"):
        strict.chat_ids(CHAT)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[0, 9999]], [2], "expected ids from 0 to"),
        ([[0, 1]], [3], "expected lengths from 0 to 2, got 3 to 3"),
        ([0, 1], [2], r"expected tokens \[B, T\]"),
    ],
)
def test_ids_and_lengths_outside_their_range_are_refused(
    policy: Policy, tokens: list, lengths: list, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        policy.logits(np.array(tokens), np.array(lengths))
