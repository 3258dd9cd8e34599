"""Rewards from a scorer over HTTP: the client of OpenRLHF's convention.

    POST URL  {"query": [text, ...]}  ->  {"rewards": [number, ...]}

A `query` text is prompt and completion as one text. OpenRLHF sends what the policy
saw: its template, its special tokens and the end token written out; with an `encoder`
this client does the same. Without one the text is prompt + completion as they are, and
messages are written as HH text. Such a text no longer says where the prompt ends, so
each request also carries

    "prompts": [text or messages, ...], "completions": [text, ...]
    and "tools": [list or null, ...] where a row has tools

which `rlhf-jax serve` reads instead of `query`: the scorer's own template and tokenizer
are then applied to the row, as everywhere in this package. Other servers ignore them.
"""

import contextlib
import dataclasses
import http.client
import json
import math
import numbers
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.messages import as_messages, describe, is_hh, to_hh

_TEMPORARY = (429, 502, 503, 504)
"""Statuses that another try may change."""
_TEXT_SHOWN = 300
"""Characters of a server's error that are repeated."""


@dataclasses.dataclass(frozen=True)
class HttpScorer:
    """A scorer behind a URL."""

    url: str
    """Such as http://127.0.0.1:5000/get_reward."""
    timeout_s: float
    """Longest silence of the server in one request."""
    batch_size: int = 128
    """Completions of a request."""
    tries: int = 3
    """Requests made for a batch before an unreachable or busy server is an error."""
    backoff_s: float = 0.5
    """Pause before the second try; it doubles for each further one."""
    encoder: Encoder | None = None
    """The policy's, which writes `query`; None = plain text."""

    def __post_init__(self) -> None:
        check_url(self.url)
        for name in ("timeout_s", "batch_size", "tries", "backoff_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: expected a positive number")

    def rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        tools: Sequence[list | None] | None = None,
    ) -> np.ndarray:
        """float64 [M], in input order.

        Args:
            prompts: text or messages.
            completions: as many texts.
            tools: what the template is told of tools, one entry a prompt.

        Raises:
            ValueError: no answer after all tries, an error status, or an answer that
                is not one finite number a completion; names URL and reason.
        """
        tools = tools or [None] * len(completions)
        found: list[float] = []
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            body = self._body(prompts[part], completions[part], tools[part])
            count = len(completions[part])
            where = f"completions {start} to {start + count - 1}"
            found += self._numbers(self._ask(body, where), count, where)
        return np.array(found, np.float64)

    def _body(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        tools: Sequence[list | None],
    ) -> bytes:
        query = []
        for n, triple in enumerate(zip(prompts, completions, tools, strict=True)):
            try:
                query.append(self.query(*triple))
            except ValueError as error:
                raise ValueError(
                    f"reward {self.url}: {describe(prompts[n])} and its completion "
                    f"cannot be written as one text: {error}"
                ) from None
        fields: dict[str, Any] = {
            "query": query,
            "prompts": list(prompts),
            "completions": list(completions),
        }
        if any(tools):
            fields["tools"] = list(tools)
        try:
            return json.dumps(fields, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {self.url}: the prompts cannot be written as JSON: {error}"
            ) from None

    def query(self, prompt: Any, completion: str, tools: list | None = None) -> str:
        """Prompt and completion as the one text that OpenRLHF's servers read."""
        if self.encoder is not None:
            encoded = self.encoder.encode(prompt, completion, tools=tools)
            return self.encoder.decode([*encoded.prompt, *encoded.completion])
        if isinstance(prompt, str) and not is_hh(prompt):
            return prompt + completion
        return f"{to_hh(as_messages(prompt))}\n\nAssistant: {completion}"

    def _ask(self, body: bytes, where: str) -> bytes:
        """The body of the answer; tries again while the server is away or busy."""
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            request = urllib.request.Request(
                self.url, data=body, headers={"Content-Type": "application/json"}
            )
            try:
                with _opener(self.url).open(request, timeout=self.timeout_s) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                reason = _status(error)
                if error.code not in _TEMPORARY:
                    raise ValueError(f"reward {self.url}: {reason} ({where})") from None
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = f"{type(cause).__name__}: {cause}"
                if isinstance(cause, ConnectionError):  # or too long for the server
                    reason += f" (the request has {len(body):,} bytes)"
        raise ValueError(
            f"reward {self.url}: no answer in {self.tries} tries ({where}); "
            f"the last: {reason}"
        )

    def _numbers(self, answer: bytes, count: int, where: str) -> Iterator[float]:
        begin = f"reward {self.url}: expected {{'rewards': [{count} numbers]}}, got"
        try:
            values = json.loads(answer)
        except (ValueError, RecursionError):
            text = answer[:_TEXT_SHOWN].decode("utf-8", "replace")
            raise ValueError(f"{begin} no JSON but {text!r} ({where})") from None
        if isinstance(values, dict) and "rewards" in values:
            values = values["rewards"]
        else:
            raise ValueError(f"{begin} {describe(values)} ({where})")
        if not isinstance(values, list) or len(values) != count:
            size = f"{len(values)} of them" if isinstance(values, list) else ""
            raise ValueError(f"{begin} {size or describe(values)} ({where})")
        for n, value in enumerate(values):
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real:
                raise ValueError(f"{begin} {describe(value)} at {n} ({where})")
            try:
                yield float(value)
            except OverflowError:  # JSON has integers of any size
                raise ValueError(
                    f"{begin} a number too large for a float at {n} ({where})"
                ) from None


def check_url(url: str) -> None:
    """Refuses what is not a plain http or https URL of a host.

    Raises:
        ValueError: says what is wrong, without repeating a password.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"reward {parts.scheme}://...@{parts.hostname}: user and password in the "
            "URL are not sent; use a server or a tunnel that needs none"
        )
    try:
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # the port is no number
        raise ValueError(f"reward {url}: {error}") from None
    if not named or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"reward {url!r}: expected http://HOST:PORT/PATH")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would repeat the POST as a GET: it is an error status instead."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Opens URLs; a proxy of the environment is not asked for this machine itself."""
    host = urllib.parse.urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    proxies = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirect, *proxies)


def _status(error: urllib.error.HTTPError) -> str:
    """Status and what the server says of it."""
    try:
        text = error.read(64 * 1024).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = json.loads(text)["error"]
    said = " ".join(str(text).split())[:_TEXT_SHOWN]
    hint = "; scorers usually answer at /get_reward" if error.code == 404 else ""
    return f"HTTP {error.code} {error.reason}: {said or 'no explanation'}{hint}"
