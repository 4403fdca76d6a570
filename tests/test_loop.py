"""The complete loop: the nine shipped pod configs at toy size, from raw files to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import formats
import jax
import pytest

from dpo4rec_jax import train
from dpo4rec_jax.config import DataConfig, PolicyConfig
from dpo4rec_jax.data import build
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny, words_of

CONFIGS = Path(__file__).parents[1] / "configs"
LOG = formats.make_log(users=30, items=40, events=14)
WRITERS = {
    "ml-1m": formats.write_ml_1m_zip,
    "amazon-books": lambda directory, log: formats.write_amazon_2018(directory, log, "Books"),
    "amazon-beauty": lambda directory, log: formats.write_amazon_2014(directory, log, "Beauty"),
}
TOY = (
    "rounds=1",
    "data.min_user_interactions=1",
    "data.min_item_interactions=1",
    "policy.dtype=float32",
    "policy.max_prompt_tokens=256",
    "reason.samples=3",
    "reason.max_new_tokens=8",
    "reason.item_max_new_tokens=8",
    "reason.memory_gib=0.5",
    "encode.encoder=hashing",
    "encode.features=16",
    "rank.seeds=5",
    "rank.epochs=1",
    "rank.embedding=4",
    "prefer.folds=2",
    "align.batch_pairs=4",
    "align.microbatch_pairs=null",
    "evaluate.resamples=200",
)


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile() -> Iterator[None]:
    """At toy size nearly all the time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same log in the three data sets' own formats."""
    root = tmp_path_factory.mktemp("raw")
    return {name: write(root / name, LOG) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def policy(raw: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama that knows the words of all three data sets' prompts."""
    texts = []
    for name, path in raw.items():
        data = DataConfig(
            name=name, path=str(path), min_user_interactions=1, min_item_interactions=1
        )
        prepared = build(data, 0, tmp_path_factory.mktemp("cache"))
        prompts = (*prepared.user_prompts, *prepared.item_prompts)
        texts += [message["content"] for prompt in prompts for message in prompt.messages]
    tiny = PolicyConfig(tiny_width=16, tiny_layers=2, tiny_heads=2, dtype="float32")
    directory = tmp_path_factory.mktemp("policy")
    save_policy(make_tiny(tiny, words_of(texts), jax.random.key(0)), directory)
    return directory


# Every data set and every backbone once in the default run, the other six pairs in the slow one.
DIAGONAL = {("ml-1m", "dlcm"), ("amazon-books", "prm"), ("amazon-beauty", "setrank")}
PAIRS = [
    pytest.param(data, backbone, marks=() if (data, backbone) in DIAGONAL else pytest.mark.slow)
    for backbone in ("dlcm", "prm", "setrank")
    for data in WRITERS
]


@pytest.mark.parametrize(("data", "backbone"), PAIRS)
def test_loop_runs_from_raw_files_to_the_report(
    data: str, backbone: str, raw: dict[str, Path], policy: Path, tmp_path: Path
) -> None:
    config = CONFIGS / f"{data}-llama31-8b-{backbone}.yaml"
    settings = [*TOY, f"data.path={raw[data]}", f"policy.path={policy}"]
    arguments = ["--config", str(config), "--workdir", str(tmp_path)]
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert train.main(arguments) == 0

    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["dataset"], report["backbone"]) == (data, backbone)
    assert [row["method"] for row in report["rows"]] == ["backbone", "kar", "dpo4rec-1"]
    for row in report["rows"]:
        assert len(row["metrics"]["ndcg@5"]["by_seed"]) == 5
    texts = [json.loads(line) for line in (tmp_path / "round0/reason/users.jsonl").open()]
    by_split = {"train": 3, "validation": 1, "test": 1}
    users = [json.loads(line) for line in (tmp_path / "prepare/users.jsonl").open()]
    assert len(texts) == sum(by_split[user["split"]] for user in users)
    pairs = [json.loads(line) for line in (tmp_path / "round0/prefer/pairs.jsonl").open()]
    assert pairs
    assert all(pair["score_chosen"] >= pair["score_rejected"] for pair in pairs)
    assert train.main([*arguments, "--resume"]) == 0  # nothing left to do
