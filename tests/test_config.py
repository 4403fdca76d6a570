"""Configs: strict keys, one-line mistakes, bases and overrides, every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpo4rec_jax.config import Config, dump_config, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def written(directory: Path, text: str, name: str = "c.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_what_it_is(path: Path) -> None:
    assert load_config(path).name == path.stem
    assert path.read_text().startswith("# ")
    assert "Machine:" in path.read_text()


def test_the_nine_pod_configs_differ_only_in_data_and_backbone() -> None:
    pods = [p for p in CONFIGS if "-llama31-8b-" in p.stem]
    assert len(pods) == 9
    seen, shared = set(), []
    for pod in pods:
        values = load_config(pod).model_dump()
        seen.add((values["data"].pop("name"), values["rank"].pop("backbone")))
        values.pop("name")
        shared.append(values)
    assert len(seen) == 9
    assert all(values == shared[0] for values in shared)


def test_resolved_config_loads_back_to_itself(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "rank: {backbone: dlcm}\nseed: 7\n"))
    again = load_config(written(tmp_path, dump_config(config), "again.yaml"))
    assert again == config


def test_base_is_overridden_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, "rank: {backbone: dlcm, seeds: 2}\nseed: 3\n", "base.yaml")
    config = load_config(written(tmp_path, "base: base.yaml\nrank: {seeds: 4}\n"))
    assert (config.rank.backbone, config.rank.seeds, config.seed) == ("dlcm", 4, 3)


def test_set_wins_over_the_file_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\n")
    config = load_config(path, ["seed=2", "seed=3", "align.learning_rate=1e-6", "data.path=null"])
    assert (config.seed, config.align.learning_rate, config.data.path) == (3, 1e-6, None)


def test_every_key_has_a_description() -> None:
    def check(model: type) -> None:
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name}"

    check(Config)
    for info in Config.model_fields.values():
        if hasattr(info.annotation, "model_fields"):
            check(info.annotation)


def test_defaults_dump_as_plain_yaml() -> None:
    assert yaml.safe_load(dump_config(Config()))["align"]["beta"] == 0.01
