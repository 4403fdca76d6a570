"""The house: arrows of import run one way, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo4rec_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
SHARED = {"config", "workspace", "products", ""}
ALLOWED = {
    "runtime": set(),
    "objectives": set(),
    "models": set(),
    "data": set(),
    "weights": {"data", "models", "objectives", "runtime"},
    "sampling": {"weights", "data", "models", "objectives", "runtime"},
    "stages": {"sampling", "weights", "data", "models", "objectives", "runtime"},
    "rehearsal": {"stages", "sampling", "weights", "data", "models", "objectives", "runtime"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "dpo4rec_jax":
                names = [f"dpo4rec_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "dpo4rec_jax":
                rooms.add(name.split(".")[1] if "." in name else "")
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_house(path: Path) -> None:
    room = room_of(path)
    if room in ALLOWED:
        assert imported_rooms(path) - SHARED - {room} <= ALLOWED[room]


def test_stages_never_import_each_other() -> None:
    stages = {"prepare", "warmup", "reason", "encode", "rank", "prefer", "align", "evaluate"}
    for name in stages | {"report"}:
        tree = ast.parse((PACKAGE / "stages" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "dpo4rec_jax.stages"
            ):
                other = (node.module or "").split(".")[-1]
                assert other not in (stages | {"report"}) - {name}, f"{name} imports {other}"


def test_no_room_for_odds_and_ends() -> None:
    forbidden = {"utils", "helpers", "common", "misc", "base"}
    assert not [path for path in FILES if path.stem in forbidden]


def test_no_pickle_and_no_remote_code() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert "allow_pickle=True" not in text, path
