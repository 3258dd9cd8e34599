"""The visible loop of `rloo` and `ppo`: prompts in, completions, rewards, updates.

Read `reinforce`: a step samples and scores (`gather`), makes advantages (`targets`),
and learns for some epochs over the same completions (`learn`). The functions come from
the program; the loop owns order, checkpoints, metrics, samples and warnings. A
checkpoint can be taken between any two epochs and holds everything: policy, critic,
optimizer states, cursor, and the completions if the step is not done with them.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.io import checkpoint, progress
from rlhf_jax.io.metrics import Write
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs.experience import Completions, epoch_rng
from rlhf_jax.programs.supervised import Interrupted, signals
from rlhf_jax.programs.watch import watch
from rlhf_jax.rl import streams
from rlhf_jax.types import Experience, TrainState


@dataclasses.dataclass(frozen=True)
class RLLoopConfig:
    """When to evaluate, save and report."""

    eval_every: int = 0
    """Steps between evaluations; 0 = ten times a run. The start and the last step are
    always evaluated."""
    save_every: int = 0
    """Steps between checkpoints; 0 = ten times a run."""
    keep: int = 2
    """Newest checkpoints kept."""
    samples_every: int = 0
    """Steps between sample tables in samples.jsonl; 0 = twenty times a run."""
    samples: int = 4
    """Completions in a sample table."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop the run, or drop that update and go on."""
    wandb_project: str | None = None
    """Weights & Biases project to log to (extra wandb)."""

    def __post_init__(self) -> None:
        for name, low in (
            ("eval_every", 0),
            ("save_every", 0),
            ("keep", 1),
            ("samples_every", 0),
            ("samples", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(
                    f"loop.{name}: expected at least {low}, got {getattr(self, name)}"
                )


@dataclasses.dataclass
class RLCursor:
    """What the loop must remember besides the TrainStates; JSON in a checkpoint."""

    step: int = 0
    """Steps that are done."""
    epoch: int = 0
    """Epochs that are done in the step under way."""
    next_row: int = 0
    """Global row position of the prompts."""
    kl_coef: float = 0.0
    moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Count, mean and m2 of `rl.moments`."""
    data_digest: str = ""
    gathered: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the step under way, before its updates."""
    updates: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Metrics of the updates that it has had."""


@dataclasses.dataclass
class Learner:
    """The models that are trained."""

    policy: TrainState
    critic: TrainState | None = None


Gather = Callable[[Learner, RLCursor], tuple[Completions, dict[str, float], list[dict]]]
"""Samples and scores the prompts at cursor.next_row: (completions, metrics, table)."""
Targets = Callable[[Completions, RLCursor], tuple[Completions, dict[str, float]]]
"""Advantages and returns; may move the cursor's controller and moments."""
Epoch = Callable[[Completions, np.random.Generator], Iterator[Experience]]
"""The minibatches of one epoch."""
Learn = Callable[
    [Learner, Experience, jax.Array, RLCursor], tuple[Learner, dict[str, jax.Array]]
]


def reinforce(
    loop: RLLoopConfig,
    *,
    run_dir: pathlib.Path,
    learner: Learner,
    cursor: RLCursor,
    gather: Gather,
    targets: Targets,
    epoch_batches: Epoch,
    learn: Learn,
    evaluate: Callable[[Learner], dict[str, float]],
    steps: int,
    epochs: int,
    seed: int,
    write: Write,
    learning_rate: Callable[[int], float],
    title: str,
) -> Learner:
    """Trains to `steps`, from the newest checkpoint in the run directory if any.

    Args:
        loop: when to evaluate, save and report.
        run_dir: gets checkpoints and samples.jsonl.
        learner: initial states; a checkpoint replaces their values.
        cursor: of the start, with the digest of the data.
        gather: see `Gather`.
        targets: see `Targets`.
        epoch_batches: see `Epoch`.
        learn: one update of the policy, the critic, or both.
        evaluate: metrics on held-out prompts; {} without any.
        steps: of the whole run.
        epochs: passes over the completions of a step.
        seed: decides the order of minibatches and the randomness of updates.
        write: (step, values) -> None.
        learning_rate: optimizer step -> learning rate, for the log.
        title: what the progress bar calls the run.

    Returns:
        The last states.

    Raises:
        FloatingPointError: an update was not finite and loop.nonfinite is "stop".
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ValueError: a reward failed; the state from before the step, or from before the
            evaluation, is saved.
    """
    every = {
        name: getattr(loop, f"{name}_every") or max(1, steps // per_run)
        for name, per_run in (("eval", 10), ("save", 10), ("samples", 20))
    }
    key = jax.random.fold_in(jax.random.key(seed), streams.UPDATE)
    completions: Completions | None = None
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_checkpoints(run_dir))
        fresh = manager.latest_step() is None
        if not fresh:
            learner, cursor, completions = _resume(manager, learner, cursor)
        history = _history(run_dir, cursor.step)
        stopping = stack.enter_context(signals())
        bar = stack.enter_context(progress.rl_bar(title, steps, cursor.step))
        save = _Saver(manager, loop.keep, epochs)
        if fresh and (found := evaluate(learner)):
            write(0, found)
            bar.evaluated(0, found)
        while cursor.step < steps:
            started = time.perf_counter()
            step = cursor.step + 1
            if completions is None:
                before = dataclasses.replace(cursor)
                try:
                    completions, metrics, table = gather(learner, cursor)
                except ValueError:
                    save(learner, before, None)
                    raise
                completions, more = targets(completions, cursor)
                cursor.gathered = metrics | more
                if step % every["samples"] == 0 or step in (1, steps):
                    _write_samples(run_dir, step, table[: loop.samples])
            updates: list[dict[str, Any]] = list(cursor.updates)
            for epoch in range(cursor.epoch, epochs):
                order = epoch_rng(seed, cursor.step, epoch)
                for batch in epoch_batches(completions, order):
                    learner, metrics = learn(learner, batch, key, cursor)
                    updates.append(metrics)
                cursor.epoch = epoch + 1
                if stopping() is not None and cursor.epoch < epochs:
                    cursor.updates = _floats(updates)
                    save(learner, cursor, completions)
                    raise Interrupted(128 + int(stopping() or 0))
            values = cursor.gathered | _mean(_floats(updates))
            values["train/learning_rate"] = learning_rate(int(learner.policy.step))
            values["perf/step_s"] = time.perf_counter() - started
            if step % every["eval"] == 0 or step == steps:
                try:
                    found = evaluate(learner)
                except ValueError:  # all epochs are done, the step is not
                    cursor.updates = _floats(updates)
                    save(learner, cursor, completions)
                    raise
                values |= found
                bar.evaluated(step, found)
            completions = None
            cursor.step, cursor.epoch = step, 0
            cursor.gathered, cursor.updates = {}, []
            write(step, values)
            bar.advance(step, values)
            history.append(values)
            for line in watch(history):
                bar.warn(step, line)
            stop = stopping()
            if step % every["save"] == 0 or step == steps or stop is not None:
                save(learner, cursor, None)
            _check_finite(loop, step, values)
            if stop is not None:
                raise Interrupted(128 + stop)
        checkpoint.prune(manager, keep=loop.keep, best_step=None)
    return learner


class _Saver:
    """Saves with a number that counts epochs, so that every checkpoint has its own."""

    def __init__(self, manager: Any, keep: int, epochs: int) -> None:
        self.manager, self.keep, self.epochs = manager, keep, epochs

    def __call__(
        self, learner: Learner, cursor: RLCursor, completions: Completions | None
    ) -> None:
        checkpoint.prune(self.manager, keep=self.keep, best_step=None)
        checkpoint.save(
            self.manager,
            learner.policy,
            dataclasses.asdict(cursor),
            step=cursor.step * self.epochs + cursor.epoch,
            critic=learner.critic,
            experience=None if completions is None else completions.arrays(),
        )


def _resume(
    manager: Any, learner: Learner, cursor: RLCursor
) -> tuple[Learner, RLCursor, Completions | None]:
    """The newest checkpoint.

    Raises:
        ValueError: the prompts that it counted are not those of now.
    """
    policy, saved = checkpoint.restore(manager, learner.policy)
    restored = RLCursor(**saved)
    restored.moments = tuple(restored.moments)  # type: ignore[assignment]
    if restored.data_digest != cursor.data_digest:
        raise ValueError(
            "data: the prompts are not those this run began with (their number or "
            "lengths changed), so it cannot go on where it was; restore the data, or "
            "choose another --run_dir"
        )
    critic = learner.critic
    if critic is not None:
        critic = checkpoint.restore_critic(manager, critic)
    arrays = checkpoint.restore_experience(manager) if restored.epoch else None
    completions = None if arrays is None else Completions(**arrays)
    return Learner(policy, critic), restored, completions


def _floats(updates: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in update.items()}
        for update in jax.device_get(updates)
    ]


def _mean(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's updates: means over those that report them."""
    names = dict.fromkeys(name for update in updates for name in update)
    return {
        name: float(np.mean([update[name] for update in updates if name in update]))
        for name in names
    }


def _check_finite(loop: RLLoopConfig, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if k.endswith("update/finite") and v < 1]
    if bad and loop.nonfinite == "stop":
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)}: a loss or gradient was not finite. The "
            "parameters are those from before that update. Lower the learning rate, "
            "look at the rewards, or set loop.nonfinite to skip"
        )


def _history(run_dir: pathlib.Path, step: int) -> list[dict[str, float]]:
    """Metrics of the steps up to this one, for what `watch` compares with."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    # null stands for what was not finite.
    return [
        {name: value for name, value in row.items() if value is not None}
        for row in rows
        if 0 < row["step"] <= step
    ]


def _write_samples(run_dir: pathlib.Path, step: int, table: list[dict]) -> None:
    """Adds rows to samples.jsonl; those a killed run wrote for later steps are gone."""
    path = run_dir / "samples.jsonl"
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                if json.loads(line)["step"] < step:
                    kept.append(line)
    kept += [
        json.dumps({"schema": 1, "step": step, **row}, ensure_ascii=False)
        for row in table
    ]
    write_atomic(path, "".join(f"{line}\n" for line in kept))
