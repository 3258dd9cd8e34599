"""Chat completions from any OpenAI-compatible endpoint: cached, limited, counted.

    with ChatClient(ChatConfig(base_url="http://localhost:8000/v1", model="m")) as chat:
        replies = chat.ask([Question([{"role": "user", "content": "Hi"}])])
        replies[0].text, replies[0].error

A reply is kept on disk as soon as it is there and never paid for twice. What goes wrong
for good is a reply with an `error`, not an exception: one bad answer does not lose the
others. A key that is missing or refused, and an endpoint that is not there, are errors
at once: they are wrong for every question. Attempts after the first are made here and
not in the openai package, so that they too keep to `per_minute`.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.io import retries
from rlhf_jax.io.run_dir import write_atomic

CHARACTERS_PER_TOKEN = 4
"""Of English text, about: what the estimate before a run is made with."""


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """An endpoint and how it is asked."""

    base_url: str | None = None
    """Of the endpoint, such as https://api.openai.com/v1; null = none."""
    model: str | None = None
    """Name of the model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server takes any."""
    cache: str = "~/.cache/rlhf_jax/chat"
    """Directory of the replies."""
    max_tokens: int = 512
    """Longest reply, and what a model reasons before it."""
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it; models that reason want the second."""
    send_temperature: bool = True
    """false for models that take none but their own."""
    concurrent: int = 8
    """Questions under way at a time."""
    per_minute: float = 0.0
    """Most requests a minute, second attempts among them; 0 = no limit of ours."""
    retries: int = 5
    """Attempts after the first, on 429, 5xx and broken connections, further and further
    apart, or when the endpoint says (Retry-After)."""
    timeout_s: float = 60.0
    """Longest time of one attempt."""
    price_in: float = 0.0
    """Per million tokens asked, for the estimate before the run."""
    price_out: float = 0.0
    """Per million tokens answered."""
    max_price: float | None = None
    """Ask nothing if the estimate is above it, which needs the prices; null = no
    limit."""

    def __post_init__(self) -> None:
        if (self.base_url is None) != (self.model is None):
            raise ValueError("chat: expected base_url and model, or neither")
        if min(self.max_tokens, self.concurrent) < 1 or self.retries < 0:
            raise ValueError(
                f"chat: max_tokens {self.max_tokens}, concurrent {self.concurrent}, "
                f"retries {self.retries}: expected at least 1, 1 and 0"
            )
        if not (self.per_minute >= 0 and self.timeout_s > 0):
            raise ValueError(
                f"chat: per_minute {self.per_minute}, timeout_s {self.timeout_s}: "
                "expected at least 0, and a number above 0"
            )
        for name in ("price_in", "price_out", "max_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"chat.{name} {value}: expected at least 0")
        if self.max_price is not None and not self.priced:
            raise ValueError(
                f"chat.max_price {self.max_price:g}: expected chat.price_in and "
                "chat.price_out, a million tokens, with it: without prices nothing is "
                "too dear"
            )

    @property
    def priced(self) -> bool:
        """Whether prices are given."""
        return self.price_in > 0 or self.price_out > 0


class Question(NamedTuple):
    """What is asked."""

    messages: Sequence[Mapping[str, str]]
    temperature: float = 1.0
    sample: int = 0
    """Tells several replies to the same messages apart."""


class Reply(NamedTuple):
    """What came back."""

    text: str
    error: str | None = None
    """Why there is none."""


class Estimate(NamedTuple):
    """What a run will ask for, if every question needs one attempt."""

    asked: int
    """Questions without a reply in the cache, each once if some are the same."""
    cached: int
    tokens_in: int
    """About: counted in characters."""
    tokens_out: int
    """At most: each reply as long as it may be."""
    price: float | None
    """Of these tokens; None = prices not given."""

    def describe(self) -> str:
        """One line, for people."""
        price = "prices not given"
        if self.price is not None:
            price = f"about {self.price:.2f} at the prices given"
        return (
            f"{self.asked:,} questions ({self.cached:,} replies are there), about "
            f"{self.tokens_in:,} tokens in, at most {self.tokens_out:,} out, {price}"
        )


class ChatClient:
    """An endpoint; a context, whose end closes its connections."""

    def __init__(self, config: ChatConfig) -> None:
        """
        Raises:
            ValueError: no endpoint, no key, or the openai package is not installed.
        """
        if config.base_url is None:
            raise ValueError("chat.base_url: expected an endpoint; none is set")
        try:
            import openai
        except ImportError:
            raise ValueError(
                "chat: endpoints are asked through the openai package, which is not "
                'installed; pip install "rlhf-jax[seam]"'
            ) from None
        key = os.environ.get(config.key_variable)
        if not key:
            raise ValueError(
                f"chat: {config.key_variable} is not set; put the endpoint's key into "
                "it (any word for a server that asks for none), or name another "
                "variable with chat.key_variable"
            )
        self.config, self._openai = config, openai
        self._client = openai.OpenAI(
            api_key=key,
            base_url=config.base_url,
            timeout=config.timeout_s,
            max_retries=0,  # attempts are made in `_answer`, which waits its turn
        )
        self._cache = pathlib.Path(config.cache).expanduser()
        self._next, self._lock = 0.0, threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """What `ask` would send and pay; asks nothing."""
        different = {self._path(one): one for one in questions}
        new = [one for path, one in different.items() if not path.exists()]
        characters = sum(len(m["content"]) for one in new for m in one.messages)
        tokens_in = characters // CHARACTERS_PER_TOKEN
        tokens_out = len(new) * self.config.max_tokens
        config, price = self.config, None
        if config.priced:
            price = tokens_in * config.price_in + tokens_out * config.price_out
            price /= 1e6
        cached = len(different) - len(new)
        return Estimate(len(new), cached, tokens_in, tokens_out, price)

    def ask(
        self,
        questions: Sequence[Question],
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[Reply]:
        """The replies, in the order of the questions.

        Raises:
            ValueError: it may cost more than max_price, the key is refused, the model
                is not there, or the endpoint cannot be reached at all.
        """
        price, limit = self.estimate(questions).price, self.config.max_price
        if limit is not None and price is not None and price > limit:
            raise ValueError(
                f"chat: these questions may cost {price:.2f}, and max_price is "
                f"{limit:g}; ask fewer, or raise it"
            )
        places: dict[pathlib.Path, list[int]] = {}
        for n, question in enumerate(questions):
            places.setdefault(self._path(question), []).append(n)
        replies: dict[int, Reply] = {}
        self._stop.clear()
        pool = concurrent.futures.ThreadPoolExecutor(self.config.concurrent)
        waiting = {
            pool.submit(self._one, questions[same[0]]): same for same in places.values()
        }
        try:
            for done in concurrent.futures.as_completed(waiting):
                reply, same = done.result(), waiting[done]
                replies |= dict.fromkeys(same, reply)
                progress(len(same))
        finally:
            self._stop.set()  # what waits for its turn is given up
            pool.shutdown(cancel_futures=True)
        return [replies[n] for n in range(len(questions))]

    def _one(self, question: Question) -> Reply:
        path = self._path(question)
        if path.exists():
            return Reply(json.loads(path.read_text(encoding="utf-8"))["text"])
        openai = self._openai
        try:
            answer = self._answer(question)
            text = answer.choices[0].message.content
            cut = answer.choices[0].finish_reason == "length"
        except (
            openai.AuthenticationError,
            openai.NotFoundError,
            openai.APIConnectionError,
        ) as error:
            late = isinstance(error, openai.APITimeoutError)
            if late and type(error.__cause__).__name__ != "ConnectTimeout":
                tries = f"{self.config.retries + 1} times {self.config.timeout_s:g} s"
                return Reply("", f"no reply within {tries}")
            raise ValueError(
                f"chat: {self.config.base_url}, model {self.config.model}: {error}"
            ) from None
        except openai.APIError as error:
            if hint := _hint(str(error)):  # wrong for every question
                raise ValueError(
                    f"chat: {self.config.base_url}, model {self.config.model}: "
                    f"{error}; {hint}"
                ) from None
            return Reply("", f"{type(error).__name__}: {error}")
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Reply("", f"malformed reply: {error}")
        if cut:
            return Reply(
                "",
                f"cut off at max_tokens {self.config.max_tokens}, which "
                "counts what a model reasons before it answers",
            )
        if not isinstance(text, str) or not text.strip():
            return Reply("", "malformed reply: no text")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"text": text}))
        return Reply(text)

    def _answer(self, question: Question) -> Any:
        """What the endpoint says in the end; raises what the last attempt raised, or
        CancelledError once `ask` is over."""
        options: dict[str, Any] = {self.config.length_parameter: self.config.max_tokens}
        if self.config.send_temperature:
            options["temperature"] = question.temperature
        for attempt in itertools.count():
            self._wait()
            if self._stop.is_set():
                raise concurrent.futures.CancelledError
            try:
                return self._client.chat.completions.create(
                    model=str(self.config.model),
                    messages=[dict(message) for message in question.messages],  # type: ignore[misc]
                    **options,
                )
            except (
                self._openai.APIConnectionError,
                self._openai.APIStatusError,
            ) as error:
                pause = retries.pause_s(getattr(error, "response", None), attempt)
                if pause is None or attempt == self.config.retries:
                    raise
                self._stop.wait(pause)
        raise AssertionError("unreachable")

    def _wait(self) -> None:
        """Until the rate limit allows another request."""
        if not self.config.per_minute:
            return
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + 60 / self.config.per_minute
        self._stop.wait(at - now)

    def _path(self, question: Question) -> pathlib.Path:
        """Where the reply is kept: everything that decides it is in the name."""
        key = json.dumps(
            [
                self.config.base_url,
                self.config.model,
                self.config.max_tokens,
                question.temperature if self.config.send_temperature else None,
                question.sample,
                [dict(message) for message in question.messages],
            ],
            sort_keys=True,
        )
        digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        return self._cache / digest[:2] / f"{digest}.json"


def _hint(refusal: str) -> str:
    """What to set when an endpoint refuses a parameter by its name."""
    words = refusal.lower()
    refused = ("unsupported", "not supported", "unrecognized", "unexpected")
    if not any(word in words for word in refused):
        return ""
    if "max_tokens" in words or "max_completion_tokens" in words:
        return "chat.length_parameter takes the other name"
    if "temperature" in words:
        return "chat.send_temperature false leaves it out"
    return ""
