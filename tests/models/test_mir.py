"""MIR: what the history does to the scores, and that it learns from it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import RankConfig
from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.backbones import Window
from dpo4rec_jax.models.lists import score_batch
from dpo4rec_jax.models.mir import MIR, SetToList
from dpo4rec_jax.objectives import ndcg
from dpo4rec_jax.stages.arms import lists_of, reranker_config
from dpo4rec_jax.stages.fitting import fit_arm

B, N, H, D = 3, 6, 5, 12


@pytest.fixture(scope="module")
def called():
    """A function of candidates, mask and window, with parameters of ordinary size."""
    x_BND, mask_BN, window = make_inputs()
    module = MIR()
    params = module.init(jax.random.key(0), x_BND, mask_BN, False, window)
    return jax.jit(lambda *inputs: module.apply(params, *inputs[:2], False, inputs[2]))


def make_inputs():
    random = np.random.default_rng(0)
    x_BND = jnp.asarray(random.normal(size=(B, N, D)), jnp.float32)
    mask_BN = jnp.asarray(np.arange(N)[None] < np.array([[N], [4], [3]]))
    past_BHD = jnp.asarray(random.normal(size=(B, H, D)), jnp.float32)
    mask_BH = jnp.asarray(np.arange(H)[None] < np.array([[H], [3], [0]]))
    return x_BND, mask_BN, Window(past_BHD, mask_BH)


def test_the_history_is_a_list_and_the_candidates_are_a_set(called):
    x_BND, mask_BN, window = make_inputs()
    plain = called(x_BND, mask_BN, window)
    order = np.array([3, 1, 0, 2, 5, 4])
    moved = called(x_BND[:, order], mask_BN[:, order], window)
    np.testing.assert_allclose(moved, plain[:, order], atol=1e-5)
    turned = Window(window.item_BHD[:, ::-1], window.mask_BH)
    assert np.abs(called(x_BND, mask_BN, turned)[0] - plain[0]).max() > 1e-4


def test_what_stands_in_the_padding_of_a_window_changes_no_score(called):
    x_BND, mask_BN, window = make_inputs()
    plain = called(x_BND, mask_BN, window)
    noise = jnp.where(window.mask_BH[..., None], window.item_BHD, 100.0)
    np.testing.assert_allclose(
        called(x_BND, mask_BN, Window(noise, window.mask_BH)), plain, atol=1e-6
    )
    longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 4)) + ((0, 0),) * (x.ndim - 2)), window)
    np.testing.assert_allclose(called(x_BND, mask_BN, longer), plain, atol=1e-5)
    assert np.isfinite(plain).all()  # the last user has no history at all


def test_every_real_item_of_the_history_moves_the_scores(called):
    x_BND, mask_BN, window = make_inputs()

    def total(past_BHD):
        return (called(x_BND, mask_BN, Window(past_BHD, window.mask_BH)) ** 2).sum()

    moved_BH = np.abs(jax.grad(total)(window.item_BHD)).max(-1) > 1e-7
    np.testing.assert_array_equal(moved_BH, np.asarray(window.mask_BH))


def test_an_old_item_weighs_less_by_the_users_own_rate():
    """With the rate's bias far up only the newest item is left in the affinity."""
    random = np.random.default_rng(1)
    set_BND, list_BHD = (
        jnp.asarray(random.normal(size=(1, length, 8)), jnp.float32) for length in (N, H)
    )
    masks = jnp.ones((1, N), bool), jnp.ones((1, H), bool)
    module = SetToList()
    params = module.init(jax.random.key(0), set_BND, list_BHD, *masks)["params"]

    def seen(bias, list_BHD):
        decay = {"kernel": params["decay"]["kernel"] * 0, "bias": jnp.array([bias])}
        variables = {"params": {**params, "decay": decay}}
        return module.apply(variables, set_BND, list_BHD, *masks)[1]

    other = list_BHD.at[:, 0].add(1.0)
    np.testing.assert_array_equal(seen(50.0, other), seen(50.0, list_BHD))
    assert np.abs(seen(-50.0, other) - seen(-50.0, list_BHD)).max() > 1e-3


def test_it_trains_on_histories_alone_and_beats_a_constant_and_setrank():
    """No knowledge: what tells users apart is their history, which SetRank does not see."""
    prepared = world.make_prepared(users=160)
    best = {}
    for backbone in ("mir", "setrank"):
        settings = world.RANK | {"backbone": backbone, "epochs": 8, "learning_rate": 3e-3}
        rank = RankConfig.model_validate(settings)
        _, fitted = fit_arm(prepared, lists_of(prepared, None, rank), rank, seed=0)
        best[backbone] = float(fitted.best_R.mean())
        assert np.isfinite(fitted.loss_ER).all()
    assert best["mir"] > best["setrank"] + 0.02
    assert best["mir"] > constant(prepared) + 0.05


def constant(prepared) -> float:
    """Expected ndcg@5 of random orders of the validation lists, as a constant scorer gets."""
    lists_L = prepared.split_U[prepared.user_L] == 1
    label_LN, mask_LN = prepared.label_LN[lists_L], prepared.mask_LN[lists_L]
    score_LN = np.zeros(label_LN.shape, np.float32)
    return float(
        ndcg(jnp.asarray(score_LN), jnp.asarray(label_LN), where=jnp.asarray(mask_LN), k=5).mean()
    )


def test_a_reranker_embeds_the_window_by_the_tables_of_the_candidates():
    prepared = world.make_prepared(users=40)
    rank = RankConfig.model_validate(world.RANK | {"backbone": "mir"})
    lists = lists_of(prepared, None, rank)
    assert lists.past_UH is not None and lists.rating_UH is not None
    config = reranker_config(rank, prepared, lists)
    params = jax.jit(reranker.init, static_argnums=0)(config, jax.random.key(0))
    assert {"item_embed", "rating_embed", "backbone"} <= set(params)
    score = jax.jit(lambda lists: score_batch(config, params, lists, jnp.arange(4)))
    harsher = replace(lists, rating_UH=jnp.where(lists.rating_UH > 0, 1, lists.rating_UH))
    assert np.abs(score(harsher) - score(lists)).max() > 1e-6
