"""Log-probabilities of shared-prompt rows against separate rows, and what leaves them alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.objectives.dpo import dpo_loss
from dpo4rec_jax.runtime.loader import Rows, Shape, batch_of
from dpo4rec_jax.sampling.scoring import completion_token_logps

CONFIG = llama.LlamaConfig(
    vocab_size=31, width=16, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=4, tied=True
)
LORA = LoraConfig(rank=2, targets=["q", "v", "down"])
rng = np.random.default_rng(0)


def ids(length):
    return rng.integers(1, 31, length).tolist()


# A one-token completion, lengths all different, a prompt of one token.
ROWS = Rows([ids(5), ids(1), ids(7)], [[ids(4), ids(1)], [ids(2), ids(3)], [ids(6), ids(2)]])


SHAPE = Shape(8, 6)


@pytest.fixture(scope="module")
def params():
    """Matrices large enough that attention is far from uniform."""

    def scaled(path, leaf):
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf * 10

    return jax.tree_util.tree_map_with_path(scaled, llama.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def adapter():
    tree = lora.init(CONFIG, LORA, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


def batch(rows=ROWS, shape=SHAPE, size=3):
    return jax.tree.map(jnp.asarray, batch_of(rows, range(len(rows)), shape, size))


@partial(jax.jit, static_argnames=("remat", "chunk_tokens"))
def logps(params, arrays, adapter=None, **options):
    return completion_token_logps(
        CONFIG,
        params,
        arrays["prompt_BT"],
        arrays["completion_BCT"],
        arrays["prompt_length_B"],
        arrays["completion_length_BC"],
        arrays.get("packed_BW"),
        lora=adapter,
        lora_config=None if adapter is None else LORA,
        **options,
    )


@jax.jit
def plain_logps(params, tokens_BT, length_B, adapter):
    """Of every token given those before it, by a plain log-softmax over whole rows."""
    attention = Causal(length_B)
    position_BT = attention.position_BT(tokens_BT.shape[1])
    hidden_BTD, _ = llama.apply(
        CONFIG, params, tokens_BT, position_BT, attention, lora=adapter, lora_config=LORA
    )
    logp_BTV = jax.nn.log_softmax(llama.unembed(CONFIG, params, hidden_BTD), axis=-1)
    return jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]


def separate_rows(rows):
    """Rows [prompt | completion], right-padded, and which of their tokens are completion."""
    texts = [(p, c) for p, both in zip(rows.prompts, rows.completions, strict=True) for c in both]
    tokens = np.zeros((len(texts), 14), np.int32)
    scored = np.zeros((len(texts), 13), bool)
    for row, (prompt, text) in enumerate(texts):
        tokens[row, : len(prompt) + len(text)] = [*prompt, *text]
        scored[row, len(prompt) - 1 : len(prompt) + len(text) - 1] = True
    length = np.array([len(prompt) + len(text) for prompt, text in texts])
    return jnp.asarray(tokens), jnp.asarray(length), jnp.asarray(scored)


def separate(params, rows=ROWS, adapter=None):
    """Log-probabilities of each completion's tokens, each in a row of its own."""
    tokens, length, scored = separate_rows(rows)
    logp = np.asarray(plain_logps(params, tokens, length, adapter))
    return [each[mask] for each, mask in zip(logp, np.asarray(scored), strict=True)]


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
def test_shared_prompt_rows_equal_separate_rows(params, adapter, adapted):
    tree = adapter if adapted else None
    together = np.asarray(logps(params, batch(), tree)).reshape(6, -1)
    for ours, alone in zip(together, separate(params, adapter=tree), strict=True):
        np.testing.assert_allclose(ours[: len(alone)], alone, atol=1e-5)
        np.testing.assert_array_equal(ours[len(alone) :], 0.0)


def loss_of(logp_BP):
    reference = jnp.array([[-9.0, -8.0], [-7.0, -9.0], [-20.0, -5.0]])
    return dpo_loss(logp_BP, reference, beta=0.1).loss_B.mean()


def test_gradients_of_shared_rows_equal_those_of_separate_rows(params):
    tokens, length, scored = separate_rows(ROWS)

    def together(params):
        return loss_of(logps(params, batch(), remat="dots", chunk_tokens=5).sum(axis=-1))

    def apart(params):
        logp = plain_logps(params, tokens, length, None)
        return loss_of(jnp.where(scored, logp, 0.0).sum(axis=-1).reshape(3, 2))

    ours, theirs = jax.jit(jax.grad(together))(params), jax.jit(jax.grad(apart))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_padding_and_other_rows_change_nothing(params):
    wide = logps(params, batch(shape=Shape(13, 9), size=5))
    np.testing.assert_allclose(wide[:3, :, :6], logps(params, batch()), atol=1e-5)


def test_what_stands_in_padding_changes_nothing(params):
    arrays = batch()
    noisy = {name: np.array(value) for name, value in arrays.items()}
    for row in range(3):
        noisy["prompt_BT"][row, arrays["prompt_length_B"][row] :] = 17
        for side in range(2):
            noisy["completion_BCT"][row, side, arrays["completion_length_BC"][row, side] :] = 23
    np.testing.assert_array_equal(logps(params, noisy), logps(params, arrays))


def test_completions_do_not_see_each_other(params):
    swapped = Rows(ROWS.prompts, [texts[::-1] for texts in ROWS.completions])
    ours, theirs = logps(params, batch()), logps(params, batch(swapped))
    np.testing.assert_allclose(theirs[:, ::-1], ours, atol=1e-5)


def test_a_token_moves_only_its_own_log_probability_and_later_ones(params):
    arrays = batch()
    other = (arrays["completion_BCT"][0, 0, 2] + 2) % 31
    changed = arrays | {"completion_BCT": arrays["completion_BCT"].at[0, 0, 2].set(other)}
    moved = np.asarray(logps(params, changed) != logps(params, arrays))
    assert not moved[0, 0, :2].any()
    assert moved[0, 0, 2:4].all()
    assert not moved[0, 1].any()
    assert not moved[1:].any()


def test_absent_completion_gives_zero_and_no_nan(params):
    arrays = batch(Rows([ids(4)] * 3, [[ids(3), []]] * 3))
    out, gradient = jax.value_and_grad(lambda p: logps(p, arrays).sum())(params)
    np.testing.assert_array_equal(logps(params, arrays)[0, 1], 0.0)
    assert np.isfinite(out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_packed_completions_give_the_same_as_padded_ones(params, adapter, remat):
    """Log-probabilities and gradients of all weights, with an empty completion among them."""
    rows = Rows([ids(5), ids(1), ids(7)], [[ids(4), ids(1)], [ids(2), []], [ids(6), ids(5)]])
    weight_BCT = jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32)

    def weighted(trainable, arrays):
        out_BCT = logps(trainable[0], arrays, trainable[1], remat=remat)
        return (out_BCT * weight_BCT).sum(), out_BCT

    gradient = jax.grad(weighted, has_aux=True)
    (padded, padded_BCT), (packed, packed_BCT) = (
        gradient((params, adapter), batch(rows, shape)) for shape in (SHAPE, Shape(8, 6, 13))
    )
    np.testing.assert_allclose(packed_BCT, padded_BCT, atol=1e-5)
    assert (np.asarray(packed_BCT)[1, 1] == 0).all()
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(padded))
    for ours, theirs in zip(*map(jax.tree.leaves, (packed, padded)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * largest)


def test_stop_token_counts_even_where_it_equals_the_padding(params):
    """Lengths say what is real: id 0 pads, and is scored where it ends a completion."""
    rows = Rows([ids(4)] * 3, [[[5, 0], [0]]] * 3)
    out, alone = np.asarray(logps(params, batch(rows))), separate(params, rows)
    np.testing.assert_allclose(out[0, 0, :2], alone[0], atol=1e-5)
    np.testing.assert_allclose(out[0, 1, :1], alone[1], atol=1e-5)
    assert (out[0, 0, :2] < 0).all()


def test_all_samples_of_a_prompt_share_its_row(params):
    rows = Rows([ids(6)], [[ids(n) for n in (1, 2, 3, 4, 5, 6)]])
    out = np.asarray(logps(params, batch(rows, Shape(6, 6), 1)))
    for ours, alone in zip(out[0], separate(params, rows), strict=True):
        np.testing.assert_allclose(ours[: len(alone)], alone, atol=1e-5)
