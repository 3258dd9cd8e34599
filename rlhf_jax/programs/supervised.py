"""The visible loop of `sft` and `reward`: batches in, checkpoints and metrics out.

Read `supervise`: it is the whole of it, step by step. What the objective is does not
show here: it gets a jitted update, a jitted evaluation and batches. Metrics are fetched
one step late, so the device never waits for the host. Everything a resumed run needs is
in the checkpoint: parameters, optimizer state and the cursor (data position, best
value, patience).
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.io import checkpoint, progress
from rlhf_jax.io.metrics import Write
from rlhf_jax.programs.watch import WINDOW, watch_supervised
from rlhf_jax.types import Sequences, TrainState

Batch = Any
Evaluate = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When to evaluate, save, report and stop."""

    eval_every: int = 0
    """Steps between evaluations; 0 = ten times a run. The last step is always
    evaluated."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at evaluations."""
    keep: int = 2
    """Newest checkpoints kept, besides the best one."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    best: str | None = None
    """Metric that names the best checkpoint, such as eval/id/accuracy; null = the first
    evaluation set's accuracy (reward) or loss (sft). A name ending in loss is
    minimised."""
    patience: int = 0
    """Evaluations without a better best metric before the run stops; 0 = never."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop the run, or drop that step and go on."""
    wandb_project: str | None = None
    """Weights & Biases project to log to (extra wandb)."""

    def __post_init__(self) -> None:
        for name, low in (
            ("eval_every", 0),
            ("save_every", 0),
            ("keep", 1),
            ("log_every", 1),
            ("patience", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(
                    f"loop.{name}: expected at least {low}, got {getattr(self, name)}"
                )


@dataclasses.dataclass
class Cursor:
    """What the loop must remember besides the TrainState."""

    next_row: int = 0
    """Global row position of the data."""
    best_value: float | None = None
    best_step: int | None = None
    since_best: int = 0
    """Evaluations since the best one."""
    data_digest: str = ""
    """Of the rows that next_row counts."""


class Interrupted(SystemExit):
    """A signal asked the run to leave and it has saved itself; code 128 + signal."""


def supervise(
    loop: LoopConfig,
    *,
    run_dir: pathlib.Path,
    state: TrainState,
    update: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]],
    evaluate: Evaluate,
    batches: Callable[[int], Iterator[tuple[Batch, int]]],
    put: Callable[[Batch], Batch],
    steps: int,
    best: str | None,
    key: jax.Array,
    data_digest: str,
    write: Write,
    learning_rate: Callable[[int], float],
    flops: Callable[[Sequences], float],
    title: str,
) -> TrainState:
    """Trains to `steps`, from the newest checkpoint in the run directory if any.

    Args:
        loop: when to evaluate, save, report and stop.
        run_dir: gets checkpoints and best.json.
        state: the initial state; a checkpoint replaces its values.
        update: jitted; donates the state.
        evaluate: state -> eval/NAME/METRIC of every evaluation set, see `held_out`.
        batches: start row -> iterator of (host batch, next row).
        put: host batch -> device batch.
        steps: optimizer steps of the whole run.
        best: metric that names the best checkpoint; None = no evaluation.
        key: randomness of the run; the update folds the step into it.
        data_digest: identifies the rows; a resumed run must have the same.
        write: (step, values) -> None.
        learning_rate: step -> learning rate, for the log.
        flops: host Sequences -> FLOPs of the step, for MFU.
        title: what the progress bar calls the run.

    Returns:
        The last state.

    Raises:
        FloatingPointError: a step was not finite and loop.nonfinite is "stop".
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    eval_every = loop.eval_every or max(1, math.ceil(steps / 10))
    save_every = loop.save_every or eval_every
    cursor = Cursor(data_digest=data_digest)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_checkpoints(run_dir))
        if manager.latest_step() is not None:
            state, cursor = _resume(manager, state, data_digest)
        stopping = stack.enter_context(signals())
        start = int(state.step)
        if loop.patience and cursor.since_best >= loop.patience:
            steps = start  # patience had ended this run already
        on_disk = (cursor.best_step, cursor.best_value)
        bar = stack.enter_context(progress.training_bar(title, steps, start))
        report = _Reporter(loop, bar, write, learning_rate)
        stream = batches(cursor.next_row)
        stack.callback(getattr(stream, "close", lambda: None))
        for step in range(start + 1, steps + 1):
            batch, next_row = next(stream)
            state, metrics = update(state, put(batch), key)
            rows = _sequences(batch)
            report.push(step, metrics, sum(map(_tokens, rows)), sum(map(flops, rows)))
            cursor.next_row = next_row
            stop = stopping() is not None
            if best and (step % eval_every == 0 or step == steps):
                report.flush()
                values = evaluate(state)
                _judge(cursor, step, best, values)
                report.evaluation(step, values)
                stop = stop or bool(
                    loop.patience and cursor.since_best >= loop.patience
                )
            is_best = cursor.best_step == step
            if step % save_every == 0 or step == steps or stop or is_best:
                report.flush()
                # The best so far stays, and keeps its name, until a better is on disk.
                _settle(manager, loop, run_dir, best, on_disk)
                checkpoint.save(manager, state, dataclasses.asdict(cursor))
                on_disk = (cursor.best_step, cursor.best_value)
            if stop:
                break
        report.flush()
        _settle(manager, loop, run_dir, best, on_disk)
        if (number := stopping()) is not None:
            raise Interrupted(128 + number)
    return state


def minimised(metric: str) -> bool:
    """Whether a smaller value of the metric is better: its name ends in loss."""
    return metric.endswith("loss")


def _resume(
    manager: Any, state: TrainState, data_digest: str
) -> tuple[TrainState, Cursor]:
    """The newest checkpoint.

    Raises:
        ValueError: the rows that it counted are not those of now.
    """
    state, saved = checkpoint.restore(manager, state)
    cursor = Cursor(**saved)
    if cursor.data_digest != data_digest:
        raise ValueError(
            "data: the training rows are not those this run began with (their number "
            "or lengths changed), so it cannot go on where it was; restore the data, "
            "or choose another --run_dir"
        )
    return state, cursor


def _settle(
    manager: Any,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    best: str | None,
    on_disk: tuple[int | None, float | None],
) -> None:
    """Waits for the save under way, names the best checkpoint, drops old ones."""
    step, value = on_disk
    checkpoint.prune(manager, keep=loop.keep, best_step=step)
    if best and step is not None and value is not None:
        checkpoint.write_best(run_dir, step, best, value)


def _judge(cursor: Cursor, step: int, best: str, values: dict[str, float]) -> None:
    """Updates the best step and the patience counter."""
    if best not in values:
        raise ValueError(
            f"loop.best {best!r}: no such metric; expected one of {', '.join(values)}"
        )
    value = values[best]
    sign = -1.0 if minimised(best) else 1.0
    so_far = -sign * math.inf if cursor.best_value is None else cursor.best_value
    if sign * value > sign * so_far:  # never true for nan
        cursor.best_value, cursor.best_step, cursor.since_best = value, step, 0
    else:
        cursor.since_best += 1


class _Reporter:
    """Holds one step's metrics back until the next is under way, then writes them."""

    def __init__(
        self,
        loop: LoopConfig,
        bar: progress.Bar,
        write: Write,
        learning_rate: Callable[[int], float],
    ) -> None:
        self.loop, self.bar, self.write = loop, bar, write
        self.learning_rate = learning_rate
        self.history: list[dict[str, float]] = []
        self.held_out: dict[str, list[float]] = {}
        self.pending: tuple[int, dict[str, Any], int, float] | None = None
        self.clock = time.perf_counter()

    def push(self, step: int, metrics: Any, tokens: int, flops: float) -> None:
        pending, self.pending = self.pending, (step, metrics, tokens, flops)
        if pending is not None:
            self._report(*pending)

    def flush(self) -> None:
        """Reports the step that is held back, before what is not part of its time."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self._report(*pending)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.write(step, values)
        self.bar.evaluated(step, values)
        for name, value in values.items():
            if name.endswith("/loss"):
                self.held_out.setdefault(name, []).append(value)
        self.clock = time.perf_counter()

    def _report(self, step: int, metrics: Any, tokens: int, flops: float) -> None:
        values = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        values["train/learning_rate"] = float(self.learning_rate(step - 1))
        values["perf/tokens_per_s"] = tokens / seconds
        values["perf/flops_per_s"] = flops / seconds
        values["perf/step_s"] = seconds
        if step % self.loop.log_every == 0:
            self.write(step, values)
        self.bar.advance(step, values)
        self.history.append(values)
        if len(self.history) > 10 * WINDOW:
            del self.history[:WINDOW]
        for line in watch_supervised(self.history, self.held_out):
            self.bar.warn(step, line)
        if values["train/update/finite"] == 0 and self.loop.nonfinite == "stop":
            raise FloatingPointError(
                f"step {step}: loss {values['train/loss']}, gradient norm "
                f"{values['train/grad_norm']}: not finite. The parameters are those "
                "from before the step. Lower optimizer.learning_rate, look at the "
                "batch, or set loop.nonfinite to skip"
            )


def _sequences(batch: Batch) -> list[Sequences]:
    """All rows of tokens in a batch, wherever they are in it."""
    leaves = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Sequences))
    return [leaf for leaf in leaves if isinstance(leaf, Sequences)]


def _tokens(rows: Sequences) -> int:
    return int(np.count_nonzero(rows.segment))


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """SIGINT and SIGTERM ask the loop to leave after this step; a second one kills."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)

    caught = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handle) for number in caught}
    except ValueError:  # not the main thread: a notebook's worker, a test
        yield lambda: None
        return
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
