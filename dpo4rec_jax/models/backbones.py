"""The backbones that `rank.backbone` may name, one line each.

A backbone is a linen module with the field `dropout` that is called as `(x_BND, mask_BN, training)`
and returns score_BN; one that sets `reads_history = True` is given a `Window` as well. The table
holds `"module:Class"`, imported when it is first needed, or the class itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, NamedTuple

import pydantic
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

BACKBONES: dict[str, str | type[nn.Module]] = {
    "dlcm": "dpo4rec_jax.models.dlcm:DLCM",
    "prm": "dpo4rec_jax.models.prm:PRM",
    "prm-small": "dpo4rec_jax.models.prm:SmallPRM",
    "prm-tiny": "dpo4rec_jax.models.prm:TinyPRM",
    "setrank": "dpo4rec_jax.models.setrank:SetRank",
    "setrank-isab": "dpo4rec_jax.models.setrank:InducedSetRank",
    "setrank-small": "dpo4rec_jax.models.setrank:SmallSetRank",
    "setrank-tiny": "dpo4rec_jax.models.setrank:TinySetRank",
    "mir": "dpo4rec_jax.models.mir:MIR",
}


def _registered(name: str) -> str:
    if name not in BACKBONES:
        known = ", ".join(f"'{known}'" for known in BACKBONES)
        raise PydanticCustomError("backbone", "input should be one of {known}", {"known": known})
    return name


# What a config accepts: names that are in the table when the config is read.
BackboneName = Annotated[
    str,
    pydantic.AfterValidator(_registered),
    pydantic.WithJsonSchema({"enum": list(BACKBONES)}),
]


class Window(NamedTuple):
    """What a user rated, oldest first: each item's id, attributes and rating, embedded.

    Real items stand first (`mask_BH` True); the window of a user without history has none.
    """

    item_BHD: jax.Array
    mask_BH: jax.Array


def backbone_of(name: str) -> type[nn.Module]:
    """The class that the table holds for `name`."""
    entry = BACKBONES[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def reads_history(name: str) -> bool:
    return bool(getattr(backbone_of(name), "reads_history", False))
