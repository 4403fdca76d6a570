"""Generated Amazon files are what the reader of real ones takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dpo4rec_jax import data
from dpo4rec_jax.config import DataConfig

TOOL = Path(__file__).parents[2] / "tools" / "make_amazon.py"
REVIEWS, LINES = 3000, 900


def write(directory: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    spec = importlib.util.spec_from_file_location("make_amazon", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sizes = ["--reviews", str(REVIEWS), "--lines", str(LINES), "--to", str(directory)]
    monkeypatch.setattr(sys, "argv", ["make_amazon", *sizes, "--words", "12", *options])
    tool.main()


@pytest.mark.parametrize("form", ["2014", "2018", "2023"])
def test_every_form_is_read_with_its_metadata(form, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "--form", form, "--gz")
    prepared = data.build(DataConfig(name="amazon-beauty", path=str(tmp_path)), 0, "unused")
    # pairs repeat, and users of one review have no list
    assert REVIEWS / 2 < prepared.counts["interactions"] <= REVIEWS
    titled = [item for item in prepared.items if item["title"] != item["item"]]
    assert len(titled) == len(prepared.items)
    assert prepared.attribute_names == ["category", "brand"]
    assert min(prepared.attribute_sizes) > 10


def test_the_same_seed_gives_the_same_files(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write(tmp_path / name, monkeypatch, "--seed", "3")
    for name in ("reviews.json", "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
