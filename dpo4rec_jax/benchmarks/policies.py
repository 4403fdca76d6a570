"""The policy that a config names, for the parts that run it."""

from __future__ import annotations

import jax

from dpo4rec_jax.config import Config
from dpo4rec_jax.models import llama
from dpo4rec_jax.rehearsal.architectures import architecture_of
from dpo4rec_jax.weights import Policy, load_policy, tiny

RANDOM = "random:"  # before a path: its architecture, random weights


def policy_of(config: Config) -> Policy:
    """The config's policy; for `tiny`, which a run makes itself, one of its shape; behind `random:`
    one of that architecture whose weights are drawn here, so that nothing is downloaded but a
    config.json."""
    settings = config.policy
    if settings.path == "tiny":
        words = [f"word{index}" for index in range(1000)]
        return tiny.make_tiny(settings, words, jax.random.key(config.seed))
    if settings.path.startswith(RANDOM):
        return _random(config)
    return load_policy(
        settings.path,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        tokenizer=settings.tokenizer,
        cache_dir=config.runtime.cache_dir,
    )


def _random(config: Config) -> Policy:
    path = config.policy.path.removeprefix(RANDOM)
    policy = config.policy.model_copy(update={"path": path})
    architecture = architecture_of(
        config.model_copy(update={"policy": policy}), jax.default_backend()
    )
    tokenizer = tiny.make_tokenizer(f"w{index}" for index in range(architecture.vocab_size // 2))
    params = llama.init(architecture, jax.random.key(config.seed))
    return Policy(architecture, params, tokenizer, (), {}, {})
