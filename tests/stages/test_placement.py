"""The table of shardings that --dry-run prints."""

from __future__ import annotations

from typing import Any

from jax.sharding import AbstractMesh

from dpo4rec_jax.config import AlignConfig
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.stages import placement

MESH: Any = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
MODEL = LlamaConfig(96, 48, 80, 2, 4, 2, 12)


def line_of(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    return line.split()


def test_every_parameter_has_its_shape_sharding_and_bytes_a_device() -> None:
    lines = placement.table(MODEL, AlignConfig(), MESH)
    assert line_of(lines, "layers/up/kernel") == [
        *("layers/up/kernel", "float32[2,", "48,", "80]", "-,", "fsdp,", "tensor"),
        f"{2 * (48 // 4) * (80 // 2) * 4:,}",
    ]
    adapter = line_of(lines, "adapter/layers/up/b")
    assert adapter[-1] == f"{2 * 16 * (80 // 2) * 4:,}"


def test_moments_lie_as_what_moves() -> None:
    full = placement.table(MODEL, AlignConfig(method="full"), MESH)
    split = 2 * 96 * 48 + 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80)  # over all 8 devices
    norms = 2 * 2 * 48 + 48  # whole on each
    values = split // 8 + norms
    assert f"all of them: {4 * values:,} bytes a device" in full[-2]
    assert full[-2].endswith(f"which lie as it does: {2 * 4 * values:,}")
