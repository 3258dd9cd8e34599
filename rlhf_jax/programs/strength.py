"""`rlhf-jax strength`: how clearly M reward models agree with the label of each pair.

Read `run`: M runs of `reward` on the same pairs in different orders, their rewards for
every pair, and from these

    strength.jsonl   the rows with strength_mean, strength_std, chosen_rewards [M],
                     rejected_rewards [M] and action
    cleaned.jsonl    the rows after their action: flipped, with margin or soft_label,
                     without the dropped ones; the command that trains on it is printed
    plots/           histogram and the U shape of the spread
    warm/            the members' average as one model (WARM), in Hugging Face's format

Where all members fit the memory of the one device there is they are trained together,
vmapped; elsewhere one after the other, and then a stopped run goes on where it was
(`at_once`). With `folds` every pair is scored by members that never saw it.

Source: Wang et al. 2024, arXiv:2401.06080, sections 2.2-2.3; arXiv:2401.12187 (WARM).
"""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
)
from rlhf_jax.curation.clean import ACTIONS, CleanConfig, changed_row, decide
from rlhf_jax.curation.strength import Strength, strength
from rlhf_jax.data import prepare, sources, specs
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.store import PairDataset
from rlhf_jax.io import progress, strength_plots
from rlhf_jax.io.run_dir import open_run, write_atomic
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import models, objectives, scored_rows, strength_members
from rlhf_jax.sharding import MeshConfig

COLUMNS = (
    "strength_mean",
    "strength_std",
    "chosen_rewards",
    "rejected_rewards",
    "action",
)


@dataclasses.dataclass(frozen=True)
class StrengthConfig:
    """Measure the preference strength of pairs, and clean them by it."""

    run_dir: str
    """Directory of the result and of the members' runs."""
    model: str
    """Backbone of the members: HF directory, hub id, .gguf, preset or run."""
    data: str
    """Pairs, SPEC."""
    members: int = 10
    """M, reward models in different data orders."""
    folds: int = 0
    """Cut the pairs into this many parts and score each with members that were trained
    on the others; 0 = score the pairs that were trained on, as the paper does."""
    at_once: bool | None = None
    """Train all members of a fold together (vmap) on one device; null = if that is the
    only device and they fit its memory, decided when the run begins. A stop then loses
    the fold that is being trained, and members have no metrics."""
    standardise: bool = False
    """Divide each member's reward differences by their root mean square."""
    clean: CleanConfig = CleanConfig()
    """What is done with the pairs."""
    warm: bool = True
    """Write the members' average as one model (without folds)."""
    loss: str = "bradley_terry"
    """Loss of a pair, as in the reward program."""
    batch_size: int = 64
    """Pairs in an optimizer step."""
    accum_steps: int = 1
    """Micro-batches that a step is cut into."""
    epochs: float = 1.0
    """Passes over the pairs, unless `steps` says otherwise."""
    steps: int | None = None
    """Optimizer steps of each member."""
    seed: int = 0
    """Seed of the one head that all members start from; member m shuffles with seed +
    1 + m."""
    rows: DataConfig = DataConfig()
    """How rows become batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(
                f"members: expected at least 2, got {self.members}: the spread between "
                "models is part of the result (the paper takes 10)"
            )
        if self.folds == 1 or self.folds < 0:
            raise ValueError(f"folds: expected 0 or at least 2, got {self.folds}")
        alone = strength_members.alone_for(self)
        if self.at_once and alone:
            raise ValueError(
                "at_once: trains whole models on one device, in single batches of "
                f"shared rows of its own length; leave out {alone}, or at_once"
            )
        columns = self.rows.columns
        flips = self.clean.flip_fraction > 0 or self.clean.flip_below is not None
        if flips and (columns.margin or columns.soft_label or columns.gap_bound):
            raise ValueError(
                "clean: a flipped pair's own margin, soft label or bound would speak "
                "of the old order; train the members without these columns, or do not "
                "flip"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.rows.over_long == "truncate_prompt":
            raise ValueError(
                "rows.over_long: truncate_prompt would score other texts than the rows "
                "hold; set drop or error"
            )
        objectives.check(
            self.loss,
            (),
            columns=vars(self.rows.columns),
            batch_size=self.batch_size,
        )


def run(config: StrengthConfig) -> pathlib.Path:
    """Trains what is not trained yet, measures, cleans, writes; returns run_dir."""
    opened = open_run(
        config.run_dir,
        config,
        holds_runs=True,
        may_change=("clean", "standardise", "warm"),
    )
    with opened.lock:
        root = opened.path
        encoder = _encoder(config)
        dataset, account = prepare.prepare_pairs(
            [config.data],
            encoder,
            config.rows,
            side_file=root / "set_aside" / "data.jsonl",
        )
        progress.say(f"data: {account.summary()}")
        objectives.check_margins(config.loss, dataset)
        source = sources.open_source(specs.parse(config.data), streams=False)
        rows = [dict(source[int(n)][0]) for n in dataset.source_row]
        _check_columns(rows, dataset, config)
        fold = strength_members.folds(rows, config)
        chosen, rejected = strength_members.rewards(
            config, root, rows, dataset, fold, encoder
        )
        found = strength(chosen, rejected, standardise=config.standardise)
        actions = decide(found, config.clean)
        _write(root, rows, found, (chosen, rejected), actions, config)
        if config.warm and not config.folds:
            strength_members.write_average(config, root, encoder)
        plots = [
            strength_plots.histogram(found, actions, root / "plots" / "strength.png"),
            strength_plots.u_shape(found, root / "plots" / "u_shape.png"),
        ]
    _print(root, found, actions, plots)
    _print_next(root, config)
    return root


def _encoder(config: StrengthConfig) -> Encoder:
    tokenizer = models.load_tokenizer_of(config.model)
    return prepare.make_encoder(tokenizer, config.rows)


def _check_columns(
    rows: Sequence[dict[str, Any]], dataset: PairDataset, config: StrengthConfig
) -> None:
    """Before hours of training: nothing that will be written is there already."""
    written = [*COLUMNS, *["margin"] * config.clean.margin]
    written += ["soft_label"] * config.clean.softens
    for row, where in zip(rows, dataset.where, strict=True):
        taken = [name for name in written if name in row]
        if taken:
            raise ValueError(
                f"{where}: the row has a column {taken[0]!r} already; rename it: it is "
                "not overwritten"
            )


def _write(
    root: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    found: Strength,
    rewards: tuple[np.ndarray, np.ndarray],
    actions: np.ndarray,
    config: StrengthConfig,
) -> None:
    columns = config.rows.columns
    names = {"chosen": columns.chosen, "rejected": columns.rejected}
    measured = (
        {
            **row,
            "strength_mean": float(found.mean[n]),
            "strength_std": float(found.std[n]),
            "chosen_rewards": [float(r) for r in rewards[0][n]],
            "rejected_rewards": [float(r) for r in rewards[1][n]],
            "action": str(actions[n]),
            "schema": 1,
        }
        for n, row in enumerate(rows)
    )
    scored_rows.write_whole(root / "strength.jsonl", measured)
    changed = (
        changed_row(row, str(actions[n]), found.mean[n], config.clean, **names)
        for n, row in enumerate(rows)
    )
    scored_rows.write_whole(
        root / "cleaned.jsonl", (row for row in changed if row is not None)
    )


def _print_next(root: pathlib.Path, config: StrengthConfig) -> None:
    """The command that uses what was written: columns are read only if named."""
    named = ["margin"] * config.clean.margin + ["soft_label"] * config.clean.softens
    flags = [f"--rows.columns.{name} {name}" for name in named]
    command = f"rlhf-jax reward --model {config.model} --data {root / 'cleaned.jsonl'}"
    text = " ".join(["next", command, *flags, "--run_dir ..."])
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _print(
    root: pathlib.Path,
    found: Strength,
    actions: np.ndarray,
    plots: Sequence[pathlib.Path],
) -> None:
    counts = Counter(actions.tolist())
    table = Table(title=f"preference strength of {len(actions):,} pairs")
    for name in ("action", "pairs", "share", "mean strength", "mean std"):
        table.add_column(name, justify="left" if name == "action" else "right")
    for action in ACTIONS:
        mask = actions == action
        if counts[action]:
            table.add_row(
                action,
                f"{counts[action]:,}",
                f"{counts[action] / len(actions):.1%}",
                f"{found.mean[mask].mean():.3f}",
                f"{found.std[mask].mean():.3f}",
            )
    console = Console()
    console.print(table)
    negative = float((found.mean < 0).mean())
    console.print(f"strength below 0: {negative:.1%} of the pairs", highlight=False)
    for path in (root / "strength.jsonl", root / "cleaned.jsonl", *plots):
        console.print(str(path), highlight=False)
    summary = {
        "schema": 1,
        "pairs": len(actions),
        "members": found.gaps.shape[1],
        "below_zero": negative,
        "actions": dict(counts),
    }
    write_atomic(root / "strength.json", json.dumps(summary, indent=1))
