"""Malformed candidate lists, texts beside them and workspaces, given to `predict`."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ranking_world as world
from malformed_input import Malformed, check_refusal, rows, write

from dpo4rec_jax import predict

FINE = json.dumps({"user": "u0", "items": ["i1", "i2", "i3"]})
Make = Callable[[Path], list[str]]


def lists(*lines: str, texts: str | None = None) -> Make:
    """A sound line before those given, so that the line with the fault is the second."""
    return raw("\n".join((FINE, *lines, "")).encode(), texts=texts)


def raw(content: bytes, texts: str | None = None, name: str = "l.jsonl") -> Make:
    def make(directory: Path) -> list[str]:
        given = ["--input", str(write(directory, {name: content}) / name)]
        if texts is not None:
            given += ["--texts", str(write(directory, {"t.jsonl": texts + "\n"}) / "t.jsonl")]
        return [*given, "--workdir", str(world.finished().path)]

    return make


def one(**values: object) -> str:
    return json.dumps({"user": "u0", "items": ["i1", "i2"]} | values)


def path_as(option: str, name: str = "nothing") -> Make:
    """A sound call but for one option, which names a path that is not there, or a directory."""
    return lambda directory: [*lists()(directory), option, str(directory / name)]


def damaged(damage: Callable[[Path], object]) -> Make:
    def make(directory: Path) -> list[str]:
        workspace = Path(shutil.copytree(world.finished().path, directory / "run"))
        damage(workspace)
        return [*lists()(directory), "--workdir", str(workspace)]

    return make


def cut(name: str, length: int) -> Make:
    """A file of the workspace that ends early."""

    def damage(workspace: Path) -> None:
        path = workspace / name
        path.write_bytes(path.read_bytes()[:length])

    return damaged(damage)


def file(name: str, content: str) -> Make:
    return damaged(lambda workspace: (workspace / name).write_text(content))


def no_rerankers(workspace: Path) -> None:
    for round in (0, 1):
        shutil.rmtree(workspace / f"round{round}" / "rank")


FORM = r'l\.jsonl:2: expected {"user": raw id, "items": \[raw ids\]}, got '
LISTS = (
    Malformed("no JSON", lists("u0: i1, i2"), r"l\.jsonl:2: not JSON: Expecting value"),
    Malformed("cut", lists('{"user": "u0", "items": ["i1"'), r":2: not JSON: Expecting ','"),
    Malformed("a blank line", lists("", FINE), r"l\.jsonl:2: not JSON: Expecting value"),
    Malformed("two in a line", lists(FINE + FINE), r"l\.jsonl:2: not JSON: Extra data"),
    Malformed("a list", lists('["i1", "i2"]'), r"l\.jsonl:2: expected an object, got \['i1'"),
    Malformed("a word", lists('"u0"'), r"l\.jsonl:2: expected an object, got 'u0'"),
    Malformed("null", lists("null"), r"l\.jsonl:2: expected an object, got None"),
    Malformed("no user", lists('{"items": ["i1", "i2"]}'), FORM),
    Malformed("no items", lists('{"user": "u0"}'), FORM),
    Malformed("misspelt", lists('{"user": "u0", "item": ["i1"]}'), FORM),
    Malformed("no candidate", lists(one(items=[])), FORM),
    Malformed("a word of items", lists(one(items="i1, i2")), FORM),
    Malformed("an object of items", lists(one(items={"i1": 1})), FORM),
    Malformed("null items", lists(one(items=None)), FORM),
    Malformed("null user", lists(one(user=None)), FORM),
    Malformed("a list of users", lists(one(user=["u0"])), FORM),
    Malformed("user true", lists(one(user=True)), FORM),
    Malformed("user 1.5", lists(one(user=1.5)), FORM),
    Malformed("item null", lists(one(items=["i1", None])), r":2: items: .* raw ids, got None"),
    Malformed("item in a list", lists(one(items=[["i1"]])), r":2: items: .* ids, got \['i1'\]"),
    Malformed("item an object", lists(one(items=[{"item": "i1"}])), r":2: items: expected raw ids"),
    Malformed("item true", lists(one(items=["i1", True])), r":2: items: .* raw ids, got True"),
    Malformed("item NaN", lists('{"user": "u0", "items": [NaN]}'), r":2: items: .* ids, got nan"),
    Malformed("unknown item", lists(one(items=["i1", "x"])), r":2: unknown item 'x'; .* --texts"),
    Malformed("item of the place", lists(one(items=[1, 2])), r":2: unknown item '1'; describe"),
    Malformed("unknown user", lists(one(user="x")), r":2: unknown user 'x'; .* --texts"),
    Malformed("twice", lists(one(items=["i1", "i2", "i1"])), r":2: item 'i1' stands twice; name"),
    Malformed(
        "longer than its positions",
        lists(one(items=[f"i{n}" for n in range(11)])),
        r":2: 11 candidates; prm learned positions up to 10: shorten the list or train with",
    ),
    Malformed("a long id", lists(one(user="u" * 9999)), r":2: unknown user 'u{79}; describe"),
    Malformed("deep", lists("[" * 9999), r"l\.jsonl:2: not JSON: nested too deeply"),
    Malformed("digits", lists('{"user": ' + "9" * 5000 + "}"), r"l\.jsonl:2: not JSON: Exceeds"),
    Malformed("half a pair", lists(r'{"user": "\ud800"}'), r":2: not JSON: holds half a surrogate"),
    Malformed("bytes", raw(b'{"user": "caf\xe9"}\n'), r"l\.jsonl:1: expected UTF-8 text"),
    Malformed("UTF-16", raw(FINE.encode("utf-16")), r"l\.jsonl:1: expected UTF-8 text"),
    Malformed("packed", raw(gzip.compress(FINE.encode()), name="l.jsonl.gz"), r":1: .* unpack"),
    Malformed("empty", raw(b""), r"l\.jsonl: expected candidate lists, got an empty file"),
    Malformed("no file", path_as("--input"), r"nothing: no such file; check --input"),
    Malformed("a directory", path_as("--input", "."), r": no such file; check --input"),
)
TEXTS = (
    Malformed("texts: none", path_as("--texts"), r"nothing: cannot read the texts: No such file"),
    Malformed("texts: no JSON", lists(texts="likes drama"), r"t\.jsonl:1: not JSON: Expecting"),
    Malformed("texts: no id", lists(texts='{"text": "x"}'), r"t\.jsonl:1: expected a key user or"),
    Malformed("texts: null", lists(texts='{"item": "x", "text": null}'), r":1: text: expected a s"),
    Malformed(
        "unknown item beside texts",
        lists(one(items=["i1", "x"]), texts='{"item": "y", "text": "a drama"}'),
        r"l\.jsonl:2: unknown item 'x'; describe it by --texts",
    ),
    Malformed(
        "an item's text for a user",
        lists(one(user="x"), texts='{"item": "x", "text": "a drama"}'),
        r"l\.jsonl:2: unknown user 'x'",
    ),
)
PLACES = (
    Malformed("workdir: none", path_as("--workdir"), r"nothing: .* got no config\.yaml; check --w"),
    Malformed("workdir: empty", path_as("--workdir", "."), r"expected the workspace of a run, got"),
    Malformed("config", file("config.yaml", "rank: ["), r"config\.yaml:1: not valid YAML"),
    Malformed("unknown arm", lambda d: [*lists()(d), "--arm", "kra"], "--arm kra: .* dpo4rec-1, "),
    Malformed("no re-ranker", damaged(no_rerankers), "no re-ranker yet; run stage rank"),
    Malformed("cut re-ranker", cut("round1/rank/dpo4rec-1.safetensors", 99), "not a file of re-ra"),
    Malformed(
        "empty re-ranker", cut("round1/rank/dpo4rec-1.safetensors", 0), "not a file of re-ra"
    ),
    Malformed("no summary", file("round1/rank/dpo4rec-1.json", ""), r"1\.json: not the validation"),
    Malformed("other summary", file("round1/rank/dpo4rec-1.json", "[1]"), "not the validation met"),
    Malformed("cut vectors", cut("round1/encode/vectors.npz", 999), r"vectors\.npz: damaged"),
    Malformed("empty vectors", cut("round1/encode/vectors.npz", 0), r"vectors\.npz: damaged"),
    Malformed("cut lists", cut("prepare/lists.npz", 999), r"prepare: damaged .*run stage prepare"),
    Malformed("empty lists", cut("prepare/lists.npz", 0), r"prepare: damaged .*run stage prepare"),
    Malformed("items", file("prepare/items.jsonl", "{"), r"prepare: damaged .*run stage prepare"),
    Malformed("output: a directory", path_as("--output", "."), r": Is a directory"),
    Malformed("output: below a file", path_as("--output", "l.jsonl/s"), r"(Not a dir|File exists)"),
)


@rows(*LISTS, *TEXTS, *PLACES)
def test_it_is_one_line_and_status_2(
    row: Malformed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = tmp_path / "out" / "s.jsonl"
    arguments = ["--output", str(scores), *row.make(tmp_path / "in")]
    check_refusal(predict.main(arguments), capsys.readouterr().err, row.says, tmp_path)
    assert not scores.exists()
