"""Stage warmup: what is imitated, and that the tiny policy learns to copy from its prompt."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from preference_pairs import compiled_once, logged, save_tiny_policy, stop_after  # noqa: F401
from rich.console import Console

from dpo4rec_jax import data
from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.data import synthetic
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped
from dpo4rec_jax.stages import warmup
from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.workspace import Stage, Workspace

TINY = {"path": "tiny", "tiny_width": 16, "tiny_layers": 1, "tiny_heads": 2}
WORLD = {"synthetic": {"users": 20, "items": 30, "interactions": 12}}


def make_stage(path: Path, **sections) -> Stage:
    config = Config.model_validate({"data": WORLD, "policy": TINY} | sections)
    workspace = Workspace(path)
    directory = workspace.stage_dir("warmup")
    directory.mkdir(parents=True)
    progress = Progress(Console(file=io.StringIO(), width=200))
    log = MetricsLog(path, "warmup", None)
    return Stage(config, workspace, "warmup", None, directory, log, progress)


SHORT = {"steps": 6, "batch": 4, "samples": 2, "log_every": 1, "save_every": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    stage = make_stage(tmp_path_factory.mktemp("run"), warmup=SHORT)
    warmup.run(stage)
    return stage


def weights(stage: Stage) -> bytes:
    return (stage.directory / "policy" / "model.safetensors").read_bytes()


def test_leaves_a_policy_that_loads_and_knows_the_worlds_words(finished):
    policy = load_policy(finished.directory / "policy")
    text = "the viewer likes genre drama , mood dark and lead kim ."
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    assert policy.tokenizer.decode(ids) == text
    assert policy.tokenizer.unk_token_id not in ids
    assert {path.name for path in finished.directory.iterdir()} == {"policy"}


def test_loss_falls_from_that_of_a_random_policy(finished):
    losses = [line["loss"] for line in logged(finished)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_killed_warmup_continues_to_the_same_bits(finished, tmp_path):
    stage = make_stage(tmp_path, warmup=SHORT)
    stop_after(stage, 3)
    with pytest.raises(Stopped):
        warmup.run(stage)
    stage.progress.stop_requested.clear()
    warmup.run(stage)
    assert weights(stage) == weights(finished)
    assert [line["step"] for line in logged(stage)] == [1, 2, 3, 4, 5, 6]


def test_reply_ends_with_one_stop_id_and_continues_the_prompt(finished):
    policy = load_policy(finished.directory / "policy")
    messages = [{"role": "user", "content": "what is drama ?"}]
    reply = warmup.reply_ids(policy, messages, "the viewer likes drama .")
    assert [id in policy.stop_ids for id in reply] == [False] * (len(reply) - 1) + [True]
    whole = policy.tokenizer.decode([*policy.chat_ids(messages), *reply])
    assert whole.endswith("<|assistant|>the viewer likes drama .<|end|>")


def test_texts_of_a_file_are_imitated_behind_their_users_prompts(tmp_path):
    prepared = data.build(Config.model_validate({"data": WORLD}).data, seed=0, cache_dir="unused")
    train = [id for id, split in zip(prepared.user_id, prepared.split_U, strict=True) if split == 0]
    test = next(i for i, split in zip(prepared.user_id, prepared.split_U, strict=True) if split)
    lines = [(train[0], "the viewer likes drama ."), (train[0], "drama ."), (train[3], "crime .")]
    lines += [(test, "the viewer likes war .")]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"user": u, "text": t}) + "\n" for u, t in lines))
    stage = make_stage(tmp_path / "run", warmup=SHORT | {"texts": str(path)})
    prepared.save(stage.workspace.stage_dir("prepare"))
    policy = load_policy(save_policy_of_world(tmp_path / "policy"))
    rows = warmup.imitation_rows(stage, policy, str(path))
    assert [len(row) for row in rows.completions] == [2, 2]
    decoded = [[policy.tokenizer.decode(text) for text in row] for row in rows.completions]
    assert decoded == [
        ["the viewer likes drama .<|end|>", "drama .<|end|>"],
        ["crime .<|end|>", ""],
    ]
    prompt = prepared.user_prompts[prepared.user_id.index(train[0])]
    assert rows.prompts[0] == policy.chat_ids(prompt.messages)

    (tmp_path / "none.jsonl").write_text('{"user": "nobody", "text": "x"}\n')
    with pytest.raises(InputError, match=r"none\.jsonl: no text of a training user"):
        warmup.imitation_rows(stage, policy, str(tmp_path / "none.jsonl"))


def save_policy_of_world(directory: Path) -> Path:
    from preference_pairs import TINY

    words = synthetic.vocabulary(Config.model_validate({"data": WORLD}).data)
    return save_tiny_policy(directory, TINY, words)


@pytest.mark.slow
def test_shipped_warmup_leaves_a_fluent_copier(tmp_path):
    """Texts have the form of the world's sentences; what they name, they found in the prompt more
    often than chance would. Histories are short: a long one holds nearly every value there is."""
    from dpo4rec_jax.sampling import sample

    stage = make_stage(tmp_path, data={"window": 6}, policy={"path": "tiny"})
    warmup.run(stage)
    policy = load_policy(stage.directory / "policy")
    examples = synthetic.warmup_texts(stage.config.data, 1, viewers=64, samples=1)
    texts = sample(policy, [m for m, _ in examples], num_samples=4, max_new_tokens=24, seed=0)
    forms = [re.sub(r"\\{\d\\}", r"(\\w+ \\w+)", re.escape(form)) for form in synthetic.SENTENCES]
    fluent, seen, by_chance = [], [], []
    rng = np.random.default_rng(0)
    for (messages, _), completions in zip(examples, texts, strict=True):
        words = set(messages[-1]["content"].split())
        for completion in completions:
            found = [m for form in forms if (m := re.fullmatch(form, completion.text))]
            named = [name.split() for name in found[0].groups()] if found else []
            known = [value in synthetic.VALUES.get(kind, ()) for kind, value in named]
            fluent.append(bool(named) and all(known))
            for kind, value in named if fluent[-1] else ():
                seen.append(value in words)
                by_chance.append(rng.choice(synthetic.VALUES[kind]) in words)
    assert np.mean(fluent) > 0.95
    assert np.mean(by_chance) < 0.75  # so that there is something to find
    assert np.mean(seen) > (1 + np.mean(by_chance)) / 2
