"""The training loop: steps of one loss over a feed, with checkpoints, figures, stop on request.

The next step is dispatched before the last one's figures are fetched, so the device never waits for
the host. One program is compiled ahead of time for each microbatch shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.checkpoint import Checkpoints
from dpo4rec_jax.runtime.loader import Feed, Microbatch
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped, Task
from dpo4rec_jax.runtime.state import Loss, TrainState, Tree
from dpo4rec_jax.runtime.throttle import Throttle
from dpo4rec_jax.workspace import write_json

Place = Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]]


@dataclass(frozen=True)
class Trainer:
    """What a run is made of.

    `advice` ends the message of a run that diverges: of one with `max_skipped` steps in a row whose
    loss or gradient is not finite. Their batches then go to `diagnosis`, each row by its name in
    `row_names` (without any: by its number).
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    log: MetricsLog
    progress: Progress
    description: str
    unit: str = "pairs"
    advice: str = "lower the learning rate"
    max_skipped: int = 5
    diagnosis: Path | None = None
    row_names: Sequence[str] = ()
    log_every: int = 5
    save_every: int = 50
    place: Place = jax.device_put

    def fit(
        self, state: TrainState, frozen: Tree, feed: Feed, checkpoints: Checkpoints | None = None
    ) -> TrainState:
        """Trains to the end of the feed, from the newest checkpoint if there is one.

        `state` is donated. On Stopped (SIGTERM) everything is saved, the half-finished accumulation
        of a step included, and Stopped goes on. A step whose loss or gradient is not finite is
        skipped; after `max_skipped` in a row the last good state is saved, and InputError raised.
        """
        state, done = self._restored(state, feed, checkpoints)
        programs = Programs(self.loss, self.optimizer, self.schedule)
        meter = _Meter(self, step=int(state.step), programs=programs)
        microbatches = len(feed.microbatches)
        with self.progress.track(
            self.description, microbatches, "microbatches", lockstep=True
        ) as task:
            _advance(task, done)
            try:
                for microbatch, arrays in feed:
                    state, figures = programs.run(state, frozen, self.place(arrays), microbatch)
                    done += 1
                    meter.count(microbatch, arrays)
                    if figures is not None:
                        meter.end_step(figures)
                        if checkpoints and meter.step % self.save_every == 0:
                            checkpoints.save(done, state, feed.position)
                    _advance(task, 1, **meter.shown)
                meter.finish()
            except (Stopped, _Diverged) as reason:
                if checkpoints:
                    checkpoints.save(done, state, feed.position)
                    checkpoints.wait()
                this().barrier("saved", while_stopping=True)
                if isinstance(reason, _Diverged):
                    raise InputError(self._diagnosed(reason)) from None
                meter.finish()
                raise
        if checkpoints:
            checkpoints.wait()
        if skipped := int(state.skipped):
            self.progress.say(
                f"  {self.description}: {skipped} of {int(state.step)} steps skipped, their loss "
                f"or gradient was not finite; {self.advice}"
            )
        return state

    def _diagnosed(self, diverged: _Diverged) -> str:
        """Writes which batches were skipped last; returns the message."""
        message = (
            f"{self.description}: loss or gradient not finite in {diverged.in_a_row} steps in a "
            f"row, up to step {diverged.steps[-1].step}; {self.advice}"
        )
        if self.diagnosis is None:
            return message
        batches = [
            {
                "step": skipped.step,
                "rows": [self.row_names[row] if self.row_names else row for row in skipped.rows],
                **{name: str(value) for name, value in skipped.figures.items()},
            }
            for skipped in diverged.steps
        ]
        write_json(self.diagnosis, {"message": message, "skipped": batches})
        return (
            f"{message} ({self.diagnosis} lists the batches; the state before them is kept: to go "
            f"on from it, --resume --set runtime.max_skipped={2 * self.max_skipped})"
        )

    def _restored(
        self, state: TrainState, feed: Feed, checkpoints: Checkpoints | None
    ) -> tuple[TrainState, int]:
        latest = checkpoints.latest() if checkpoints else None
        if checkpoints is None or latest is None:
            return state, 0
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        jax.tree.map(lambda leaf: leaf.delete(), state)  # never two states on the device
        done, state, feed.position = checkpoints.restore_newest(like)
        if done != latest:
            self.progress.say(f"  {self.description}: checkpoint {latest} is damaged, going back")
        self.log.rewind(int(state.step) + 1)
        return state, done


def _advance(task: Task, n: int, **figures: float) -> None:
    if n:
        task.advance(n, **figures)


class Programs:
    """Compiled steps by microbatch shape; compile time is kept apart from the time of training."""

    def __init__(
        self, loss: Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule
    ):
        self._loss, self._optimizer, self._schedule = loss, optimizer, schedule
        self._compiled: dict[Any, Any] = {}
        self._throttle = Throttle()
        self.seconds_compiling = 0.0

    def run(
        self, state: TrainState, frozen: Tree, batch: training.Batch, microbatch: Microbatch
    ) -> tuple[TrainState, dict[str, jax.Array] | None]:
        """Takes in one microbatch; figures come with the one that ends a step. Donates `state`."""
        assert microbatch.ends_step or state.pending is not None, "no room for accumulation"
        take_in, *at_the_end = self.functions(accumulating=state.pending is not None).items()
        state, figures = self._call(take_in, microbatch.shape, state, frozen, batch)
        if microbatch.ends_step:
            for end in at_the_end:
                state, figures = self._call(end, None, state)
        self._throttle(state.step)
        return state, figures

    def functions(self, accumulating: bool) -> dict[str, Any]:
        """By name, what takes in a microbatch (state, frozen, batch) and, where a step is several,
        what ends it (state). Each returns (state, figures)."""

        def add(state: TrainState, frozen: Tree, batch: training.Batch) -> tuple[TrainState, None]:
            return training.accumulate(self._loss, state, frozen, batch), None

        def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            return training.update(self._optimizer, self._schedule, state)

        if accumulating:
            return {"accumulate": add, "update": update}
        return {"step": training.step(self._loss, self._optimizer, self._schedule)}

    def _call(
        self, named: tuple[str, Any], shape: Any, state: TrainState, *rest: Any
    ) -> tuple[TrainState, Any]:
        name, function = named
        if (name, shape) not in self._compiled:
            began = time.perf_counter()
            self._compiled[name, shape] = compiled(lower(function, state, *rest))
            self.seconds_compiling += time.perf_counter() - began
        return self._compiled[name, shape](state, *rest)


def lower(function: Any, state: TrainState, *rest: Any) -> jax.stages.Lowered:
    """One of `Programs.functions` for these arguments, or for their shapes and shardings: the state
    is donated and comes back where it lay."""
    like = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(function, donate_argnums=0, out_shardings=(like, None)).lower(state, *rest)


@dataclass(frozen=True)
class _Skipped:
    """A step that changed nothing: its rows, and the figures that were not finite."""

    step: int
    rows: tuple[int, ...]
    figures: dict[str, float]


class _Diverged(Exception):
    def __init__(self, steps: Sequence[_Skipped], in_a_row: int):
        self.steps, self.in_a_row = steps, in_a_row


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The executable. Without the option XLA's CPU backend copies both moments of Adam and the
    gradients before it updates them in place: twice the update's time, a gigabyte for 135M."""
    on_cpu = jax.default_backend() == "cpu"
    options: Any = {"xla_cpu_copy_insertion_use_region_analysis": True} if on_cpu else None
    return lowered.compile(compiler_options=options)


@dataclass
class _Meter:
    """Means of the figures over each interval, one step behind the device."""

    trainer: Trainer
    step: int
    programs: Programs
    shown: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting: tuple[int, dict[str, jax.Array], tuple[int, ...], int] | None = None
        self._rows: tuple[int, ...] = ()
        self._tokens = 0
        self._skipped: list[_Skipped] = []  # in a row, up to now
        self._start_interval()

    def count(self, microbatch: Microbatch, arrays: Mapping[str, np.ndarray]) -> None:
        real = arrays["mask_B"]
        self._rows += microbatch.rows
        self._tokens += int(arrays["prompt_length_B"][real].sum())
        self._tokens += int(arrays["completion_length_BC"][real].sum())

    def end_step(self, figures: dict[str, jax.Array]) -> None:
        self.step += 1
        finished, self._waiting = self._waiting, (self.step, figures, self._rows, self._tokens)
        self._rows, self._tokens = (), 0
        if finished is not None:
            self._take(*finished)

    def finish(self) -> None:
        """Takes in the last step and writes what is left of the interval."""
        if self._waiting is not None:
            self._take(*self._waiting)
            self._waiting = None
        self._write()

    def _take(
        self, step: int, on_device: dict[str, jax.Array], rows: tuple[int, ...], tokens: int
    ) -> None:
        figures = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if figures["skipped_in_a_row"]:
            shown = {name: figures[name] for name in ("loss", "grad_norm")}
            self._skipped.append(_Skipped(step, rows, shown))
        else:
            self._skipped.clear()
        if figures["skipped_in_a_row"] >= self.trainer.max_skipped:
            raise _Diverged(self._skipped, int(figures["skipped_in_a_row"]))
        self._steps.append(figures)
        self._interval_rows += len(rows)
        self._interval_tokens += tokens
        self._last = step
        self.shown = {"loss": figures["loss"]}
        if step % self.trainer.log_every == 0:
            self._write()

    def _write(self) -> None:
        if not self._steps:
            return
        compiling = self.programs.seconds_compiling - self._compiled_before
        seconds = max(time.perf_counter() - self._began - compiling, 1e-9)
        taken = [figures for figures in self._steps if np.isfinite(figures["loss"])]
        values = {name: self._steps[-1][name] for name in ("learning_rate", "skipped")}
        for name in taken[0] if taken else ():
            if name not in ("learning_rate", "skipped", "skipped_in_a_row", "weight"):
                weights = None if name == "grad_norm" else [figures["weight"] for figures in taken]
                values[name] = float(np.average([f[name] for f in taken], weights=weights))
        values[f"{self.trainer.unit}_per_second"] = self._interval_rows / seconds
        values["tokens_per_second"] = self._interval_tokens / seconds
        values["seconds_compiling"] = compiling
        self.trainer.log.write(self._last, values)
        self._start_interval()

    def _start_interval(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._interval_rows = self._interval_tokens = 0
        self._last = self.step
        self._began = time.perf_counter()
        self._compiled_before = self.programs.seconds_compiling
