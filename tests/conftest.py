"""Fixtures and the runtime type check of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_HOOK = install_import_hook("dpo4rec_jax", "beartype.beartype")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def strict_jax() -> None:
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets that lie beside a checkout of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets not there: {SHARED_DATA}")
    return SHARED_DATA
