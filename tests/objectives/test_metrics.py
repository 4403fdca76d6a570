"""Metrics against arithmetic, against KAR's own loop, and against every order of tied scores."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.objectives.metrics import average_precision, ndcg


def kar_metrics(ranked_labels, k):
    """KAR's definition (its evaluate_rerank), for one list already in ranked order."""
    dcg = ideal = precision = found = 0.0
    best = sorted(ranked_labels, reverse=True)
    for i in range(1, min(k, len(ranked_labels)) + 1):
        dcg += (2 ** ranked_labels[i - 1] - 1) / np.log2(i + 1)
        ideal += (2 ** best[i - 1] - 1) / np.log2(i + 1)
        if ranked_labels[i - 1] >= 1:
            found += 1
            precision += found / i
    return (dcg / ideal if ideal else 0.0), (precision / found if found else 0.0)


def standard_ap(ranked_labels, k):
    hits = np.cumsum(ranked_labels)
    total = sum(hits[i] / (i + 1) for i in range(min(k, len(hits))) if ranked_labels[i])
    return total / min(k, hits[-1])


def mean_over_tied_orders(scores, labels, of_ranked):
    """The mean of a metric over every order that sorts the scores."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        ranked = [scores[i] for i in order]
        if all(a >= b for a, b in itertools.pairwise(ranked)):
            values.append(of_ranked([labels[i] for i in order]))
    return np.mean(values)


def test_ndcg_at_2_of_a_hand_made_list_is_its_arithmetic():
    scores, labels = jnp.array([0.1, 0.9, 0.5]), jnp.array([1, 0, 1])
    expected = (1 / np.log2(3)) / (1 + 1 / np.log2(3))
    assert ndcg(scores, labels, k=2) == pytest.approx(expected, abs=1e-6)


def test_graded_labels_gain_two_to_the_label_minus_one():
    scores, labels = jnp.array([3.0, 2.0, 1.0]), jnp.array([1, 2, 0])
    expected = (1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3))
    assert ndcg(scores, labels, k=3) == pytest.approx(expected, abs=1e-6)


def test_kar_divides_by_the_positives_found_and_the_standard_by_those_possible():
    scores, labels = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 0, 1])
    assert average_precision(scores, labels, k=2, convention="kar") == pytest.approx(1.0)
    assert average_precision(scores, labels, k=2, convention="standard") == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [ndcg, average_precision])
def test_a_list_without_positives_is_zero_for_kar_and_left_out_of_the_standard(metric):
    scores, labels = jnp.array([2.0, 1.0]), jnp.array([0, 0])
    assert metric(scores, labels, k=2, convention="kar") == 0.0
    assert jnp.isnan(metric(scores, labels, k=2, convention="standard"))


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_distinct_scores_give_what_kars_loop_gives(k):
    random = np.random.default_rng(k)
    scores = random.permuted(np.tile(np.arange(10.0), (64, 1)), axis=1).astype(np.float32)
    labels = random.integers(0, 2, (64, 10))
    order = np.argsort(-scores, axis=1)
    expected = [kar_metrics(row[o].tolist(), k) for row, o in zip(labels, order, strict=True)]
    np.testing.assert_allclose(ndcg(scores, labels, k=k), [e[0] for e in expected], atol=1e-6)
    np.testing.assert_allclose(
        average_precision(scores, labels, k=k), [e[1] for e in expected], atol=1e-6
    )


@pytest.mark.parametrize("k", [1, 3, 4, 9])
def test_ties_average_over_every_tied_order(k):
    random = np.random.default_rng(k)
    scores = random.integers(0, 3, (6, 6)).astype(np.float32)
    labels = random.permuted(np.tile([1, 1, 1, 0, 0, 0], (6, 1)), axis=1)
    kar = jax.jit(lambda: (ndcg(scores, labels, k=k), average_precision(scores, labels, k=k)))()
    standard = jax.jit(lambda: average_precision(scores, labels, k=k, convention="standard"))()
    for i in range(6):
        expected_ndcg, expected_ap = (
            mean_over_tied_orders(scores[i], labels[i], lambda r, m=m: kar_metrics(r, k)[m])
            for m in (0, 1)
        )
        expected_std = mean_over_tied_orders(scores[i], labels[i], lambda r: standard_ap(r, k))
        got = [kar[0][i], kar[1][i], standard[i]]
        np.testing.assert_allclose(got, [expected_ndcg, expected_ap, expected_std], atol=1e-5)


@pytest.mark.parametrize("metric", [ndcg, average_precision])
def test_a_constant_scorer_gains_nothing_from_where_the_positives_stand(metric):
    constant = jnp.zeros((2, 6))
    labels = jnp.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    first, last = metric(constant, labels, k=3)
    assert first == pytest.approx(float(last), abs=1e-6)
    assert first < 0.6


@pytest.mark.parametrize("convention", ["kar", "standard"])
@pytest.mark.parametrize("metric", [ndcg, average_precision])
def test_padding_changes_nothing_whatever_its_scores_and_labels(metric, convention):
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (8, 7)).astype(np.float32)
    labels = random.integers(0, 2, (8, 7))
    padded_scores = np.concatenate([scores, np.full((8, 3), 9.0, np.float32)], axis=1)
    padded_labels = np.concatenate([labels, np.ones((8, 3), int)], axis=1)
    where = np.arange(10)[None] < np.full((8, 1), 7)
    plain = metric(scores, labels, k=5, convention=convention)
    padded = metric(padded_scores, padded_labels, where=where, k=5, convention=convention)
    np.testing.assert_allclose(padded, plain, atol=1e-6)


@pytest.mark.parametrize("metric", [ndcg, average_precision])
def test_an_all_masked_list_is_finite_and_any_batch_shape_compiles(metric):
    scores, labels = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))
    where = jnp.zeros((2, 3, 4), bool)
    values = jax.jit(lambda s, y, w: metric(s, y, where=w, k=5))(scores, labels, where)
    assert values.shape == (2, 3) and values.dtype == jnp.float32
    np.testing.assert_array_equal(values, 0.0)


def test_a_nan_score_ranks_lowest():
    assert ndcg(jnp.array([jnp.nan, 0.0]), jnp.array([1, 0]), k=1) == 0.0


def test_ndcg_equals_rax_where_lists_hold_positives():
    rax = pytest.importorskip("rax")
    random = np.random.default_rng(1)
    scores = random.normal(size=(32, 10)).astype(np.float32)
    labels = random.integers(0, 2, (32, 10))
    labels[:, 0] = 1
    theirs = rax.ndcg_metric(scores, labels.astype(np.float32), topn=5, reduce_fn=None)
    np.testing.assert_allclose(ndcg(scores, labels, k=5), theirs, atol=1e-6)
