"""Reads a config: strict YAML over its base files and under `--set` pairs.

Every mistake is one line (`InputError`) that names the file or the key, what was expected, what was
found and what to do.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from dpo4rec_jax.config.errors import InputError
from dpo4rec_jax.config.sections import Config, Section


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file over its `base:` files and applies `a.b=c` overrides in order.

    Raises InputError, one line, for a missing file, bad YAML, an unknown key (with the nearest
    known one), a wrong type or a value out of bounds.
    """
    values = _read_yaml(Path(path), chain=())
    values.setdefault("name", Path(path).stem)
    for override in overrides:
        _apply_override(values, override)
    _check_keys(values, Config, prefix="", source=str(path))
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {_first_line(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise InputError(f"{path}: base files form a circle; remove one `base:`")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot read the config: {reason}; check --config") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected UTF-8 text, got other bytes; check --config") from None
    try:
        values = yaml.safe_load(text)
    except Exception as error:  # YAMLError, and what its readers of dates and numbers raise
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{line}: not valid YAML: {problem}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    _check_names(values, path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise InputError(f"{path}: base: expected a file name, got {base!r}")
    return _merge(_read_yaml(path.parent / base, (*chain, path.resolve())), values)


def _check_names(values: dict[Any, Any], path: Path) -> None:
    """YAML takes numbers, dates and null for keys; a config's keys are words."""
    for key, value in values.items():
        if not isinstance(key, str):
            raise InputError(f"{path}: expected a word as key, got {key!r}")
        if isinstance(value, dict):
            _check_names(value, path)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b=c")
    try:
        value = yaml.safe_load(text)
    except Exception:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from None
    *sections, key = path.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[key] = value


def _check_keys(values: dict[str, Any], model: type[Section], prefix: str, source: str) -> None:
    """Names the nearest known key for a misspelt one, before pydantic reports it less helpfully."""
    for key, value in values.items():
        known = model.model_fields
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"{source}: {prefix}{key}: unknown key; {hint}")
        section = section_of(known[key].annotation)
        if section is not None and isinstance(value, dict):
            _check_keys(value, section, f"{prefix}{key}.", source)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key of this type holds, None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [section_of(part) for part in typing.get_args(annotation)]
        return next((section for section in found if section is not None), None)
    return None


def _first_line(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # of several keys together: it says what it got
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {message}, got {first.get('input')!r:.80}"
