"""The endpoint client against a real HTTP server on loopback that misbehaves as told."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator

import pytest
from chat_server import Handler, Respond, Server, answer, completion, serving

from dpo4rec_jax.config import EndpointConfig, InputError
from dpo4rec_jax.sampling import endpoint as endpoint_module
from dpo4rec_jax.sampling.endpoint import Endpoint, Reply, Request

KEY = "sk-test-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "What does this user like? Ünïcode"}]


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.01)
    with serving() as server:
        yield server


def ask(server: Server, number: int = 1, **settings) -> list[Reply[int]]:
    values = {"base_url": server.url, "model": "m", "key_env": "TEST_KEY", "retries": 2}
    endpoint = Endpoint(EndpointConfig(**(values | settings)), temperature=0.5, top_p=0.9)
    return list(endpoint.replies(Request(n, MESSAGES, 32) for n in range(number)))


def then_answer(first: Respond, times: int = 1) -> Respond:
    """`first` for the first so many requests, a good answer after."""

    def respond(handler: Handler, number: int, body: dict) -> None:
        (first if number < times else answer)(handler, number, body)

    return respond


def test_a_request_is_an_openai_chat_completion_with_the_key_as_bearer(server) -> None:
    assert ask(server) == [Reply(0, "text 0", "stop")]
    ((path, headers, body, _),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m", "messages": MESSAGES, "max_tokens": 32, "temperature": 0.5, "top_p": 0.9,
    }  # fmt: skip


def test_every_request_is_answered_once_and_at_most_concurrency_are_in_flight(server) -> None:
    in_flight, seen_in_flight = 0, []

    def respond(handler: Handler, number: int, body: dict) -> None:
        nonlocal in_flight
        with server.lock:
            in_flight += 1
            seen_in_flight.append(in_flight)
        time.sleep(0.02)
        with server.lock:  # before the answer: the client's next request may overtake what follows
            in_flight -= 1
        answer(handler, number, body)

    server.respond = respond
    replies = ask(server, number=12, concurrency=3)
    assert sorted(reply.name for reply in replies) == list(range(12))
    assert max(seen_in_flight) == 3


def test_a_text_cut_at_the_limit_finishes_by_length_and_a_refusal_is_empty(server) -> None:
    server.respond = lambda handler, n, body: handler.reply(200, completion("cut", "length"))
    assert ask(server) == [Reply(0, "cut", "length")]
    server.respond = lambda handler, n, body: handler.reply(200, completion(None))
    assert ask(server) == [Reply(0, "", "stop")]


@pytest.mark.parametrize("date", [False, True])
def test_429_is_tried_again_after_what_retry_after_says(server, date) -> None:
    wait = email.utils.formatdate(time.time() + 1.6, usegmt=True) if date else "0.3"
    server.respond = then_answer(lambda handler, n, body: handler.reply(429, {}, Retry_After=wait))
    assert [reply.text for reply in ask(server)] == ["text 1"]
    (*_, first), (*_, second) = server.seen
    assert second - first >= 0.3 - 0.01


def test_html_half_and_broken_replies_are_tried_again(server) -> None:
    def html(handler: Handler, number: int, body: dict) -> None:
        handler.reply(200, b"<html>gateway</html>")

    def half(handler: Handler, number: int, body: dict) -> None:
        handler.reply(200, b'{"choices": [{"mess', Content_Length="500")

    def no_choices(handler: Handler, number: int, body: dict) -> None:
        handler.reply(200, {"choices": []})

    def hang_up(handler: Handler, number: int, body: dict) -> None:
        handler.connection.close()

    def gateway(handler: Handler, number: int, body: dict) -> None:
        handler.reply(502, b"<html>bad gateway</html>")

    for trouble in (html, half, no_choices, hang_up, gateway):
        server.seen.clear()
        server.respond = then_answer(trouble)
        assert [reply.text for reply in ask(server)] == ["text 1"], trouble.__name__


def test_a_server_that_stays_broken_ends_the_run_in_one_line(server) -> None:
    server.respond = lambda handler, n, body: handler.reply(500, {"error": "no"})
    with pytest.raises(InputError) as error:
        ask(server)
    assert len(server.seen) == 3  # the first try and two more
    message = str(error.value)
    assert "status 500 after 3 tries" in message and "--resume" in message
    assert "\n" not in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_at_once(server, status) -> None:
    said = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    server.respond = lambda handler, n, body: handler.reply(status, said)
    with pytest.raises(InputError, match=f"{status}: the key in TEST_KEY is refused") as error:
        ask(server)
    assert len(server.seen) == 1
    assert KEY not in str(error.value)


def test_a_request_that_is_not_understood_shows_the_servers_words_without_the_key(server) -> None:
    said = {"error": {"message": f"model m not found for {KEY}"}}
    server.respond = lambda handler, n, body: handler.reply(404, said)
    with pytest.raises(InputError, match=r"status 404: .*model m not found for \*\*\*"):
        ask(server)
    assert len(server.seen) == 1


def test_a_redirect_is_not_followed_so_the_key_stays_here(server) -> None:
    other = f"http://127.0.0.1:{server.server_address[1]}/elsewhere"
    for status in (301, 302, 307, 308):
        server.seen.clear()
        server.respond = lambda handler, n, body, s=status: handler.reply(s, b"", Location=other)
        with pytest.raises(InputError, match=r"redirects to .*/elsewhere"):
            ask(server)
        assert len(server.seen) == 1


def test_replies_before_a_failure_are_kept(server) -> None:
    def respond(handler: Handler, number: int, body: dict) -> None:
        if number < 3:
            answer(handler, number, body)
        else:
            handler.reply(401, {})

    server.respond = respond
    values = {"base_url": server.url, "model": "m", "key_env": "TEST_KEY", "concurrency": 1}
    replies = Endpoint(EndpointConfig(**values)).replies(Request(n, MESSAGES, 8) for n in range(9))
    kept = []
    with pytest.raises(InputError):
        for reply in replies:
            kept.append(reply.name)
    assert kept == [0, 1, 2]
    assert len(server.seen) == 4
