"""What `prepare` leaves and every later stage reads: sequences, lists, features and prompts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int32, Int64

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.prompts import Prompt
from dpo4rec_jax.workspace import write_json, write_jsonl, write_npz

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("train", "validation", "test")

SEQUENCES = ("offset_U1", "item_E", "rating_E", "time_E", "window_U", "split_U")
LISTS = ("user_L", "item_LN", "label_LN", "mask_LN")


@dataclass(frozen=True, eq=False)  # itself alone: what is made of it is kept by it
class Prepared:
    """One data set, indexed: user u is `user_id[u]`, item i is `item_id[i]`.

    `offset_U1`, `item_E`, `rating_E` and `time_E` hold the users' interactions in time order: user
    u's are `[offset_U1[u], offset_U1[u + 1])`, of which the first `window_U[u]` make the knowledge
    window that prompts see. `rating_E` is NaN where there is none. Lists are sorted by user; a
    list's places where `mask_LN` is False are padding (item 0, label 0). `attribute_IAM` holds ids
    counted from 0 within each attribute, padded with -1.
    """

    user_id: list[str]
    item_id: list[str]
    offset_U1: Int64[np.ndarray, " U1"]
    item_E: Int32[np.ndarray, " E"]
    rating_E: Float32[np.ndarray, " E"]
    time_E: Int64[np.ndarray, " E"]
    window_U: Int32[np.ndarray, " U"]
    split_U: Int8[np.ndarray, " U"]
    user_L: Int32[np.ndarray, " L"]
    item_LN: Int32[np.ndarray, "L N"]
    label_LN: Int8[np.ndarray, "L N"]
    mask_LN: Bool[np.ndarray, "L N"]
    attribute_IAM: Int32[np.ndarray, "I A M"]
    attribute_names: list[str]
    attribute_sizes: list[int]
    items: list[dict[str, Any]]
    users: list[dict[str, Any]]
    user_prompts: list[Prompt] = field(repr=False)
    item_prompts: list[Prompt] = field(repr=False)
    counts: dict[str, Any]

    def save(self, directory: Path) -> None:
        sequences = {name: getattr(self, name) for name in SEQUENCES}
        sequences["user_id"] = np.array(self.user_id, dtype=np.str_)
        sequences["item_id"] = np.array(self.item_id, dtype=np.str_)
        features = {
            "attribute_IAM": self.attribute_IAM,
            "attribute_names": np.array(self.attribute_names, dtype=np.str_),
            "attribute_sizes": np.array(self.attribute_sizes, dtype=np.int32),
        }
        write_npz(directory / "sequences.npz", sequences)
        write_npz(directory / "lists.npz", {name: getattr(self, name) for name in LISTS})
        write_npz(directory / "features.npz", features)
        write_jsonl(directory / "items.jsonl", self.items)
        write_jsonl(directory / "users.jsonl", self.users)
        prompts = (*self.user_prompts, *self.item_prompts)
        write_jsonl(directory / "prompts.jsonl", (vars(prompt) for prompt in prompts))
        write_json(directory / "counts.json", self.counts)

    @classmethod
    def load(cls, directory: Path, prompts: bool = True) -> Prepared:
        """Reads what `save` wrote; without `prompts` both prompt lists stay empty.

        Raises InputError where a file is missing or damaged.
        """
        try:
            return cls._load(directory, prompts)
        except FileNotFoundError as error:
            raise InputError(f"{error.filename}: missing; run stage prepare") from None
        except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{directory}: damaged ({error}); run stage prepare again") from None

    @classmethod
    def _load(cls, directory: Path, prompts: bool) -> Prepared:
        with np.load(directory / "sequences.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in SEQUENCES}
            user_id, item_id = file["user_id"].tolist(), file["item_id"].tolist()
        with np.load(directory / "lists.npz", allow_pickle=False) as file:
            arrays.update({name: file[name] for name in LISTS})
        with np.load(directory / "features.npz", allow_pickle=False) as file:
            attribute_IAM = file["attribute_IAM"]
            names, sizes = file["attribute_names"].tolist(), file["attribute_sizes"].tolist()
        by_kind: dict[str, list[Prompt]] = {"user": [], "item": []}
        for line in _lines(directory / "prompts.jsonl") if prompts else ():
            by_kind[line["kind"]].append(Prompt(**line))
        return cls(
            user_id=user_id,
            item_id=item_id,
            attribute_IAM=attribute_IAM,
            attribute_names=names,
            attribute_sizes=sizes,
            items=list(_lines(directory / "items.jsonl")),
            users=list(_lines(directory / "users.jsonl")),
            user_prompts=by_kind["user"],
            item_prompts=by_kind["item"],
            counts=json.loads((directory / "counts.json").read_text(encoding="utf-8")),
            **arrays,
        )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
