"""The static sizes of a sampling job, chosen from a memory budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig

Chunks = tuple[tuple[int, int], ...]

# (tokens of a prefill chunk, prompts of a shard in one call), large to small; the smallest also
# rounds prompts up. A CPU is at its peak with 128 tokens; an accelerator wants several hundred, or
# it waits for the weights.
CHUNKS: Chunks = ((128, 1), (32, 1))
ACCELERATOR_CHUNKS: Chunks = ((512, 1), (64, 8))

MAX_ROWS = 256  # rows of a shard, however large the budget
ROWS_STEP = 8  # rows are a multiple of this, where there is a choice
STRAGGLERS = 1.75  # prefix slots over what full prompts need: prompts of which few rows still run
AHEAD = 2  # more of them, at the most, where there are several shards: see Schedule.prefill_jobs


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a job's caches. A text is reproduced exactly by the same layout."""

    shards: int  # parts of the data axis
    rows: int  # row slots of a shard
    prompts: int  # prefix slots of a shard
    samples: int  # completions of a prompt, at the most
    prompt_tokens: int  # of a prefix slot: a prompt without its last token, rounded up
    new_tokens: int  # of a row slot
    chunks: Chunks = CHUNKS

    @property
    def lanes(self) -> int:
        """Rows that a prompt can have at once."""
        return min(self.samples, self.rows)

    def jobs(self, size: int) -> int:
        """Prompts of a shard whose chunks of this size one prefill call takes."""
        return dict(self.chunks)[size]

    def chunks_of(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, size) of the chunks that cover so many tokens, decided by that number alone.

        Whole large chunks, then small ones; they end at the number rounded up to a small chunk.
        """
        chunks, offset = [], 0
        for size, _ in self.chunks:
            last = size == self.chunks[-1][0]
            while num_tokens - offset >= size or (last and num_tokens > offset):
                chunks.append((offset, size))
                offset += size
        return chunks

    def bytes_of_shard(self, bytes_token: int) -> int:
        """Cache memory: prompts x prompt length + rows x new tokens."""
        tokens = self.prompts * self.prompt_tokens + self.rows * self.new_tokens
        return tokens * bytes_token


def bytes_token(config: LlamaConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    size = 2 if config.dtype == "bfloat16" else 4
    return 2 * config.layers * config.kv_heads * config.head_dim * size


def plan_layout(
    config: LlamaConfig,
    prompt_lengths: Sequence[int],
    samples: int | Sequence[int],
    new_tokens: int,
    *,
    slots: int | None = None,
    memory_gib: float = 4.0,
    mesh: Mesh | None = None,
) -> Layout:
    """The sizes for a whole job of `samples` texts a prompt (or so many of each).

    As many rows as the budget of each device holds, or `slots` over all shards. Raises InputError
    where that, or a single prompt, is more than `memory_gib` holds, and says what fits.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else mesh.shape
    shards, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    chunks = CHUNKS if platform == "cpu" else ACCELERATOR_CHUNKS
    longest = max(prompt_lengths, default=1)
    counts = [samples] * len(prompt_lengths) if isinstance(samples, int) else list(samples)
    texts = -(-sum(counts) // shards) or 1  # of a shard
    prompts = -(-len(counts) // shards) or 1
    budget = memory_gib * 2**30
    per_token = bytes_token(config) // (tensor if config.kv_heads % tensor == 0 else 1)

    def layout(rows: int) -> Layout:
        busy = -(-rows * prompts // texts)  # prompts all of whose texts are running
        ahead = min(busy, AHEAD) if shards > 1 else 0
        return Layout(
            shards=shards,
            rows=rows,
            prompts=min(prompts, max(busy + 1, int(busy * STRAGGLERS)) + ahead),
            samples=max(counts, default=1),
            prompt_tokens=max(-(-(longest - 1) // chunks[-1][0]), 1) * chunks[-1][0],
            new_tokens=new_tokens,
            chunks=chunks,
        )

    def fits(rows: int) -> bool:
        return layout(rows).bytes_of_shard(per_token) <= budget

    wanted = min(texts, MAX_ROWS if slots is None else -(-slots // shards))
    most = max((rows for rows in range(1, wanted + 1) if fits(rows)), default=0)
    if most == 0:
        needed = layout(1).bytes_of_shard(per_token) / 2**30
        raise InputError(
            f"reason.memory_gib: {memory_gib:g} GiB of cache hold no prompt of {longest} tokens "
            f"with {new_tokens} new ones; it takes {needed:.3f}"
        )
    if slots is None:
        waves = -(-texts // most)
        even = -(-texts // waves)  # the last wave as full as the others
        return layout(min(most, -(-even // ROWS_STEP) * ROWS_STEP))
    if most < wanted:
        needed = layout(wanted).bytes_of_shard(per_token) / 2**30
        raise InputError(
            f"reason.slots: {slots} rows of {new_tokens} new tokens need {needed:.2f} GiB of cache "
            f"a device, reason.memory_gib is {memory_gib:g}: at most {most * shards} rows fit"
        )
    return layout(wanted)
