"""What a run shows: plain lines, nested bars, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import io
import json
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.runtime import progress as progress_module
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped
from dpo4rec_jax.runtime.tracking import tracking


def plain() -> tuple[Progress, io.StringIO]:
    written = io.StringIO()
    return Progress(Console(file=written, width=200)), written


def test_lines_tell_count_rate_time_left_and_figures_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    seconds = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(progress_module, "time", clock)
    progress, written = plain()
    with progress.step("rank (round 0)", 3, 9), progress.track("kar: mir", 10, "epochs") as task:
        seconds[0] = 60.0  # the first unit, and what it takes once
        task.advance(1, loss=0.5)
        seconds[0] = 64.0
        task.advance(4, loss=0.25)
    first, line = written.getvalue().splitlines()
    assert first.endswith("time left unknown)  loss 0.5")
    assert line == "  kar: mir: 5/10 epochs (0.0781/s, 5 s left)  loss 0.25"
    assert "\x1b" not in line and "\r" not in line


def test_a_silent_step_says_that_it_is_alive_and_a_talking_one_does_not(monkeypatch):
    monkeypatch.setattr(progress_module, "SILENCE_SECONDS", 0.2)
    progress, written = plain()
    with progress.step("align (round 0)", 1, 2):
        time.sleep(0.5)
    assert written.getvalue().startswith("  align (round 0): 0 s so far\n")
    progress, written = plain()
    with progress.step("align (round 0)", 1, 2):
        for _ in range(20):
            time.sleep(0.02)
            progress.say("step")
    assert "so far" not in written.getvalue()


def test_bars_of_tasks_stand_under_their_step_on_a_terminal(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    written = io.StringIO()
    progress = Progress(Console(file=written, force_terminal=True, width=140))
    assert progress.interactive
    with progress.step("reason (round 1)", 4, 9):
        with progress.track("users", 40, "texts") as task:
            task.advance(30)
            assert progress._rich is not None
            step, texts = progress._rich.tasks
            assert step.description == "reason (round 1) (4 of 9)" and step.completed == 3
            assert texts.description == "  users" and texts.completed == 30
            assert texts.fields["shown"].endswith(" texts/s")
        assert len(progress._rich.tasks) == 1  # the step's own outlives its tasks
    assert progress._rich is None


def test_a_stop_request_is_raised_where_work_is_counted():
    progress, _ = plain()
    progress.stop_requested.set()
    with pytest.raises(Stopped), progress.track("x", 2) as task:
        task.advance()


def test_metrics_are_lines_of_json_and_tensorboard_events(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import Event

    log = MetricsLog(tmp_path, "align", 0)
    log.write(5, {"loss": 0.5, "kl": float("nan")})
    log.write(10, {"loss": 0.25})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[0]["kl"] is None and lines[0]["stage"] == "align" and lines[0]["round"] == 0
    (events,) = (tmp_path / "tb").iterdir()
    found = [
        (value.tag, event.step, value.simple_value)
        for event in map(Event.FromString, records(events.read_bytes()))
        for value in event.summary.value
    ]
    assert found == [("round0/align/loss", 5, 0.5), ("round0/align/loss", 10, 0.25)]


def records(data: bytes) -> list[bytes]:
    """TFRecords: length in 8 bytes, its checksum in 4, the record, its checksum in 4."""
    found, place = [], 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        found.append(data[place + 12 : place + 12 + size])
        place += 12 + size + 4
    return found


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def init(self, **settings) -> None:
        self.calls.append(("init", settings))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, values: dict) -> None:
        self.calls.append(("log", values))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


CONFIG = Config.model_validate({"name": "try", "runtime": {"wandb": "films"}})


def test_weights_and_biases_gets_every_figure_on_its_stages_own_axis(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracking(CONFIG, tmp_path) as tracker:
        for round, step in ((0, 5), (0, 10), (1, 5)):
            log = MetricsLog(tmp_path, "align", round, tracker)
            log.write(step, {"loss": 0.5, "kl": float("inf")})
            log.close()
    (begin, settings), *middle, end = fake.calls
    assert begin == "init" and (settings["project"], settings["name"]) == ("films", "try")
    assert settings["config"]["runtime"]["wandb"] == "films"
    assert [call[1] for call in middle if call[0] == "log"] == [
        {"round0/align/step": 5, "round0/align/loss": 0.5},
        {"round0/align/step": 10, "round0/align/loss": 0.5},
        {"round1/align/step": 5, "round1/align/loss": 0.5},
    ]
    assert ("define", "round1/align/*", "round1/align/step") in middle
    assert sum(call[0] == "define" for call in middle) == 4
    assert end == ("finish", 0)


def test_a_continued_run_continues_its_wandb_run_and_a_broken_one_says_so(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KeyError), tracking(CONFIG, tmp_path):
        raise KeyError
    with tracking(CONFIG, tmp_path):
        pass
    first, second = (call[1] for call in fake.calls if call[0] == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert [call[1] for call in fake.calls if call[0] == "finish"] == [1, 0]


def test_wandb_is_not_touched_unless_asked_for_and_its_absence_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracking(Config(), tmp_path) as tracker:
        assert tracker is None
    with pytest.raises(InputError, match=r"runtime\.wandb: the package wandb is not installed"):
        tracking(CONFIG, tmp_path).__enter__()
    refusing = FakeWandb()
    monkeypatch.setattr(refusing, "init", lambda **_: 1 / 0, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", refusing)
    with pytest.raises(InputError, match=r"runtime\.wandb: 'films': division by zero; log in"):
        tracking(CONFIG, tmp_path).__enter__()
