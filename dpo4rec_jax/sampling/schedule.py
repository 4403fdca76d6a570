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

from dpo4rec_jax.sampling.layout import Layout


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
class Move:
    """A prompt goes from the slot where it was prefilled to one that rows attend to."""

    shard: int
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class PrefillJob:
    """One chunk of a prompt."""

    shard: int
    slot: int
    prompt: int
    offset: int
    size: int


class Schedule:
    """The bookkeeping of one job: `prefill_jobs`, `moves`, `start_rows` and `finish` in turn until
    `done`.

    `lengths` are of whole prompts, `samples` how many texts each gets (default: all the same).
    The last token of each is fed to its rows as their first step,
    so that prefill needs no logits and all tokens are drawn in one place.
    """

    def __init__(
        self, layout: Layout, lengths: Sequence[int], samples: Sequence[int] | None = None
    ):
        self.layout, self.lengths = layout, lengths
        self.samples = [layout.samples] * len(lengths) if samples is None else samples
        X, B, G = layout.shards, layout.rows, layout.prompts
        self.queue = deque(range(len(lengths)))
        slots = G + layout.parked
        self.residents: list[list[Resident | None]] = [[None] * slots for _ in range(X)]
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
        resident = sum(map(self._waiting, self._shards))
        return resident + sum(self.samples[prompt] for prompt in self.queue)

    def prefill_jobs(self) -> list[PrefillJob]:
        """The chunks of the next call, all of one size; empty where every free row has its prompt.

        Takes prompts from the queue into free prefix slots as rows need them. A shard without a
        chunk of that size works ahead, as far as it has a slot: all shards run the same call.
        """
        wanted = [self._jobs_for(shard, self._idle(shard)) for shard in self._shards]
        if not any(wanted):
            return []
        size = self._fullest(wanted)
        chosen = []
        for shard, jobs in zip(self._shards, wanted, strict=True):
            fitting = [job for job in jobs if job.size == size]
            if not fitting:  # the call takes this shard's time all the same
                ahead = self._jobs_for(shard, self._waiting(shard) + 1)
                fitting = [job for job in ahead if job.size == size]
            chosen += fitting[: self.layout.jobs(size)]
        for job in chosen:
            resident = self.residents[job.shard][job.slot]
            assert resident is not None
            resident.chunks.popleft()
        return chosen

    def moves(self) -> list[Move]:
        """Of each shard's oldest parked prompt, if it is prefilled and there is a free slot."""
        found = []
        for shard, residents in enumerate(self.residents):
            attended = residents[: self.layout.prompts]
            parked = [slot for slot in self._by_age(shard) if slot >= len(attended)]
            resident = residents[parked[0]] if parked and None in attended else None
            if resident is not None and not resident.chunks:
                move = Move(shard, parked[0], attended.index(None))
                residents[move.target], residents[move.source] = resident, None
                self.prefix_length_XG[shard, move.target] = self.lengths[resident.prompt] - 1
                found.append(move)
        return found

    def start_rows(self) -> list[Start]:
        """Puts waiting samples of prefilled prompts into free rows, oldest prompt first."""
        starts = []
        for shard, residents in enumerate(self.residents):
            free = deque(row for row, held in enumerate(self.seats[shard]) if held is None)
            for slot in self._by_age(shard):
                resident = residents[slot]
                assert resident is not None
                if slot >= self.layout.prompts:  # parked
                    continue
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

    @property
    def _shards(self) -> range:
        return range(self.layout.shards)

    def _idle(self, shard: int) -> int:
        """Rows without a text."""
        return sum(row is None for row in self.seats[shard])

    def _waiting(self, shard: int) -> int:
        """Texts not started, of resident prompts."""
        return sum(len(one.waiting) for one in self.residents[shard] if one)

    def _fullest(self, wanted: list[list[PrefillJob]]) -> int:
        """The size of chunk whose call would do most of what it can; the larger where equal."""

        def share(size: int) -> float:
            room = self.layout.jobs(size)
            taken = (min(sum(job.size == size for job in jobs), room) for jobs in wanted)
            return sum(taken) / room

        return max((size for size, _ in self.layout.chunks), key=share)

    def _jobs_for(self, shard: int, rows: int) -> list[PrefillJob]:
        """The next chunk of every prompt, oldest first, that so many free rows wait for."""
        residents = self.residents[shard]
        jobs, coming = [], 0
        for slot in self._by_age(shard):
            resident = residents[slot]
            assert resident is not None
            if coming < rows and resident.chunks:
                jobs.append(PrefillJob(shard, slot, resident.prompt, *resident.chunks[0]))
            coming += len(resident.waiting)
        for slot in self.layout.home:
            if coming >= rows or not self.queue:
                break
            if residents[slot] is None:
                resident = self._load(shard, slot)
                coming += len(resident.waiting)
                if resident.chunks:
                    jobs.append(PrefillJob(shard, slot, resident.prompt, *resident.chunks[0]))
        return jobs

    def _load(self, shard: int, slot: int) -> Resident:
        """Takes the next queued prompt into a free prefix slot."""
        prompt = self.queue.popleft()
        num_tokens = self.lengths[prompt] - 1
        if slot < self.layout.prompts:
            self.prefix_length_XG[shard, slot] = num_tokens
        resident = Resident(
            prompt,
            deque(self.layout.chunks_of(num_tokens)),
            waiting=deque(range(self.samples[prompt])),
            free_lanes=deque(range(self.layout.lanes)),
        )
        self.residents[shard][slot] = resident
        return resident

    def _by_age(self, shard: int) -> list[int]:
        """Occupied prefix slots, oldest prompt first."""
        held = [
            (one.prompt, slot) for slot, one in enumerate(self.residents[shard]) if one is not None
        ]
        return [slot for _, slot in sorted(held)]
