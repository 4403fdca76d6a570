from __future__ import annotations

import collections

import numpy as np
import pytest

from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data import Prepared, build, synthetic
from dpo4rec_jax.data.synthetic import TASTES, VALUES, truth, vocabulary, warmup_texts

CONFIG = DataConfig(synthetic={"users": 400, "items": 300, "interactions": 44})
KIND_OF = {value: kind for kind, values in VALUES.items() for value in values}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return build(CONFIG, 0, "unused")


@pytest.fixture(scope="module")
def warmup() -> list[tuple[list[dict[str, str]], list[str]]]:
    return warmup_texts(CONFIG, 0, viewers=600, samples=3)


def share_liked(prepared: Prepared, kind: str, stars_above: float) -> float:
    """How often a rating is above the stars where the item has the user's value of a kind."""
    likes = truth(CONFIG, 0)
    fits, loved = [], []
    for u, user in enumerate(prepared.user_id):
        for e in range(prepared.offset_U1[u], prepared.offset_U1[u + 1]):
            value = prepared.items[prepared.item_E[e]]["attributes"][kind][0]
            fits.append(value == likes[user][kind])
            loved.append(prepared.rating_E[e] > stars_above)
    fits, loved = np.array(fits), np.array(loved)
    return loved[fits].mean() - loved[~fits].mean()


@pytest.mark.parametrize("kind", TASTES)
def test_items_of_the_planted_taste_are_rated_higher(prepared: Prepared, kind: str) -> None:
    assert share_liked(prepared, kind, 3) > 0.3


def test_the_mood_of_an_item_does_not_move_ratings(prepared: Prepared) -> None:
    stars: dict[str, list[float]] = collections.defaultdict(list)
    for item, rating in zip(prepared.item_E, prepared.rating_E, strict=True):
        stars[prepared.items[item]["attributes"]["mood"][0]].append(rating)
    means = [np.mean(values) for values in stars.values()]
    # Items carry several hundred ratings a mood each, but also their own quality.
    assert max(means) - min(means) < 0.3


def test_the_window_reveals_the_taste_but_not_in_every_entry(prepared: Prepared) -> None:
    likes = truth(CONFIG, 0)
    found, fitting, entries = 0, 0, 0
    for prompt in prepared.user_prompts:
        words = [word for entry in prompt.history for word in entry.split()]
        for kind in TASTES:
            count = {value: words.count(value) for value in VALUES[kind]}
            found += max(count, key=count.__getitem__) == likes[prompt.id][kind]
            fitting += count[likes[prompt.id][kind]]
        entries += len(prompt.history)
    assert found / (3 * len(prepared.user_prompts)) > 0.85
    assert 0.3 < fitting / (3 * entries) < 0.8


def test_naming_the_taste_ranks_better_than_naming_what_was_seen(prepared: Prepared) -> None:
    likes, rng = truth(CONFIG, 0), np.random.default_rng(0)
    words_I = [set(item["title"].split()) for item in prepared.items]

    def share_of_positives_on_top(named_by_user: list[set[str]]) -> float:
        hits = []
        for user, items, labels in zip(
            prepared.user_L, prepared.item_LN, prepared.label_LN, strict=True
        ):
            if labels.any():
                scores = [len(words_I[i] & named_by_user[user]) + 0.1 * rng.random() for i in items]
                hits.append(labels[int(np.argmax(scores))])
        return float(np.mean(hits))

    right = [set(likes[user].values()) for user in prepared.user_id]
    random = [
        set(synthetic.unaligned_text(np.array([e.split()[1:] for e in p.history]), rng).split())
        for p in prepared.user_prompts
    ]
    moods = [set(VALUES["mood"][:1]) for _ in prepared.user_id]
    best, seen, useless = map(share_of_positives_on_top, (right, random, moods))
    assert best > seen + 0.2
    assert seen > useless


def test_prompts_and_texts_are_short_and_of_few_words(prepared: Prepared, warmup) -> None:
    words = set(vocabulary(CONFIG))
    assert len(words) <= 120
    for prompt in prepared.user_prompts + prepared.item_prompts:
        said = prompt.messages[-1]["content"].split()
        assert len(said) <= 150
        assert set(said) <= words
    for messages, texts in warmup:
        assert set(messages[-1]["content"].split()) <= words
        for text in texts:
            assert set(text.split()) <= words
            assert 10 <= len(text.split()) <= 14
    for item in prepared.items:
        assert set(item["text"].split()) <= words
    assert all(set(user["history"].split()) <= words for user in prepared.users)


def test_warmup_prompts_look_like_the_data_s_but_are_other_viewers(
    prepared: Prepared, warmup
) -> None:
    ours = {prompt.messages[-1]["content"] for prompt in prepared.user_prompts}
    theirs = {messages[-1]["content"] for messages, _ in warmup}
    assert not ours & theirs
    first = prepared.user_prompts[0]
    assert (
        warmup[0][0][-1]["content"].splitlines()[0] == first.messages[-1]["content"].splitlines()[0]
    )
    assert len(warmup[0][0][-1]["content"].splitlines()) == len(first.history) + 2


def test_warmup_texts_name_seen_values_of_every_kind_and_verdict_at_random(warmup) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    disliked_only = 0
    for messages, texts in warmup:
        assert len(texts) == 3
        text = texts[0]
        history = messages[-1]["content"].splitlines()[1:-1]
        seen = {word for entry in history for word in entry.split()}
        loved = {w for entry in history if entry.startswith("loved") for w in entry.split()}
        named = [word for word in text.split() if word in KIND_OF]
        assert len(named) == len(set(named)) == 3
        assert set(named) <= seen
        kinds.update(KIND_OF[value] for value in named)
        disliked_only += len(set(named) - loved)
        words = text.split()
        assert all(words[words.index(value) - 1] == KIND_OF[value] for value in named)
    total = sum(kinds.values())
    assert all(0.15 < kinds[kind] / total < 0.35 for kind in VALUES)
    assert disliked_only > 0.05 * total


def test_seeds_make_other_worlds_and_equal_seeds_the_same(prepared: Prepared) -> None:
    assert build(CONFIG, 0, "unused").user_prompts == prepared.user_prompts
    assert truth(CONFIG, 1) != truth(CONFIG, 0)
    few = {"viewers": 5, "samples": 2}
    assert warmup_texts(CONFIG, 0, **few) == warmup_texts(CONFIG, 0, **few)
