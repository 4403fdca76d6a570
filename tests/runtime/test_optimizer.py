import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.runtime.optimizer import adamw, decayed, learning_rate_schedule


def test_learning_rate_rises_then_falls_to_zero():
    schedule = learning_rate_schedule(1.0, 10, warmup_fraction=0.4, decay="linear")
    rates = [float(schedule(step)) for step in range(11)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[5:], np.linspace(5 / 6, 0, 6), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_short_runs_never_take_a_step_at_rate_zero(steps, fraction):
    schedule = learning_rate_schedule(1.0, steps, warmup_fraction=fraction)
    assert all(schedule(step) > 0 for step in range(steps))


def test_norms_biases_and_embeddings_are_not_decayed():
    stack = jnp.ones((2, 3, 4))
    params = {
        "embed": stack[0],
        "final_norm": stack[0, 0],
        "layers": {"q": {"kernel": stack, "bias": stack[:, 0]}, "mlp_norm": stack[:, 0]},
    }
    assert decayed(params) == {
        "embed": False,
        "final_norm": False,
        "layers": {"q": {"kernel": True, "bias": False}, "mlp_norm": False},
    }


def test_first_step_is_the_clipped_sign_of_the_gradient_plus_decay():
    """Adam's first step is lr * g / (|g| + eps); decay adds lr * wd * w for matrices."""
    optimizer = adamw(lambda _: 0.1, max_grad_norm=1.0, weight_decay=0.5)
    params = {"kernel": jnp.full((2, 2), 2.0), "norm": jnp.full((2, 2), 2.0)}
    gradient = {"kernel": jnp.full((2, 2), 30.0), "norm": jnp.full((2, 2), -30.0)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], 0.1, rtol=1e-5)
