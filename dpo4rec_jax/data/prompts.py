"""What the LLM is asked: KAR's factorised prompts (Xi et al. 2023), worded for each domain."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo4rec_jax.config import InputError, PromptsConfig

# Between history entries; a newline is whitespace to every tokenizer and never part of a title.
SEPARATOR = "\n"

# What `{verdict}` in an entry says of a rating above the threshold, and of another.
LIKED, DISLIKED = "loved", "disliked"


@dataclass(frozen=True)
class Prompt:
    """A chat to complete; `history` holds the entries its user message lists, oldest first."""

    kind: str
    id: str
    messages: list[dict[str, str]]
    history: list[str]


@dataclass(frozen=True)
class Domain:
    """The wording of one kind of data.

    `user`, `item` and `text` are templates; `rated` and `unrated` make one history entry each,
    `sentence` the history that the encoder reads before the LLM's reasoning (KAR does the same),
    `text` an item's metadata with each attribute worded by `attribute`.
    """

    factors: tuple[str, ...]
    user: str
    item: str
    sentence: str
    rated: str = '"{title}", {stars} stars'
    unrated: str = '"{title}"'
    profile: str = "a user"
    attribute: str = "{name}: {values}"
    between: str = "; "
    text: str = "{title}. {attributes}."


_ASK = (
    "\n\nAnalyze this user's preferences on {noun} about factors like {{factors}}. "
    "Explain briefly, with details from the history."
)


def _domain(noun: str, one: str, activity: str, factors: Sequence[str]) -> Domain:
    return Domain(
        factors=tuple(factors),
        user=f"This is the {activity} history of {{profile}}. The oldest comes first.\n{{history}}"
        + _ASK.format(noun=noun),
        item=f"Introduce the {one} {{title}}{{attributes}}. Describe its {{factors}}. Be brief.",
        sentence=f"The user's {activity} history: {{history}}.",
    )


DOMAINS = {
    "movies": _domain(
        "movies",
        "movie",
        "movie viewing",
        (
            "genre",
            "director and actors",
            "time period and country",
            "character",
            "plot and theme",
            "mood and tone",
            "critical acclaim and awards",
            "production quality",
            "soundtrack",
        ),
    ),
    "books": _domain(
        "books",
        "book",
        "book reading",
        (
            "genre",
            "author",
            "writing style",
            "theme",
            "setting",
            "length and complexity",
            "time period",
            "literary quality",
            "critical acclaim",
        ),
    ),
    "beauty": _domain(
        "beauty products",
        "beauty product",
        "beauty purchase",
        (
            "product type",
            "brand",
            "ingredients",
            "skin or hair concern",
            "effect and finish",
            "scent and texture",
            "price and quality",
            "packaging",
            "reputation",
        ),
    ),
    "products": _domain(
        "products",
        "product",
        "purchase",
        ("category", "brand", "functionality", "quality", "price", "design", "reputation"),
    ),
}

# Of each template: the placeholders it may hold, and the one that makes prompts differ.
PLACEHOLDERS = {
    "user": (("profile", "history", "factors"), "history"),
    "item": (("title", "attributes", "factors"), "title"),
    "rated": (("title", "attributes", "stars", "verdict"), "title"),
    "unrated": (("title", "attributes"), "title"),
}


def customise(domain: Domain, config: PromptsConfig) -> Domain:
    """The domain with the config's templates and factors in place of its own.

    Raises InputError for a template with another placeholder, a broken one, or one without the
    placeholder that makes prompts differ.
    """
    changes: dict[str, Any] = {}
    for kind, (allowed, needed) in PLACEHOLDERS.items():
        template = getattr(config, kind)
        if template is not None:
            _check_template(template, f"data.prompts.{kind}", allowed, needed)
            changes[kind] = template
    if config.factors is not None:
        changes["factors"] = tuple(config.factors)
    return replace(domain, **changes)


def user_prompt(
    domain: Domain, user: str, profile: str, history: list[str], system: str | None
) -> Prompt:
    listed = SEPARATOR.join(history)
    content = domain.user.format(
        profile=profile, history=listed, factors=enumerated(domain.factors)
    )
    return Prompt("user", user, _chat(content, system), history)


def item_prompt(domain: Domain, item: dict[str, Any], system: str | None) -> Prompt:
    content = domain.item.format(
        title=item["title"],
        attributes=in_brackets(domain, item["attributes"]),
        factors=enumerated(domain.factors),
    )
    return Prompt("item", item["item"], _chat(content, system), [])


def shorten(prompt: Prompt, keep: int) -> Prompt:
    """The prompt with only the newest `keep` history entries; the instruction stays whole."""
    if keep >= len(prompt.history):
        return prompt
    listed = SEPARATOR.join(prompt.history)
    newest = prompt.history[len(prompt.history) - keep :]
    *before, last = prompt.messages
    content = last["content"].replace(listed, SEPARATOR.join(newest), 1)
    return replace(prompt, messages=[*before, {**last, "content": content}], history=newest)


def history_entries(
    domain: Domain, items: Iterable[dict[str, Any]], ratings: Iterable[float], threshold: float
) -> list[str]:
    """One entry an interaction with an item, {"title", "attributes"}; a rating of NaN is none."""
    entries, told = [], "{attributes}" in domain.rated + domain.unrated
    for item, rating in zip(items, ratings, strict=True):
        attributes = in_brackets(domain, item["attributes"]) if told else ""
        known = {"title": item["title"], "attributes": attributes}
        if rating != rating:
            entries.append(domain.unrated.format(**known))
        else:
            verdict = LIKED if rating > threshold else DISLIKED
            entries.append(domain.rated.format(**known, stars=f"{rating:g}", verdict=verdict))
    return entries


def profile_text(domain: Domain, attributes: dict[str, str]) -> str:
    """One noun phrase, such as `a female user, aged 18-24, occupation: artist`."""
    gender, age = attributes.get("gender"), attributes.get("age")
    parts = [domain.profile.replace("a ", f"a {gender} ", 1) if gender else domain.profile]
    if age:
        parts.append(f"aged {age}")
    others = ((name, value) for name, value in attributes.items() if name not in ("gender", "age"))
    parts.extend(f"{name}: {value}" for name, value in others)
    return ", ".join(parts)


def attribute_text(domain: Domain, attributes: dict[str, list[str]]) -> str:
    """`genre: Drama, Comedy; brand: OPI`; attributes without a value are left out."""
    return domain.between.join(
        domain.attribute.format(name=name, values=", ".join(values))
        for name, values in attributes.items()
        if values
    )


def in_brackets(domain: Domain, attributes: dict[str, list[str]]) -> str:
    """` (genre: Drama, Comedy)` behind a title; nothing where nothing is known."""
    known = attribute_text(domain, attributes)
    return f" ({known})" if known else ""


def item_text(domain: Domain, title: str, attributes: dict[str, list[str]]) -> str:
    """An item's metadata as one text, for runs whose item texts no LLM writes."""
    known = attribute_text(domain, attributes)
    return domain.text.format(title=title, attributes=known) if known else f"{title}."


def enumerated(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _chat(content: str, system: str | None) -> list[dict[str, str]]:
    user = {"role": "user", "content": content}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _check_template(template: str, where: str, allowed: Sequence[str], needed: str) -> None:
    known = ", ".join(f"{{{name}}}" for name in allowed)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for name in names:
            if name not in allowed:
                raise InputError(f"{where}: unknown placeholder {{{name}}}; known: {known}")
        template.format(**dict.fromkeys(allowed, ""))
    except (ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{where}: broken template: {error}; known placeholders: {known}; a literal brace is "
            "written twice"
        ) from None
    if needed not in names:
        raise InputError(f"{where}: expected the placeholder {{{needed}}} in it")
