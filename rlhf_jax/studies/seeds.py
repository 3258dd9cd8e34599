"""A study's directory: runs and one file a seed, none of them made twice, so that a
stopped study goes on."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_jax.io.run_dir import is_finished, open_run, write_atomic
from rlhf_jax.programs.runs import MAY_CHANGE


@contextlib.contextmanager
def study_dir(config: Any) -> Iterator[pathlib.Path]:
    """The directory of a study, locked. More seeds may be asked for later; every other
    setting must be that of the results in it.

    Raises:
        ValueError: the directory holds a study with other settings, listed; or no seed.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {config.seeds}")
    opened = open_run(config.run_dir, config, holds_runs=True, may_change=("seeds",))
    with opened.lock:
        yield opened.path


def by_seed(
    root: pathlib.Path, seeds: int, one: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """`one(seed)` for each seed, read from its file where it is there; writes
    study.json.

    Args:
        root: from `study_dir`.
        seeds: how many, from 0.
        one: JSON-able results of a seed.
    """
    results = []
    for seed in range(seeds):
        path = root / f"seed-{seed}.json"
        if not path.exists():
            write_atomic(path, json.dumps(one(seed)))
        results.append(json.loads(path.read_text(encoding="utf-8")))
    write_atomic(
        root / "study.json", json.dumps({"schema": 1, "seeds": results}, indent=1)
    )
    return results


def once(program: Callable[[Any], pathlib.Path], config: Any) -> pathlib.Path:
    """The run of a config, which is not repeated if it is done.

    Raises:
        ValueError: its directory holds a run of another config.
    """
    path = pathlib.Path(config.run_dir)
    done = is_finished(path, config, may_change=MAY_CHANGE)
    return path if done else program(config)


def read(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dict a step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
