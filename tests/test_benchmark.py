"""The benchmark command at toy size."""

from __future__ import annotations

import json

import pytest

from dpo4rec_jax import benchmark

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
    assert sampling["decode"]["share_of_floor"] > 0
    parts = sampling["decode"]["parts_seconds"]
    assert sum(parts.values()) == pytest.approx(sampling["decode"]["step_seconds"])


def test_an_unknown_part_is_one_line_and_status_2(config_path, capsys) -> None:
    assert benchmark.main(["--config", config_path, "--what", "smapling"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --what smapling: unknown part; known: ")
    assert error.count("\n") == 1
