"""Which prompt lies in which prefix slot and which sample runs in which row slot: host side only.

A finished row's slot goes to the next (prompt, sample) whose prompt is prefilled. Prompts are
prefilled in chunks of a few fixed sizes, chosen by the prompt's length alone, so what is computed
for a prompt, and therefore its texts, does not depend on what else is going on.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig

CHUNKS = (128, 32)  # tokens of a prefill call; the last also rounds prompts up
MAX_ROWS = 256  # rows of a shard, however large the budget
ROWS_STEP = 8  # rows are a multiple of this, where there is a choice
STRAGGLERS = 1.75  # prefix slots over what full prompts need: prompts of which few rows still run


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a job's caches. A text is reproduced exactly by the same layout."""

    shards: int  # parts of the data axis
    rows: int  # row slots of a shard
    prompts: int  # prefix slots of a shard
    samples: int  # completions of a prompt
    prompt_tokens: int  # of a prefix slot: a prompt without its last token, rounded up
    new_tokens: int  # of a row slot

    @property
    def lanes(self) -> int:
        """Rows that a prompt can have at once."""
        return min(self.samples, self.rows)

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
    num_samples: int,
    new_tokens: int,
    *,
    slots: int | None = None,
    memory_gib: float = 4.0,
    mesh: Mesh | None = None,
) -> Layout:
    """The sizes for a whole job: as many rows as the budget of each device holds.

    `slots` asks for so many rows over all shards. Raises InputError where that, or a single
    prompt, is more than `memory_gib` holds, and says what fits.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else mesh.shape
    shards, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    longest = max(prompt_lengths, default=1)
    prompts = -(-len(prompt_lengths) // shards)
    budget = memory_gib * 2**30
    per_token = bytes_token(config) // (tensor if config.kv_heads % tensor == 0 else 1)

    def layout(rows: int) -> Layout:
        needed = -(-rows // num_samples)
        return Layout(
            shards=shards,
            rows=rows,
            prompts=max(1, min(prompts, max(needed + 1, int(needed * STRAGGLERS)))),
            samples=num_samples,
            prompt_tokens=max(-(-(longest - 1) // CHUNKS[-1]), 1) * CHUNKS[-1],
            new_tokens=new_tokens,
        )

    def fits(rows: int) -> bool:
        return layout(rows).bytes_of_shard(per_token) <= budget

    most = max(min(prompts * num_samples, MAX_ROWS), 1)
    if slots is not None:
        most = min(-(-slots // shards), max(prompts * num_samples, 1))
        if not fits(most):
            fitting = max((rows for rows in range(1, most) if fits(rows)), default=0)
            needed = layout(most).bytes_of_shard(per_token) / 2**30
            raise InputError(
                f"reason.slots: {slots} rows of {new_tokens} new tokens need {needed:.2f} GiB of "
                f"cache a device, reason.memory_gib is {memory_gib:g}: at most {fitting * shards} "
                "rows fit"
            )
        return layout(most)
    choices = [most, *range(most - most % ROWS_STEP, 0, -ROWS_STEP), *range(ROWS_STEP - 1, 0, -1)]
    for rows in choices:
        if fits(rows):
            return layout(rows)
    raise InputError(
        f"reason.memory_gib: {memory_gib:g} GiB of cache hold no prompt of {longest} tokens with "
        f"{new_tokens} new ones; it takes {layout(1).bytes_of_shard(per_token) / 2**30:.3f}"
    )


def chunks_of(num_tokens: int) -> list[tuple[int, int]]:
    """(offset, size) of the prefill calls that cover so many tokens, decided by that number alone.

    Whole large chunks, then small ones; they end at the number rounded up to a small chunk.
    """
    chunks, offset = [], 0
    for size in CHUNKS:
        while num_tokens - offset >= size or (size == CHUNKS[-1] and num_tokens > offset):
            chunks.append((offset, size))
            offset += size
    return chunks


@dataclasses.dataclass
class Resident:
    """A prompt in a prefix slot."""

    prompt: int
    chunks: deque[tuple[int, int]]
    waiting: deque[int]  # samples not yet started
    free_lanes: deque[int]
    live: int = 0


@dataclasses.dataclass(frozen=True)
class Start:
    """A row that begins now."""

    shard: int
    row: int
    prompt: int
    sample: int


@dataclasses.dataclass(frozen=True)
class Seat:
    """What a row slot holds."""

    slot: int
    lane: int
    sample: int


@dataclasses.dataclass(frozen=True)
class PrefillJob:
    """One chunk of a prompt."""

    shard: int
    slot: int
    prompt: int
    offset: int
    size: int


class Schedule:
    """The bookkeeping of one job: `prefill_jobs`, `start_rows` and `finish` in turn until `done`.

    `lengths` are of whole prompts; the last token of each is fed to its rows as their first step,
    so that prefill needs no logits and all tokens are drawn in one place.
    """

    def __init__(self, layout: Layout, lengths: Sequence[int]):
        self.layout, self.lengths = layout, lengths
        X, B, G = layout.shards, layout.rows, layout.prompts
        self.queue = deque(range(len(lengths)))
        self.residents: list[list[Resident | None]] = [[None] * G for _ in range(X)]
        self.seats: list[list[Seat | None]] = [[None] * B for _ in range(X)]
        self.lane_of_row_XB = np.zeros((X, B), np.int32)
        self.row_of_lane_XL = np.zeros((X, G * layout.lanes), np.int32)
        self.prefix_length_XG = np.zeros((X, G), np.int32)

    @property
    def done(self) -> bool:
        return not self.queue and not any(any(shard) for shard in self.residents)

    @property
    def num_live(self) -> int:
        return sum(row is not None for shard in self.seats for row in shard)

    @property
    def num_waiting(self) -> int:
        """Rows not started, of prompts resident or queued."""
        resident = sum(len(one.waiting) for shard in self.residents for one in shard if one)
        return resident + len(self.queue) * self.layout.samples

    def prefill_jobs(self) -> list[PrefillJob]:
        """At most one chunk a shard, all of one size; empty where every free row has its prompt.

        Takes prompts from the queue into free prefix slots as rows need them.
        """
        jobs = []
        for shard in range(self.layout.shards):
            job = self._prefill_job(shard)
            if job is not None:
                jobs.append(job)
        if not jobs:
            return []
        size = max(job.size for job in jobs)
        jobs = [job for job in jobs if job.size == size]
        for job in jobs:
            resident = self.residents[job.shard][job.slot]
            assert resident is not None
            resident.chunks.popleft()
        return jobs

    def start_rows(self) -> list[Start]:
        """Puts waiting samples of prefilled prompts into free rows, oldest prompt first."""
        starts = []
        for shard, residents in enumerate(self.residents):
            free = deque(row for row, held in enumerate(self.seats[shard]) if held is None)
            for slot in self._by_age(shard):
                resident = residents[slot]
                assert resident is not None
                while free and resident.waiting and not resident.chunks:
                    row, sample = free.popleft(), resident.waiting.popleft()
                    seat = Seat(slot, resident.free_lanes.popleft(), sample)
                    lane = slot * self.layout.lanes + seat.lane
                    self.seats[shard][row] = seat
                    self.lane_of_row_XB[shard, row] = lane
                    self.row_of_lane_XL[shard, lane] = row
                    resident.live += 1
                    starts.append(Start(shard, row, resident.prompt, sample))
        return starts

    def finish(self, shard: int, row: int) -> tuple[int, int, bool]:
        """Frees a row; (prompt, sample, whether that was the prompt's last one)."""
        seat = self.seats[shard][row]
        assert seat is not None
        resident = self.residents[shard][seat.slot]
        assert resident is not None
        self.seats[shard][row] = None
        resident.free_lanes.append(seat.lane)
        resident.live -= 1
        last = not resident.live and not resident.waiting
        if last:
            self.residents[shard][seat.slot] = None
        return resident.prompt, seat.sample, last

    def _prefill_job(self, shard: int) -> PrefillJob | None:
        residents = self.residents[shard]
        free = sum(row is None for row in self.seats[shard])
        ready = sum(len(one.waiting) for one in residents if one and not one.chunks)
        if ready >= free:
            return None
        for slot in self._by_age(shard):
            resident = residents[slot]
            assert resident is not None
            if resident.chunks:
                return PrefillJob(shard, slot, resident.prompt, *resident.chunks[0])
        return self._load(shard)

    def _load(self, shard: int) -> PrefillJob | None:
        """Takes queued prompts into free prefix slots, up to the first that has a chunk to run."""
        for slot, held in enumerate(self.residents[shard]):
            if held is not None or not self.queue:
                continue
            prompt = self.queue.popleft()
            num_tokens = self.lengths[prompt] - 1
            chunks = deque(chunks_of(num_tokens))
            self.residents[shard][slot] = Resident(
                prompt,
                chunks,
                waiting=deque(range(self.layout.samples)),
                free_lanes=deque(range(self.layout.lanes)),
            )
            self.prefix_length_XG[shard, slot] = num_tokens
            if chunks:
                return PrefillJob(shard, slot, prompt, *chunks[0])
        return None

    def _by_age(self, shard: int) -> list[int]:
        """Occupied prefix slots, oldest prompt first."""
        held = [
            (one.prompt, slot) for slot, one in enumerate(self.residents[shard]) if one is not None
        ]
        return [slot for _, slot in sorted(held)]
