"""The configuration reference is what the config models say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_in_step_with_the_models() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools/config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == module.reference(), "run python tools/config_reference.py"
