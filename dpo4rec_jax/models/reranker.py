"""The re-ranker: features of each candidate, a backbone over the list, one score a candidate.

A candidate is [item id embedding | history | attribute embeddings | adaptor(user vector) |
adaptor(item vector)], the history an option. The adaptors are applied apart from the scoring, so
that a caller pays for them once a distinct user and item: `adapt_users`, `adapt_items`, then
`score` on what they return.

Where both sides have texts, a score also holds how well the two match (`Match`): a product of the
vectors, dimension by dimension, in place of what a perceptron would have to learn from a few
thousand users, and learns as these users' names.

The backbones are those of `backbones.py`; one that reads the history is given the user's window as
embeddings of the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from dpo4rec_jax.models.adaptor import ADAPTORS
from dpo4rec_jax.models.backbones import Window, backbone_of, reads_history
from dpo4rec_jax.models.history import RATINGS, TargetAttention

# Attributes of at most so many values are embedded by a product with their multi-hot rows; larger
# ones by lookup. The gradient of a lookup is a scatter, slow on every backend.
MULTI_HOT = 64

DEVIATION = 0.1  # of embeddings, to begin with

Params = Mapping[str, Any]


@dataclass(frozen=True)
class RerankerConfig:
    """Sizes of a re-ranker. A side whose `_features` (length of its vectors) is 0 has no knowledge.
    With adaptor `none` knowledge counts by the match alone.

    `list_length` matters to PRM alone, whose positions are learned. `history` adds to a candidate
    what it finds in the user's window, whatever the backbone; `attributes` are embeddings of their
    own beside that of the item's id, or are added to it; `match` adds to a score how well the
    texts match, where there are both; `ease`, a ridge, adds how well each candidate fits what
    the user liked (`ease.affinities`).
    """

    backbone: str
    num_items: int
    attribute_sizes: tuple[int, ...]
    list_length: int
    user_features: int = 0
    item_features: int = 0
    adaptor: str = "hybrid"
    embedding: int = 32
    dropout: float = 0.0
    user_dropout: float = 0.0
    history: bool = False
    match: bool = False
    ease: float | None = None
    attributes: Literal["joined", "added"] = "joined"

    @property
    def adapts(self) -> bool:
        return self.adaptor != "none" and bool(self.user_features or self.item_features)

    @property
    def matches(self) -> bool:
        return self.match and bool(self.user_features and self.item_features)

    @property
    def reads_windows(self) -> bool:
        return self.history or reads_history(self.backbone)


class History(NamedTuple):
    """The users' windows: items and their stars (0: none, -1: padding)."""

    item_BH: jax.Array
    rating_BH: jax.Array


class Match(NamedTuple):
    """Vectors of the users' texts and of the candidates', as the adaptors are given them."""

    user_BF: jax.Array
    item_BNF: jax.Array


# Of each attribute of every item: shares_IV of its values, or value_IM, padded with -1.
Attributes = tuple[jax.Array, ...]


def attribute_tables(config: RerankerConfig, attribute_IAM: Int[jax.Array, "I A M"]) -> Attributes:
    """What a step looks up of the items' attributes, made once for many steps."""
    return tuple(
        _shares(attribute_IAM[:, a], size) if size <= MULTI_HOT else attribute_IAM[:, a]
        for a, size in enumerate(config.attribute_sizes)
    )


def _shares(value_IM: jax.Array, size: int) -> jax.Array:
    """Multi-hot rows that sum to 1; zeros where there is no value."""
    count_I1 = jnp.maximum((value_IM >= 0).sum(-1, keepdims=True), 1)
    return jax.nn.one_hot(value_IM, size, dtype=jnp.float32).sum(-2) / count_I1


class MatchScore(nn.Module):
    """Weighs each dimension of the two vectors' product; `item_F` weighs the item's alone, which
    takes what all users' texts share off it. Both begin at zero. Vectors have any length."""

    @nn.compact
    def __call__(self, user_BF: jax.Array, item_BNF: jax.Array) -> jax.Array:
        zeros, features = nn.initializers.zeros_init(), user_BF.shape[-1]
        weight_F = self.param("weight", zeros, (features,))
        item_F = self.param("item", zeros, (features,))
        user_BF = weight_F[None] * _unit(user_BF) * features**0.5 + item_F[None]
        # Divided by the length afterwards: the vectors of a whole list are not written again.
        return jnp.einsum("bf,bnf->bn", user_BF, item_BNF) * _inverse_length(item_BNF)


def _unit(x: jax.Array) -> jax.Array:
    """Of length 1; zeros stay."""
    return x * _inverse_length(x)[..., None]


def _inverse_length(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(jnp.einsum("...f,...f->...", x, x), 1e-12))


class Reranker(nn.Module):
    config: RerankerConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(DEVIATION)
        self.item_embed = nn.Embed(config.num_items, config.embedding, embedding_init=init)
        self.attribute_embed = [
            nn.Embed(size, config.embedding, embedding_init=init) for size in config.attribute_sizes
        ]
        if config.adapts:
            self.adaptor = ADAPTORS[config.adaptor]()
        # Of the whole list at once, as within the backbones.
        self.drop = nn.Dropout(config.dropout, broadcast_dims=(1,))
        if config.history:
            self.history = TargetAttention()
        if config.matches:
            self.match = MatchScore()
        if config.ease is not None:
            self.affinity = self.param("affinity", nn.initializers.zeros_init(), ())
        if reads_history(config.backbone):
            self.rating_embed = nn.Embed(RATINGS, config.embedding, embedding_init=init)
        # Its own type is not known here: the table holds it.
        module: Any = backbone_of(config.backbone)
        self.backbone = module(dropout=config.dropout)

    def adapt(self, x: jax.Array, side: str) -> jax.Array:
        return self.adaptor(x, side)

    def score(
        self,
        item_BN,
        mask_BN,
        attributes: Attributes,
        user_BO,
        item_BNO,
        history,
        match,
        affinity_BN,
        training,
    ):
        score_BN = self.score_list(
            item_BN, mask_BN, attributes, user_BO, item_BNO, history, training
        )
        if self.config.matches:
            score_BN += self.match(*match)
        if self.config.ease is not None:
            score_BN += self.affinity * affinity_BN
        return score_BN

    def score_list(
        self, item_BN, mask_BN, attributes: Attributes, user_BO, item_BNO, history, training: bool
    ):
        parts = self.embedded(item_BN, attributes)
        if self.config.history:
            past = self.embedded(history.item_BH, attributes)
            found_BNW = self.history(
                jnp.concatenate(parts, axis=-1), jnp.concatenate(past, axis=-1), history.rating_BH
            )
            parts.append(found_BNW)
        if user_BO is not None:
            if training and self.config.user_dropout:
                user_BO = self.without_some(user_BO)
            parts.append(jnp.broadcast_to(user_BO[:, None], (*item_BN.shape, user_BO.shape[-1])))
        if item_BNO is not None:
            parts.append(item_BNO)
        x_BND = self.drop(jnp.concatenate(parts, axis=-1), deterministic=not training)
        if not reads_history(self.config.backbone):
            return self.backbone(x_BND, mask_BN, training)
        return self.backbone(x_BND, mask_BN, training, self.window(history, attributes))

    def without_some(self, user_BO: jax.Array) -> jax.Array:
        """Zeros for the share `user_dropout` of the users: one has many lists and a vector of his
        own, by which a re-ranker could learn him by heart. What is left is not scaled, since every
        user is shown later."""
        shown = 1.0 - self.config.user_dropout
        keep_B = jax.random.bernoulli(self.make_rng("dropout"), shown, user_BO.shape[:1])
        return jnp.where(keep_B[:, None], user_BO, 0.0)

    def embedded(self, item_BN: jax.Array, attributes: Attributes) -> list[jax.Array]:
        """The items' id embeddings and those of their attributes, or the sum of them all."""
        parts = [self.item_embed(item_BN)] + [
            _mean_embedding(embed, table[item_BN])
            for embed, table in zip(self.attribute_embed, attributes, strict=True)
        ]
        return [sum(parts[1:], parts[0])] if self.config.attributes == "added" else parts

    def window(self, history: History, attributes: Attributes) -> Window:
        rating_BHD = self.rating_embed(jnp.maximum(history.rating_BH, 0))
        parts = self.embedded(history.item_BH, attributes)
        return Window(jnp.concatenate([*parts, rating_BHD], axis=-1), history.rating_BH >= 0)

    def everything(self, item_BN, mask_BN, attributes, user_BF, item_BNF, history):
        """Touches every parameter, for `init`."""
        adapts = self.config.adapts
        user_BO = self.adapt(user_BF, "user") if adapts and user_BF is not None else None
        item_BNO = self.adapt(item_BNF, "item") if adapts and item_BNF is not None else None
        match = None if user_BF is None or item_BNF is None else Match(user_BF, item_BNF)
        affinity_BN = jnp.zeros(item_BN.shape)
        knowledge = user_BO, item_BNO, history, match, affinity_BN
        return self.score(item_BN, mask_BN, attributes, *knowledge, False)


def init(config: RerankerConfig, key: jax.Array) -> dict[str, Any]:
    """Parameters of a fresh re-ranker, float32."""
    shape = (1, config.list_length)
    user_BF = jnp.zeros((1, config.user_features)) if config.user_features else None
    item_BNF = jnp.zeros((*shape, config.item_features)) if config.item_features else None
    variables: Any = Reranker(config).init(
        key,
        jnp.zeros(shape, jnp.int32),
        jnp.ones(shape, bool),
        attribute_tables(config, jnp.zeros((1, len(config.attribute_sizes), 1), jnp.int32)),
        user_BF,
        item_BNF,
        History(*[jnp.zeros((1, 1), jnp.int32)] * 2) if config.reads_windows else None,
        method="everything",
    )
    return variables["params"]


def adapt_users(
    config: RerankerConfig, params: Params, user_BF: Float[jax.Array, "*B F"]
) -> Float[jax.Array, "*B O"]:
    """User vectors into the recommender's space."""
    return _apply(config, params, None, "adapt", user_BF, "user")


def adapt_items(
    config: RerankerConfig, params: Params, item_IF: Float[jax.Array, "*I F"]
) -> Float[jax.Array, "*I O"]:
    """Item vectors into the recommender's space."""
    return _apply(config, params, None, "adapt", item_IF, "item")


def score(
    config: RerankerConfig,
    params: Params,
    item_BN: Int[jax.Array, "B N"],
    mask_BN: Bool[jax.Array, "B N"],
    attributes: Attributes,
    user_BO: Float[jax.Array, "B O"] | None = None,
    item_BNO: Float[jax.Array, "B N O"] | None = None,
    history: History | None = None,
    match: Match | None = None,
    affinity_BN: Float[jax.Array, "B N"] | None = None,
    key: jax.Array | None = None,
) -> Float[jax.Array, "B N"]:
    """Scores of the candidates, float32, 0 on padding; a `key` turns dropout on.

    `attributes` are the tables of all items (`attribute_tables`).
    `user_BO` and `item_BNO` are what the adaptors returned, None for a side without knowledge.
    `history`: each user's window, where the re-ranker reads windows. `match`: the vectors
    themselves, where it matches them. `affinity_BN`: where it reads affinities.
    """
    known = user_BO, item_BNO, history, match, affinity_BN
    arguments = (item_BN, mask_BN, attributes, *known, key is not None)
    score_BN = _apply(config, params, key, "score", *arguments)
    return jnp.where(mask_BN, score_BN.astype(jnp.float32), 0.0)


def _apply(
    config: RerankerConfig, params: Params, key: jax.Array | None, method: str, *args
) -> Any:
    rngs = None if key is None else {"dropout": key}
    # float32 means float32: in TF32 a list's scores would depend on the batch that it is in.
    with jax.default_matmul_precision("highest"):
        return Reranker(config).apply({"params": params}, *args, method=method, rngs=rngs)


def _mean_embedding(embed: nn.Embed, value_BNx: jax.Array) -> jax.Array:
    """Mean of the embeddings of an attribute's values; zeros where there is none."""
    if embed.num_embeddings <= MULTI_HOT:
        return value_BNx @ embed.embedding
    known_BNM = value_BNx >= 0
    count_BN1 = jnp.maximum(known_BNM.sum(-1, keepdims=True), 1)
    value_BNMD = embed(jnp.where(known_BNM, value_BNx, 0))
    return jnp.where(known_BNM[..., None], value_BNMD, 0.0).sum(-2) / count_BN1
