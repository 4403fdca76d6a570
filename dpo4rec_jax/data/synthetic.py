"""A world whose truth is known: items with attributes, viewers with planted tastes.

A viewer likes one value of each attribute that matters (genre, decade, lead); the mood of an item
never influences a rating. A text that names what the viewer likes helps a re-ranker; one that
names moods, or values of items the viewer disliked, does not. Warm-up texts are fluent and
unaligned: they name values seen in the history at random, whatever the viewer thought of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from dpo4rec_jax.config import DataConfig, SyntheticConfig
from dpo4rec_jax.data.prompts import (
    DISLIKED,
    LIKED,
    Domain,
    customise,
    history_entries,
    user_prompt,
)
from dpo4rec_jax.data.protocol import protocol
from dpo4rec_jax.data.ratings import RawData, Select
from dpo4rec_jax.data.sequences import window

VALUES = {
    "genre": ("drama", "comedy", "horror", "western", "romance", "crime"),
    "decade": ("1960s", "1970s", "1980s", "1990s"),
    "lead": ("kim", "cruz", "novak", "okoye", "silva", "tanaka"),
    "mood": ("dark", "light", "calm", "tense"),
}
ATTRIBUTES = tuple(VALUES)
TASTES = ATTRIBUTES[:3]

# Stars: what an item without any liked value gets, what each liked value adds, and the standard
# deviation of items' quality. `data.synthetic.noise` comes on top.
BASE_STARS = 1.7
TASTE_STARS = 1.3
QUALITY_STARS = 0.3

# Log-odds of meeting an item: by each liked value it has, and by its popularity (deviation).
EXPOSURE_BY_TASTE = 2.0
EXPOSURE_BY_POPULARITY = 0.3

SENTENCES = (
    "the viewer likes {0} , {1} and {2} .",
    "{0} , {1} and {2} please this viewer .",
    "this viewer often enjoys {0} and {1} , also {2} .",
)
MENTIONS = 3

WORLD_STREAM, USERS_STREAM, WARMUP_STREAM = 11, 12, 13

DOMAIN = Domain(
    factors=ATTRIBUTES,
    user="history :\n{history}\nwhat does the viewer like ?",
    item="what is {title} ?",
    sentence="the viewer .",
    rated="{verdict} {title}",
    unrated="{title}",
    profile="a viewer",
    attribute="{name} {values}",
    between=" , ",
    text="{attributes} .",
)


@dataclass(frozen=True)
class World:
    """Items: `value_IA` holds an index into each attribute's values."""

    value_IA: Int[np.ndarray, "I A"]
    quality_I: Float[np.ndarray, " I"]
    popularity_I: Float[np.ndarray, " I"]


@dataclass(frozen=True)
class Viewers:
    """`taste_UA`: the liked value of each attribute that matters; their items in time order."""

    taste_UA: Int[np.ndarray, "U A"]
    item_UE: Int[np.ndarray, "U E"]
    rating_UE: Float[np.ndarray, "U E"]


def read(config: DataConfig, seed: int, select: Select) -> RawData:
    """The world of a seed as raw tables; users are `u0 ...`, items `i0 ...`."""
    world, viewers = _world_and_viewers(config.synthetic, seed)
    num_users, num_events = viewers.item_UE.shape
    item_id = np.array([f"i{i}" for i in range(len(world.value_IA))])
    user_id = np.array([f"u{u}" for u in range(num_users)])
    interactions = pl.DataFrame(
        {
            "user": np.repeat(user_id, num_events),
            "item": item_id[viewers.item_UE.ravel()],
            "time": np.tile(np.arange(num_events), num_users),
            "rating": viewers.rating_UE.ravel().astype(np.float32),
        }
    )
    words_IA = _words(world.value_IA)
    items = {
        "item": item_id,
        "title": _titles(world),
        **{name: [[word] for word in words_IA[:, a]] for a, name in enumerate(ATTRIBUTES)},
    }
    return RawData(select(interactions), pl.DataFrame(items), pl.DataFrame({"user": user_id}))


def truth(config: DataConfig, seed: int) -> dict[str, dict[str, str]]:
    """What each user likes, by raw id: `{"u0": {"genre": "drama", "decade": ..., "lead": ...}}`."""
    _, viewers = _world_and_viewers(config.synthetic, seed)
    words_UA = _words(viewers.taste_UA)
    return {f"u{u}": dict(zip(TASTES, words, strict=True)) for u, words in enumerate(words_UA)}


def warmup_texts(
    config: DataConfig, seed: int, *, viewers: int, samples: int
) -> list[tuple[list[dict[str, str]], list[str]]]:
    """Messages and `samples` texts to imitate, for each of so many viewers outside the data set."""
    world = _world(config.synthetic, seed)
    rng = np.random.default_rng([seed, WARMUP_STREAM])
    drawn = _viewers(world, config.synthetic, viewers, rng)
    length = np.array([drawn.item_UE.shape[1]])
    settings = protocol(config, "synthetic")
    seen = int(window(length, settings.window)[0])
    item_UE, rating_UE = drawn.item_UE[:, :seen], drawn.rating_UE[:, :seen]
    domain = customise(DOMAIN, config.prompts)
    words_UEA = _words(world.value_IA[item_UE])
    values_EA1 = words_UEA.reshape(-1, len(ATTRIBUTES), 1).tolist()
    items = [
        {"title": title, "attributes": dict(zip(ATTRIBUTES, values, strict=True))}
        for title, values in zip(_titles(world)[item_UE].ravel(), values_EA1, strict=True)
    ]
    entries = history_entries(domain, items, rating_UE.ravel(), settings.threshold)
    histories = [entries[u * seen : (u + 1) * seen] for u in range(viewers)]
    prompts = [
        user_prompt(domain, "", domain.profile, history, config.prompts.system)
        for history in histories
    ]
    return [
        (prompt.messages, [unaligned_text(words_EA, rng) for _ in range(samples)])
        for prompt, words_EA in zip(prompts, words_UEA, strict=True)
    ]


def unaligned_text(words_EA: np.ndarray, rng: np.random.Generator) -> str:
    """A fluent text that names values from a history at random, each once."""
    events = rng.integers(len(words_EA), size=8 * MENTIONS)
    kinds = rng.integers(len(ATTRIBUTES), size=8 * MENTIONS)
    named = dict.fromkeys(
        f"{ATTRIBUTES[kind]} {words_EA[event, kind]}"
        for event, kind in zip(events, kinds, strict=True)
    )
    return SENTENCES[rng.integers(len(SENTENCES))].format(*named)


def vocabulary(config: DataConfig) -> list[str]:
    """Every word of the world's prompts and texts."""
    domain = customise(DOMAIN, config.prompts)
    templates = (domain.user, domain.item, domain.sentence, config.prompts.system or "", *SENTENCES)
    words = {word for text in templates for word in re.sub(r"{\w*}", " ", text).split()}
    words.update(ATTRIBUTES, *VALUES.values(), (LIKED, DISLIKED), domain.profile.split())
    words.update(word for factor in domain.factors for word in factor.split())
    return sorted(words)


def _world_and_viewers(config: SyntheticConfig, seed: int) -> tuple[World, Viewers]:
    world = _world(config, seed)
    rng = np.random.default_rng([seed, USERS_STREAM])
    return world, _viewers(world, config, config.users, rng)


def _world(config: SyntheticConfig, seed: int) -> World:
    rng = np.random.default_rng([seed, WORLD_STREAM])
    columns = [rng.integers(len(values), size=config.items) for values in VALUES.values()]
    return World(
        value_IA=np.stack(columns, axis=1),
        quality_I=rng.normal(size=config.items),
        popularity_I=rng.normal(size=config.items),
    )


def _viewers(
    world: World, config: SyntheticConfig, users: int, rng: np.random.Generator
) -> Viewers:
    """Draws tastes, then items without repeats (Gumbel top-k), then ratings from 1 to 5 stars."""
    taste_UA = np.stack([rng.integers(len(VALUES[name]), size=users) for name in TASTES], axis=1)
    liked_UI = (taste_UA[:, None] == world.value_IA[:, : len(TASTES)]).sum(axis=-1)
    logit_UI = EXPOSURE_BY_TASTE * liked_UI + EXPOSURE_BY_POPULARITY * world.popularity_I
    score_UI = logit_UI + rng.gumbel(size=liked_UI.shape)
    events = min(config.interactions, config.items)
    # In the order of the scores a viewer would meet the items that fit best first.
    item_UE = rng.permuted(np.argsort(-score_UI, axis=1)[:, :events], axis=1)
    stars_UE = (
        BASE_STARS
        + TASTE_STARS * np.take_along_axis(liked_UI, item_UE, axis=1)
        + QUALITY_STARS * world.quality_I[item_UE]
        + config.noise * rng.normal(size=item_UE.shape)
    )
    return Viewers(taste_UA, item_UE, np.clip(np.rint(stars_UE), 1, 5))


def _words(value_xA: np.ndarray) -> np.ndarray:
    """The words of value indices; the last axis runs over the attributes."""
    names = ATTRIBUTES[: value_xA.shape[-1]]
    return np.stack([np.array(VALUES[name])[value_xA[..., a]] for a, name in enumerate(names)], -1)


def _titles(world: World) -> np.ndarray:
    return np.array([" ".join(words) for words in _words(world.value_IA)])
