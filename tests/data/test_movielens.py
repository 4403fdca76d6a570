from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data import Prepared, build, movielens
from dpo4rec_jax.data.files import Files

RATINGS = "1::10::5::978300760\n1::20::3::978302109\n2::10::4::978301968\n"
MOVIES = "10::Toy Story (1995)::Animation|Comedy\n20::Misérables, Les (1995)::Drama\n"
USERS = "1::F::1::10::48067\n2::M::56::0::70072\n"


@pytest.fixture(scope="module")
def ml_1m(shared_data: Path) -> Prepared:
    return build(DataConfig(name="ml-1m", path=str(shared_data / "ml-1m.zip")), 0, "unused")


def raw_ratings(path: Path) -> np.ndarray:
    """(user, item, rating, time) by another parser than ours."""
    text = Files(path).read("ml-1m/ratings.dat").replace(b"::", b" ")
    return np.array(text.split(), dtype=np.int64).reshape(-1, 4)


def test_ml_1m_has_its_published_counts(ml_1m: Prepared) -> None:
    assert ml_1m.counts["interactions"] == 1_000_209
    assert ml_1m.counts["users"] == 6_040
    assert ml_1m.counts["items"] == 3_706
    assert ml_1m.counts["users_by_split"] == {"train": 4832, "validation": 604, "test": 604}
    assert ml_1m.attribute_names == ["genre"]
    assert ml_1m.attribute_sizes == [18]


def test_no_list_holds_a_window_item_or_a_negative_the_user_rated(
    ml_1m: Prepared, shared_data: Path
) -> None:
    user_R, item_R, rating_R, _ = raw_ratings(shared_data / "ml-1m.zip").T
    user_of = {int(id): u for u, id in enumerate(ml_1m.user_id)}
    item_of = {int(id): i for i, id in enumerate(ml_1m.item_id)}
    stars_UI = np.zeros((len(user_of), len(item_of)), np.int8)
    stars_UI[[user_of[u] for u in user_R.tolist()], [item_of[i] for i in item_R.tolist()]] = (
        rating_R
    )

    length_U = np.diff(ml_1m.offset_U1)
    assert (ml_1m.window_U == np.minimum(-(-length_U // 2), 30)).all()
    place_E = np.arange(len(ml_1m.item_E)) - np.repeat(ml_1m.offset_U1[:-1], length_U)
    user_E = np.repeat(np.arange(len(length_U)), length_U)
    seen_E = place_E < ml_1m.window_U[user_E]
    window_UI = np.zeros(stars_UI.shape, bool)
    window_UI[user_E[seen_E], ml_1m.item_E[seen_E]] = True

    user_LN = np.repeat(ml_1m.user_L[:, None], 10, axis=1)
    assert ml_1m.mask_LN.all()
    assert not window_UI[user_LN, ml_1m.item_LN].any()
    stars_LN = stars_UI[user_LN, ml_1m.item_LN]
    assert (ml_1m.label_LN == (stars_LN > 3)).all()
    # Every rated candidate is one of the chunk that follows the window, and each is there once.
    own_L = (stars_LN > 0).sum(axis=1)
    assert own_L.max() == 4
    assert own_L.sum() == (length_U - ml_1m.window_U).sum()
    assert (np.bincount(ml_1m.user_L) == -(-(length_U - ml_1m.window_U) // 4)).all()
    sorted_LN = np.sort(ml_1m.item_LN, axis=1)
    assert (sorted_LN[:, 1:] != sorted_LN[:, :-1]).all()


def test_ml_1m_sequences_are_in_time_order(ml_1m: Prepared, shared_data: Path) -> None:
    rows = raw_ratings(shared_data / "ml-1m.zip")
    assert (ml_1m.time_E.sum(), ml_1m.rating_E.sum()) == (rows[:, 3].sum(), rows[:, 2].sum())
    within = np.ones(len(ml_1m.time_E) - 1, bool)
    within[ml_1m.offset_U1[1:-1] - 1] = False
    assert (np.diff(ml_1m.time_E)[within] >= 0).all()
    mine = rows[rows[:, 0] == 42]
    expected = mine[np.argsort(mine[:, 3], kind="stable"), 1]
    start, end = ml_1m.offset_U1[41:43]
    assert [int(ml_1m.item_id[i]) for i in ml_1m.item_E[start:end]] == expected.tolist()


def test_prompts_see_the_window_and_nothing_later(ml_1m: Prepared) -> None:
    for u in (0, 17, 6039):
        start, seen = ml_1m.offset_U1[u], ml_1m.window_U[u]
        items = ml_1m.item_E[start : start + seen]
        titles = [ml_1m.items[i]["title"] for i in items]
        stars = ml_1m.rating_E[start : start + seen]
        assert ml_1m.user_prompts[u].history == [
            f'"{title}", {rating:.0f} stars' for title, rating in zip(titles, stars, strict=True)
        ]
        later = {
            ml_1m.items[i]["title"] for i in ml_1m.item_E[start + seen : ml_1m.offset_U1[u + 1]]
        }
        text = ml_1m.user_prompts[u].messages[-1]["content"] + ml_1m.users[u]["history"]
        assert not [title for title in later if f'"{title}"' in text]


def test_max_users_keeps_the_first_of_the_file_and_their_items(shared_data: Path) -> None:
    config = DataConfig(name="ml-1m", path=str(shared_data / "ml-1m.zip"), max_users=50)
    prepared = build(config, 0, "unused")
    assert prepared.user_id == [str(user) for user in range(1, 51)]
    assert set(prepared.item_E) == set(range(len(prepared.item_id)))


def write(directory: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("latin-1")
        (directory / name.replace("_", ".")).write_bytes(data)
    return directory


def read(directory: Path):
    return movielens.read(Files(directory), lambda interactions: interactions)


def test_titles_are_latin_1_with_the_article_in_front(tmp_path: Path) -> None:
    raw = read(write(tmp_path, ratings_dat=RATINGS, movies_dat=MOVIES, users_dat=USERS))
    assert raw.items["title"].to_list() == ["Toy Story (1995)", "Les Misérables (1995)"]
    assert raw.items["genre"].to_list() == [["Animation", "Comedy"], ["Drama"]]


def test_titles_in_utf_8_are_read_as_that(tmp_path: Path) -> None:
    movies = MOVIES.encode()  # as in ML-10M
    raw = read(write(tmp_path, ratings_dat=RATINGS, movies_dat=movies, users_dat=USERS))
    assert raw.items["title"].to_list() == ["Toy Story (1995)", "Les Misérables (1995)"]


def test_profiles_are_in_words_and_an_unknown_occupation_is_left_out(tmp_path: Path) -> None:
    raw = read(write(tmp_path, ratings_dat=RATINGS, users_dat=USERS))
    assert raw.users.rows() == [
        ("1", "female", "under 18", "K-12 student"),
        ("2", "male", "56 or older", None),
    ]


def test_windows_line_ends_and_a_missing_last_one_are_read(tmp_path: Path) -> None:
    plain = read(write(tmp_path, ratings_dat=RATINGS)).interactions
    odd = RATINGS.replace("\n", "\r\n").rstrip()
    assert read(write(tmp_path, ratings_dat=odd)).interactions.equals(plain)
