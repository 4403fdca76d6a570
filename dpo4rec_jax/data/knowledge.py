"""The vectors of a round's texts, aligned with the indices of the prepared data."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from dpo4rec_jax.config import InputError
from dpo4rec_jax.workspace import write_npz


@dataclass(frozen=True)
class Knowledge:
    """One vector a text: row u of `user_UCF` is user index u's, row i of `item_IF` item i's.

    The first `count_U[u]` of a user's C vectors are texts, the rest zeros; users without a text
    count 0.
    """

    user_UCF: Float32[np.ndarray, "U C F"]
    count_U: Int32[np.ndarray, " U"]
    item_IF: Float32[np.ndarray, "I F"]
    user_id: list[str]
    item_id: list[str]

    def save(self, path: Path) -> None:
        arrays = {
            "user_UxCxF": self.user_UCF,
            "user_count": self.count_U,
            "item_IxF": self.item_IF,
            "user_id": np.array(self.user_id, dtype=np.str_),
            "item_id": np.array(self.item_id, dtype=np.str_),
        }
        write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> Knowledge:
        """Raises InputError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(
                    user_UCF=file["user_UxCxF"],
                    count_U=file["user_count"],
                    item_IF=file["item_IxF"],
                    user_id=file["user_id"].tolist(),
                    item_id=file["item_id"].tolist(),
                )
        except FileNotFoundError:
            raise InputError(f"{path}: missing; run stage encode") from None
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: damaged ({error}); run stage encode again") from None
