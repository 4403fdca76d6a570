"""Configs: strict keys, one-line mistakes, bases and overrides, every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_jax.config import Config, InputError, dump_config, load_config

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: {backbon: prm}", "rank.backbon: unknown key; did you mean rank.backbone?"),
        ("rnak: {}", "rnak: unknown key; did you mean rank?"),
        ("rank: {backbone: resnet}", "rank.backbone: input should be one of 'dlcm', 'prm', "),
        ("rounds: two", "rounds: input should be a valid integer"),
        ("rounds: -1", "rounds: input should be greater than or equal to 0, got -1"),
        ("reason: {top_p: 1.5}", "reason.top_p: input should be less than or equal to 1"),
        ("rank: 3", "rank: input should be a valid dictionary"),
        ("?", "expected a word as key, got None"),
        ("rank: {1: 2}", "expected a word as key, got 1"),
        ("- a", "expected a mapping of sections, got list"),
        ("a: [", "c.yaml:2: not valid YAML"),
        ("base: nowhere.yaml", "nowhere.yaml: cannot read the config: No such file"),
        ("base: 3", "base: expected a file name, got 3"),
        ("base: c.yaml", "base files form a circle"),
        ("reason: {endpoint: {model: m}}", "reason.endpoint.base_url: field required"),
        ("reason: {endpoint: {url: m}}", "reason.endpoint.url: unknown key"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path, text + "\n"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["seed", "=3", "seed=[", "reason.x=1"])
def test_a_broken_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError):
        load_config(written(tmp_path, ""), [override])


@given(st.text(max_size=60))
def test_any_text_loads_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = written(tmp_path_factory.mktemp("c"), "")
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(load_config(path), Config)
    except InputError as error:
        assert "\n" not in str(error)


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
