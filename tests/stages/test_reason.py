"""Stage reason on a small synthetic world with a tiny policy, and with a server on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import process_group
import pytest
from rich.console import Console

from dpo4rec_jax import data
from dpo4rec_jax.config import (
    Config,
    DataConfig,
    InputError,
    PolicyConfig,
    ReasonConfig,
    SyntheticConfig,
)
from dpo4rec_jax.data.texts import read_records
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped
from dpo4rec_jax.stages import reason
from dpo4rec_jax.weights import Policy, export, load_policy, tiny
from dpo4rec_jax.workspace import Stage, Workspace

SAMPLES = 3
POLICY = PolicyConfig(tiny_width=32, tiny_layers=2, tiny_heads=2)


@pytest.fixture(scope="module")
def prepared() -> data.Prepared:
    world = SyntheticConfig(users=20, items=30, interactions=12)
    return data.build(DataConfig(synthetic=world), seed=0, cache_dir="unused")


@pytest.fixture(scope="module")
def policy_dir(prepared, tmp_path_factory) -> Path:
    """A policy of random weights large enough that its texts differ."""
    prompts = (*prepared.user_prompts, *prepared.item_prompts)
    texts = [message["content"] for prompt in prompts for message in prompt.messages]
    policy = tiny.make_tiny(POLICY, tiny.words_of(texts), jax.random.key(1))
    directory = tmp_path_factory.mktemp("policy")
    export.save_policy(policy, directory)
    return directory


def make_stage(path: Path, prepared: data.Prepared, round: int = 0, **sections) -> Stage:
    prepared.save(Workspace(path).stage_dir("prepare"))
    return open_stage(path, round, **sections)


def open_stage(path: Path, round: int = 0, **sections) -> Stage:
    texts = {"samples": SAMPLES, "max_new_tokens": 8, "item_max_new_tokens": 4, "slots": 8}
    values = {"reason": texts | sections.pop("reason", {}), "align": {"method": "lora"}}
    workspace = Workspace(path)
    config = Config.model_validate(values | sections)
    directory = workspace.stage_dir("reason", round)
    directory.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(path, "reason", round)
    progress = Progress(Console(file=io.StringIO(), width=200))
    return Stage(config, workspace, "reason", round, directory, log, progress)


def logged(stage: Stage) -> dict[str, float]:
    """The last value of everything the stage logged."""
    text = (stage.workspace.path / "metrics.jsonl").read_text(encoding="utf-8")
    return {name: value for line in text.splitlines() for name, value in json.loads(line).items()}


def said(stage: Stage) -> str:
    return stage.progress.console.file.getvalue()


def texts_of(stage: Stage, name: str = "users") -> bytes:
    return (stage.directory / f"{name}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def finished(prepared, policy_dir, tmp_path_factory) -> Stage:
    path = tmp_path_factory.mktemp("finished")
    stage = make_stage(path, prepared, policy={"path": str(policy_dir)})
    reason.run(stage)
    return stage


def test_training_users_get_n_texts_the_others_one_and_items_one(finished, prepared) -> None:
    users = read_records(finished.directory / "users.jsonl")
    wanted = [
        (id, sample)
        for id, split in zip(prepared.user_id, prepared.split_U, strict=True)
        for sample in range(SAMPLES if split == data.TRAIN else 1)
    ]
    assert [(record.id, record.sample) for record in users] == wanted
    items = read_records(finished.directory / "items.jsonl")
    assert [record.id for record in items] == prepared.item_id
    assert max(len(record.completion_tokens) for record in users) <= 8
    assert max(len(record.completion_tokens) for record in items) <= 4
    assert not list(finished.directory.glob("*.part*"))


def test_ids_in_the_file_are_the_prompts_and_the_texts(finished, prepared, policy_dir) -> None:
    policy = load_policy(policy_dir)
    prompts = {prompt.id: prompt for prompt in prepared.user_prompts}
    for record in read_records(finished.directory / "users.jsonl"):
        assert list(record.prompt_tokens) == policy.chat_ids(prompts[record.id].messages)
        ids = list(record.completion_tokens)
        assert policy.tokenizer.decode(ids, skip_special_tokens=True) == record.text
        assert (record.finish == "stop") == (ids[-1] in policy.stop_ids)
        assert not set(ids[:-1]) & set(policy.stop_ids)


def test_what_the_texts_are_like_is_logged(finished) -> None:
    users = read_records(finished.directory / "users.jsonl")
    values = logged(finished)
    lengths = [len(record.completion_tokens) for record in users]
    assert values["length_mean"] == pytest.approx(np.mean(lengths))
    stops = [record.finish == "stop" for record in users]
    assert values["stopped_share"] == pytest.approx(np.mean(stops))
    assert 1 / SAMPLES <= values["distinct_share"] <= 1
    assert values["users/tokens_per_second"] > 0


def test_a_run_killed_at_any_moment_continues_to_the_same_texts(
    finished, prepared, policy_dir, tmp_path
) -> None:
    for advances, cut in ((1, 0), (5, 3)):
        stage = make_stage(tmp_path / str(cut), prepared, policy={"path": str(policy_dir)})
        stop_after(stage.progress, advances)
        with pytest.raises(Stopped):
            reason.run(stage)
        part = stage.directory / "users.part0.jsonl"
        held = part.read_bytes()
        assert held
        part.write_bytes(held[: len(held) - cut])  # a line that was being written
        stage.progress.stop_requested.clear()
        reason.run(stage)
        assert texts_of(stage) == texts_of(finished)
        assert texts_of(stage, "items") == texts_of(finished, "items")


def stop_after(progress: Progress, advances: int) -> None:
    def move_bar(*_) -> None:
        nonlocal advances
        advances -= 1
        if advances == 0:
            progress.stop_requested.set()

    progress.move_bar = move_bar


def test_a_later_round_draws_anew_and_keeps_the_items(finished, prepared, policy_dir) -> None:
    full = {"method": "full"}
    stage = make_stage(finished.workspace.path, prepared, round=1, align=full)
    aligned = stage.workspace.stage_dir("align", 0) / "policy"
    export.save_policy(load_policy(policy_dir), aligned)  # the same weights
    reason.run(stage)
    assert texts_of(stage, "items") == texts_of(finished, "items")
    before = [record.text for record in read_records(finished.directory / "users.jsonl")]
    after = [record.text for record in read_records(stage.directory / "users.jsonl")]
    same = np.mean([one == other for one, other in zip(before, after, strict=True)])
    assert same < 0.5


def test_item_texts_can_be_their_metadata(prepared, policy_dir, tmp_path) -> None:
    given = tmp_path / "texts.jsonl"
    lines = [{"user": id, "text": f"likes {id}"} for id in prepared.user_id]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"item_texts": "metadata", "texts": str(given)}
    stage = make_stage(tmp_path / "run", prepared, reason=settings)
    reason.run(stage)
    items = read_records(stage.directory / "items.jsonl")
    assert [record.text for record in items] == [item["text"] for item in prepared.items]


def test_without_reasoning_a_user_has_one_empty_text_and_no_policy_is_loaded(
    prepared, tmp_path
) -> None:
    settings = {"user_texts": "history", "item_texts": "metadata"}
    stage = make_stage(tmp_path / "run", prepared, reason=settings, rounds=0, policy={"path": "no"})
    reason.run(stage)
    users = read_records(stage.directory / "users.jsonl")
    assert [(record.id, record.text) for record in users] == [(id, "") for id in prepared.user_id]


def test_likes_are_told_by_the_metadata_of_the_windows_positives(prepared, tmp_path) -> None:
    settings = {"user_texts": "likes", "item_texts": "metadata"}
    stage = make_stage(tmp_path / "run", prepared, reason=settings, rounds=0, policy={"path": "no"})
    reason.run(stage)
    threshold = 3  # of the synthetic world's stars
    for user, record in enumerate(read_records(stage.directory / "users.jsonl")):
        start = prepared.offset_U1[user]
        window = slice(start, start + prepared.window_U[user])
        liked = prepared.item_E[window][prepared.rating_E[window] > threshold]
        told = "\n".join(prepared.items[item]["text"] for item in liked)
        assert record.text == (f"The user likes: {told}" if told else "")


def test_without_reasoning_there_is_nothing_to_align(prepared, tmp_path) -> None:
    settings = {"user_texts": "history", "item_texts": "metadata"}
    stage = make_stage(tmp_path / "run", prepared, reason=settings, rounds=1)
    with pytest.raises(InputError, match=r"reason\.user_texts: history .* rounds is 1; set"):
        reason.run(stage)


def test_texts_of_a_file_take_the_place_of_sampling(prepared, tmp_path) -> None:
    given = tmp_path / "texts.jsonl"
    absent = prepared.user_id[0]
    lines = [
        {"user": id, "sample": sample, "text": f"{id} likes {sample}"}
        for id in prepared.user_id[1:]
        for sample in range(SAMPLES + 2)
    ] + [{"item": prepared.item_id[0], "text": "a fact"}]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    stage = make_stage(tmp_path / "run", prepared, reason={"texts": str(given)})
    reason.run(stage)
    users = read_records(stage.directory / "users.jsonl")
    split = dict(zip(prepared.user_id, prepared.split_U, strict=True))
    wanted = [
        (id, sample)
        for id in prepared.user_id[1:]
        for sample in range(SAMPLES if split[id] == data.TRAIN else 1)
    ]
    assert [(record.id, record.sample) for record in users] == wanted
    assert absent not in {record.id for record in users}
    assert "1 of 20 users have no text" in said(stage)
    items = read_records(stage.directory / "items.jsonl")
    expected = ["a fact", *(item["text"] for item in prepared.items[1:])]
    assert [record.text for record in items] == expected


def test_a_file_without_any_known_user_is_refused(prepared, tmp_path) -> None:
    given = tmp_path / "texts.jsonl"
    given.write_text('{"user": "nobody", "text": "likes nothing"}\n', encoding="utf-8")
    stage = make_stage(tmp_path / "run", prepared, reason={"texts": str(given)})
    with pytest.raises(InputError, match=r"texts\.jsonl: no text of any user"):
        reason.run(stage)


PROCESS = """
import sys, threading
from pathlib import Path
from dpo4rec_jax.config import RuntimeConfig
from dpo4rec_jax.runtime import launch
here, root, policy = sys.argv[1:]
processes = launch.start(RuntimeConfig(heartbeat_s=300), threading.Event())
assert processes.count == 2
sys.path.append(here)
import test_reason
test_reason.reason.run(test_reason.open_stage(Path(root), policy={"path": policy}))
processes.leave(0)
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_write_the_texts_of_one(
    finished, prepared, policy_dir, tmp_path
) -> None:
    prepared.save(Workspace(tmp_path).stage_dir("prepare"))
    arguments = [str(Path(__file__).parent), str(tmp_path), str(policy_dir)]
    for status, output in process_group.finish(process_group.start(2, 1, arguments, PROCESS)):
        assert status == 0, output[-2000:]
    written = Workspace(tmp_path).stage_dir("reason", 0)
    for name in ("users.jsonl", "items.jsonl"):
        ours = read_records(finished.directory / name)
        theirs = read_records(written / name)
        assert [(one.id, one.sample) for one in ours] == [(one.id, one.sample) for one in theirs]
        differing = np.mean([one != other for one, other in zip(ours, theirs, strict=True)])
        assert differing <= 0.01


@contextlib.contextmanager
def chat_server(fail_from: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that repeats what it is asked; from request `fail_from` on it refuses the key."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = asked["messages"][-1]["content"]
            with lock:
                refused = fail_from is not None and len(seen) >= fail_from
                seen.append(content)
            message = {"role": "assistant", "content": f"about {content}"}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(401 if refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()
    server.server_close()


def user_job(prepared: data.Prepared) -> reason.Job:
    ids = list(range(len(prepared.user_prompts)))
    return reason.Job("user", prepared.user_prompts, [SAMPLES] * len(ids), ids, 8)


def longest_prompt(policy: Policy, prepared: data.Prepared) -> int:
    return max(len(policy.chat_ids(prompt.messages)) for prompt in prepared.user_prompts)


def test_a_long_prompt_loses_its_oldest_history_and_that_is_said(
    prepared, policy_dir, tmp_path
) -> None:
    policy = load_policy(policy_dir)
    limit = longest_prompt(policy, prepared) - 1
    settings = {"path": str(policy_dir), "max_prompt_tokens": limit}
    stage = make_stage(tmp_path, prepared, policy=settings)
    fitted = reason.fit_prompts(stage, policy, user_job(prepared))
    too_long = 0
    for prompt, ids in zip(prepared.user_prompts, fitted, strict=True):
        whole = policy.chat_ids(prompt.messages)
        assert len(ids) <= limit
        if len(whole) <= limit:
            assert ids == whole
            continue
        too_long += 1
        kept = [
            keep
            for keep in range(1, len(prompt.history))
            if policy.chat_ids(data.prompts.shorten(prompt, keep).messages) == ids
        ]
        assert len(kept) == 1
        longer = policy.chat_ids(data.prompts.shorten(prompt, kept[0] + 1).messages)
        assert len(longer) > limit  # one entry more would not have fitted
    assert too_long > 0
    assert f"{too_long} of {len(fitted)} prompts shortened to {limit} tokens" in said(stage)
    assert logged(stage)["users/prompts_shortened"] == too_long


def test_a_prompt_that_cannot_fit_stops_the_run(prepared, policy_dir, tmp_path) -> None:
    settings = {"path": str(policy_dir), "max_prompt_tokens": 16}
    stage = make_stage(tmp_path, prepared, policy=settings)
    with pytest.raises(InputError, match=r"policy\.max_prompt_tokens: the prompt of user '"):
        reason.run(stage)


def test_an_endpoints_texts_are_resumed_and_the_key_is_nowhere_on_disk(
    prepared, tmp_path, monkeypatch
) -> None:
    key = "sk-never-written-9876"
    monkeypatch.setenv("REASON_KEY", key)
    with chat_server(fail_from=25) as (url, seen):
        endpoint = {"base_url": url, "model": "m", "key_env": "REASON_KEY", "concurrency": 2}
        stage = make_stage(tmp_path, prepared, reason={"endpoint": endpoint})
        with pytest.raises(InputError, match="the key in REASON_KEY is refused"):
            reason.run(stage)
        assert len(read_records(stage.directory / "users.part0.jsonl")) == 25
    answered = seen[:25]
    with chat_server() as (url, seen):
        endpoint |= {"base_url": url}
        stage = make_stage(tmp_path, prepared, reason={"endpoint": endpoint})
        reason.run(stage)
    users = read_records(stage.directory / "users.jsonl")
    training = int((prepared.split_U == data.TRAIN).sum())
    assert len(users) == training * SAMPLES + len(prepared.user_id) - training
    assert len(seen) == len(users) - 25 + len(prepared.item_id)
    said_of = {prompt.id: prompt.messages[-1]["content"] for prompt in prepared.user_prompts}
    for record in users:
        assert record.text == f"about {said_of[record.id]}"
    everyone = sorted(said_of[record.id] for record in users)
    assert sorted([*answered, *seen[: len(users) - 25]]) == everyone
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes()


def test_texts_cut_off_or_all_equal_are_said_with_the_knob():
    config = ReasonConfig(max_new_tokens=24, temperature=0.5)
    assert not list(reason.doubts({"stopped_share": 0.9, "distinct_share": 1.0}, config))
    (cut,) = reason.doubts({"stopped_share": 0.0}, config)
    assert cut == "all of the texts are cut off at reason.max_new_tokens = 24; raise it"
    (equal,) = reason.doubts({"stopped_share": 1.0, "distinct_share": 0.125}, config)
    assert "only 12% of a user's texts are distinct" in equal
    assert "raise reason.temperature (now 0.5)" in equal
