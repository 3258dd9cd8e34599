"""`rlhf-jax seam-select`: the RL prompts without those of the lowest SEAM.

Reads the directory of a `seam` run. For each share q of `drop` --out gets

    seam-Q.jsonl      the prompts without the lowest q
    random-Q.jsonl    without as many random ones: the control

Rows are those of the run's data, columns and all, in their order: what `rloo` and `ppo`
take. A prompt without a score is never dropped.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.curation.seam import scores
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.seam import read_scores


@dataclasses.dataclass(frozen=True)
class SeamSelectConfig:
    """Drop the prompts that policy and reward model do not share."""

    run_dir: str
    """Directory of a `seam` run."""
    out: str
    """Directory for the prompts."""
    drop: list[float] = dataclasses.field(default_factory=lambda: [0.2])
    """Shares of the scored prompts to drop, each with a file of its own."""
    estimator: str | None = None
    """Whose scores; null = the run's only one."""
    control: bool = True
    """Write the random control too."""
    overwrite: bool = False
    """Replace files of these names."""
    seed: int = 0
    """Of the control, and of the draw among equal scores."""

    def __post_init__(self) -> None:
        if not self.drop or not all(0 < share < 1 for share in self.drop):
            raise ValueError(
                f"drop: expected shares between 0 and 1, one or more, got {self.drop}"
            )


def run(config: SeamSelectConfig) -> list[pathlib.Path]:
    """Writes the files; returns their paths."""
    rows, lines = read_run(config.run_dir, config.estimator)
    index = np.array([line["index"] for line in lines])
    seam = np.array([scores.of_line(line) for line in lines])
    plans: dict[str, np.ndarray] = {}
    for share in config.drop:
        lowest = scores.lowest(seam, share, seed=config.seed)
        plans[f"seam-{share:g}"] = lowest
        if config.control:
            # One order for all shares: a larger one drops what a smaller one does.
            order = np.random.default_rng(config.seed).permutation(len(lines))
            drawn = order[: len(lowest)]
            plans[f"random-{share:g}"] = np.sort(drawn)
    out = pathlib.Path(config.out).expanduser()
    paths = {name: out / f"{name}.jsonl" for name in plans}
    make_room(out, list(paths.values()), config.overwrite)
    table = Table(title=f"{out}: {len(rows):,} prompts, {len(lines):,} with a score")
    for name in ("file", "dropped", "kept", "highest SEAM dropped", "tied there"):
        table.add_column(name, justify="left" if name == "file" else "right")
    for name, dropped in plans.items():
        gone = set(index[dropped].tolist())
        scored_rows.write_whole(
            paths[name], (row for n, row in enumerate(rows) if n not in gone)
        )
        at = float(seam[dropped].max()) if len(dropped) else float("nan")
        tied = f"{int((seam == at).sum()):,}" if name.startswith("seam") else "-"
        cells = (f"{len(gone):,}", f"{len(rows) - len(gone):,}", f"{at:.3f}", tied)
        table.add_row(paths[name].name, *cells)
    console = Console()
    console.print(table)
    for share in config.drop:
        infinite = int(np.isinf(seam[plans[f"seam-{share:g}"]]).sum())
        if infinite:
            console.print(
                f"warning: seam-{share:g} leaves out {infinite:,} prompts without a "
                "misjudged completion, drawn at random: fewer than this share have a "
                "finite SEAM",
                highlight=False,
            )
    return list(paths.values())


def read_run(
    run_dir: str, estimator: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of prompts.jsonl, lines of one estimator of seam.jsonl) of a `seam` run.

    Raises:
        ValueError: no such run, or no or several such estimators.
    """
    root = pathlib.Path(run_dir).expanduser()
    if not (root / "seam.jsonl").exists():
        raise ValueError(
            f"run_dir {run_dir}: holds no seam.jsonl; run `rlhf-jax seam` first"
        )
    lines = read_scores(str(root / "seam.jsonl"))
    rows = scored_rows.read_jsonl(root / "prompts.jsonl")
    found = list(dict.fromkeys(line["estimator"] for line in lines))
    if estimator is None and len(found) > 1:
        raise ValueError(
            f"estimator: the run has {', '.join(found)}; expected one of them"
        )
    wanted = estimator or found[0]
    if wanted not in found:
        raise ValueError(
            f"estimator {wanted}: the run has scores of {', '.join(found)}"
        )
    return rows, [line for line in lines if line["estimator"] == wanted]


def make_room(out: pathlib.Path, paths: list[pathlib.Path], overwrite: bool) -> None:
    """The directory of some files, which are not there yet.

    Raises:
        ValueError: one is, or the directory cannot be made.
    """
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise ValueError(
            f"out {out}: {there[0].name} exists; name another directory or set "
            "--overwrite true"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out}: cannot write there: {error}") from None
