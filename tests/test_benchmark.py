"""The benchmark command at toy size."""

from __future__ import annotations

import json

import hf_models
import jax
import jax.numpy as jnp
import pytest

from dpo4rec_jax import benchmark
from dpo4rec_jax.benchmarks.policies import policy_of
from dpo4rec_jax.config import load_config
from dpo4rec_jax.weights import outline
from dpo4rec_jax.weights.policy import shapes

TOY = """
policy: {path: tiny, tiny_width: 16, tiny_layers: 1, tiny_heads: 2, max_prompt_tokens: 40}
reason: {samples: 2, max_new_tokens: 4, slots: 4}
"""


@pytest.fixture
def config_path(tmp_path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY, encoding="utf-8")
    return str(path)


def test_sampling_figures_are_printed_and_written(config_path, tmp_path, capsys) -> None:
    output = tmp_path / "figures.json"
    arguments = ["--config", config_path, "--what", "sampling", "--output", str(output)]
    assert benchmark.main(arguments) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert written["machine"]["flops_per_second"] > 0
    sampling = written["sampling"]
    assert sampling["layout"]["rows"] == 4
    assert sampling["job"]["tokens_per_second"] > 0
    assert 0 < sampling["decode"]["share_of_floor"] < 1
    parts = sampling["decode"]["parts_seconds"]
    assert sum(parts.values()) == pytest.approx(sampling["decode"]["step_seconds"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dpo_figures_agree_with_each_other(config_path, tmp_path, method) -> None:
    output = tmp_path / "figures.json"
    sizes = ["align.batch_pairs=4", "align.microbatch_pairs=2", f"align.method={method}"]
    arguments = ["--config", config_path, "--what", "dpo", "--output", str(output)]
    assert benchmark.main(arguments + [f"--set={size}" for size in sizes]) == 0
    dpo = json.loads(output.read_text(encoding="utf-8"))["dpo"]
    assert dpo["pairs_per_second"] == pytest.approx(4 / dpo["step_seconds"])
    row = dpo["prompt_tokens"] + 2 * dpo["completion_tokens"]
    assert dpo["tokens_per_second"] == pytest.approx(row * dpo["pairs_per_second"])
    assert dpo["step_seconds"] > 2 * dpo["microbatch_seconds"]
    assert 0 < dpo["mfu"] < 1
    assert dpo["peak_bytes"] > 0 and dpo["bytes_moved_a_step"] > 0


def test_rank_figures_are_of_one_seed_and_of_all(config_path, tmp_path) -> None:
    output = tmp_path / "figures.json"
    sizes = ["data.synthetic.users=30", "rank.seeds=2", "encode.encoder=hashing"]
    arguments = ["--config", config_path, "--what", "rank", "--output", str(output)]
    assert benchmark.main(arguments + [f"--set={size}" for size in sizes]) == 0
    rank = json.loads(output.read_text(encoding="utf-8"))["rank"]
    for knowledge in ("without", "with"):
        for seeds in (1, 2):
            figures = rank[f"{knowledge}_knowledge_{seeds}_seeds"]
            lists = seeds * rank["train_lists"]
            assert figures["lists_per_second"] == pytest.approx(lists / figures["epoch_seconds"])


def test_random_weights_of_an_architecture(config_path, tmp_path) -> None:
    directory = hf_models.save_model(hf_models.make_model("llama-3.1"), tmp_path / "policy")
    config = load_config(config_path, [f"policy.path=random:{directory}"])
    (directory / "model.safetensors").unlink()  # they are not asked for
    policy = policy_of(config)
    assert policy.config == outline(directory)[0]
    assert jax.tree.map(jnp.shape, policy.params) == jax.tree.map(jnp.shape, shapes(policy.config))
    text = policy.tokenizer.decode(range(10, policy.config.vocab_size))
    assert len(text.split()) > 30


def test_an_unknown_part_is_one_line_and_status_2(config_path, capsys) -> None:
    assert benchmark.main(["--config", config_path, "--what", "smapling"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --what smapling: unknown part; known: ")
    assert error.count("\n") == 1
