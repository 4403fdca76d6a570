"""Endpoints that never give a text, asked by `train`; and no key in any file or line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from chat_server import Handler, Respond, Server, serving
from malformed_input import Malformed, check_refusal, rows, settings, write

from dpo4rec_jax import train
from dpo4rec_jax.sampling import endpoint

KEY = "sk-never-to-be-seen-0123456789"
CONFIG = """
data: {synthetic: {users: 40, items: 30, interactions: 20}}
reason:
  item_texts: metadata
  endpoint: {base_url: URL, model: m, key_env: TABLE_KEY, retries: 1, timeout_s: 5}
"""


def always(status: int, body: bytes | dict, **headers: str) -> Respond:
    return lambda handler, number, asked: handler.reply(status, body, **headers)


def choice(content: object) -> dict:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


def hang_up(handler: Handler, number: int, asked: dict) -> None:
    handler.connection.close()


TRIES = "after 2 tries; the texts so far are kept: continue with --resume"
LIES = {"error": {"message": f"Incorrect API key provided: {KEY}"}}


def told(respond: Respond, *more: str) -> Callable[[Server], Sequence[str]]:
    """Tells the server what to answer; returns arguments of the command."""

    def make(server: Server) -> Sequence[str]:
        server.respond = respond
        return more

    return make


def set_(**values: object) -> Callable[[Server], Sequence[str]]:
    return lambda server: settings(**{f"reason__endpoint__{k}": v for k, v in values.items()})


ENDPOINTS = (
    Malformed(
        "HTML", told(always(200, b"<!doctype html>\n<p>hi")), f"<!doctype html> <p>hi.*{TRIES}"
    ),
    Malformed("no JSON", told(always(200, b"")), f"not a chat completion .*{TRIES}"),
    Malformed("other bytes", told(always(200, b"\xff\xfe")), f"not a chat completion .*{TRIES}"),
    Malformed("too deep", told(always(200, b"[" * 9999)), f"not a chat completion .*{TRIES}"),
    Malformed(
        "half", told(always(200, b'{"cho', Content_Length="500")), f"no whole reply .*{TRIES}"
    ),
    Malformed("hangs up", told(hang_up), f"no whole reply .*{TRIES}"),
    Malformed("no choices", told(always(200, {"choices": []})), f"not a chat completion .*{TRIES}"),
    Malformed(
        "a list", told(always(200, choice(["a"]))), f"the reply's content is not a text {TRIES}"
    ),
    Malformed(
        "half a pair", told(always(200, choice("\ud800"))), f"not a chat completion .*{TRIES}"
    ),
    Malformed("429", told(always(429, {}, Retry_After="0")), f"status 429 {TRIES}"),
    Malformed("500", told(always(500, {"error": "no"})), f"status 500 {TRIES}"),
    Malformed("502", told(always(502, b"<html>bad gateway")), f"status 502 {TRIES}"),
    Malformed("401", told(always(401, LIES)), "401: the key in TABLE_KEY is refused"),
    Malformed("404", told(always(404, LIES)), r"status 404: .*provided: \*\*\*"),
    Malformed(
        "redirect", told(always(301, b"", Location="/else")), "redirects to .*; name that addr"
    ),
    Malformed("not there", set_(base_url="http://127.0.0.1:9/v1"), f"no whole reply .*{TRIES}"),
    Malformed(
        "no key", set_(key_env="NO_SUCH_KEY"), "key_env: environment variable NO_SUCH_KEY is n"
    ),
    Malformed("no scheme", set_(base_url="host/v1"), r"base_url: expected http\(s\)://host/"),
    Malformed("ftp", set_(base_url="ftp://host/v1"), r"base_url: expected http\(s\)://host/"),
    Malformed(
        "password", set_(base_url="https://a:b@host/v1"), "holds a password; name an environ"
    ),
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TABLE_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    with serving() as server:
        yield server


def command(server: Server, directory: Path, more: Sequence[str] = ()) -> list[str]:
    config = write(directory, {"c.yaml": CONFIG.replace("URL", server.url)}) / "c.yaml"
    workdir = ["--workdir", str(directory / "w"), "--stages", "prepare,round0/reason"]
    return ["--config", str(config), *workdir, "--set", "policy.path=never-loaded", *more]


def assert_no_key(said: str, directory: Path) -> None:
    assert KEY not in said
    for path in directory.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@rows(*ENDPOINTS)
def test_it_is_one_line_and_status_2(
    row: Malformed, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status = train.main(command(server, tmp_path, row.make(server)))
    captured = capsys.readouterr()
    check_refusal(status, captured.err, row.says, tmp_path / "w")
    assert_no_key(captured.out + captured.err, tmp_path)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_the_key_of_a_run_is_in_no_file_and_no_line(
    server: Server, tmp_path: Path, broken: bool
) -> None:
    if broken:
        server.respond = always(500, LIES)
    program = [sys.executable, "-m", "dpo4rec_jax.train", *command(server, tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == (2 if broken else 0), done.stderr
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    assert_no_key(done.stdout + done.stderr, tmp_path)
    assert broken or (tmp_path / "w" / "round0" / "reason" / "users.jsonl").exists()
