"""The host's bookkeeping: sizes from a budget, chunks, slots."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.sampling.layout import AHEAD, ROWS_STEP, Layout, plan_layout
from dpo4rec_jax.sampling.schedule import Schedule

SMOLLM2 = LlamaConfig(
    vocab_size=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64
)
KV_BYTES = 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, size, float32


def test_memory_is_prompts_times_length_plus_rows_times_new_tokens() -> None:
    layout = Layout(shards=1, rows=32, prompts=5, samples=8, prompt_tokens=544, new_tokens=128)
    assert layout.bytes_of_shard(KV_BYTES) == (5 * 544 + 32 * 128) * KV_BYTES


@pytest.mark.parametrize("memory_gib", [0.1, 0.5, 1.0])
def test_rows_fill_the_budget_and_not_more(memory_gib) -> None:
    layout = plan_layout(SMOLLM2, [520] * 1000, 10, 128, memory_gib=memory_gib)
    assert layout.bytes_of_shard(KV_BYTES) <= memory_gib * 2**30
    with pytest.raises(InputError, match=r"reason\.slots"):
        more = layout.rows + ROWS_STEP
        plan_layout(SMOLLM2, [520] * 1000, 10, 128, memory_gib=memory_gib, slots=more)


def test_asking_for_too_many_slots_says_what_fits() -> None:
    with pytest.raises(InputError, match=r"reason\.slots: 500 rows .* at most (\d+) rows") as error:
        plan_layout(SMOLLM2, [520] * 1000, 10, 128, memory_gib=0.5, slots=500)
    fitting = int(str(error.value).split("at most ")[1].split()[0])
    plan_layout(SMOLLM2, [520] * 1000, 10, 128, memory_gib=0.5, slots=fitting)
    with pytest.raises(InputError):
        plan_layout(SMOLLM2, [520] * 1000, 10, 128, memory_gib=0.5, slots=fitting + 1)


def test_a_budget_that_holds_no_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"reason\.memory_gib: 0\.01 GiB .* no prompt of 520"):
        plan_layout(SMOLLM2, [520], 10, 128, memory_gib=0.01)


def test_a_small_job_gets_no_more_slots_than_texts() -> None:
    layout = plan_layout(SMOLLM2, [100, 90], 3, 16)
    assert (layout.rows, layout.prompts, layout.prompt_tokens) == (6, 2, 112)


def test_the_large_chunks_of_a_cpu_cover_the_longest_prompt_evenly() -> None:
    layout = plan_layout(SMOLLM2, [521, 535, 60], 8, 128, common=37)
    assert layout.chunks == ((125, 1), (32, 1))
    assert layout.prompt_tokens == 544
    assert layout.chunks_of(534) == [(37, 125), (162, 125), (287, 125), (412, 125)]
    assert layout.chunks_of(520) == layout.chunks_of(534)  # the last one mostly full
    assert layout.chunks_of(59) == [(37, 32)]


@given(st.integers(0, 2000))
def test_chunks_cover_a_prompt_behind_what_is_common_without_gaps(num_tokens) -> None:
    # Several prompts a small call: less than a small chunk too much. One: a quarter of a large one.
    for small, most in (((48, 3), (32, 2)), 31), (((32, 1),), 32):
        layout = Layout(1, 1, 1, 1, 1, 1, chunks=((128, 1), *small), common=9)
        chunks = layout.chunks_of(9 + num_tokens)
        ends = [offset + size for offset, size in chunks]
        assert [offset for offset, _ in chunks] == [9, *ends][: len(chunks)]
        assert {size for _, size in chunks} <= {size for size, _ in layout.chunks}
        covered = ends[-1] - 9 if ends else 0
        assert num_tokens <= covered <= num_tokens + most


@given(st.data())
def test_every_sample_runs_once_on_its_own_prompts_prefix(data) -> None:
    """Plays the device: rows finish at random; a row must find its prompt whole in its slot, also
    where it was prefilled in another."""
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    layout = Layout(
        shards=data.draw(st.integers(1, 3)),
        rows=data.draw(st.integers(1, 5)),
        prompts=data.draw(st.integers(1, 4)),
        samples=data.draw(st.integers(1, 4)),
        prompt_tokens=320,
        new_tokens=8,
        chunks=((128, data.draw(st.integers(1, 2))), (32, data.draw(st.integers(1, 3)))),
        parked=data.draw(st.integers(0, 2)),
    )
    schedule = Schedule(layout, lengths)
    prefilled: dict[tuple[int, int], tuple[int, int]] = {}  # slot -> prompt, tokens
    running: dict[tuple[int, int], tuple[int, int]] = {}  # row -> prompt, sample
    finished, whole = [], {}

    def move() -> None:
        moves = schedule.moves()
        assert len({one.shard for one in moves}) == len(moves)
        for one in moves:
            assert one.source >= layout.prompts > one.target
            target = (one.shard, one.target)
            assert not any(whole[key] == target for key in running)
            prefilled[target] = prefilled.pop((one.shard, one.source), (-1, 0))

    while not schedule.done:
        while True:
            move()
            jobs = schedule.prefill_jobs()
            if not jobs:
                break
            assert len({(job.shard, job.slot) for job in jobs}) == len(jobs)
            (size,) = {job.size for job in jobs}
            by_shard = Counter(job.shard for job in jobs)
            assert max(by_shard.values()) <= layout.jobs(size)
            for job in jobs:
                assert job.slot in layout.home
                at, before = (job.shard, job.slot), prefilled.get((job.shard, job.slot))
                if job.offset == 0:
                    assert not any(key[0] == job.shard and whole[key] == at for key in running)
                else:
                    assert before == (job.prompt, job.offset)
                prefilled[at] = (job.prompt, job.offset + job.size)
        move()
        for start in schedule.start_rows():
            row = (start.shard, start.row)
            assert row not in running
            running[row] = (start.prompt, start.sample)
            lane = int(schedule.lane_of_row_XB[row])
            slot = lane // layout.lanes
            whole[row] = (start.shard, slot)
            assert schedule.row_of_lane_XL[start.shard, lane] == start.row
            assert schedule.prefix_length_XG[start.shard, slot] == lengths[start.prompt] - 1
            if lengths[start.prompt] > 1:
                held = prefilled[start.shard, slot]
                assert held[0] == start.prompt and held[1] >= lengths[start.prompt] - 1
        assert running, "nothing runs and nothing is done"
        number = data.draw(st.integers(1, len(running)))
        for row in list(running)[:number]:
            prompt, sample, last = schedule.finish(*row)
            assert (prompt, sample) == running.pop(row)
            finished.append((prompt, sample))
            assert last == (sum(one == prompt for one, _ in finished) == layout.samples)
    every = [(prompt, n) for prompt in range(len(lengths)) for n in range(layout.samples)]
    assert sorted(finished) == every


def test_a_freed_row_goes_to_the_next_sample_at_once() -> None:
    layout = Layout(shards=1, rows=4, prompts=3, samples=3, prompt_tokens=32, new_tokens=8)
    schedule = Schedule(layout, [5, 5, 5])
    while schedule.prefill_jobs():
        pass
    assert [(one.prompt, one.sample) for one in schedule.start_rows()] == [
        (0, 0), (0, 1), (0, 2), (1, 0),
    ]  # fmt: skip
    schedule.finish(0, 1)
    assert not schedule.prefill_jobs()  # prompt 1 is there already
    (start,) = schedule.start_rows()
    assert dataclasses.astuple(start) == (0, 1, 1, 1)
    assert np.all(schedule.lane_of_row_XB[0] == [0, 4, 2, 3])


def test_shards_prefill_in_the_same_calls(monkeypatch) -> None:
    """8 shards of 32 rows, 2,048 texts of 8 to 128 tokens behind prompts of 520: a call runs on
    all shards, so 256 prompts of five chunks take 160 calls where no shard ever sits one out."""

    devices = np.array(jax.devices()[:1] * 8).reshape(8, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    layout = plan_layout(SMOLLM2, [522] * 256, 8, 128, slots=256, mesh=mesh)
    assert (layout.rows, layout.prompts, layout.parked) == (32, 7, AHEAD)
    assert _prefill_calls(layout, 256) < 1.25 * 160
    monkeypatch.setattr(Schedule, "_waiting", lambda schedule, shard: -1)  # nobody works ahead
    assert _prefill_calls(layout, 256) > 2 * 160


def _prefill_calls(layout: Layout, num_prompts: int) -> int:
    """Plays a job: 16 steps or fewer, then as many prefills as rows ask for."""
    rng = np.random.default_rng(0)
    left = rng.integers(8, 129, (num_prompts, layout.samples))
    schedule = Schedule(layout, [521] * num_prompts)
    running: dict[tuple[int, int], int] = {}
    calls = 0
    while not schedule.done:
        schedule.moves()
        while schedule.prefill_jobs():
            calls += 1
            schedule.moves()
        for start in schedule.start_rows():
            running[start.shard, start.row] = int(left[start.prompt, start.sample])
        steps = min(16, sorted(running.values())[: layout.shards * layout.rows // 16][-1])
        running = {row: tokens - steps for row, tokens in running.items()}
        for row in [row for row, tokens in running.items() if tokens <= 0]:
            schedule.finish(*row)
            del running[row]
    return calls
