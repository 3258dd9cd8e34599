"""Python functions as rewards: `package.module:function` -> one checked number a text.

    def f(prompt, completion, answer): ...      plain: one completion, one number
    def f(prompts, completions, answer): ...    batched: all at once, as many numbers

The parameter names tell the two apart. Further parameters are columns of the data row,
passed by name: a value each in the plain form, a list in the batched one. A parameter
with a default is optional, and `**kwargs` takes every column. The prompt is what the
row holds, text or messages, and may be left out.

Functions run in a daemon thread: one that never returns is an error after `timeout_s`
and does not keep the process alive. It is not stopped, and code that holds Python's
global lock (a regular expression that backtracks for ever) cannot be timed. A thread
is not the main thread: `signal.alarm` does not work in it.
"""

import contextlib
import dataclasses
import functools
import inspect
import numbers
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax.data.messages import describe

_PLAIN = ("prompt", "completion")
_BATCHED = ("prompts", "completions")
_FORMS = "f(prompt, completion, ...) or f(prompts, completions, ...)"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function with what its signature asks for."""

    spec: str
    function: Callable[..., Any]
    timeout_s: float
    """Longest time of one call."""
    batched: bool
    parameters: Mapping[str, bool]
    """Name -> whether it must be given."""
    takes_all: bool
    """Whether it has **kwargs."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """float64 [M].

        Raises:
            ValueError: a column is missing, or the function raises, hangs, or returns
                something else than a number for each completion.
        """
        arguments = self._arguments(prompts, completions, rows)
        values = list(self._call(arguments, completions))
        if self.batched:
            values = self._sequence(values[0], len(completions))
        return np.array([self._number(n, v, completions) for n, v in enumerate(values)])

    def _arguments(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """What each call gets: one call in the batched form, else one a completion."""
        self._check_columns(rows)
        if self.batched:
            columns = {
                name: [row[name] for row in rows]
                for name in rows[0]
                if name not in _PLAIN and all(name in row for row in rows)
            }
            texts = {"prompts": list(prompts), "completions": list(completions)}
            given = [columns | texts]
        else:
            given = [
                {**row, "prompt": prompt, "completion": completion}
                for row, prompt, completion in zip(rows, prompts, completions)
            ]
        if self.takes_all:
            return given
        return [{k: v for k, v in g.items() if k in self.parameters} for g in given]

    def _check_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses rows without a column that the function must get, or gets in part."""
        for name, needed in self.parameters.items():
            if name in (_BATCHED if self.batched else _PLAIN):
                continue
            without = [n for n, row in enumerate(rows) if name not in row]
            in_part = self.batched and len(without) < len(rows)
            if without and (needed or in_part):
                columns = ", ".join(map(repr, rows[without[0]])) or "none"
                raise ValueError(
                    f"reward {self.spec}: it takes {name!r}, which row {without[0]} "
                    f"has no column for; the row has {columns}"
                )

    def _call(
        self, arguments: list[dict[str, Any]], completions: Sequence[str]
    ) -> Iterator[Any]:
        """What the function returns for each set of arguments."""
        calls = [functools.partial(self.function, **given) for given in arguments]
        results = _in_thread(calls, self.timeout_s)
        for n in range(len(calls)):
            where = "" if self.batched else f" on {quoted(n, completions)}"
            try:
                value, error = next(results)
            except queue.Empty:
                raise ValueError(
                    f"reward {self.spec}: did not return within {self.timeout_s:g} s"
                    f"{where}"
                ) from None
            if error is not None:
                raise ValueError(
                    f"reward {self.spec}: raised {type(error).__name__}: {error}"
                    f"{_line(error)}{where}"
                ) from error
            yield value

    def _sequence(self, returned: Any, count: int) -> list[Any]:
        """The batched form's numbers, not yet checked one by one."""
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise ValueError(
                f"reward {self.spec}: expected a sequence of {count} numbers, "
                f"got {describe(returned)}"
            )
        if len(values) != count:
            raise ValueError(
                f"reward {self.spec}: expected {count} numbers, one for each "
                f"completion, got {len(values)}"
            )
        return list(values)

    def _number(self, n: int, value: Any, completions: Sequence[str]) -> float:
        scalar = isinstance(value, numbers.Real) or getattr(value, "shape", 0) == ()
        if scalar and not isinstance(value, str) and not _is_complex(value):
            with contextlib.suppress(TypeError, OverflowError):
                return float(value)
        raise ValueError(
            f"reward {self.spec}: expected a number, got {describe(value)} for "
            f"{quoted(n, completions)}"
        )


def _is_complex(value: Any) -> bool:
    """float() would drop the imaginary part of a NumPy number."""
    return np.asarray(value).dtype.kind == "c"


def open_function(spec: str, timeout_s: float) -> RewardFunction:
    """The reward function that "package.module:function" names.

    Raises:
        ValueError: it cannot be imported, is asynchronous, or its parameters fit
            neither form.
    """
    try:
        function = configs.load_function(spec, "reward")
    except ValueError:
        raise
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"reward {spec}: importing it raised {type(error).__name__}: {error}"
            f"{_line(error)}"
        ) from error
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {spec}: is async; expected a plain function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(
            f"reward {spec}: its parameters cannot be read; expected {_FORMS}"
        ) from None
    found = signature.parameters.values()
    parameters = {p.name: p.default is p.empty for p in found if p.kind in _NAMED}
    hidden = [p.name for p in found if p.kind is p.POSITIONAL_ONLY]
    batched = "completions" in parameters
    mixed = any(name in parameters for name in (_PLAIN if batched else _BATCHED))
    if mixed or hidden or not {"completion", "completions"} & set(parameters):
        raise ValueError(
            f"reward {spec}: expected {_FORMS} with parameters that can be passed by "
            f"name, got {getattr(function, '__name__', 'f')}{signature}"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
    return RewardFunction(spec, function, timeout_s, batched, parameters, takes_all)


def _in_thread(
    calls: Sequence[Callable[[], Any]], timeout_s: float
) -> Iterator[tuple[Any, BaseException | None]]:
    """(result, error) of each call, made one after another in a daemon thread.

    Raises:
        queue.Empty: a call took longer than `timeout_s`.
    """
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    unwanted = threading.Event()

    def work() -> None:
        for call in calls:
            if unwanted.is_set():
                return
            try:
                results.put((call(), None))
            except BaseException as error:  # raised again where the caller waits
                results.put((None, error))
                return

    threading.Thread(target=work, name="reward function", daemon=True).start()
    try:
        for _ in calls:
            yield results.get(timeout=timeout_s)
    finally:
        unwanted.set()


def quoted(n: int, completions: Sequence[str]) -> str:
    """Which completion an error is about, and how its text starts."""
    return f"completion {n} ({describe(completions[n])})"


def _line(error: BaseException) -> str:
    """Where an error was raised, as the message alone would not say."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
