"""Sampling N completions of every prompt: shared prefixes, slots, continuous batching.

The host's loop: prefill what free rows need, start waiting samples in them, let the device draw
some tokens, take what has finished. A row's random draws come from (seed, round, prompt id,
sample) and the token's index only, and what it computes never depends on its neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.runtime.throttle import Throttle
from dpo4rec_jax.sampling import steps
from dpo4rec_jax.sampling.filters import Settings
from dpo4rec_jax.sampling.layout import Layout, common_head, cover, plan_layout
from dpo4rec_jax.sampling.schedule import Move, PrefillJob, Schedule, Start
from dpo4rec_jax.sampling.steps import Job

BURST = 8  # prefill calls between two decode calls while most rows are running

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


@runtime_checkable
class Policy(Protocol):
    """What sampling needs of `weights.Policy`."""

    @property
    def config(self) -> LlamaConfig: ...
    @property
    def params(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def chat_ids(self, messages: Sequence[Message], /) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled text. `tokens` include the stop token; `text` has no special tokens.

    `logps` are the policy's own log-probabilities of the tokens, in nats, before temperature and
    filters; None where they were not asked for.
    """

    text: str
    tokens: list[int]
    finish: Literal["stop", "length"]
    logps: list[float] | None = None


@dataclasses.dataclass
class Figures:
    """What a job has done so far."""

    prefill_calls: int = 0
    prefill_tokens: int = 0  # padding included
    decode_calls: int = 0
    decode_steps: int = 0  # each is a token of every running row
    tokens: int = 0
    rows: int = 0


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    *,
    round: int = 0,
    slots: int | None = None,
    memory_gib: float = 4.0,
    logps: bool = False,
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt, in the prompts' order.

    A prompt is token ids, a string (tokenized as it is) or chat messages (by the chat template).
    Temperature 0 takes the likeliest token; filters apply in the order temperature, `top_k`,
    `top_p`. `slots` rows are decoded at once, by default as many as `memory_gib` of keys and values
    hold. Raises InputError for an empty prompt, ids outside of the vocabulary, a budget that holds
    no prompt, and a policy whose logits are not finite.
    """
    ids = [encode(policy, prompt) for prompt in prompts]
    if not ids:
        return []
    layout = plan_layout(
        policy.config,
        [len(prompt) for prompt in ids],
        num_samples,
        max_new_tokens,
        common=common_head(ids),
        slots=slots,
        memory_gib=memory_gib,
    )
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    found = dict(stream(policy, ids, layout, seed=seed, round=round, logps=logps, **settings))
    return [found[index] for index in range(len(ids))]


def encode(policy: Policy, prompt: Prompt) -> list[int]:
    """Token ids of a prompt in any of its forms."""
    if isinstance(prompt, str):
        return list(policy.tokenizer(prompt)["input_ids"])
    if prompt and isinstance(prompt[0], Mapping):
        return policy.chat_ids(prompt)  # pyright: ignore[reportArgumentType]
    return [int(token) for token in prompt]  # pyright: ignore[reportArgumentType]


def stream(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    layout: Layout,
    *,
    mesh: jax.sharding.Mesh | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    round: int = 0,
    samples: Sequence[int] | None = None,
    prompt_ids: Sequence[int] | None = None,
    limit_PN: np.ndarray | None = None,
    logps: bool = False,
    figures: Figures | None = None,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yields (position in `prompts`, its completions) as prompts become complete, in any order.

    Each prompt, token ids, gets `layout.samples` completions or, where `samples` says so, fewer.
    The `layout.common` tokens that all prompts begin with are prefilled once.
    `prompt_ids` name the prompts to the random numbers (default: their positions), so a part of a
    job draws what the whole would. `limit_PN` limits single completions (default: all to
    `layout.new_tokens`). `figures` is kept up to date for whoever passed it.
    """
    limit_PN = np.broadcast_to(
        layout.new_tokens if limit_PN is None else limit_PN, (len(prompts), layout.samples)
    )
    _check(prompts, layout, limit_PN, policy.config.vocab_size)
    ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    figures = Figures() if figures is None else figures
    settings = Settings.of(temperature, top_p, top_k)
    job = Job.of(settings, policy.stop_ids, seed, round)
    device = _Device(policy, layout, job, mesh, logps)
    schedule = Schedule(layout, [len(prompt) for prompt in prompts], samples)
    if not schedule.done:
        device.prefill_head(prompts[0])
    found: dict[int, dict[int, Completion]] = {}
    while not schedule.done:
        mostly_running = 2 * schedule.num_live >= layout.shards * layout.rows
        for _ in range(BURST) if mostly_running else itertools.count():
            device.move(schedule.moves())
            jobs = schedule.prefill_jobs()
            if not jobs:
                break
            device.prefill(jobs, prompts)
            figures.prefill_calls += 1
            figures.prefill_tokens += sum(job.size for job in jobs)
        device.move(schedule.moves())
        starts = schedule.start_rows()
        turn = steps.idle_turn(schedule)
        for start in starts:
            limit = int(limit_PN[start.prompt, start.sample])
            _begin(turn, start, prompts[start.prompt], ids[start.prompt], limit)
        figures.decode_calls += 1
        finished, taken = device.decode(turn)
        figures.decode_steps += taken
        for (shard, row), tokens, token_logps in finished:
            prompt, index, last = schedule.finish(shard, row)
            if not np.isfinite(token_logps).all():
                raise InputError(
                    f"policy: its logits for prompt {ids[prompt]} are not finite; check the "
                    "weights, or align with a smaller learning rate"
                )
            figures.tokens += len(tokens)
            figures.rows += 1
            found.setdefault(prompt, {})[index] = Completion(
                text=policy.tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=tokens,
                finish="stop" if tokens[-1] in policy.stop_ids else "length",
                logps=token_logps if logps else None,
            )
            if last:
                yield prompt, [one for _, one in sorted(found.pop(prompt).items())]


class _Device:
    """The arrays of a job on the device, and the calls that advance them."""

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        job: Job,
        mesh: jax.sharding.Mesh | None,
        logps: bool,
    ):
        config = self._config = policy.config
        self._layout, self._job, self._logps = layout, job, logps
        self._params = llama.split_layers(policy.params)

        self._sharding = steps.Sharding(mesh) if mesh is not None and mesh.size > 1 else None
        prefix, self._suffix, self._rows = steps.empty(config, layout, self._sharding)
        self._prefixes = [prefix]
        if layout.parked:  # prompts are prefilled in the last
            self._prefixes.append(steps.parking(config, layout, self._sharding))
        self._running_XB = np.zeros((layout.shards, layout.rows), bool)
        self._throttle = Throttle()

    def prefill_head(self, prompt: Sequence[int]) -> None:
        """Writes the common tokens, which this prompt begins with, into every prefix slot."""
        common, shards = self._layout.common, range(self._layout.shards)
        for offset, size in cover(common, self._layout.chunks):
            # What follows the common tokens in the chunk is written over by each slot's prompt.
            slot = self._layout.home.start
            jobs = [PrefillJob(shard, slot, 0, offset, size) for shard in shards]
            self.prefill(jobs, [[*prompt[:common], 0]])
        if common:
            self._prefixes[-1] = steps.spread(self._prefixes[-1], common, self._sharding)

    def prefill(self, jobs: Sequence[PrefillJob], prompts: Sequence[Sequence[int]]) -> None:
        """Runs one chunk of each job; their sizes are equal."""
        X, T = self._layout.shards, jobs[0].size
        shape = (X, self._layout.jobs(T))
        tokens_XJT = np.zeros((*shape, T), np.int32)
        slot_XJ, offset_XJ = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        valid_XJ = np.zeros(shape, bool)
        for job in jobs:
            at = (job.shard, int(valid_XJ[job.shard].sum()))
            # The last token is not part of the prefix: it is its rows' first step.
            end = min(job.offset + T, len(prompts[job.prompt]) - 1)
            chunk = prompts[job.prompt][job.offset : end]
            tokens_XJT[at][: len(chunk)] = chunk
            slot = self._layout.home.index(job.slot)
            slot_XJ[at], offset_XJ[at], valid_XJ[at] = slot, job.offset, True
        arguments = (tokens_XJT, slot_XJ, offset_XJ, valid_XJ)
        self._prefixes[-1] = steps.prefill(
            self._config, self._params, self._prefixes[-1], *arguments, self._sharding
        )
        self._throttle(self._prefixes[-1])

    def move(self, moves: Sequence[Move]) -> None:
        """Brings parked prompts, one a shard at the most, to where rows attend to them."""
        if not moves:
            return
        source_X, target_X, valid_X = np.zeros((3, self._layout.shards), np.int32)
        for move in moves:
            at = move.shard
            source_X[at], target_X[at] = self._layout.home.index(move.source), move.target
            valid_X[at] = True
        prefix, parked = self._prefixes
        self._prefixes[0] = steps.move(
            parked, prefix, source_X, target_X, valid_X.astype(bool), self._sharding
        )

    def decode(
        self, turn: steps.Turn
    ) -> tuple[list[tuple[tuple[int, int], list[int], list[float]]], int]:
        """Draws some tokens for every row: ((shard, row), tokens, logps or margins) of those that
        finished, and the number of steps taken."""
        self._suffix, self._rows, taken = steps.decode(
            self._config,
            self._params,
            self._prefixes[0],
            self._suffix,
            self._rows,
            turn,
            self._job,
            self._sharding,
            self._logps,
        )
        active_XB = np.asarray(self._rows.active_XB)
        finished_XB = (self._running_XB | turn.fresh_XB) & ~active_XB
        self._running_XB = active_XB
        if not finished_XB.any():
            return [], int(taken)
        length_XB, tokens_XBT, logps_XBT = jax.device_get(
            (self._rows.length_XB, self._rows.tokens_XBT, self._rows.logps_XBT)
        )
        finished = []
        for shard, row in np.argwhere(finished_XB).tolist():
            own = (shard, row, slice(0, int(length_XB[shard, row])))
            finished.append(((shard, row), tokens_XBT[own].tolist(), logps_XBT[own].tolist()))
        return finished, int(taken)


def _begin(
    turn: steps.Turn, start: Start, prompt: Sequence[int], prompt_id: int, limit: int
) -> None:
    at = (start.shard, start.row)
    turn.fresh_XB[at] = True
    turn.token_XB[at] = prompt[-1]
    turn.position_XB[at] = len(prompt) - 1
    turn.limit_XB[at] = limit
    turn.prompt_id_XB[at] = prompt_id
    turn.sample_XB[at] = start.sample


def _check(
    prompts: Sequence[Sequence[int]], layout: Layout, limit_PN: np.ndarray, vocabulary: int
) -> None:
    if limit_PN.size and not 1 <= limit_PN.min() <= limit_PN.max() <= layout.new_tokens:
        raise InputError(
            f"max_new_tokens: expected 1 to {layout.new_tokens}, got {limit_PN.min()} to "
            f"{limit_PN.max()}"
        )
    head = list(prompts[0][: layout.common]) if len(prompts) else []
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= layout.prompt_tokens + 1:
            raise InputError(
                f"prompt {index}: expected 1 to {layout.prompt_tokens + 1} tokens, got "
                f"{len(prompt)}; shorten it"
            )
        if list(prompt[: layout.common]) != head or len(prompt) == layout.common:
            raise InputError(
                f"prompt {index}: expected to begin with {layout.common} tokens of prompt 0 and to "
                "go on; plan the layout with the common_head of all prompts"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {index}: expected ids from 0 to {vocabulary - 1}, got {min(prompt)} to "
                f"{max(prompt)}"
            )
