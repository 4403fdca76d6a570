"""Stage encode on a small synthetic world with the hashing encoder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from dpo4rec_jax import data
from dpo4rec_jax.config import Config, DataConfig, InputError, PolicyConfig, SyntheticConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.texts import TextRecord, write_records
from dpo4rec_jax.runtime.progress import MetricsLog, Progress
from dpo4rec_jax.stages import encode
from dpo4rec_jax.weights import load_encoder
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny, words_of
from dpo4rec_jax.workspace import Stage, Workspace

SAMPLES = 3


@pytest.fixture(scope="module")
def prepared() -> data.Prepared:
    world = SyntheticConfig(users=20, items=40, interactions=16)
    return data.build(DataConfig(synthetic=world), seed=0, cache_dir="unused")


def make_stage(path: Path, round: int, **overrides) -> Stage:
    values = {"encode": {"encoder": "hashing", "features": 32, "max_tokens": 400}}
    config = Config.model_validate(values | overrides)
    workspace = Workspace(path)
    directory = workspace.stage_dir("encode", round)
    directory.mkdir(parents=True)
    log = MetricsLog(path, "encode", round)
    progress = Progress(Console(file=io.StringIO()))
    return Stage(config, workspace, "encode", round, directory, log, progress)


def user_text(id: str, sample: int, round: int) -> str:
    return f"likes number{sample} of {id} in round{round}"


def write_texts(stage: Stage, prepared: data.Prepared, without: str | None = None) -> None:
    """Three samples a training user, one for others, in an order that is not the users'."""
    directory = stage.workspace.stage_dir("reason", stage.round)
    records = [
        TextRecord("user", id, user_text(id, sample, stage.round or 0), sample)
        for sample in reversed(range(SAMPLES))
        for id, split in zip(prepared.user_id, prepared.split_U, strict=True)
        if id != without and (split == data.TRAIN or sample == 0)
    ]
    write_records(directory / "users.jsonl", records)
    if stage.round == 0:
        items = [TextRecord("item", id, f"facts of {id}") for id in prepared.item_id]
        write_records(directory / "items.jsonl", items)


def test_every_text_is_encoded_with_its_users_history_in_its_own_place(tmp_path, prepared) -> None:
    stage = make_stage(tmp_path, 0)
    prepared.save(stage.workspace.stage_dir("prepare"))
    write_texts(stage, prepared, without=prepared.user_id[3])
    encode.run(stage)
    knowledge = Knowledge.load(stage.directory / "vectors.npz")

    samples_U = np.where(prepared.split_U == data.TRAIN, SAMPLES, 1)
    samples_U[3] = 0
    np.testing.assert_array_equal(knowledge.count_U, samples_U)
    encoder = load_encoder("hashing", features=32)
    for user, (id, count) in enumerate(zip(prepared.user_id, samples_U, strict=True)):
        history = prepared.users[user]["history"]
        texts = [f"{history} {user_text(id, sample, 0)}" for sample in range(count)]
        expected_CF = encoder.encode(texts, max_tokens=400)
        np.testing.assert_array_equal(knowledge.user_UCF[user, :count], expected_CF)
        assert not knowledge.user_UCF[user, count:].any()
    facts = [f"facts of {id}" for id in prepared.item_id]
    np.testing.assert_array_equal(knowledge.item_IF, encoder.encode(facts))
    counts = json.loads((stage.directory / "counts.json").read_text())
    assert counts["users"]["without_text"] == 1
    assert counts["users"]["texts"] == samples_U.sum()


def test_texts_are_read_line_by_line_and_without_their_history_where_asked(
    tmp_path, prepared
) -> None:
    settings = {"encoder": "hashing", "features": 32, "history": False, "lines": True}
    stage = make_stage(tmp_path, 0, encode=settings)
    prepared.save(stage.workspace.stage_dir("prepare"))
    write_texts(stage, prepared)
    users = stage.workspace.stage_dir("reason", 0) / "users.jsonl"
    id = prepared.user_id[5]
    write_records(users, [TextRecord("user", id, "likes drama\nlikes war")])
    encode.run(stage)
    knowledge = Knowledge.load(stage.directory / "vectors.npz")
    drama_war_2F = load_encoder("hashing", features=32).encode(["likes drama", "likes war"])
    np.testing.assert_allclose(knowledge.user_UCF[5, 0], drama_war_2F.mean(0), atol=1e-6)


def test_items_are_encoded_at_round_0_and_reused(tmp_path, prepared) -> None:
    first, second = make_stage(tmp_path, 0), make_stage(tmp_path, 1)
    prepared.save(first.workspace.stage_dir("prepare"))
    for stage in (first, second):
        write_texts(stage, prepared)
        encode.run(stage)
    before = Knowledge.load(first.directory / "vectors.npz")
    after = Knowledge.load(second.directory / "vectors.npz")
    np.testing.assert_array_equal(before.item_IF, after.item_IF)
    assert not np.array_equal(before.user_UCF, after.user_UCF)
    assert "items" not in json.loads((second.directory / "counts.json").read_text())


def test_the_policy_as_encoder_stays_as_it_was_before_alignment(tmp_path, prepared) -> None:
    words = words_of(user["history"] for user in prepared.users)
    config = PolicyConfig(tiny_width=16, tiny_heads=2, tiny_layers=1)
    policies = [make_tiny(config, words, jax.random.key(round)) for round in (0, 1)]
    workspace = Workspace(tmp_path)
    save_policy(policies[0], workspace.stage_dir("warmup") / "policy")
    save_policy(policies[1], workspace.stage_dir("align", 0) / "policy")
    prepared.save(workspace.stage_dir("prepare"))
    facts = [f"facts of {id}" for id in prepared.item_id]
    for round in (0, 1):
        overrides = {"encode": {"encoder": "policy"}, "align": {"method": "full"}}
        stage = make_stage(tmp_path, round, policy={"dtype": "float32"}, **overrides)
        write_texts(stage, prepared)
        encode.run(stage)
        knowledge = Knowledge.load(stage.directory / "vectors.npz")
        encoder = load_encoder("policy", policy=policies[0])
        np.testing.assert_allclose(knowledge.item_IF, encoder.encode(facts), atol=1e-5)
        user = prepared.user_id[5]
        text = f"{prepared.users[5]['history']} {user_text(user, 0, round)}"
        np.testing.assert_allclose(knowledge.user_UCF[5, 0], encoder.encode([text])[0], atol=1e-5)


def test_texts_from_elsewhere_get_vectors_of_their_own(tmp_path, prepared) -> None:
    external = tmp_path / "chatgpt.jsonl"
    lines = [{"user": prepared.user_id[5], "text": "what someone else wrote"}]
    lines.append({"user": "of another data set", "text": "x"})
    external.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = make_stage(tmp_path / "work", 0, evaluate={"external_texts": str(external)})
    prepared.save(stage.workspace.stage_dir("prepare"))
    write_texts(stage, prepared)
    encode.run(stage)
    knowledge = Knowledge.load(stage.directory / "external.npz")
    assert knowledge.count_U.tolist() == [int(user == 5) for user in range(20)]
    assert not knowledge.user_UCF[:5].any() and knowledge.user_UCF[5].any()
    ours = Knowledge.load(stage.directory / "vectors.npz")
    np.testing.assert_array_equal(knowledge.item_IF, ours.item_IF)
    counts = json.loads((stage.directory / "counts.json").read_text())
    assert counts["external_users"]["without_text"] == 19


def test_texts_from_elsewhere_for_no_user_of_ours_are_a_mistake(tmp_path, prepared) -> None:
    external = tmp_path / "chatgpt.jsonl"
    external.write_text('{"user": "of another data set", "text": "x"}\n')
    stage = make_stage(tmp_path / "work", 0, evaluate={"external_texts": str(external)})
    prepared.save(stage.workspace.stage_dir("prepare"))
    write_texts(stage, prepared)
    with pytest.raises(InputError, match="expected texts of this data set's users, got none"):
        encode.run(stage)
