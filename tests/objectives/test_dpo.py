"""Preference losses against arithmetic, TRL's formulas in torch, and their symmetries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.objectives.dpo import best_against_each, completion_logps, dpo_loss

LOSSES = ("sigmoid", "ipo", "hinge", "robust")
logps = st.floats(-300.0, 0.0, width=32)
pairs = st.lists(st.tuples(logps, logps, logps, logps), min_size=1, max_size=5)


def arrays(rows):
    values = np.asarray(rows, np.float32)
    return jnp.asarray(values[:, :2]), jnp.asarray(values[:, 2:])


def test_hand_computed_example():
    # chosen: policy -10, reference -12; rejected: policy -20, reference -19
    # h = (-10 + 12) - (-20 + 19) = 3; beta h = 0.3; loss = log(1 + e^-0.3)
    out = dpo_loss(jnp.array([[-10.0, -20.0]]), jnp.array([[-12.0, -19.0]]), beta=0.1)
    np.testing.assert_allclose(out.loss_B, [math.log1p(math.exp(-0.3))], rtol=1e-6)
    np.testing.assert_allclose(out.reward_BP, [[0.2, -0.1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)],
)
def test_loss_at_zero_margin(loss, expected):
    same = jnp.array([[-31.5, -7.25], [-200.0, -0.5]])
    out = dpo_loss(same, same, beta=0.1, loss=loss)
    np.testing.assert_array_equal(out.reward_BP, 0.0)
    np.testing.assert_allclose(out.loss_B, expected, rtol=1e-6)


def torch_formula(loss, policy, reference, beta, smoothing, length):
    """Per-pair losses as TRL's DPOTrainer 1.16 writes them."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    scores = torch.tensor(np.asarray(policy)) - torch.tensor(np.asarray(reference))
    delta = scores[:, 0] - scores[:, 1]
    match loss:
        case "sigmoid":
            value = -functional.logsigmoid(beta * delta)
        case "hinge":
            value = torch.relu(1 - beta * delta)
        case "robust":
            clean = -(1 - smoothing) * functional.logsigmoid(beta * delta)
            flipped = -smoothing * functional.logsigmoid(-beta * delta)
            value = (clean - flipped) / (1 - 2 * smoothing)
        case "ipo":
            mean = scores / torch.tensor(np.asarray(length))
            value = (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)) ** 2
        case _:
            raise AssertionError(loss)
    return value.numpy()


@settings(max_examples=25, deadline=None)
@given(pairs)
def test_equals_the_formulas_of_trl(rows):
    policy, reference = arrays(rows)
    length = jnp.tile(jnp.array([[7, 30]]), (len(rows), 1))
    for loss in LOSSES:
        smoothing = 0.2 if loss == "robust" else 0.0
        ours = dpo_loss(
            policy,
            reference,
            beta=0.1,
            loss=loss,
            label_smoothing=smoothing,
            length_BP=length,
            length_normalise=loss == "ipo",
        )
        theirs = torch_formula(loss, policy, reference, 0.1, smoothing, length)
        np.testing.assert_allclose(ours.loss_B, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(pairs)
def test_swapping_chosen_and_rejected_mirrors_the_loss(rows):
    """l(u) - l(-u) = -u for the sigmoid; rewards change places."""
    policy, reference = arrays(rows)
    out = dpo_loss(policy, reference, beta=0.1)
    swapped = dpo_loss(policy[:, ::-1], reference[:, ::-1], beta=0.1)
    np.testing.assert_array_equal(swapped.reward_BP, out.reward_BP[:, ::-1])
    lead = out.reward_BP[:, 0] - out.reward_BP[:, 1]
    np.testing.assert_allclose(swapped.loss_B - out.loss_B, lead, rtol=1e-4, atol=1e-5)


def test_conservative_loss_is_the_average_over_flipped_labels():
    policy, reference = jnp.array([[-10.0, -25.0]]), jnp.array([[-12.0, -19.0]])
    keep = dpo_loss(policy, reference, beta=0.3).loss_B
    flip = dpo_loss(policy[:, ::-1], reference[:, ::-1], beta=0.3).loss_B
    smooth = dpo_loss(policy, reference, beta=0.3, label_smoothing=0.25).loss_B
    np.testing.assert_allclose(smooth, 0.75 * keep + 0.25 * flip, rtol=1e-6)


def test_robust_loss_is_unbiased_under_flipped_labels():
    policy, reference = jnp.array([[-10.0, -25.0]]), jnp.array([[-12.0, -19.0]])
    options = {"beta": 0.3, "loss": "robust", "label_smoothing": 0.25}
    keep = dpo_loss(policy, reference, **options).loss_B
    flip = dpo_loss(policy[:, ::-1], reference[:, ::-1], **options).loss_B
    clean = dpo_loss(policy, reference, beta=0.3).loss_B
    np.testing.assert_allclose(0.75 * keep + 0.25 * flip, clean, rtol=1e-5)


def test_margin_is_subtracted_from_the_reward_gap():
    policy, reference = jnp.array([[-10.0, -20.0]]), jnp.array([[-12.0, -19.0]])
    out = dpo_loss(policy, reference, beta=0.1, margin_B=jnp.array([0.3]))
    np.testing.assert_allclose(out.loss_B, [math.log(2)], rtol=1e-6)


def test_reference_free_with_length_and_margin_is_simpo():
    # beta (mean chosen - mean rejected) - gamma = 2 (-1 + 2) - 0.5 = 1.5
    out = dpo_loss(
        jnp.array([[-10.0, -8.0]]),
        jnp.array([[-99.0, -1.0]]),
        beta=2.0,
        length_BP=jnp.array([[10, 4]]),
        margin_B=jnp.array([0.5]),
        length_normalise=True,
        reference_free=True,
    )
    np.testing.assert_allclose(out.loss_B, [math.log1p(math.exp(-1.5))], rtol=1e-6)


def test_nll_term_adds_the_chosen_texts_mean_nll():
    policy, length = jnp.array([[-10.0, -20.0]]), jnp.array([[5, 4]])
    with_nll = dpo_loss(policy, policy, beta=0.1, length_BP=length, nll_weight=0.5).loss_B
    np.testing.assert_allclose(with_nll, [math.log(2) + 0.5 * 10.0 / 5], rtol=1e-6)


def test_reference_gets_no_gradient():
    def total(reference):
        return dpo_loss(jnp.array([[-10.0, -20.0]]), reference, beta=0.1).loss_B.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([[-12.0, -19.0]])), 0.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_far_from_zero(loss):
    policy = jnp.array([[-1e4, 0.0], [0.0, -1e4]])

    def total(logp):
        return dpo_loss(logp, jnp.zeros_like(logp), beta=1.0, loss=loss).loss_B.sum()

    assert np.isfinite(jax.grad(total)(policy)).all()


def test_low_precision_log_probabilities_are_reduced_in_float32():
    out = dpo_loss(jnp.ones((2, 2), jnp.bfloat16), jnp.zeros((2, 2), jnp.bfloat16), beta=0.1)
    assert out.loss_B.dtype == out.reward_BP.dtype == jnp.float32


def test_truncated_completion_gives_no_nan():
    out = dpo_loss(
        jnp.zeros((1, 2)),
        jnp.zeros((1, 2)),
        beta=0.1,
        length_BP=jnp.array([[0, 3]]),
        length_normalise=True,
        nll_weight=1.0,
    )
    np.testing.assert_allclose(out.loss_B, [math.log(2)], rtol=1e-6)


def test_missing_length_and_unknown_loss_are_refused():
    zeros = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="need length_BP"):
        dpo_loss(zeros, zeros, beta=0.1, nll_weight=1.0)
    with pytest.raises(Exception, match="loss"):
        dpo_loss(zeros, zeros, beta=0.1, loss="simgoid")


def test_log_probabilities_are_summed_over_real_tokens_only():
    logp = jnp.array([[[-1.0, -2.0, jnp.nan], [-4.0, jnp.inf, jnp.nan]]])
    mask = jnp.array([[[True, True, False], [True, False, False]]])
    np.testing.assert_array_equal(completion_logps(logp, mask), [[-3.0, -4.0]])


def test_best_is_paired_with_each_other_sample():
    np.testing.assert_array_equal(
        best_against_each(jnp.array([[5.0, 1.0, 2.0]])), [[[5.0, 1.0], [5.0, 2.0]]]
    )
