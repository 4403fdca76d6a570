"""Drawing tokens: frequencies against the filtered softmax computed by sorting, in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo4rec_jax.sampling.filters import (
    Settings,
    block_tokens,
    draw,
    token_logps,
    token_margins,
)

DRAWS = 20_000
draw_jitted = jax.jit(draw)


def filtered(logits_V: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities after HF's warpers: temperature, top-k, then top-p of what is left."""
    score_V = logits_V.astype(np.float64) / temperature
    if top_k:
        score_V = np.where(score_V >= np.sort(score_V)[-top_k], score_V, -np.inf)
    weight_V = np.exp(score_V - score_V.max())
    probability_V = weight_V / weight_V.sum()
    order_V = np.argsort(-probability_V)
    before_V = np.cumsum(probability_V[order_V]) - probability_V[order_V]
    kept_V = np.zeros(len(logits_V), bool)
    kept_V[order_V[before_V < top_p]] = True
    kept_V &= probability_V > 0
    return np.where(kept_V, probability_V, 0) / probability_V[kept_V].sum()


def frequencies(logits_V: np.ndarray, settings: Settings, seed: int) -> np.ndarray:
    rows = 500
    counts_V = np.zeros(len(logits_V), int)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (rows, len(logits_V)))
    for key in jax.random.split(jax.random.key(seed), DRAWS // rows):
        token_B = draw_jitted(logits_BV, jax.random.split(key, rows), settings)
        counts_V += np.bincount(token_B, minlength=len(logits_V))
    return counts_V


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 0.95, 0), (1.5, 0.5, 0), (1.0, 0.3, 0), (1.0, 1.0, 7), (2.0, 0.8, 20)],
)
def test_frequencies_over_20000_draws_are_the_filtered_softmax(temperature, top_p, top_k) -> None:
    logits_V = np.random.default_rng(0).normal(size=300) * 2  # 300: the last block is padded
    expected_V = filtered(logits_V, temperature, top_p, top_k)
    counts_V = frequencies(logits_V, Settings.of(temperature, top_p, top_k), seed=1)
    assert counts_V[expected_V == 0].sum() == 0
    common_V = expected_V * DRAWS >= 5  # the rest in one class, as a chi-square test wants
    observed = [*counts_V[common_V], counts_V[~common_V].sum()]
    expected = [*(expected_V[common_V] * DRAWS), expected_V[~common_V].sum() * DRAWS]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def test_temperature_zero_and_top_k_one_take_the_likeliest_token() -> None:
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1000)), jnp.float32)
    key_B = jax.random.split(jax.random.key(0), 64)
    likeliest_B = np.asarray(logits_BV).argmax(-1)
    for settings in (Settings.of(0.0, 1.0, 0), Settings.of(1.0, 1.0, 1), Settings.of(1.0, 1e-6, 0)):
        np.testing.assert_array_equal(draw_jitted(logits_BV, key_B, settings), likeliest_B)


def test_equal_tokens_at_the_edge_of_a_filter_stay_together() -> None:
    logits_V = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    for settings in (Settings.of(1.0, 1.0, 2), Settings.of(1.0, 0.6, 0)):
        counts_V = frequencies(logits_V, settings, seed=2)
        assert (counts_V > 0).tolist() == [True, True, True, True, False]


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = np.full(300, -np.inf)
    logits_V[[5, 299]] = 0.0, -1.0
    counts_V = frequencies(logits_V, Settings.of(1.0, 1.0, 0), seed=3)
    assert set(np.flatnonzero(counts_V)) == {5, 299}
    share = 1 / (1 + np.exp(-1.0))
    assert counts_V[5] / DRAWS == pytest.approx(share, abs=4 * np.sqrt(share / DRAWS))


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it() -> None:
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(40, 300)) * 2, jnp.float32)
    key_B = jax.random.split(jax.random.key(0), 40)
    settings = Settings.of(1.0, 0.3, 0)  # many redraws, of different numbers of rows
    together_B = np.asarray(draw_jitted(logits_BV, key_B, settings))
    order_B = np.random.default_rng(1).permutation(40)
    shuffled_B = np.asarray(draw_jitted(logits_BV[order_B], key_B[order_B], settings))
    np.testing.assert_array_equal(shuffled_B, together_B[order_B])


def test_log_probabilities_are_of_the_unfiltered_softmax() -> None:
    logits_BV = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    token_B = jnp.array([4, 0, 49])
    expected_B = np.log(np.exp(logits_BV) / np.exp(logits_BV).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        token_logps(jnp.asarray(logits_BV), token_B), expected_B[np.arange(3), token_B], atol=1e-5
    )


def test_margins_are_no_numbers_where_any_logit_is_none() -> None:
    logits_BV = jnp.array([[1.0, 3.0, 2.5], [1.0, jnp.nan, 2.0], [jnp.inf, 1.0, 2.0]])
    margin_B = np.asarray(token_margins(logits_BV, jnp.array([2, 0, 0])))
    assert margin_B[0] == -0.5
    assert not np.isfinite(margin_B[1:]).any()


@pytest.mark.parametrize(
    ("vocabulary", "parts", "block"),
    [(49_152, 8, 128), (128_256, 8, 32), (151_936, 4, 32), (32_000, 8, 32), (300, 1, 128)],
)
def test_no_block_lies_on_two_devices(vocabulary: int, parts: int, block: int) -> None:
    assert block_tokens(vocabulary) == block
    assert parts == 1 or vocabulary // parts % block == 0
