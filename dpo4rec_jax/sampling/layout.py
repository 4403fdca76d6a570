"""The static sizes of a sampling job, chosen from a memory budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig

Chunks = tuple[tuple[int, int], ...]

# (tokens of a prefill chunk, prompts of a shard in one call), large to small. A CPU is at its peak
# with 128 tokens; an accelerator wants several hundred, or it waits for the weights.
CHUNKS: Chunks = ((128, 1), (32, 1))
ACCELERATOR_CHUNKS: Chunks = ((512, 1), (64, 8))

MAX_ROWS = 256  # rows of a shard, however large the budget
ROWS_STEP = 8  # rows are a multiple of this, where there is a choice
STRAGGLERS = 1.75  # prefix slots over what full prompts need: prompts of which few rows still run
MOSTLY = 0.75  # a large chunk so full takes no longer than small ones of one prompt each
LINE = 16  # prefix slots are a multiple of this: a cache line of float32
AHEAD = 2  # more of them, at the most, where there are several shards: see Schedule.prefill_jobs;
# where a call takes one prompt a shard they are parked, and no time goes to attention to them


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a job's caches. A text is reproduced exactly by the same layout."""

    shards: int  # parts of the data axis
    rows: int  # row slots of a shard
    prompts: int  # prefix slots of a shard, to which rows attend
    samples: int  # completions of a prompt, at the most
    prompt_tokens: int  # of a prefix slot: a prompt without its last token, rounded up
    new_tokens: int  # of a row slot
    chunks: Chunks = CHUNKS
    common: int = 0  # tokens that every prompt begins with: prefilled once for all prefix slots
    parked: int = 0  # more slots, where prompts are prefilled if there are any, else in place

    @property
    def lanes(self) -> int:
        """Rows that a prompt can have at once."""
        return min(self.samples, self.rows)

    @property
    def home(self) -> range:
        """The prefix slots where prompts are prefilled; parked ones count behind the others."""
        return range(self.prompts if self.parked else 0, self.prompts + self.parked)

    def jobs(self, size: int) -> int:
        """Prompts of a shard whose chunks of this size one prefill call takes."""
        return dict(self.chunks)[size]

    def chunks_of(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, size) of the chunks that cover so many tokens behind the common ones, decided by
        that number alone."""
        own = cover(num_tokens - self.common, self.chunks)
        return [(self.common + offset, size) for offset, size in own]

    def bytes_of_shard(self, bytes_token: int) -> int:
        """Cache memory: prompts x prompt length + rows x new tokens."""
        prompts = self.prompts + self.parked
        tokens = prompts * self.prompt_tokens + self.rows * self.new_tokens
        return tokens * bytes_token


def cover(num_tokens: int, chunks: Chunks) -> list[tuple[int, int]]:
    """(offset, size) of the chunks that cover so many tokens: large ones while they are full, then
    small ones. They end at the number rounded up to a small chunk or, where small chunks have calls
    of their own as large ones have, with a large one that is mostly full."""
    *large, (_, jobs_of_smallest) = chunks
    enough = [int(size * MOSTLY) if jobs == jobs_of_smallest else size for size, jobs in large]
    found, offset = [], 0
    for (size, _), least in zip(chunks, [*enough, 1], strict=True):
        while num_tokens - offset >= least:
            found.append((offset, size))
            offset += size
    return found


def common_head(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; the last one of a prompt does not count."""
    if not prompts:
        return 0
    first, last = min(prompts, key=list), max(prompts, key=list)  # what these share, all do
    most = min(len(prompt) - 1 for prompt in prompts)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return max(min(sum(1 for _ in shared), most), 0)


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
    common: int = 0,
    slots: int | None = None,
    memory_gib: float = 4.0,
    mesh: Mesh | None = None,
) -> Layout:
    """The sizes for a whole job of `samples` texts a prompt (or so many of each), of prompts that
    all begin with the same `common` tokens (`common_head`).

    As many rows as the budget of each device holds, or `slots` over all shards. Raises InputError
    where that, or a single prompt, is more than `memory_gib` holds, and says what fits.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else mesh.shape
    shards, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    longest = max(prompt_lengths, default=1)
    chunks = _even(longest - 1 - common) if platform == "cpu" else ACCELERATOR_CHUNKS
    ends = [common + _end(length - 1 - common, chunks) for length in {*prompt_lengths}]
    widest = max(*ends, _end(common, chunks), chunks[-1][0])
    prompt_tokens = -(-widest // LINE) * LINE
    counts = [samples] * len(prompt_lengths) if isinstance(samples, int) else list(samples)
    texts = -(-sum(counts) // shards) or 1  # of a shard
    prompts = -(-len(counts) // shards) or 1
    budget = memory_gib * 2**30
    per_token = bytes_token(config) // (tensor if config.kv_heads % tensor == 0 else 1)

    def layout(rows: int) -> Layout:
        busy = -(-rows * prompts // texts)  # prompts all of whose texts are running
        resident = min(prompts, max(busy + 1, math.ceil(busy * STRAGGLERS)))
        ahead = min(busy, AHEAD, prompts - resident) if shards > 1 else 0
        parked = ahead if max(jobs for _, jobs in chunks) == 1 else 0
        return Layout(
            shards=shards,
            rows=rows,
            prompts=resident + ahead - parked,
            parked=parked,
            samples=max(counts, default=1),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            chunks=chunks,
            common=common,
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


def _end(num_tokens: int, chunks: Chunks) -> int:
    return sum(size for _, size in cover(num_tokens, chunks))


def _even(num_tokens: int) -> Chunks:
    """A CPU's chunks, the large ones of a size by which they cover so many tokens evenly."""
    (most, jobs), *small = CHUNKS
    even = -(-num_tokens // max(-(-num_tokens // most), 1))
    return ((even, jobs) if even > most // 2 else CHUNKS[0], *small)
