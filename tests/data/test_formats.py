"""One log, nine layouts: every reader finds the same data in its own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from formats import WRITERS, make_log

from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data import build


@pytest.mark.parametrize("format", WRITERS)
def test_every_layout_gives_the_log_it_was_written_from(format: str, tmp_path: Path) -> None:
    log = make_log()
    path = WRITERS[format](tmp_path, log)
    prepared = build(DataConfig(name="toy", path=str(path)), 0, tmp_path)

    told = {
        (prepared.user_id[u], prepared.item_id[i]): rating
        for u in range(len(prepared.user_id))
        for i, rating in zip(
            prepared.item_E[prepared.offset_U1[u] : prepared.offset_U1[u + 1]].tolist(),
            prepared.rating_E[prepared.offset_U1[u] : prepared.offset_U1[u + 1]].tolist(),
            strict=True,
        )
    }
    assert told == {(user, item): float(rating) for user, item, rating, _ in log.events}
    for item in prepared.items:
        assert item["title"] == log.title(item["item"])
        assert [log.genre(item["item"])] in [v[-1:] for v in item["attributes"].values()]


@pytest.mark.parametrize("format", WRITERS)
def test_every_layout_gives_the_same_lists(format: str, tmp_path: Path) -> None:
    log = make_log()
    common = {"name": "toy", "domain": "movies", "window": 30, "rating_threshold": 3}
    reference, other = (
        build(DataConfig(path=str(WRITERS[name](tmp_path, log)), **common), 7, tmp_path)
        for name in ("ml-1m", format)
    )
    assert reference.item_id == other.item_id
    np.testing.assert_array_equal(reference.item_E, other.item_E)
    np.testing.assert_array_equal(reference.item_LN, other.item_LN)
    np.testing.assert_array_equal(reference.label_LN, other.label_LN)
    np.testing.assert_array_equal(reference.split_U, other.split_U)


@pytest.mark.parametrize("format", WRITERS)
def test_events_come_in_time_order(format: str, tmp_path: Path) -> None:
    log = make_log()
    path = WRITERS[format](tmp_path, log)
    prepared = build(DataConfig(name="toy", path=str(path)), 0, tmp_path)
    mine = sorted((time, item) for user, item, _, time in log.events if user == log.users[0])
    u = prepared.user_id.index(log.users[0])
    events = prepared.item_E[prepared.offset_U1[u] : prepared.offset_U1[u + 1]]
    assert [prepared.item_id[i] for i in events] == [item for _, item in mine]


def test_a_single_file_is_enough(tmp_path: Path) -> None:
    path = WRITERS["ml-1m"](tmp_path, make_log()) / "ratings.dat"
    prepared = build(DataConfig(name="ml-1m", path=str(path)), 0, tmp_path)
    assert prepared.items[0]["title"] == prepared.item_id[0]
    assert prepared.attribute_IAM.shape[1] == 0
