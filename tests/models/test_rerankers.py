"""Re-rankers: invariances of every backbone, parity of the GRU, and one adaptor for all leading
axes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpo4rec_jax.models import dlcm, lean, reranker
from dpo4rec_jax.models import lists as device_lists
from dpo4rec_jax.models.adaptor import ADAPTORS, OUT
from dpo4rec_jax.models.backbones import BACKBONES
from dpo4rec_jax.models.dlcm import GRU
from dpo4rec_jax.models.list_attention import (
    HIDDEN_SCORE,
    NORM_EPSILON,
    Attention,
    LayerNorm,
    softmax,
)
from dpo4rec_jax.models.lists import Lists
from dpo4rec_jax.models.reranker import RerankerConfig

ITEMS, LISTS, N, FEATURES, SAMPLES, PAST = 30, 6, 8, 12, 3, 5
SIZES = (5, 100)  # one attribute by multi-hot rows, one by lookup


def make(backbone: str, knowledge: bool = True, **changes: Any):
    """A config, parameters of ordinary size (biases too), and lists with padding."""
    features = FEATURES if knowledge else 0
    config = RerankerConfig(backbone, ITEMS, SIZES, N, features, features, match=True, ease=9.0)
    config = replace(config, **changes)
    shapes = jax.eval_shape(lambda: reranker.init(config, jax.random.key(0)))
    random = np.random.default_rng(0)

    def draw(shape):
        scale = shape.shape[0] ** -0.5 if len(shape.shape) > 1 else 0.3
        return random.normal(scale=scale, size=shape.shape).astype(np.float32)

    return config, jax.tree.map(draw, shapes), make_lists(knowledge)


def make_lists(knowledge: bool = True) -> Lists:
    random = np.random.default_rng(1)
    attribute = np.stack([random.integers(-1, size, (ITEMS, 2)) for size in SIZES], axis=1)
    vectors = {
        "user_UCF": jnp.asarray(random.normal(size=(4, SAMPLES, FEATURES)), jnp.float32),
        "count_U": jnp.full((4,), SAMPLES, jnp.int32),
        "item_IF": jnp.asarray(random.normal(size=(ITEMS, FEATURES)), jnp.float32),
    }
    return Lists(
        user_L=jnp.asarray(random.integers(0, 4, LISTS), jnp.int32),
        item_LN=jnp.asarray(random.integers(0, ITEMS, (LISTS, N)), jnp.int32),
        label_LN=jnp.asarray(random.integers(0, 2, (LISTS, N)), jnp.int8),
        mask_LN=jnp.asarray(np.arange(N)[None] < random.integers(3, N + 1, LISTS)[:, None]),
        attribute_IAM=jnp.asarray(attribute, jnp.int32),
        past_UH=jnp.asarray(random.integers(0, ITEMS, (4, PAST)), jnp.int32),
        affinity_UI=jnp.asarray(random.normal(size=(4, ITEMS)), jnp.float32),
        rating_UH=jnp.asarray([[1, 2, 3, 4, 5], [5, 0, -1, -1, -1], [3, 3, 3, -1, -1], [4] * 5]),
        **(vectors if knowledge else {}),
    )


@partial(jax.jit, static_argnums=0)
def score_and_gradient(config, params, lists, index):
    """Scores, and the gradient of the sum of their squares: one program a backbone."""

    def total(params):
        score_BN = device_lists.score_batch(config, params, lists, index)
        return (score_BN**2).sum(), score_BN

    gradient, score_BN = jax.grad(total, has_aux=True)(params)
    return score_BN, gradient


@partial(jax.jit, static_argnums=0, static_argnames="capacity")
def score_some(config, params, lists, index, **options):
    return device_lists.score_batch(config, params, lists, index, **options)


def score(config, params, lists):
    return score_and_gradient(config, params, lists, jnp.arange(LISTS))[0]


def permuted(lists: Lists, order: np.ndarray) -> Lists:
    return replace(
        lists,
        **{name: getattr(lists, name)[:, order] for name in ("item_LN", "label_LN", "mask_LN")},
    )


@pytest.mark.parametrize(
    "backbone", ["setrank", "setrank-isab", "setrank-small", "setrank-tiny", "mir"]
)
def test_scores_of_a_set_move_with_their_candidates(backbone):
    config, params, lists = make(backbone)
    order = np.random.default_rng(2).permutation(N)
    plain, moved = score(config, params, lists), score(config, params, permuted(lists, order))
    np.testing.assert_allclose(moved, plain[:, order], atol=1e-5)
    assert np.ptp(np.asarray(plain[0])) > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_list_scores_the_same_whoever_is_in_its_batch(backbone):
    config, params, lists = make(backbone)
    index = jnp.arange(LISTS)[::-1]
    turned, _ = score_and_gradient(config, params, lists, index)
    np.testing.assert_allclose(turned[::-1], score(config, params, lists), atol=1e-5)


@pytest.mark.parametrize("backbone", ["prm", "prm-small", "prm-tiny", "dlcm"])
def test_prm_and_dlcm_know_the_order_of_the_list(backbone):
    config, params, lists = make(backbone)
    order = np.arange(N)[::-1]
    plain, moved = score(config, params, lists), score(config, params, permuted(lists, order))
    assert np.abs(moved - plain[:, order]).max() > 1e-4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_stands_in_the_padding_changes_no_score(backbone):
    config, params, lists = make(backbone)
    other = replace(lists, item_LN=jnp.where(lists.mask_LN, lists.item_LN, ITEMS - 1))
    plain, changed = score(config, params, lists), score(config, params, other)
    np.testing.assert_allclose(changed, plain, atol=1e-6)
    assert not np.asarray(plain)[~np.asarray(lists.mask_LN)].any()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_list_that_is_all_padding_has_finite_scores_and_gradients(backbone):
    config, params, lists = make(backbone)
    lists = replace(lists, mask_LN=lists.mask_LN.at[0].set(False))
    score_BN, gradient = score_and_gradient(config, params, lists, jnp.arange(LISTS))
    assert jnp.isfinite(score_BN).all()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_a_list_is_scored_the_same_in_any_batch_and_at_any_capacity():
    config, params, lists = make("prm")
    alone = score_some(config, params, lists, jnp.array([2]), capacity=N)
    distinct = int(device_lists.count_distinct(lists, jnp.arange(LISTS)))
    assert distinct == len(np.unique(np.asarray(lists.item_LN)))
    together = score_some(config, params, lists, jnp.arange(LISTS), capacity=distinct)
    np.testing.assert_allclose(together[2], alone[0], atol=1e-5)
    np.testing.assert_allclose(together, score(config, params, lists), atol=1e-5)


def test_texts_scored_from_tables_equal_texts_scored_in_a_batch():
    config, params, lists = make("dlcm")

    def from_tables(params, lists, index):
        return device_lists.map_lists(
            config, params, lists, index, lambda score, label, mask: score, SAMPLES, rows=12
        )

    index = jnp.array([5, 0, 3, 1, 2])  # not a multiple of the chunk
    score_BCN = jax.jit(from_tables)(params, lists, index)
    for sample in range(SAMPLES):
        expected = score_some(config, params, lists, index, sample_B=jnp.full((5,), sample))
        np.testing.assert_allclose(score_BCN[:, sample], expected, atol=1e-5)


def test_a_match_is_the_weighted_product_of_the_unit_vectors():
    config, params, lists = make("prm")
    index = jnp.arange(LISTS)
    whole_BN = device_lists.score_batch(config, params, lists, index)
    apart_BN = device_lists.score_batch(replace(config, match=False), params, lists, index)
    user_BF, item_BNF = lists.user_UCF[lists.user_L, 0], lists.item_IF[lists.item_LN]
    user_BF /= np.linalg.norm(user_BF, axis=-1, keepdims=True)
    item_BNF /= np.linalg.norm(item_BNF, axis=-1, keepdims=True)
    weight_F, item_F = params["match"]["weight"], params["match"]["item"]
    user_BF = np.sqrt(FEATURES) * np.asarray(user_BF) * weight_F + item_F
    expected_BN = np.einsum("bf,bnf->bn", user_BF, np.asarray(item_BNF)) * lists.mask_LN
    np.testing.assert_allclose(whole_BN - apart_BN, expected_BN, atol=1e-5)


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_side_without_knowledge_has_no_adaptor(side):
    _, params, _ = make("setrank", knowledge=True, **{f"{side}_features": 0})
    kept = {"user": "gate_item", "item": "gate_user"}[side]
    assert kept in params["adaptor"] and f"gate_{side}" not in params["adaptor"]


def test_without_adaptor_texts_count_by_their_match():
    config, params, lists = make("prm", adaptor="none")
    assert "adaptor" not in params
    index = jnp.arange(LISTS)
    score_BN = device_lists.score_batch(config, params, lists, index)
    bare = replace(config, user_features=0, item_features=0)
    bare_BN = device_lists.score_batch(bare, params, make_lists(knowledge=False), index)
    match = {**params, "match": jax.tree.map(jnp.zeros_like, params["match"])}
    np.testing.assert_allclose(device_lists.score_batch(config, match, lists, index), bare_BN)
    assert np.abs(score_BN - bare_BN).max() > 0.1


def test_without_knowledge_there_is_no_adaptor_at_all():
    config, params, lists = make("setrank", knowledge=False)
    assert "adaptor" not in params
    assert score(config, params, lists).shape == (LISTS, N)


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_adaptors_take_any_leading_axes(adaptor):
    config, params, lists = make("setrank", adaptor=adaptor)
    assert lists.user_UCF is not None
    adapted_UCO = reranker.adapt_users(config, params, lists.user_UCF)
    alone_O = reranker.adapt_users(config, params, lists.user_UCF[1, 2])
    assert adapted_UCO.shape == (4, SAMPLES, 32)
    np.testing.assert_allclose(adapted_UCO[1, 2], alone_O, atol=1e-5)


def test_hybrid_adaptor_is_the_gated_sum_of_shared_and_dedicated_perceptrons():
    config, params, lists = make("setrank")
    assert lists.item_IF is not None
    x_F = np.asarray(lists.item_IF[3])
    tree = jax.tree.map(np.asarray, params["adaptor"])
    logit_E = x_F @ tree["gate_item"]["kernel"] + tree["gate_item"]["bias"]
    gate_E = np.exp(logit_E) / np.exp(logit_E).sum()
    expected, e = np.zeros(32), 0
    for name, count in (("shared", 2), ("item", 5)):
        hidden, out = tree[name]["hidden"], tree[name]["out"]["kernel"]
        for n in range(count):
            at = slice(128 * n, 128 * n + 128)
            h = np.maximum(x_F @ hidden["kernel"][:, at] + hidden["bias"][at], 0)
            expected += gate_E[e] * (h @ out[at] + tree[name]["bias"][n])
            e += 1
    np.testing.assert_allclose(
        reranker.adapt_items(config, params, lists.item_IF)[3], expected, atol=1e-5
    )


def value_and_gradient(function, x):
    """Of a sum over the outputs, each weighted differently."""
    weight = jnp.asarray(np.random.default_rng(3).normal(size=x.shape), jnp.float32)
    return jax.jit(lambda x: (function(x), jax.grad(lambda x: (function(x) * weight).sum())(x)))(x)


@pytest.mark.parametrize("width", [1, 10, 64])
def test_softmax_by_products_equals_jaxs(width):
    x = jnp.asarray(np.random.default_rng(0).normal(scale=9.0, size=(4, 7, width)), jnp.float32)
    x = x.at[0, :, width // 2 :].set(HIDDEN_SCORE).at[1, 0].set(HIDDEN_SCORE)
    ours, theirs = value_and_gradient(softmax, x), value_and_gradient(jax.nn.softmax, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_layer_norm_by_products_equals_flaxs():
    x = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (4, 7, 64)), jnp.float32)
    x = x.at[0, 0].set(5.0)  # no variance
    random = np.random.default_rng(1)
    params = {name: jnp.asarray(random.normal(size=64), jnp.float32) for name in ("scale", "bias")}
    ours, theirs = (
        value_and_gradient(lambda x, m=module: m.apply({"params": params}, x), x)
        for module in (LayerNorm(), nn.LayerNorm(use_fast_variance=False))
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def test_scaling_has_the_gradient_of_its_formula():
    x = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (4, 7, 64)), jnp.float32)
    x = x.at[0, 0].set(0.0)
    plain = value_and_gradient(
        lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPSILON), x
    )
    ours = value_and_gradient(lean.scaled, x)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], plain[1], rtol=1e-4, atol=1e-4)


def test_a_look_up_is_attention_of_one_head_whose_keys_are_their_own_values():
    random = np.random.default_rng(0)
    query, key, weight = (jnp.asarray(random.normal(size=(3, N, 6)), jnp.float32) for _ in range(3))
    mask = jnp.arange(N)[None] < jnp.asarray([[N], [3], [0]])
    identity = np.eye(6, dtype=np.float32)
    kernels = {"query": identity, "key_value": np.tile(identity, 2), "out": identity}
    params = {
        name: {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
        for name, kernel in kernels.items()
    }

    def attended(query: jax.Array, key: jax.Array) -> Any:
        return Attention(1).apply({"params": params}, query, key, mask)

    def gradients(function: Any) -> Any:
        # A list that is all padding has no loss, and so no gradient.
        real = weight * mask.any(1)[:, None, None]
        by_both = jax.grad(lambda q, k: (function(q, k) * real).sum(), argnums=(0, 1))
        return function(query, key), by_both(query, key)

    chex.assert_trees_all_close(
        gradients(lambda q, k: lean.looked_up(q, k, mask)), gradients(attended), atol=1e-5
    )


def test_attributes_are_added_to_the_item_or_stand_beside_it():
    joined, params, lists = make("setrank-tiny", knowledge=False)
    added = replace(joined, attributes="added")
    tables = reranker.attribute_tables(joined, lists.attribute_IAM)

    def parts(config: RerankerConfig) -> list[jax.Array]:
        module = reranker.Reranker(config)
        return module.apply({"params": params}, lists.item_LN, tables, method="embedded")

    assert len(parts(joined)) == 1 + len(SIZES)
    np.testing.assert_allclose(parts(added)[0], sum(parts(joined)), atol=1e-6)
    assert len(parts(added)) == 1
    width = jax.eval_shape(lambda: reranker.init(added, jax.random.key(0)))
    assert width["backbone"]["encoder"]["score"]["kernel"].shape == (joined.embedding, 1)


def apply(module: GRU, variables: Any, *arguments: Any) -> Any:
    return module.apply(variables, *arguments)


def test_gru_equals_torchs_with_the_same_weights():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(N, 3, 5)), jnp.float32)
    module = GRU(4)
    mask = jnp.ones((N, 3), bool)
    variables = module.init(jax.random.key(0), x, mask)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), variables["params"]
    )
    states, last = apply(module, {"params": params}, x, mask)

    theirs = torch.nn.GRU(5, 4)
    bias_hh = np.concatenate([np.zeros(8, np.float32), params["new_bias"]])
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(params["input"]["kernel"].T))
        theirs.weight_hh_l0.copy_(torch.tensor(params["recurrent"].T))
        theirs.bias_ih_l0.copy_(torch.tensor(params["input"]["bias"]))
        theirs.bias_hh_l0.copy_(torch.tensor(bias_hh))
        expected, expected_last = theirs(torch.tensor(np.asarray(x)))
    np.testing.assert_allclose(states, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(last, expected_last[0].numpy(), atol=1e-5)


def test_states_times_context_has_the_gradient_of_a_plain_product():
    random = np.random.default_rng(1)
    state, context, weight = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((N, 3, 4), (3, 4), (N, 3, 4))
    )

    def gradients(times: Any) -> Any:
        return jax.grad(lambda s, c: (times(s, c) * weight).sum(), argnums=(0, 1))(state, context)

    expected = gradients(lambda s, c: s * c[None])
    chex.assert_trees_all_close(gradients(dlcm.each_times), expected, rtol=1e-5)


def test_gru_state_passes_padding_by():
    module = GRU(4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, 1, 5)), jnp.float32)
    mask = jnp.asarray(np.array([[True, False, True, True, False, False, False, False]]).T)
    variables = module.init(jax.random.key(0), x, mask)
    _, last = apply(module, variables, x, mask)
    kept = x[jnp.array([0, 2, 3])]
    _, expected = apply(module, variables, kept, jnp.ones((3, 1), bool))
    np.testing.assert_allclose(last, expected, atol=1e-6)


def test_second_reading_of_a_gru_goes_on_from_the_first():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, 2, 5)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(1).random((N, 2)) < 0.7)
    variables = GRU(4).init(jax.random.key(0), x, mask)
    states, last = apply(GRU(4, readings=2), variables, x, mask)
    twice, expected = apply(GRU(4), variables, jnp.tile(x, (2, 1, 1)), jnp.tile(mask, (2, 1)))
    np.testing.assert_allclose(states, twice[N:], atol=1e-6)
    np.testing.assert_allclose(last, expected, atol=1e-6)


def test_dlcm_is_equation_6_of_a_list_read_twice():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, N, 6)), jnp.float32)
    mask = jnp.arange(N)[None] < jnp.asarray([[N], [3], [1]])
    module = dlcm.DLCM()
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32),
        module.init(jax.random.key(0), x, mask, False)["params"],
    )
    read = LayerNorm().apply({"params": params["LayerNorm_0"]}, x.swapaxes(0, 1))
    gru = {"params": params["gru"]}
    states, last = apply(GRU(128), gru, jnp.tile(read, (2, 1, 1)), jnp.tile(mask.T, (2, 1)))
    context = jnp.tanh(nn.Dense(128).apply({"params": params["context"]}, last))
    expected = nn.Dense(1).apply({"params": params["score"]}, states[N:] * context[None])
    scores = module.apply({"params": params}, x, mask, False)
    np.testing.assert_allclose(scores, expected[..., 0].T, rtol=1e-4, atol=1e-5)


def test_distinct_items_are_ascending_and_every_candidate_finds_its_own():
    item_BN = jnp.asarray([[5, 2, 5], [29, 0, 2]])
    distinct_K, place_BN = device_lists.distinct(item_BN, 6, ITEMS)
    np.testing.assert_array_equal(distinct_K, [0, 2, 5, 29, 0, 0])
    np.testing.assert_array_equal(distinct_K[place_BN], item_BN)


def test_dropout_takes_a_key_and_drops_features_of_the_whole_list():
    config, params, lists = make("prm", dropout=0.5)
    first, again, second = (
        score_some(config, params, lists, jnp.arange(LISTS), key=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


def test_user_dropout_shows_some_lists_without_their_user(monkeypatch):
    config, params, lists = make("prm", user_dropout=0.5)

    def scores(key=None):
        return device_lists.score_batch(config, params, lists, jnp.arange(LISTS), key=key)

    with_user = scores()
    drawn = [scores(jax.random.key(seed)) for seed in range(8)]
    monkeypatch.setattr(reranker, "adapt_users", lambda *_: jnp.zeros((LISTS, OUT)))
    without = scores()
    hidden = [np.isclose(each, without, atol=1e-6).all(-1) for each in drawn]
    for each, list_hidden in zip(drawn, hidden, strict=True):
        expected = np.where(list_hidden[:, None], without, with_user)
        np.testing.assert_allclose(each, expected, atol=1e-6)
    assert 0.2 < np.mean(hidden) < 0.8
