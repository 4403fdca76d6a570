"""Texts from an OpenAI-compatible endpoint: ChatGPT, or a vLLM server, in place of the policy.

One request a text, so that a run that stops keeps every text it paid for. The key is read from an
environment variable, travels in the Authorization header and nowhere else: redirects are refused
rather than followed, and what the server says is shown with the key masked.
"""

from __future__ import annotations

import email.message
import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from dpo4rec_jax.config import EndpointConfig, InputError
from dpo4rec_jax.workspace import parse_json

FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_ASKED_S = 0.5, 60.0, 600.0
LAST_WAIT_S = 30.0  # for replies in flight when another request has failed for good
SHOWN = 160  # characters of a server's words in an error

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Request(Generic[Name]):
    name: Name
    messages: Sequence[Mapping[str, str]]
    max_tokens: int


@dataclass(frozen=True)
class Reply(Generic[Name]):
    name: Name
    text: str
    finish: Literal["stop", "length"]


class Endpoint:
    """A checked address and key. Raises InputError for a variable that is not set or a URL that
    is not http(s) or carries a password."""

    def __init__(self, config: EndpointConfig, *, temperature: float = 1.0, top_p: float = 1.0):
        url = urllib.parse.urlsplit(config.base_url)
        where = "reason.endpoint.base_url"
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"{where}: expected http(s)://host/..., got {config.base_url!r}")
        if url.username or url.password:
            raise InputError(f"{where}: holds a password; name an environment variable in key_env")
        self._key = None
        if config.key_env is not None:
            self._key = os.environ.get(config.key_env, "").strip()
            if not self._key:
                raise InputError(
                    f"reason.endpoint.key_env: environment variable {config.key_env} is not set; "
                    "set it, or key_env: null for a server without keys"
                )
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._options = {"model": config.model, "temperature": temperature, "top_p": top_p}
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopping = threading.Event()

    def replies(self, requests: Iterable[Request[Name]]) -> Iterator[Reply[Name]]:
        """Yields replies as they arrive, `concurrency` requests in flight.

        Raises InputError at once where the key is refused or the request is not understood, and
        after `retries` more tries where the server stays broken or out of reach.
        """
        waiting = queue.SimpleQueue[Request[Name]]()
        results = queue.SimpleQueue[Reply[Name] | Exception | None]()
        for request in requests:
            waiting.put(request)
        self._stopping.clear()
        working = min(self._config.concurrency, waiting.qsize())
        for _ in range(working):
            threading.Thread(target=self._work, args=(waiting, results), daemon=True).start()
        failure, deadline = None, None
        try:
            while working:
                patience = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                try:
                    result = results.get(timeout=patience)
                except queue.Empty:
                    break
                if result is None:
                    working -= 1
                elif isinstance(result, Reply):
                    yield result
                elif failure is None:  # what is in flight is paid for: wait for it a little
                    failure, deadline = result, time.monotonic() + LAST_WAIT_S
                    self._stopping.set()
        finally:
            self._stopping.set()
        if failure is not None:
            raise failure

    def _work(self, waiting: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
        """One thread: request after request until none is left or all stop; then None."""
        try:
            while not self._stopping.is_set():
                results.put(self._ask(waiting.get_nowait()))
        except queue.Empty:
            pass
        except Exception as error:
            results.put(error)
        finally:
            results.put(None)

    def _ask(self, request: Request[Name]) -> Reply[Name]:
        for attempt in range(self._config.retries + 1):
            try:
                text, finish = self._once(request)
                return Reply(request.name, text, finish)
            except _TryAgain as error:
                wait = error.wait_s
                if wait is None:
                    most = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
                    wait = random.uniform(most / 2, most)
                problem = str(error)
            if attempt < self._config.retries and self._stopping.wait(min(wait, LONGEST_ASKED_S)):
                break
        raise InputError(
            f"reason.endpoint: {self._url}: {problem} after {self._config.retries + 1} tries; "
            "the texts so far are kept: continue with --resume"
        )

    def _once(self, request: Request[Name]) -> tuple[str, Literal["stop", "length"]]:
        body = self._options | {
            "messages": [dict(message) for message in request.messages],
            "max_tokens": request.max_tokens,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sent = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(sent, timeout=self._config.timeout_s) as reply:
                return _parse(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise _TryAgain(f"no whole reply ({type(reason).__name__}: {reason})") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What a status that is no success means: the user's mistake, or worth another try."""
        if error.code in (401, 403):
            key = self._config.key_env
            given = f"the key in {key} is refused" if key else "it wants a key: set key_env"
            return InputError(f"reason.endpoint: {self._url}: {error.code}: {given}")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return _TryAgain(f"status {error.code}", _retry_after(error.headers))
        if 300 <= error.code < 400:
            to = self._masked(error.headers.get("Location", "nowhere"))
            return InputError(
                f"reason.endpoint.base_url: {self._url} redirects to {to}; name that address"
            )
        try:
            said = self._masked(error.read().decode("utf-8", "replace"))
        except (http.client.HTTPException, OSError):
            said = ""
        return InputError(f"reason.endpoint: {self._url}: status {error.code}: {said}")

    def _masked(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:SHOWN]


class _TryAgain(Exception):
    """A failure that may pass; `wait_s` where the server said how long to wait."""

    def __init__(self, problem: str, wait_s: float | None = None):
        super().__init__(problem)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _parse(body: bytes) -> tuple[str, Literal["stop", "length"]]:
    """Text and finish of a chat completion; a null content (a refusal) is an empty text."""
    try:
        choice = parse_json(body.decode())["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        start = " ".join(body[:SHOWN].decode("utf-8", "replace").split())[:40]
        raise _TryAgain(f"the reply is not a chat completion (it begins {start!r})") from None
    if not isinstance(text, str | None):
        raise _TryAgain("the reply's content is not a text")
    return text or "", "length" if finish == "length" else "stop"


def _retry_after(headers: email.message.Message) -> float | None:
    """Seconds to wait by the Retry-After header, which holds seconds or a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
