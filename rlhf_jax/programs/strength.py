"""`rlhf-jax strength`: how clearly M reward models agree with the label of each pair.

Read `run`: M runs of `reward` on the same pairs in different orders, their rewards for
every pair, and from these

    strength.jsonl   the rows with strength_mean, strength_std, chosen_rewards [M],
                     rejected_rewards [M] and action
    cleaned.jsonl    the rows after their action: flipped, with margin or soft_label,
                     without the dropped ones; the command that trains on it is printed
    plots/           histogram and the U shape of the spread
    warm/            the members' average as one model (WARM), in Hugging Face's format

Members are finished one after the other; a stopped run goes on where it was. With
`at_once` they are trained together, vmapped, in one process: for models of which many
fit in memory. With `folds` every pair is scored by members that never saw it.

Source: Wang et al. 2024, arXiv:2401.06080, sections 2.2-2.3; arXiv:2401.12187 (WARM).
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.reward_model import reward_apply, reward_objective
from rlhf_jax.curation.clean import ACTIONS, CleanConfig, changed_row, decide
from rlhf_jax.curation.strength import Strength, strength
from rlhf_jax.data import prepare, sources, specs
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.store import PairDataset
from rlhf_jax.io import strength_plots
from rlhf_jax.io.run_dir import open_run, write_atomic
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import export, members, models, objectives, reward, training
from rlhf_jax.programs.scored_rows import write_jsonl
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig

REWARDS = "rewards.npz"
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
    at_once: bool = False
    """Train all members of a fold together (vmap) on one device; a stop then loses the
    fold that is being trained."""
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
        if self.at_once and (self.lora.rank or self.accum_steps > 1):
            raise ValueError(
                "at_once: trains whole models in single batches; leave out lora.rank "
                "and accum_steps, or at_once"
            )
        if self.at_once and (
            self.mesh != MeshConfig()
            or self.rows.layout != "shared"
            or self.rows.row_length is not None
        ):
            raise ValueError(
                "at_once: trains on one device in shared rows of its own length; leave "
                "out mesh, rows.layout and rows.row_length, or at_once"
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
        training.say(f"data: {account.summary()}")
        source = sources.open_source(specs.parse(config.data), streams=False)
        rows = [dict(source[int(n)][0]) for n in dataset.source_row]
        _check_columns(rows, dataset, config)
        fold = _folds(rows, config)
        chosen, rejected = _rewards(config, root, rows, dataset, fold, encoder)
        found = strength(chosen, rejected, standardise=config.standardise)
        actions = decide(found, config.clean)
        _write(root, rows, found, (chosen, rejected), actions, config)
        if config.warm and not config.folds:
            _write_average(config, root, encoder)
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


def _folds(rows: Sequence[dict[str, Any]], config: StrengthConfig) -> np.ndarray:
    """The fold of each row; rows of one prompt share theirs."""
    name = config.rows.columns.prompt
    keys = [json.dumps(row.get(name, row), sort_keys=True) for row in rows]
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] % max(config.folds, 1) for key in keys])


def _rewards(
    config: StrengthConfig,
    root: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    dataset: PairDataset,
    fold: np.ndarray,
    encoder: Encoder,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [Q M] of chosen and rejected, each row by members allowed to judge it."""
    rewards = np.zeros((len(rows), 2, config.members), np.float32)
    encoded = list(members.completions(dataset))
    digest = hashlib.sha256(dataset.tokens.tobytes()).hexdigest()
    for part in range(max(config.folds, 1)):
        judged = np.flatnonzero(fold == part)
        spec = config.data
        if config.folds:
            path = root / "folds" / f"without-{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            _write_rows(path, (rows[n] for n in np.flatnonzero(fold != part).tolist()))
            spec = str(path)
        names = [
            f"{part}-{m}" if config.folds else f"{m}" for m in range(config.members)
        ]
        folders = [root / "members" / name for name in names]
        missing = [f for f in folders if not (f / REWARDS).exists()]
        if config.at_once and missing:
            _train_together(config, folders, spec, encoder)
        for member, folder in enumerate(folders):
            kept = folder / REWARDS
            if not kept.exists():
                training.say(f"member {folder.name}")
                if not config.at_once:
                    reward.run(_member(config, folder, spec, member))
                scoring = ScoringConfig(
                    template=config.rows.template,
                    max_length=config.rows.max_length,
                    compute=config.compute,
                    mesh=config.mesh,
                )
                texts = [
                    encoded[2 * n + side] for n in judged.tolist() for side in (0, 1)
                ]
                _save_rewards(
                    kept, open_scorer(str(folder), scoring).rewards(texts), digest
                )
            rewards[judged, :, member] = _load_rewards(kept, digest)
    return rewards[:, 0], rewards[:, 1]


def _save_rewards(path: pathlib.Path, rewards: np.ndarray, digest: str) -> None:
    """A whole file or none, with what was scored."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, rewards=rewards, digest=np.array(digest))
    partial.replace(path)


def _load_rewards(path: pathlib.Path, digest: str) -> np.ndarray:
    """[Q 2] of chosen and rejected.

    Raises:
        ValueError: other pairs were scored.
    """
    with np.load(path) as kept:
        if str(kept["digest"]) != digest:
            raise ValueError(
                f"{path}: the members were trained on other pairs than --data holds "
                "now; restore the data, or choose another --run_dir"
            )
        return kept["rewards"].reshape(-1, 2)


def _train_together(
    config: StrengthConfig, folders: Sequence[pathlib.Path], spec: str, encoder: Encoder
) -> None:
    """All members of a fold by `members.make_trainer`, exported to their folders."""
    loaded = models.load_reward_model(
        config.model, compute=config.compute, key=jax.random.key(config.seed)
    )
    dataset, _ = prepare.prepare_pairs([spec], encoder, config.rows)
    steps = config.steps or math.ceil(config.epochs * len(dataset) / config.batch_size)
    tx = make_optimizer(config.optimizer, make_schedule(config.optimizer, steps))
    objective = reward_objective(
        reward_apply(loaded.model, deterministic=not config.compute.dropout),
        **objectives.parts(config.loss, ()),
    )
    training.say(
        f"{len(folders)} members at once: {steps} steps of {config.batch_size}"
    )
    trained = members.make_trainer(objective, tx, at_once=True)(
        [loaded.params] * len(folders),
        [dataset] * len(folders),
        seeds=[config.seed + 1 + m for m in range(len(folders))],
        steps=steps,
        batch_size=config.batch_size,
    )
    for folder, params in zip(folders, trained, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        _export(folder, config, dataclasses.replace(loaded, params=params), encoder)


def _member(
    config: StrengthConfig, folder: pathlib.Path, spec: str, member: int
) -> reward.RewardConfig:
    return reward.RewardConfig(
        run_dir=str(folder),
        model=config.model,
        data=[spec],
        loss=config.loss,
        batch_size=config.batch_size,
        accum_steps=config.accum_steps,
        epochs=config.epochs,
        steps=config.steps,
        seed=config.seed + 1 + member,
        head_seed=config.seed,
        rows=config.rows,
        optimizer=config.optimizer,
        loop=LoopConfig(keep=1),
        compute=config.compute,
        lora=config.lora,
        mesh=config.mesh,
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
    _write_rows(root / "strength.jsonl", measured)
    changed = (
        changed_row(row, str(actions[n]), found.mean[n], config.clean, **names)
        for n, row in enumerate(rows)
    )
    _write_rows(root / "cleaned.jsonl", (row for row in changed if row is not None))


def _write_rows(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """A whole file or none."""
    partial = path.with_suffix(".partial")
    write_jsonl(partial, rows)
    partial.replace(path)


def _write_average(
    config: StrengthConfig, root: pathlib.Path, encoder: Encoder
) -> None:
    out = root / "warm"
    if out.exists():
        return
    training.say("average of the members")
    folders = [root / "members" / str(m) for m in range(config.members)]
    loaded = models.load_reward_model(str(folders[0]))
    total = loaded.params
    for folder in folders[1:]:
        other = models.load_reward_model(str(folder)).params
        total = jax.tree.map(lambda a, b: a + b, total, other)
    mean = jax.tree.map(lambda leaf: leaf / config.members, total)
    _export(out, config, dataclasses.replace(loaded, params=mean), encoder)


def _export(
    out: pathlib.Path, config: StrengthConfig, loaded: models.Loaded, encoder: Encoder
) -> None:
    export.write(
        str(out),
        loaded,
        kind="reward",
        encoder=encoder,
        dtype="float32",
        max_shard_bytes=int(5e9),
        source=models.resolve(config.model),
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
