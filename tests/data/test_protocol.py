from __future__ import annotations

import pytest

from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data.protocol import domain_of, protocol


@pytest.mark.parametrize(
    ("config", "format", "domain"),
    [
        ({"name": "mine", "path": "x"}, "movielens", "movies"),
        ({"name": "ml-100k"}, "recbole", "movies"),
        ({"name": "amazon-books"}, "amazon", "books"),
        ({"name": "amazon-beauty"}, "table", "beauty"),
        ({"name": "mine", "path": "/data/All_Beauty.jsonl.gz"}, "amazon", "beauty"),
        ({"name": "mine", "path": "/data/shop.csv"}, "table", "products"),
        ({"name": "amazon-beauty", "path": "/ml-1m/amazon/reviews"}, "amazon", "beauty"),
        ({"name": "mine", "path": "/movies/Books/reviews.json"}, "amazon", "books"),
        ({"name": "mine", "path": "/html-1/notebooks/ml-research/songs.csv"}, "table", "products"),
        ({"name": "mine", "path": "/data/ml-latest-small/ratings.csv"}, "table", "movies"),
        ({"name": "synthetic"}, "synthetic", "synthetic"),
        ({"name": "amazon-books", "domain": "products"}, "amazon", "products"),
    ],
)
def test_the_wording_is_told_from_format_name_or_path(config, format: str, domain: str) -> None:
    assert domain_of(DataConfig(**config), format) == domain


def test_movies_and_books_have_kar_s_settings() -> None:
    movies = protocol(DataConfig(name="ml-1m"), "movielens")
    assert (movies.window, movies.threshold, movies.min_user, movies.min_item) == (
        30,
        3,
        None,
        None,
    )
    books = protocol(DataConfig(name="amazon-books"), "amazon")
    assert (books.window, books.threshold, books.min_user, books.min_item) == (15, 4, 60, 40)
    beauty = protocol(DataConfig(name="amazon-beauty"), "amazon")
    assert (beauty.window, beauty.threshold, beauty.min_user, beauty.min_item) == (
        15,
        4,
        None,
        None,
    )


def test_what_the_config_gives_stands() -> None:
    config = DataConfig(
        name="amazon-books",
        window=9,
        rating_threshold=0.0,
        min_user_interactions=5,
        min_item_interactions=4,
    )
    given = protocol(config, "amazon")
    assert (given.window, given.threshold, given.min_user, given.min_item) == (9, 0, 5, 4)
