"""Chunked log-probabilities against a plain log-softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.objectives.logprobs import token_logps


def inputs(rows=3, tokens=13, width=8, vocabulary=37, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, tokens, width))
    unembedding = jax.random.normal(keys[1], (width, vocabulary))
    target = jax.random.randint(keys[2], (rows, tokens), 0, vocabulary)
    weight = jax.random.normal(keys[3], (rows, tokens))
    return hidden, unembedding, target, weight


def plain(hidden, unembedding, target):
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding, precision="highest")
    logp = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_equals_full_log_softmax_whatever_the_chunk(chunk):
    hidden, unembedding, target, _ = inputs()
    ours = token_logps(hidden, unembedding, target, chunk_tokens=chunk)
    np.testing.assert_allclose(ours, plain(hidden, unembedding, target), atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 13])
def test_gradients_equal_those_of_full_log_softmax(chunk):
    hidden, unembedding, target, weight = inputs()

    def total(function, **options):
        return lambda h, w: (weight * function(h, w, target, **options)).sum()

    ours = jax.grad(total(token_logps, chunk_tokens=chunk), argnums=(0, 1))(hidden, unembedding)
    theirs = jax.grad(total(plain), argnums=(0, 1))(hidden, unembedding)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_tied_embedding_gets_both_gradients():
    _, unembedding, target, _ = inputs()
    embedding, tokens = unembedding.T, jnp.roll(target, 1, axis=1)

    def total(function):
        return lambda table: function(table[tokens], table.T, target).sum()

    np.testing.assert_allclose(
        jax.grad(total(token_logps))(embedding), jax.grad(total(plain))(embedding), atol=1e-4
    )


def test_bfloat16_weights_are_reduced_in_float32():
    hidden, unembedding, target, _ = inputs(width=64, vocabulary=4096)
    low = hidden.astype(jnp.bfloat16), (unembedding / 8).astype(jnp.bfloat16)
    exact = plain(low[0].astype(jnp.float32), low[1].astype(jnp.float32), target)
    ours = token_logps(*low, target, chunk_tokens=4)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, atol=1e-4)


def test_probabilities_of_all_tokens_sum_to_one():
    hidden, unembedding, _, _ = inputs(rows=1, tokens=1)
    every = jnp.arange(unembedding.shape[1])[None]
    logp = token_logps(jnp.repeat(hidden, every.shape[1], axis=1), unembedding, every)
    np.testing.assert_allclose(jnp.exp(logp).sum(), 1.0, rtol=1e-5)


def compiled(tokens, differentiate):
    """The gradient of the summed log-probabilities, compiled for Llama 3's vocabulary."""
    width, vocabulary = 8, 128_256

    def total(hidden, unembedding, target):
        return token_logps(hidden, unembedding, target, chunk_tokens=64).sum()

    shapes = [
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    ]
    return jax.jit(jax.grad(total, argnums=differentiate)).lower(*shapes).compile()


@pytest.mark.parametrize("differentiate", [0, (0, 1)], ids=["frozen", "trained"])
def test_memory_does_not_grow_with_completion_length(differentiate):
    short, long = (
        compiled(tokens, differentiate).memory_analysis().temp_size_in_bytes
        for tokens in (128, 2048)
    )
    logits_of_one_chunk = 64 * 128_256 * 4
    assert long - short < 0.05 * logits_of_one_chunk
    assert long < 4 * logits_of_one_chunk


def test_frozen_unembedding_costs_no_gradient_of_it():
    """Two of the four matrix products, the recomputation and the gradient, are compiled away."""
    frozen, trained = (
        compiled(256, differentiate).cost_analysis()["flops"] for differentiate in (0, (0, 1))
    )
    assert trained > 1.9 * frozen
