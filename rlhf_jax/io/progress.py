"""Progress of a run on the terminal: a rich bar, or plain lines where there is no
terminal; and `say`, one line."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_jax.io.peak import peak_flops

PLAIN_EVERY_S = 10.0
"""Seconds between lines where there is no terminal."""
Describe: TypeAlias = Callable[[dict[str, float]], str]
"""Metrics of a step -> the numbers shown beside the bar."""


class Bar(Protocol):
    """What the training loop tells."""

    def advance(self, step: int, values: dict[str, float]) -> None:
        """One step is done."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """One evaluation is done."""

    def warn(self, step: int, line: str) -> None:
        """Something that the person who watches should look at."""


def training_bar(
    title: str, steps: int, start: int
) -> contextlib.AbstractContextManager[Bar]:
    """A bar with loss, accuracy, margin, learning rate, tokens/s, MFU and time left."""
    peak = peak_flops()
    return _bar(title, steps, start, lambda values: describe(values, peak))


def rl_bar(
    title: str, steps: int, start: int
) -> contextlib.AbstractContextManager[Bar]:
    """A bar with rewards, KL, entropy, completion length and time left."""
    return _bar(title, steps, start, describe_rl)


def say(text: str) -> None:
    """One line for the person who watches, on stderr."""
    Console(file=sys.stderr, highlight=False).print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def counting_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; what it gives is called with the number done since the last."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task(title, total=total)
        yield lambda count: shown.advance(task, count)


@contextlib.contextmanager
def _bar(title: str, steps: int, start: int, describe: Describe) -> Iterator[Bar]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, steps, describe)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(title, total=steps, completed=start, numbers="")
        yield _Live(shown, task, describe)


def describe(values: dict[str, float], peak: float | None) -> str:
    """One line of the numbers that matter while a run goes on."""
    parts = []
    for name, label, form in (
        ("train/loss", "loss", ".4f"),
        ("train/accuracy", "acc", ".3f"),
        ("train/margin", "margin", ".3f"),
        ("train/learning_rate", "lr", ".2e"),
        ("perf/tokens_per_s", "tok/s", ",.0f"),
    ):
        if name in values:
            parts.append(f"{label} {values[name]:{form}}")
    if peak:
        parts.append(f"MFU {values['perf/flops_per_s'] / peak:.0%}")
    return "  ".join(parts)


def describe_rl(values: dict[str, float]) -> str:
    """One line of the numbers that matter while a policy is trained."""
    return "  ".join(
        f"{label} {values[name]:{form}}"
        for name, label, form in (
            ("reward/proxy", "reward", ".3f"),
            ("reward/gold", "gold", ".3f"),
            ("policy/kl", "KL", ".2f"),
            ("policy/entropy", "entropy", ".2f"),
            ("completion/length", "length", ".0f"),
            ("perf/step_s", "s/step", ".1f"),
        )
        if name in values
    )


def describe_evaluation(values: dict[str, float]) -> str:
    """The headline metrics of every evaluation set in one line."""
    parts = []
    for name in dict.fromkeys(key.split("/")[1] for key in values):
        for headline in (("accuracy",), ("loss",), ("proxy", "gold")):
            found = [m for m in headline if f"eval/{name}/{m}" in values]
            parts += [f"{name} {m} {values[f'eval/{name}/{m}']:.4f}" for m in found]
            if found:
                break
    return "  ".join(parts)


class _Live:
    def __init__(self, shown: Progress, task: TaskID, describe: Describe) -> None:
        self.shown, self.task, self.describe = shown, task, describe

    def advance(self, step: int, values: dict[str, float]) -> None:
        numbers = self.describe(values)
        self.shown.update(self.task, completed=step, numbers=numbers)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self._say(f"step {step}: {describe_evaluation(values)}")

    def warn(self, step: int, line: str) -> None:
        self._say(f"step {step}: warning: {line}")

    def _say(self, text: str) -> None:
        self.shown.console.print(text, markup=False, highlight=False)


class _Lines:
    def __init__(self, title: str, steps: int, describe: Describe) -> None:
        self.title, self.steps, self.describe = title, steps, describe
        self.last = time.monotonic()

    def advance(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if step in (1, self.steps) or now - self.last >= PLAIN_EVERY_S:
            self.last = now
            self._say(f"{step}/{self.steps}  {self.describe(values)}")

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self._say(f"{step}/{self.steps}  {describe_evaluation(values)}")

    def warn(self, step: int, line: str) -> None:
        self._say(f"{step}/{self.steps}  warning: {line}")

    def _say(self, text: str) -> None:
        print(f"{self.title}  {text}", file=sys.stderr, flush=True)
