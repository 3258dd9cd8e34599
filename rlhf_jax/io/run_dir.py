"""The run directory: one folder a run, resumable and readable by people and programs.

    config.yaml       the resolved config; versions in its header
    model/            architecture.json and the tokenizer: what a checkpoint is of
    checkpoints/STEP  orbax; best.json names the best one
    metrics.jsonl     and tensorboard/, plots/, report.html
    finished          written when the last step, its evaluation and the report are done

`open_run` decides between a new run and a resumed one and refuses everything else;
`is_finished` says whether a run need not be repeated.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Sequence
from typing import IO, Any

import yaml

from rlhf_jax import config as configs
from rlhf_jax.models.config import Llama3Scaling, LlamaConfig, LoraConfig

FINISHED = "finished"
VERSIONS_OF = ("rlhf-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the checkpoints of a run are: enough to build the module again."""

    kind: str
    """"causal" or "reward"."""
    config: LlamaConfig
    lora: LoraConfig
    base: str | None
    """--model SPEC of the leaves that checkpoints leave out (frozen ones); None =
    complete."""
    scan_layers: bool = True
    """Layout of the layers in the checkpoints; random bases depend on it."""


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory that is ours until `lock` is closed."""

    path: pathlib.Path
    resumed: bool
    """Whether the directory holds this very run already."""
    changed: tuple[str, ...]
    """In what the config differs from before, "key: old -> new"."""
    lock: IO[str]


def open_run(
    run_dir: str,
    config: Any,
    *,
    holds_runs: bool = False,
    begun_by: Sequence[str] = (),
    may_change: Sequence[str] = (),
) -> OpenRun:
    """Creates the directory, or accepts it for an equal config, and locks it.

    A directory whose run never took a step accepts another config.

    Args:
        run_dir: see above.
        config: of the run.
        holds_runs: True for a directory of several runs, which has begun as soon as
            there is anything in it.
        begun_by: patterns of further files, of which the first that is not empty
            begins the run.
        may_change: keys, dotted where nested, in which the config may differ from the
            earlier one.

    Raises:
        ValueError: the directory holds another run (the differing keys are listed) or
            files that are no run, cannot be written, or another process runs in it.
    """
    path = pathlib.Path(run_dir).expanduser()
    saved = path / "config.yaml"
    if path.is_file() or (path.is_dir() and not saved.exists() and _foreign(path)):
        raise ValueError(
            f"run_dir {run_dir}: expected an empty or new directory or one with a "
            "config.yaml of an earlier run; choose another --run_dir"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        changed: list[str] = []
        try:
            resumed = saved.exists() and _accept(
                saved, config, holds_runs, may_change, begun_by
            )
            if resumed:
                changed = _differences(saved, config)
            if not resumed or changed:
                write_atomic(saved, _versions() + configs.dump(config))
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise ValueError(f"run_dir {run_dir}: cannot write there: {error}") from None
    return OpenRun(path, resumed, tuple(changed), lock)


def is_finished(
    run_dir: str | pathlib.Path, config: Any, *, may_change: Sequence[str] = ()
) -> bool:
    """Whether the run of this config is there and done.

    Args:
        run_dir: where it would be.
        config: of the run.
        may_change: see `open_run`.

    Raises:
        ValueError: a finished run of another config is there.
    """
    path = pathlib.Path(run_dir).expanduser()
    if not (path / FINISHED).exists():
        return False
    _accept(path / "config.yaml", config, True, may_change)
    return True


def mark_finished(run_dir: pathlib.Path) -> None:
    """Says that nothing of the run is left to do."""
    write_atomic(run_dir / FINISHED, "")


def _accept(
    saved: pathlib.Path,
    config: Any,
    holds_runs: bool,
    may_change: Sequence[str],
    begun_by: Sequence[str] = (),
) -> bool:
    """Whether the run of this config is there; False where none has begun.

    Raises:
        ValueError: another run has.
    """
    lines = [
        line
        for line in _differences(saved, config)
        if not _within(line.partition(":")[0], may_change)
    ]
    files = (saved.parent.glob(pattern) for pattern in ("metrics.jsonl", *begun_by))
    begun = any(path.stat().st_size > 0 for found in files for path in found)
    begun = begun or any((saved.parent / "checkpoints").glob("*"))
    if holds_runs:
        begun = any(path.name != saved.name for path in _foreign(saved.parent))
    if lines and begun:
        raise ValueError(
            f"run_dir {saved.parent}: holds a run with another config:\n  "
            + "\n  ".join(lines)
            + "\nchoose another --run_dir, or resume that run with its command"
        )
    return begun


def _lock(path: pathlib.Path) -> IO[str]:
    """A lock on the directory for the life of the returned file."""
    file = open(path / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"run_dir {path}: another process is running in it; wait, or choose another"
        ) from None
    return file


def save_architecture(path: pathlib.Path, what: Architecture, tokenizer: Any) -> None:
    """Writes model/: architecture.json beside the tokenizer's files."""
    folder = path / "model"
    tokenizer.save_pretrained(folder)
    write_atomic(
        folder / "architecture.json",
        json.dumps({"schema": 1, **dataclasses.asdict(what)}, indent=2) + "\n",
    )


def read_architecture(path: pathlib.Path) -> Architecture:
    """The architecture of a run directory's checkpoints."""
    file = pathlib.Path(path) / "model" / "architecture.json"
    try:
        values = json.loads(file.read_text())
        scaling = values["config"]["rope_scaling"]
        shape = values["config"] | {
            "rope_scaling": Llama3Scaling(**scaling) if scaling else None
        }
        return Architecture(
            kind=values["kind"],
            config=LlamaConfig(**shape),
            lora=LoraConfig(**values["lora"]),
            base=values["base"],
            scan_layers=values["scan_layers"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected the architecture of a run, written by sft or reward: "
            f"{error}"
        ) from None


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a whole file or none of it: a reader never sees half."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _differences(saved: pathlib.Path, config: Any) -> list[str]:
    try:
        old = yaml.safe_load(saved.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{saved}: cannot read the run's config: {error}") from None
    new = configs.to_dict(config)
    for values in (old, new):
        values.pop("run_dir", None)  # a moved directory is still the same run
    return configs.differences(old, new)


def _foreign(path: pathlib.Path) -> list[pathlib.Path]:
    return [entry for entry in path.iterdir() if entry.name != ".lock"]


def _versions() -> str:
    lines = []
    for name in VERSIONS_OF:
        try:
            lines.append(f"# {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(lines) + "\n"
