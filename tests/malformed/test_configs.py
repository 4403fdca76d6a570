"""Malformed configs and overrides, and configs that ask for what cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from malformed_input import Malformed, check_refusal, rows, write

from dpo4rec_jax import train
from dpo4rec_jax.config import Config, InputError, load_config

WORLD = "data: {synthetic: {users: 40, items: 30, interactions: 20}}\n"


def config(text: str | bytes) -> Callable[[Path], list[str]]:
    return lambda directory: ["--config", str(write(directory, {"c.yaml": text}) / "c.yaml")]


def given_set(*overrides: str) -> Callable[[Path], list[str]]:
    sets = [word for override in overrides for word in ("--set", override)]
    return lambda directory: [*config(WORLD)(directory), *sets, "--stages", "prepare"]


def stages(names: str) -> Callable[[Path], list[str]]:
    return lambda directory: [*config(WORLD)(directory), "--stages", names]


TABLE = (
    Malformed("no file", lambda d: ["--config", str(d / "none.yaml")], r"none\.yaml: cannot read"),
    Malformed("a directory", lambda d: ["--config", str(d)], "cannot read the config: Is a direct"),
    Malformed("other bytes", config(b"seed: \xff\n"), r"c\.yaml: expected UTF-8 text"),
    Malformed("open list", config("a: [\n"), r"c\.yaml:2: not valid YAML"),
    Malformed("a tab", config("rank:\n\tseeds: 1\n"), r"c\.yaml:2: not valid YAML"),
    Malformed("no such day", config("name: 2020-13-45\n"), r"not valid YAML: month must be in 1"),
    Malformed("too deep", config("a: " + "[" * 3000), r"not valid YAML: maximum recursion"),
    Malformed("a python tag", config("a: !!python/object/apply:os.getcwd []\n"), r"c\.yaml:1: not"),
    Malformed("a list", config("- a\n"), "expected a mapping of sections, got list"),
    Malformed("null as key", config("?\n"), "expected a word as key, got None"),
    Malformed("a number as key", config("rank: {1: 2}\n"), "expected a word as key, got 1"),
    Malformed("no base", config("base: nowhere.yaml\n"), r"nowhere\.yaml: cannot read the config"),
    Malformed("a number as base", config("base: 3\n"), "base: expected a file name, got 3"),
    Malformed("itself as base", config("base: c.yaml\n"), "base files form a circle"),
    Malformed(
        "misspelt key", config("rank: {backbon: prm}\n"), r"rank\.backbon: unknown.*mean rank\.back"
    ),
    Malformed("misspelt section", config("rnak: {}\n"), r"rnak: unknown key; did you mean rank\?"),
    Malformed("key of nothing", config("zzz: 1\n"), r"zzz: unknown key; known: name, seed"),
    Malformed(
        "unknown backbone", config("rank: {backbone: resnet}\n"), r"rank\.backbone: .*'dlcm'"
    ),
    Malformed(
        "a word for a number", config("rounds: two\n"), "rounds: .*valid integer.* got 'two'"
    ),
    Malformed("below the bound", config("rounds: -1\n"), "rounds: .* or equal to 0, got -1"),
    Malformed("above the bound", config("reason: {top_p: 1.5}\n"), r"reason\.top_p: .*equal to 1"),
    Malformed(
        "infinite", config("rank: {learning_rate: .inf}\n"), r"rank\.learning_rate: .*finite"
    ),
    Malformed("a number as section", config("rank: 3\n"), "rank: .*dictionary.* got 3"),
    Malformed("a long value", config(f"rounds: {'x' * 500}\n"), "got '.{79}$"),
    Malformed("required key", config("reason: {endpoint: {model: m}}\n"), r"base_url: field requi"),
    Malformed("unknown key there", config("reason: {endpoint: {url: m}}\n"), r"endpoint\.url: unk"),
    Malformed("unknown axis", config("runtime: {mesh: {rows: 2}}\n"), r"runtime\.mesh\.rows"),
    Malformed("--set without =", given_set("seed"), "--set seed: expected a.b=c"),
    Malformed("--set without key", given_set("=3"), "--set =3: expected a.b=c"),
    Malformed("--set no YAML", given_set("seed=["), r"--set seed=\[: '\[' is not a YAML value"),
    Malformed("--set unknown", given_set("reason.x=1"), r"reason\.x: unknown key"),
    Malformed("--set under a value", given_set("seed.x=1"), "seed: .*valid integer"),
    Malformed(
        "texts without a way in",
        given_set("rank.adaptor=none", "rank.knowledge=user"),
        r"c\.yaml: rank: adaptor none leaves .* got match true and knowledge user",
    ),
    Malformed("unknown stage", stages("prepare,rang"), "--stages rang: unknown stage; known: prep"),
    Malformed("unknown round", stages("round7/rank"), "--stages round7/rank: unknown stage"),
    Malformed("too early", stages("rank"), "reads prepare, which is not complete; run it first"),
    Malformed(
        "lists of nothing but positives",
        given_set("data.positives_per_list=10"),
        r"data\.positives_per_list: expected less than data\.list_length 10, got 10",
    ),
    Malformed(
        "unknown placeholder",
        given_set("data.prompts.user='{histroy}'"),
        r"data\.prompts\.user: unknown placeholder",
    ),
    Malformed(
        "no rating above", given_set("data.rating_threshold=9"), r"rating_threshold: .*lower it"
    ),
    Malformed("no one left to train on", given_set("data.test_fraction=0.95"), "users to train on"),
    Malformed(
        "nothing behind the window",
        given_set("data.synthetic.interactions=8", "data.min_user_interactions=99"),
        r"data\.min_user_interactions 99",
    ),
    Malformed(
        "nothing to fetch", given_set("data.name=mine"), "data.name 'mine': nothing to fetch by"
    ),
)


@rows(*TABLE)
def test_it_is_one_line_and_status_2(
    row: Malformed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = row.make(tmp_path)
    only = () if "--stages" in made else ("--stages", "prepare")
    arguments = [*made, *only, "--workdir", str(tmp_path / "w")]
    check_refusal(train.main(arguments), capsys.readouterr().err, row.says, tmp_path / "w")


def test_a_process_of_its_own_says_the_same_line_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo4rec_jax.train", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    expected = "cannot read the config: No such file or directory; check --config"
    assert done.stderr == f"error: {tmp_path / 'none.yaml'}: {expected}\n"


YAML_TOKENS = ("rank", "seed", ": ", "{", "}", "[", "]", "\n", "  ", "- ", "!!int", "!!timestamp")
YAML_TOKENS += (
    "2020-99-99",
    "0x",
    "1_",
    "&a",
    "*a",
    "<<",
    "? ",
    "|",
    ">",
    '"\\ud800"',
    "null",
    "1",
)
TEXT = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(YAML_TOKENS), max_size=9).map("".join)
)


@settings(max_examples=150, deadline=None)
@example("a: 2020-99-99")
@example("? [a]\n: b")
@given(TEXT)
def test_any_text_loads_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    for overrides in ((), (f"rank.seeds={text}",)):
        try:
            assert isinstance(load_config(path, overrides), Config)
        except InputError as error:
            assert "\n" not in str(error)
