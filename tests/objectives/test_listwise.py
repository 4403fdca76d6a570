"""Listwise losses against arithmetic and rax; gradients where a list can teach nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.objectives.listwise import LOSSES, listwise_loss, log_likelihood

SCORES = np.array([0.0, np.log(2.0), np.log(3.0)], np.float32)  # softmax: 1/6, 2/6, 3/6


def test_softmax_is_the_mean_negative_log_probability_of_the_positives():
    loss = listwise_loss(SCORES, np.array([1, 0, 1]))
    assert float(loss) == pytest.approx((np.log(6) + np.log(2)) / 2, abs=1e-6)


def test_log_likelihood_is_minus_the_softmax_loss():
    assert float(log_likelihood(SCORES, np.array([0, 1, 0]))) == pytest.approx(-np.log(3), abs=1e-6)


def test_bce_is_the_mean_over_candidates_of_the_sigmoid_cross_entropy():
    # sigmoid: 1/2, 2/3, 3/4
    expected = (np.log(2) + np.log(3) + np.log(4 / 3)) / 3
    loss = listwise_loss(SCORES, np.array([1, 0, 1]), kind="bce")
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_attention_rank_is_the_cross_entropy_of_two_attentions():
    # label attention: 1/2, 0, 1/2
    p, a = np.array([1, 2, 3]) / 6, np.array([0.5, 0, 0.5])
    expected = -(a * np.log(p) + (1 - a) * np.log(1 - p)).sum()
    loss = listwise_loss(SCORES, np.array([1, 0, 1]), kind="attention_rank")
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_listmle_is_the_plackett_luce_likelihood_of_the_order_by_label():
    # order: candidate 1 (label 2), candidate 2 (label 1), candidate 0
    expected = -np.log(2 / 6 * 3 / 4)
    loss = listwise_loss(SCORES, np.array([0, 2, 1]), kind="listmle")
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_approx_ndcg_at_low_temperature_is_minus_ndcg():
    loss = listwise_loss(SCORES, np.array([1, 0, 1]), kind="approx_ndcg", temperature=1e-3)
    expected = -(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def rax_loss(name):
    rax = pytest.importorskip("rax")
    return {
        "softmax": lambda s, y, w: rax.softmax_loss(s, y / y.sum(), where=w),
        "bce": lambda s, y, w: rax.pointwise_sigmoid_loss(s, y, where=w, reduce_fn=jnp.mean),
        "listmle": lambda s, y, w: rax.listmle_loss(s, y, where=w),
        "approx_ndcg": lambda s, y, w: rax.ndcg_metric(
            s / 0.1, y, where=w, rank_fn=rax.utils.approx_ranks
        ),
    }[name]


@pytest.mark.parametrize("kind", ["softmax", "bce", "listmle", "approx_ndcg"])
def test_loss_and_gradient_equal_rax(kind):
    random = np.random.default_rng(0)
    scores = random.normal(size=10).astype(np.float32)
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 0, 1, 1], np.float32)
    where = np.arange(10) < 8
    theirs = jax.jit(jax.value_and_grad(rax_loss(kind)))(scores, labels * where, where)
    ours = jax.value_and_grad(lambda s: listwise_loss(s, labels, where=where, kind=kind))(scores)
    sign = -1.0 if kind == "approx_ndcg" else 1.0
    np.testing.assert_allclose(ours[0], sign * theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], sign * theirs[1], atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_all_masked_and_extreme_lists_have_finite_gradients(kind):
    scores = jnp.array([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = jnp.array([[0, 1, 0], [1, 0, 1], [0, 0, 0]])
    where = jnp.array([[True, True, True], [False, False, False], [True, True, True]])

    def loss(scores):
        return listwise_loss(scores, labels, where=where, kind=kind)

    values, gradient = jax.jit(lambda s: (loss(s), jax.grad(lambda x: loss(x).sum())(s)))(scores)
    assert values.shape == (3,) and values.dtype == jnp.float32
    assert jnp.isfinite(values).all() and jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(values[1], 0.0)
    np.testing.assert_array_equal(gradient[1], 0.0)
    if kind != "bce":
        np.testing.assert_array_equal(values[2], 0.0)


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_changes_neither_loss_nor_gradient(kind):
    labels = np.array([1, 0, 1])
    padded = np.concatenate([SCORES, np.array([50.0, np.nan], np.float32)])

    def grown(scores):
        return listwise_loss(scores, np.append(labels, [1, 1]), where=np.arange(5) < 3, kind=kind)

    loss, gradient = jax.value_and_grad(lambda s: listwise_loss(s, labels, kind=kind))(SCORES)
    padded_loss, padded_gradient = jax.value_and_grad(grown)(padded)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient, np.append(gradient, [0, 0]), atol=1e-6)
