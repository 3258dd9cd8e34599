"""A run as every training program opens it, supervised or RL: directory, mesh, rows.

`opened` locks the directory and sets the mesh; `prepare_sets` reads training and
evaluation rows; `save_architecture` writes what later readers of the run need;
`latest_step` says where a resumed run goes on; `finish` reports.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.prepare import PrepareReport
from rlhf_jax.data.templates import template_text
from rlhf_jax.io import progress, report
from rlhf_jax.io import run_dir as run_dirs
from rlhf_jax.sharding import make_mesh

MAY_CHANGE = (
    "loop.nonfinite",
    "loop.save_every",
    "loop.keep",
    "loop.wandb_project",
    "states",
    "shaping.timeout_s",
    "scoring.max_length",
    "scoring.tokens_per_batch",
)
"""What a run may be resumed with another value of: how failures are met, and what does
not touch a number."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared data of a run."""

    train: Any
    """A dataset of `data.store` or `data.kwise`."""
    evals: dict[str, Any]
    """Named datasets, of one type."""


@contextlib.contextmanager
def opened(config: Any) -> Iterator[tuple[pathlib.Path, Mesh]]:
    """The run directory, locked, and the mesh, set."""
    mesh = make_mesh(config.mesh)
    run = run_dirs.open_run(config.run_dir, config, may_change=MAY_CHANGE)
    with run.lock, jax.set_mesh(mesh):
        if run.resumed:
            progress.say(f"resuming the run in {run.path}")
        for line in run.changed:
            progress.say(f"changed: {line}")
        yield run.path, mesh


def prepare_sets(
    prepare: Callable[..., tuple[Any, PrepareReport]],
    config: Any,
    sets: dict[str, str],
    encoder: Encoder,
    run_dir: pathlib.Path,
    *,
    prepare_train: Callable[..., tuple[Any, PrepareReport]] | None = None,
) -> Data:
    """Training and evaluation rows; says what became of every row.

    Rows set aside are written to set_aside/NAME.jsonl in the run directory.

    Args:
        prepare: `data.prepare.prepare_pairs`, `prepare_conversations` or
            `prepare_prompts`.
        config: of the program; its data and rows are read.
        sets: evaluation specs by name.
        encoder: the one encode path.
        run_dir: of the run.
        prepare_train: for training rows of another kind than the evaluation rows.
    """
    if "train" in sets:
        raise ValueError("eval_data: the name 'train' is taken by the training rows")
    prepared = {}
    for name, texts in {
        "train": config.data,
        **{k: [v] for k, v in sets.items()},
    }.items():
        read = (prepare_train or prepare) if name == "train" else prepare
        prepared[name], account = read(
            texts,
            encoder,
            config.rows,
            side_file=run_dir / "set_aside" / f"{name}.jsonl",
        )
        progress.say(f"{name}: {account.summary()}")
    return Data(train=prepared.pop("train"), evals=prepared)


def save_architecture(
    run_dir: pathlib.Path,
    config: Any,
    kind: str,
    model: Any,
    tokenizer: Any,
    *,
    complete: bool,
) -> None:
    """Writes model/: whatever reads the run later must encode as it was trained."""
    tokenizer.chat_template, _ = template_text(tokenizer, config.rows.template)
    what = run_dirs.Architecture(
        kind=kind,
        config=model.config,
        lora=config.lora,
        base=None if complete else _absolute(config.model),
        scan_layers=config.compute.scan_layers,
    )
    run_dirs.save_architecture(run_dir, what, tokenizer)


def _absolute(spec: str) -> str:
    """A path that holds from any working directory; other specs as they are."""
    path = pathlib.Path(spec).expanduser()
    return str(path.absolute()) if path.exists() else spec


def latest_step(run_dir: pathlib.Path, epochs: int = 1) -> int:
    """The last step that the newest checkpoint has wholly behind it, -1 without one.

    Args:
        run_dir: of the run.
        epochs: checkpoints a step may have; their numbers count them.
    """
    folder = run_dir / "checkpoints"
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    if not numbers:
        return -1
    newest = max(numbers)
    # All epochs done and the completions kept: the step's evaluation failed.
    unfinished = (folder / str(newest) / "experience").exists() and newest % epochs == 0
    return newest // epochs - unfinished


def finish(run_dir: pathlib.Path) -> None:
    """Writes the report and says where it is."""
    progress.say(f"report: {report.write_report(run_dir)}")
    run_dirs.mark_finished(run_dir)
