"""The policy that a config names, for the parts that run it."""

from __future__ import annotations

import jax

from dpo4rec_jax.config import Config
from dpo4rec_jax.weights import Policy, load_policy, tiny


def policy_of(config: Config) -> Policy:
    """The config's policy; for `tiny`, which a run makes itself, one of its shape."""
    settings = config.policy
    if settings.path == "tiny":
        words = [f"word{index}" for index in range(1000)]
        return tiny.make_tiny(settings, words, jax.random.key(config.seed))
    return load_policy(
        settings.path,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        tokenizer=settings.tokenizer,
        cache_dir=config.runtime.cache_dir,
    )
