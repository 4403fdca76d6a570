"""The README says what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_run_the_quickstart_and_the_tests() -> None:
    quickstart, tests = blocks("bash")
    assert quickstart.splitlines()[-1] == (
        ".venv/bin/python -m dpo4rec_jax.train --config configs/quickstart.yaml"
    )
    assert tests.splitlines()[-1] == ".venv/bin/python -m pytest"


def test_every_file_that_it_names_exists() -> None:
    for name in re.findall(r"\]\((\w[^):]*)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([\w-]+\.yaml)`", README):
        assert (ROOT / "configs" / name).exists(), name


def test_the_map_of_the_house_is_the_house() -> None:
    house = README.split("## The house")[1].split("```")[1]
    for room in re.findall(r"^  (\w+)/", house, re.MULTILINE):
        assert (ROOT / "dpo4rec_jax" / room).is_dir(), room
    for file in re.findall(r"(\w+\.py)", house):
        assert (ROOT / "dpo4rec_jax" / file).is_file(), file
    rooms = {
        path.name for path in (ROOT / "dpo4rec_jax").iterdir() if (path / "__init__.py").exists()
    }
    assert rooms <= set(re.findall(r"(\w+)/", house))


def test_the_python_names_that_it_shows_can_be_imported() -> None:
    imports = [line for line in blocks("python")[0].splitlines() if line.startswith("from ")]
    assert imports
    losses = re.search(r"`dpo4rec_jax.objectives` has ([^.]+)\.", README)
    assert losses
    names = ", ".join(re.findall(r"`(\w+)`", losses[1]))
    for line in (*imports, f"from dpo4rec_jax.objectives import {names}"):
        exec(line, {})
