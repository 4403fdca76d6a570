"""Prompts as token ids of a length that the policy takes."""

from __future__ import annotations

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.prompts import Prompt, shorten
from dpo4rec_jax.weights import Policy


def fit_prompt(policy: Policy, prompt: Prompt, limit: int) -> tuple[list[int], int]:
    """The ids of the prompt with as much of its newest history as fits, and how much that is.

    The oldest history goes first, the instruction never. Raises InputError for a prompt that does
    not fit with a single entry of history left.
    """
    ids, fits, too_many = policy.chat_ids(prompt.messages), 0, len(prompt.history)
    if len(ids) <= limit:
        return ids, too_many
    best = None
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        ids = policy.chat_ids(shorten(prompt, middle).messages)
        if len(ids) <= limit:
            best, fits = ids, middle
        else:
            too_many = middle
    if best is None:
        entries = " with one entry of history" if prompt.history else ""
        raise InputError(
            f"policy.max_prompt_tokens: the prompt of {prompt.kind} {prompt.id!r} has {len(ids)} "
            f"tokens{entries}, {limit} fit; raise it or shorten data.prompts"
        )
    return best, fits
