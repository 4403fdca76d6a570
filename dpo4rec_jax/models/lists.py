"""Candidate lists and vectors on the device, and scoring them by index, in batches.

Training scores a batch of lists and pays the adaptor once for each distinct item of it. Everything
else scores with the items and texts adapted beforehand: `adapted`, then `map_lists`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int

from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.reranker import (
    Attributes,
    History,
    Match,
    Params,
    RerankerConfig,
    attribute_tables,
)

T = TypeVar("T")


@struct.dataclass
class Lists:
    """L lists of N candidates, the items' attributes, and the vectors of texts where there are.

    The first `count_U[u]` of a user's C vectors are texts. A side without knowledge is None, and so
    is the history (items of the window and their ratings) where re-rankers do not read it, and
    `affinity_UI` where they do not read what `ease` says of every user and item.
    """

    user_L: jax.Array
    item_LN: jax.Array
    label_LN: jax.Array
    mask_LN: jax.Array
    attribute_IAM: jax.Array
    user_UCF: jax.Array | None = None
    count_U: jax.Array | None = None
    item_IF: jax.Array | None = None
    past_UH: jax.Array | None = None
    rating_UH: jax.Array | None = None
    affinity_UI: jax.Array | None = None

    def affinity(
        self, user_B: Int[jax.Array, " B"], item_BN: Int[jax.Array, "B N"]
    ) -> jax.Array | None:
        """Of each candidate for its user, None where the re-ranker does not read it."""
        return None if self.affinity_UI is None else self.affinity_UI[user_B[:, None], item_BN]

    def history(self, user_B: jax.Array) -> History | None:
        """The users' windows, None where the re-ranker does not read them."""
        if self.past_UH is None or self.rating_UH is None:
            return None
        past_BH = self.past_UH[user_B]
        return History(past_BH, self.rating_UH[user_B])


@struct.dataclass
class Adapted:
    """What the adaptors made of every text and item, None without adaptors or for a side without
    knowledge, and the items' attributes."""

    user_UCO: jax.Array | None
    item_IO: jax.Array | None
    attributes: Attributes


def score_batch(
    config: RerankerConfig,
    params: Params,
    lists: Lists,
    index_B: Int[jax.Array, " B"],
    sample_B: Int[jax.Array, " B"] | None = None,
    capacity: int | None = None,
    key: jax.Array | None = None,
    attributes: Attributes | None = None,
) -> Float[jax.Array, "B N"]:
    """Scores of the lists at `index_B` with each one's user shown by text `sample_B`.

    `capacity` bounds the distinct items of the batch (`count_distinct`), None: any number. A `key`
    turns dropout on. `attributes`: what `attribute_tables` made of those of all items, where a
    caller scores many batches.
    """
    item_BN, user_B, mask_BN = lists.item_LN[index_B], lists.user_L[index_B], lists.mask_LN[index_B]
    if attributes is None:
        attributes = attribute_tables(config, lists.attribute_IAM)
    user_BF = user_BO = item_BNO = None
    if lists.user_UCF is not None:
        sample_B = jnp.zeros_like(user_B) if sample_B is None else sample_B
        user_BF = lists.user_UCF[user_B, sample_B]
        if config.adapts:
            user_BO = reranker.adapt_users(config, params, user_BF)
    if lists.item_IF is not None and config.adapts:
        size = min(capacity or item_BN.size, item_BN.size, lists.item_IF.shape[0])
        distinct_K, place_BN = distinct(item_BN, size, lists.item_IF.shape[0])
        item_KO = reranker.adapt_items(config, params, lists.item_IF[distinct_K])
        item_BNO = item_KO[place_BN]
    match = None
    if config.matches and user_BF is not None and lists.item_IF is not None:
        match = Match(user_BF, lists.item_IF[item_BN])
    return reranker.score(
        config,
        params,
        item_BN,
        mask_BN,
        attributes,
        user_BO,
        item_BNO,
        lists.history(user_B),
        match,
        lists.affinity(user_B, item_BN),
        key,
    )


def count_distinct(lists: Lists, index_B: Int[jax.Array, " B"]) -> jax.Array:
    """How many distinct items the lists at `index_B` hold."""
    return _met(lists.item_LN[index_B], lists.attribute_IAM.shape[0]).sum()


def distinct(
    item_BN: Int[jax.Array, "B N"], size: int, num_items: int
) -> tuple[Int[jax.Array, " K"], Int[jax.Array, "B N"]]:
    """The distinct items, ascending, in the first of `size` places, and where each one stands.

    By counting over all items: where they are not a thousand times the candidates, far cheaper than
    sorting.
    """
    place_I = jnp.cumsum(_met(item_BN, num_items)) - 1
    place_BN = place_I[item_BN]
    distinct_K = jnp.zeros(size, item_BN.dtype).at[place_BN].set(item_BN, mode="drop")
    return distinct_K, place_BN


def _met(item_BN: jax.Array, num_items: int) -> jax.Array:
    return jnp.zeros(num_items, bool).at[item_BN.reshape(-1)].set(True)


def adapted(config: RerankerConfig, params: Params, lists: Lists) -> Adapted:
    """Adapts every text and every item once."""
    user_UCO = item_IO = None
    if lists.user_UCF is not None and config.adapts:
        user_UCO = reranker.adapt_users(config, params, jnp.asarray(lists.user_UCF))
    if lists.item_IF is not None and config.adapts:
        item_IO = reranker.adapt_items(config, params, jnp.asarray(lists.item_IF))
    return Adapted(user_UCO, item_IO, attribute_tables(config, lists.attribute_IAM))


def score_texts(
    config: RerankerConfig,
    params: Params,
    lists: Lists,
    tables: Adapted,
    index_B: Int[jax.Array, " B"],
    samples: int = 1,
) -> Float[jax.Array, "B C N"]:
    """Scores of the lists at `index_B` by each of the first `samples` texts of their users."""
    item_BN, user_B, mask_BN = lists.item_LN[index_B], lists.user_L[index_B], lists.mask_LN[index_B]
    item_BNO = None if tables.item_IO is None else tables.item_IO[item_BN]
    rows = (item_BN, mask_BN, item_BNO, lists.history(user_B), lists.affinity(user_B, item_BN))
    item, mask, knowledge, history, affinity = jax.tree.map(
        lambda x: jnp.repeat(x, samples, axis=0), rows
    )

    def texts(user_UCx: jax.Array) -> jax.Array:
        user_BCx = user_UCx[user_B, :samples]
        return user_BCx.reshape(-1, user_BCx.shape[-1])

    user_BO = None if tables.user_UCO is None else texts(tables.user_UCO)
    match = None
    if config.matches and lists.user_UCF is not None and lists.item_IF is not None:
        match = Match(texts(lists.user_UCF), jnp.repeat(lists.item_IF[item_BN], samples, axis=0))
    score = reranker.score(
        config, params, item, mask, tables.attributes, user_BO, knowledge, history, match, affinity
    )
    return score.reshape(len(index_B), samples, -1)


def map_lists(
    config: RerankerConfig,
    params: Params,
    lists: Lists,
    index_T: Int[jax.Array, " T"],
    reduce: Callable[[jax.Array, jax.Array, jax.Array], T],
    samples: int = 1,
    rows: int = 2048,
) -> T:
    """`reduce(score_BCN, label_BCN, mask_BCN)` of the lists at `index_T`, about `rows` at a time.

    Leaves of the result have leading axis T, as those of `reduce` have B. Scores are never all held
    at once.
    """
    tables = adapted(config, params, lists)
    total, batch = index_T.shape[0], max(1, min(rows // samples, index_T.shape[0]))
    chunks = -(-total // batch)
    index_SB = jnp.pad(jnp.asarray(index_T), (0, chunks * batch - total)).reshape(chunks, batch)

    def one(index_B: jax.Array) -> Any:
        score_BCN = score_texts(config, params, lists, tables, index_B, samples)
        label_BCN, mask_BCN = (
            jnp.broadcast_to(x_LN[index_B][:, None], score_BCN.shape)
            for x_LN in (lists.label_LN, lists.mask_LN)
        )
        return reduce(score_BCN, label_BCN, mask_BCN)

    mapped = jax.lax.map(one, index_SB)
    return jax.tree.map(lambda x: x.reshape(chunks * batch, *x.shape[2:])[:total], mapped)
