"""Attention kernels that never hold the scores: cuDNN on NVIDIA, splash (Pallas) on TPU.

Both compute what `attention.py` computes in XLA; where one cannot (dtype, head size), `choose` says
so in one line and XLA does it.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo4rec_jax.models.llama import LlamaConfig

Implementation = Literal["xla", "cudnn", "splash"]
LANES = 128  # splash works on blocks of so many tokens
_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}

log = logging.getLogger(__name__)


def choose(requested: str, config: LlamaConfig, backend: str | None = None) -> Implementation:
    """The implementation to run: the requested one, for `auto` the platform's own, XLA where the
    model or the platform rules that out. The choice, and why it is not the requested one, is
    logged in one line."""
    backend = jax.default_backend() if backend is None else backend
    native = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(backend, "xla")
    wanted = native if requested == "auto" else requested
    reason = _obstacle(wanted, config, native, backend)
    if reason is None:
        log.info("attention: %s (runtime.attention: %s, on %s)", wanted, requested, backend)
        return "cudnn" if wanted == "cudnn" else "splash" if wanted == "splash" else "xla"
    level = logging.INFO if requested == "auto" else logging.WARNING
    log.log(level, "attention: xla instead of %s: %s", wanted, reason)
    return "xla"


def _obstacle(wanted: str, config: LlamaConfig, native: str, backend: str) -> str | None:
    if wanted == "xla":
        return None
    if wanted != native:
        return f"it needs a {_PLATFORM[wanted]}, this is {backend}"
    if wanted == "cudnn" and config.dtype != "bfloat16":
        return f"it computes in bfloat16, policy.dtype is {config.dtype}"
    if wanted == "cudnn" and (config.head_dim % 8 or config.head_dim > 128):
        return f"it needs a head size of at most 128, a multiple of 8, got {config.head_dim}"
    if wanted == "splash" and config.head_dim % 64:
        return f"it needs a head size that is a multiple of 64, got {config.head_dim}"
    return None


def cudnn_causal(
    query_BTHd: Float[Array, "B T H d"],
    key_BTKd: Float[Array, "B T K d"],
    value_BTKd: Float[Array, "B T K d"],
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Self-attention of rows, causal by index, by cuDNN's flash kernel."""
    return jax.nn.dot_product_attention(
        query_BTHd,
        key_BTKd,
        value_BTKd,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def cudnn_masked(
    query_BTHd: Float[Array, "B T H d"],
    key_BSKd: Float[Array, "B S K d"],
    value_BSKd: Float[Array, "B S K d"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H d"]:
    """Attention under an explicit mask, by cuDNN's flash kernel."""
    return jax.nn.dot_product_attention(
        query_BTHd, key_BSKd, value_BSKd, mask=mask_BTS[:, None], implementation="cudnn"
    )


def splash(
    query_BTHd: Float[Array, "B T H d"],
    key_BTKd: Float[Array, "B T K d"],
    value_BTKd: Float[Array, "B T K d"],
    mask_TT: np.ndarray,
    segment_BT: Int[Array, "B T"],
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H d"]:
    """Self-attention under a static mask, within equal segments, by the splash kernel: blocks of
    128 x 128 tokens that the mask leaves empty are not computed. Every row of the mask must see
    itself. On a mesh each device computes its own rows, and its own heads where they divide."""
    T = query_BTHd.shape[1]
    pad = -T % LANES
    mask_TT = np.pad(mask_TT, ((0, pad), (0, pad))) | np.eye(T + pad, dtype=bool)
    per_device = functools.partial(_splash, mask_TT=mask_TT, interpret=interpret)
    if mesh is not None and mesh.size > 1:
        # XLA cannot partition a Pallas kernel by itself.
        even = key_BTKd.shape[2] % mesh.shape["tensor"] == 0
        heads = PartitionSpec(("data", "fsdp"), None, "tensor" if even else None, None)
        rows = PartitionSpec(("data", "fsdp"), None)
        per_device = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )
    widths = ((0, 0), (0, pad), (0, 0), (0, 0))
    query, key, value = (jnp.pad(x, widths) for x in (query_BTHd, key_BTKd, value_BTKd))
    segment = jnp.pad(segment_BT, widths[:2], constant_values=-1)
    return per_device(query, key, value, segment)[:, :T]


def _splash(
    query_BTHd: Array,
    key_BTKd: Array,
    value_BTKd: Array,
    segment_BT: Array,
    *,
    mask_TT: np.ndarray,
    interpret: bool,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    H, d = query_BTHd.shape[2:]
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.NumpyMask(mask_TT)] * H), interpret=interpret
    )
    query_BHTd, key_BKTd, value_BKTd = (
        x.swapaxes(1, 2) for x in (query_BTHd * d**-0.5, key_BTKd, value_BTKd)
    )
    segments = kernels.SegmentIds(segment_BT, segment_BT)
    out_BHTd = jax.vmap(kernel)(query_BHTd, key_BKTd, value_BKTd, segments)
    return jnp.swapaxes(jnp.asarray(out_BHTd), 1, 2)
