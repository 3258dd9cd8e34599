"""Metrics out: metrics.jsonl always, TensorBoard beside it, Weights & Biases if asked.

`metrics_writer` gives one function `write(step, values)`. Values are flat names to
floats; one that is not finite is null in metrics.jsonl. `series` takes one name out of
such rows again.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.io.run_dir import write_atomic

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def metrics_writer(
    run_dir: pathlib.Path,
    *,
    resume_step: int = 0,
    wandb_project: str | None = None,
    config: dict[str, Any] | None = None,
) -> Iterator[Write]:
    """A context whose value is write(step, values).

    Args:
        run_dir: gets metrics.jsonl and tensorboard/.
        resume_step: lines of later steps are taken out: the run will write them again.
        wandb_project: also log to this W&B project (extra `wandb`).
        config: what W&B shows as the run's config.
    """
    from tensorboardX import SummaryWriter

    path = run_dir / "metrics.jsonl"
    _cut_after(path, resume_step)
    run = _start_wandb(wandb_project, run_dir, config)
    board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
    with path.open("a", encoding="utf-8") as file, contextlib.closing(board):

        def write(step: int, values: dict[str, float]) -> None:
            # NaN is no JSON: other readers would stop at the line.
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            line = json.dumps({"schema": 1, "step": step, **finite}, allow_nan=False)
            file.write(line + "\n")
            file.flush()
            for name, value in values.items():
                board.add_scalar(name, value, step)
            if run is not None:
                run.log(values, step=step)

        try:
            yield write
        finally:
            if run is not None:
                run.finish()


def series(
    rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one key of metrics rows, where it is a finite number.

    A step written twice keeps its last value.
    """
    found = {
        row["step"]: float(row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps])


def _cut_after(path: pathlib.Path, step: int) -> None:
    """Takes lines of steps after `step` out, and a torn last line with them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_atomic(path, "".join(kept))


def _start_wandb(project: str | None, run_dir: pathlib.Path, config: Any) -> Any:
    if project is None:
        return None
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "loop.wandb_project is set but wandb is not installed: "
            "pip install 'rlhf-jax[wandb]', or leave it null"
        ) from None
    return wandb.init(
        project=project,
        name=run_dir.name,
        id=run_dir.name,
        dir=str(run_dir),
        config=config,
        resume="allow",
    )
