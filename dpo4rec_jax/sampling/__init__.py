"""Texts from a policy: N completions a prompt, each drawn by (seed, round, prompt, sample)."""

from dpo4rec_jax.sampling.layout import Layout, common_head, plan_layout
from dpo4rec_jax.sampling.sampler import Completion, Figures, sample, stream

__all__ = ["Completion", "Figures", "Layout", "common_head", "plan_layout", "sample", "stream"]
