"""From raw tables to `Prepared`: indexing, lists, features, and the prompts in words."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Int, Int8, Int32

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data.lists import Lists, build_lists, split_users
from dpo4rec_jax.data.prepared import SPLITS, Prepared
from dpo4rec_jax.data.prompts import (
    Domain,
    history_entries,
    item_prompt,
    item_text,
    profile_text,
    user_prompt,
)
from dpo4rec_jax.data.protocol import Protocol
from dpo4rec_jax.data.ratings import RawData
from dpo4rec_jax.data.sequences import Indexed, index, window

# Values of one attribute of one item kept as features, the first ones.
MAX_VALUES = 8

SPLIT_STREAM, LISTS_STREAM = 1, 2

SECONDS = {"second": 1, "day": 24 * 60 * 60}


def assemble(
    raw: RawData, config: DataConfig, settings: Protocol, seed: int, domain: Domain
) -> Prepared:
    """Raises InputError where the lists asked for cannot be cut from the data."""
    indexed = index(raw.interactions, SECONDS[config.order])
    window_U = window(indexed.length_U, settings.window)
    split_U = split_users(
        len(indexed.user_id),
        config.validation_fraction,
        config.test_fraction,
        np.random.default_rng([seed, SPLIT_STREAM]),
    )
    lists = build_lists(
        indexed.user_E,
        indexed.item_E,
        indexed.rating_E,
        window_U,
        num_items=len(indexed.item_id),
        list_length=config.list_length,
        per_list=config.positives_per_list,
        threshold=settings.threshold,
        rng=np.random.default_rng([seed, LISTS_STREAM]),
    )
    if not lists.label_LN.any():
        raise InputError(
            "data.rating_threshold: no interaction after a window is rated above "
            f"{settings.threshold:g}, and the highest rating is {np.nanmax(indexed.rating_E):g}; "
            "lower it"
        )
    names = [name for name in raw.items.columns if name not in ("item", "title")]
    items = item_rows(raw.items, indexed.item_id, names, domain)
    attribute_IAM, attribute_sizes = attribute_ids(items, names)
    entries = window_entries(indexed, window_U, items, domain, settings.threshold)
    likes = window_likes(indexed, window_U, settings.threshold)
    profiles = profile_rows(raw.users, indexed.user_id)
    return Prepared(
        user_id=indexed.user_id,
        item_id=indexed.item_id,
        offset_U1=np.concatenate(([0], np.cumsum(indexed.length_U))).astype(np.int64),
        item_E=indexed.item_E.astype(np.int32),
        rating_E=indexed.rating_E,
        time_E=indexed.time_E,
        window_U=window_U,
        split_U=split_U,
        attribute_IAM=attribute_IAM,
        attribute_names=names,
        attribute_sizes=attribute_sizes,
        items=items,
        users=[
            {
                "user": user,
                "split": SPLITS[split],
                "attributes": profile,
                "history": domain.sentence.format(history="; ".join(listed)),
                "likes": liked,
            }
            for user, split, profile, listed, liked in zip(
                indexed.user_id, split_U, profiles, entries, likes, strict=True
            )
        ],
        user_prompts=[
            user_prompt(domain, user, profile_text(domain, profile), listed, config.prompts.system)
            for user, profile, listed in zip(indexed.user_id, profiles, entries, strict=True)
        ],
        item_prompts=[item_prompt(domain, item, config.prompts.system) for item in items],
        counts=counts(indexed, lists, split_U),
        **vars(lists),
    )


def window_entries(
    indexed: Indexed,
    window_U: Int[np.ndarray, " U"],
    items: list[dict[str, Any]],
    domain: Domain,
    threshold: float,
) -> list[list[str]]:
    """Each user's history as prompts list it: the knowledge window, oldest first."""
    seen_E = in_window(indexed, window_U)
    seen = (items[i] for i in indexed.item_E[seen_E].tolist())
    entries = history_entries(domain, seen, indexed.rating_E[seen_E].tolist(), threshold)
    return by_user(entries, window_U)


def window_likes(
    indexed: Indexed, window_U: Int[np.ndarray, " U"], threshold: float
) -> list[list[str]]:
    """Raw ids of the items in each user's window that make a positive label, oldest first."""
    liked_E = in_window(indexed, window_U) & ~(indexed.rating_E <= threshold)
    ids = [indexed.item_id[item] for item in indexed.item_E[liked_E].tolist()]
    return by_user(ids, np.bincount(indexed.user_E[liked_E], minlength=len(window_U)))


def by_user(values: list[str], count_U: Int[np.ndarray, " U"]) -> list[list[str]]:
    """Cuts what is sorted by user into a list for each."""
    ends = np.cumsum(count_U).tolist()
    return [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def in_window(indexed: Indexed, window_U: Int[np.ndarray, " U"]) -> Bool[np.ndarray, " E"]:
    """Which interactions lie in their users' knowledge windows."""
    length_U = indexed.length_U
    place_E = np.arange(len(indexed.user_E)) - np.repeat(np.cumsum(length_U) - length_U, length_U)
    return place_E < np.repeat(window_U, length_U)


def item_rows(
    table: pl.DataFrame, item_id: list[str], names: list[str], domain: Domain
) -> list[dict[str, Any]]:
    """`{"item", "title", "attributes": {name: [value ...]}, "text"}` of each item, by index.

    An item without a title, or without any metadata, is called by its id. Character references
    of web pages (`&amp;`) become characters, line ends blanks.
    """
    rows = _by_id(table, "item", item_id)
    titles = rows["title"].fill_null(rows["item"]).to_list()
    columns = [rows[name].fill_null([]).to_list() for name in names]
    items = []
    for item, title, *values in zip(item_id, titles, *columns, strict=True):
        cleaned = (list(map(_clean, listed)) for listed in values)
        title, attributes = _clean(title), dict(zip(names, cleaned, strict=True))
        text = item_text(domain, title, attributes)
        items.append({"item": item, "title": title, "attributes": attributes, "text": text})
    return items


def profile_rows(table: pl.DataFrame, user_id: list[str]) -> list[dict[str, str]]:
    """What is known of each user, by index; unknown attributes are left out."""
    rows = _by_id(table, "user", user_id).drop("user").to_dicts()
    return [{name: value for name, value in row.items() if value} for row in rows] or [
        {} for _ in user_id
    ]


def attribute_ids(
    items: list[dict[str, Any]], names: list[str]
) -> tuple[Int32[np.ndarray, "I A M"], list[int]]:
    """Ids of attribute values, numbered by first appearance, and how many each attribute has."""
    most = max((len(item["attributes"][name]) for item in items for name in names), default=1)
    attribute_IAM = np.full((len(items), len(names), max(1, min(most, MAX_VALUES))), -1, np.int32)
    sizes = []
    for a, name in enumerate(names):
        known: dict[str, int] = {}
        for i, item in enumerate(items):
            values = item["attributes"][name][:MAX_VALUES]
            ids = [known.setdefault(value, len(known)) for value in values]
            attribute_IAM[i, a, : len(ids)] = ids
        sizes.append(len(known))
    return attribute_IAM, sizes


def counts(indexed: Indexed, lists: Lists, split_U: Int8[np.ndarray, " U"]) -> dict[str, Any]:
    """What the report tells of the data."""
    positives_L = lists.label_LN.sum(axis=1)
    split_L = split_U[lists.user_L]

    def by_split(values: np.ndarray) -> dict[str, int]:
        return {name: int((values == split).sum()) for split, name in enumerate(SPLITS)}

    return {
        "users": len(indexed.user_id),
        "items": len(indexed.item_id),
        "interactions": len(indexed.user_E),
        "ratings": bool(np.isfinite(indexed.rating_E).any()),
        "users_by_split": by_split(split_U),
        "lists": len(lists.user_L),
        "lists_by_split": by_split(split_L),
        "lists_without_positives": int((positives_L == 0).sum()),
        "lists_without_positives_by_split": by_split(split_L[positives_L == 0]),
        "positives": int(positives_L.sum()),
    }


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).split())


def _by_id(table: pl.DataFrame, key: str, ids: list[str]) -> pl.DataFrame:
    """One row an id, in the order of `ids`; nulls where the table has none."""
    wanted = pl.DataFrame({key: ids}, schema={key: pl.String})
    first = table.unique(key, keep="first")
    return wanted.join(first, on=key, how="left", maintain_order="left")
