from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import Prepared, build
from dpo4rec_jax.data.knowledge import Knowledge

TOY = {"synthetic": {"users": 30, "items": 40, "interactions": 14}}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return build(DataConfig(**TOY), 0, "unused")


def test_what_was_saved_is_loaded(prepared: Prepared, tmp_path: Path) -> None:
    prepared.save(tmp_path)
    loaded = Prepared.load(tmp_path)
    for field in fields(Prepared):
        ours, theirs = getattr(prepared, field.name), getattr(loaded, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs


def test_prompts_can_stay_on_disk(prepared: Prepared, tmp_path: Path) -> None:
    prepared.save(tmp_path)
    loaded = Prepared.load(tmp_path, prompts=False)
    assert loaded.user_prompts == loaded.item_prompts == []
    assert loaded.users == prepared.users


@pytest.mark.parametrize("name", ["sequences.npz", "lists.npz", "prompts.jsonl", "counts.json"])
def test_missing_and_damaged_files_are_input_errors(
    prepared: Prepared, tmp_path: Path, name: str
) -> None:
    prepared.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"damaged .* run stage prepare again"):
        Prepared.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing; run stage prepare"):
        Prepared.load(tmp_path)


def test_the_seed_decides_split_and_lists(prepared: Prepared) -> None:
    again, other = build(DataConfig(**TOY), 0, "unused"), build(DataConfig(**TOY), 1, "unused")
    np.testing.assert_array_equal(prepared.item_LN, again.item_LN)
    np.testing.assert_array_equal(prepared.split_U, again.split_U)
    assert (prepared.split_U != other.split_U).any()


def test_attribute_ids_stand_for_the_items_values(prepared: Prepared) -> None:
    for a, name in enumerate(prepared.attribute_names):
        ids = prepared.attribute_IAM[:, a, 0]
        values = [item["attributes"][name][0] for item in prepared.items]
        assert len(set(values)) == prepared.attribute_sizes[a] == ids.max() + 1
        assert len(set(zip(ids.tolist(), values, strict=True))) == prepared.attribute_sizes[a]


def test_more_positives_than_places_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"data\.positives_per_list: expected less than .* 4"):
        build(DataConfig(list_length=4, **TOY), 0, "unused")


def test_templates_are_checked_before_any_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("damaged")
    config = DataConfig(name="mine", path=str(tmp_path), prompts={"user": "{mood}"})
    with pytest.raises(InputError, match=r"data\.prompts\.user: unknown placeholder"):
        build(config, 0, "unused")


def test_a_threshold_above_every_rating_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"data\.rating_threshold: .* highest rating is 5"):
        build(DataConfig(rating_threshold=9, **TOY), 0, "unused")


def test_knowledge_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    knowledge = Knowledge(
        user_UCF=rng.normal(size=(2, 3, 4)).astype(np.float32),
        count_U=np.array([3, 0], np.int32),
        item_IF=rng.normal(size=(5, 4)).astype(np.float32),
        user_id=["a", "ü"],
        item_id=list("vwxyz"),
    )
    knowledge.save(tmp_path / "vectors.npz")
    with np.load(tmp_path / "vectors.npz", allow_pickle=False) as file:
        assert set(file.files) == {"user_UxCxF", "item_IxF", "user_count", "user_id", "item_id"}
    loaded = Knowledge.load(tmp_path / "vectors.npz")
    np.testing.assert_array_equal(loaded.user_UCF, knowledge.user_UCF)
    assert (loaded.user_id, loaded.item_id) == (knowledge.user_id, knowledge.item_id)
    with pytest.raises(InputError, match="missing; run stage encode"):
        Knowledge.load(tmp_path / "none.npz")
