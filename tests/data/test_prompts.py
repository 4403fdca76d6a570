from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_jax.config import InputError, PromptsConfig
from dpo4rec_jax.data.prompts import (
    DOMAINS,
    customise,
    history_entries,
    item_prompt,
    item_text,
    profile_text,
    shorten,
    user_prompt,
)

MOVIES = DOMAINS["movies"]
HISTORY = ['"Heat (1995)", 5 stars', '"Clue (1985)", 2 stars', '"Alien (1979)", 4 stars']


def test_user_prompt_holds_profile_history_and_every_factor() -> None:
    profile = profile_text(MOVIES, {"gender": "female", "age": "18-24", "occupation": "artist"})
    prompt = user_prompt(MOVIES, "7", profile, HISTORY, None)
    (message,) = prompt.messages
    assert message["role"] == "user"
    assert "a female user, aged 18-24, occupation: artist" in message["content"]
    assert all(entry in message["content"] for entry in HISTORY)
    assert all(factor in message["content"] for factor in MOVIES.factors)


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_words_users_and_items(name: str) -> None:
    domain = DOMAINS[name]
    item = {"item": "i", "title": "A Thing", "attributes": {"brand": ["Co"], "category": []}}
    asked = item_prompt(domain, item, None).messages[-1]["content"]
    assert "A Thing (brand: Co)" in asked
    assert all(factor in asked for factor in domain.factors)
    assert (
        "{" not in asked + user_prompt(domain, "u", "a user", HISTORY, None).messages[-1]["content"]
    )


KAR = {
    "movies": "genre, director, actors, period, country, character, plot, theme, mood, tone, award",
    "books": "genre, author, style, theme, setting, length, complexity, period, literary, acclaim",
}


@pytest.mark.parametrize("name", KAR)
def test_kar_s_factors_are_asked_for(name: str) -> None:
    said = " ".join(DOMAINS[name].factors)
    assert [factor for factor in KAR[name].split(", ") if factor not in said] == []


def test_a_system_message_comes_first() -> None:
    prompt = user_prompt(MOVIES, "7", "a user", HISTORY, "Be kind.")
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 9])
def test_shortening_drops_the_oldest_entries_and_nothing_else(keep: int) -> None:
    long = user_prompt(MOVIES, "7", "a user", HISTORY, "Be kind.")
    short = user_prompt(MOVIES, "7", "a user", HISTORY[3 - min(keep, 3) :], "Be kind.")
    assert shorten(long, keep) == short


def test_shortening_survives_a_template_that_starts_with_the_history() -> None:
    domain = customise(MOVIES, PromptsConfig(user="{history}: what does {profile} like?"))
    prompt = shorten(user_prompt(domain, "7", "a user", HISTORY, None), 1)
    assert prompt.messages[-1]["content"] == f"{HISTORY[-1]}: what does a user like?"


def titled(*titles: str) -> list[dict[str, Any]]:
    return [{"title": title, "attributes": {"genre": ["War", "Drama"]}} for title in titles]


def test_entries_say_what_the_config_asks_for() -> None:
    config = PromptsConfig(rated="{verdict} {title}{attributes}", unrated="{title} ?")
    entries = history_entries(customise(MOVIES, config), titled("A", "B"), [4.0, float("nan")], 3.0)
    assert entries == ["loved A (genre: War, Drama)", "B ?"]


def test_entries_show_stars_only_where_there_are_any() -> None:
    entries = history_entries(MOVIES, titled("A", "B", "C"), [4.0, 3.5, float("nan")], 3.0)
    assert entries == ['"A", 4 stars', '"B", 3.5 stars', '"C"']


def test_braces_in_titles_are_left_alone() -> None:
    entries = history_entries(MOVIES, titled("{title} {0}"), [4.0], 3.0)
    assert entries == ['"{title} {0}", 4 stars']
    assert "{title} {0}" in user_prompt(MOVIES, "7", "a user", entries, None).messages[0]["content"]


def test_item_text_is_title_and_known_attributes() -> None:
    attributes = {"genre": ["Drama", "War"], "brand": []}
    assert item_text(MOVIES, "Ran (1985)", attributes) == "Ran (1985). genre: Drama, War."
    assert item_text(MOVIES, "Ran (1985)", {}) == "Ran (1985)."


def test_templates_and_factors_come_from_the_config() -> None:
    config = PromptsConfig(
        user="{profile}: {history} -> {factors}", item="{title}!", factors=["pace", "cast", "end"]
    )
    domain = customise(MOVIES, config)
    content = user_prompt(domain, "7", "a user", ["x"], None).messages[0]["content"]
    assert content == "a user: x -> pace, cast and end"
    item = {"item": "i", "title": "Heat", "attributes": {}}
    assert item_prompt(domain, item, None).messages[0]["content"] == "Heat!"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"user": "{history} {mood}"}, r"data\.prompts\.user: unknown placeholder \{mood\}"),
        ({"user": "{history} {0}"}, r"data\.prompts\.user: unknown placeholder \{0\}"),
        ({"user": "{history.a}"}, r"data\.prompts\.user: unknown placeholder \{history\.a\}"),
        ({"user": "{history} {"}, r"data\.prompts\.user: broken template"),
        ({"user": "{history:d}"}, r"data\.prompts\.user: broken template"),
        ({"user": "what next?"}, r"data\.prompts\.user: expected the placeholder \{history\}"),
        ({"item": "{history}"}, r"data\.prompts\.item: unknown placeholder \{history\}"),
        ({"item": "tell me"}, r"data\.prompts\.item: expected the placeholder \{title\}"),
    ],
)
def test_a_bad_template_is_an_input_error(config: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        customise(MOVIES, PromptsConfig(**config))
