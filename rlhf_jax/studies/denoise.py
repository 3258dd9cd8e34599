"""`rlhf-jax study denoise`: what preference strength finds, and what cleaning by it is
worth, on testbed pairs of which a known quarter of the labels is flipped.

For every seed: M reward models in different orders measure the strength of each pair;
then reward models are trained from scratch on the pairs as they are, cleaned in the
paper's ways, with the known flips undone (the ceiling), and on each fifth of the pairs
by strength. All are judged by gold labels they never saw, and by labels as noisy as the
training labels. Results of a seed are kept in its file, so a stopped study goes on.

Source: Wang et al. 2024, arXiv:2401.06080, section 2.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.curation.clean import CleanConfig, changed_row, decide
from rlhf_jax.curation.detectors import DETECTORS, auc, ser_rule, ssrm_rule
from rlhf_jax.curation.pairs import swapped
from rlhf_jax.curation.strength import Strength, slices, strength, u_curve
from rlhf_jax.io import strength_plots
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.seeds import by_seed, study_dir
from rlhf_jax.studies.statistics import interval, paired

METHODS = {
    "BT": None,
    "flip": CleanConfig(flip_fraction=0.2),
    "margin": CleanConfig(margin=True),
    "flip + margin": CleanConfig(flip_fraction=0.2, margin=True),
    "soft label + margin": CleanConfig(soft_below=0.0, margin=True),
    "soft label": CleanConfig(soft_below=0.0),
    "drop": CleanConfig(drop_fraction=0.2),
}
"""The paper's four, and two controls: each half of soft label + margin, and dropping
what flip would flip."""
CEILING = "true labels"
SLICES = 5


@dataclasses.dataclass(frozen=True)
class DenoiseConfig:
    """Label noise found and undone on the testbed."""

    run_dir: str = "runs/denoise"
    """Directory of the study."""
    seeds: int = 5
    """Repetitions, each with its own pairs, noise, heads and orders."""
    members: int = 10
    """Reward models that measure the strength."""
    pairs: int = 4000
    """Training pairs."""
    flip_rate: float = 0.25
    """Share of the labels that are flipped."""
    margin_scale: float = 0.2
    """Of the methods with a margin: testbed strengths are a few nats, and a margin as
    large as the reward difference itself leaves the gradient at its start."""
    steps: int = 200
    """Optimizer steps of every reward model."""
    eval_rows: int = 1000
    """Pairs of each evaluation set."""
    sft_steps: int = 500
    """Of the policy that all reward models start from."""


def run(config: DenoiseConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json and plots; prints the tables."""
    with study_dir(config) as root:
        tools = functools.cache(lambda: open_tools(config, root))
        results = by_seed(
            root, config.seeds, lambda seed: _one(config, *tools(), seed, root)
        )
    console = Console(width=110)
    console.print(_detection(results))
    console.print(_methods(results, "clean", "gold labels"))
    console.print(_methods(results, "unseen", "gold labels, new prompts and styles"))
    console.print(_methods(results, "noisy", "labels as noisy as in training"))
    console.print(_slices(results))
    return {"seeds": results}


def open_tools(
    config: Any, root: pathlib.Path
) -> tuple[worlds.World, Callable[..., Any]]:
    """The world, and the trainer of plain Bradley-Terry models in it."""
    world = worlds.open_world(root / "sft", sft_steps=config.sft_steps)
    objective = reward_objective(world.apply())
    return world, worlds.trainer(objective, steps=config.steps)


def _one(
    config: DenoiseConfig,
    world: worlds.World,
    train: Callable[..., Any],
    seed: int,
    root: pathlib.Path,
) -> dict[str, Any]:
    options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
    rows = worlds.rows("train", **options)
    flipped = np.array([row["flipped"] for row in rows])
    found = measure(config, world, train, seed)
    plots = root / "plots"
    actions = decide(found, METHODS["flip"])
    strength_plots.histogram(found, actions, plots / f"strength-{seed}.png")
    strength_plots.u_shape(found, plots / f"u-shape-{seed}.png")
    judges = _judges(config, world, seed)
    judged = {}
    for name, clean in METHODS.items():
        if clean is None:
            chosen = list(rows)
        else:
            clean = dataclasses.replace(clean, margin_scale=config.margin_scale)
            chosen = cleaned(rows, found, clean)
        judged[name] = _train_and_judge(world, train, chosen, seed, judges)
    right = [swapped(row) if row["flipped"] else row for row in rows]
    judged[CEILING] = _train_and_judge(world, train, right, seed, judges)
    parts = [
        _train_and_judge(world, train, [rows[n] for n in part], seed, judges)["clean"]
        for part in slices(found, SLICES)
    ]
    print(
        f"seed {seed}: " + ", ".join(f"{k} {v['clean']:.3f}" for k, v in judged.items())
    )
    return {
        "auc": {
            name: auc(detect(found), flipped) for name, detect in DETECTORS.items()
        },
        "rules": rules(found, flipped),
        "below_zero": float((found.mean < 0).mean()),
        "u_curve": [values.tolist() for values in u_curve(found)],
        "methods": judged,
        "slices": parts,
        "flipped_in_slice": [float(flipped[p].mean()) for p in slices(found, SLICES)],
    }


def measure(
    config: Any, world: worlds.World, train: Callable[..., Any], seed: int
) -> Strength:
    """The strength of a seed's training pairs under `config.members` models, which
    start from one head and differ in their order."""
    options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
    dataset = world.pairs(worlds.rows("train", **options))
    start = world.start(seed)
    params = [
        train(world, start, dataset, 1000 * seed + member)
        for member in range(config.members)
    ]
    return strength(*world.rewards(params, dataset), standardise=False)


def cleaned(rows: Any, found: Strength, config: CleanConfig) -> list[dict[str, Any]]:
    """The rows after their actions, as the strength program writes them."""
    changed = (
        changed_row(row, action, mean, config)
        for row, action, mean in zip(rows, decide(found, config), found.mean)
    )
    return [row for row in changed if row is not None]


def rules(found: Strength, flipped: np.ndarray) -> dict[str, dict[str, float]]:
    """What the confidence rules of SER and SSRM do with one model's rewards."""
    centred = found.gaps[:, 0] / 2
    decided = {"SER": ser_rule(centred, -centred), "SSRM": ssrm_rule(found.gaps[:, 0])}
    return {
        name: {
            "kept": float((actions != "drop").mean()),
            "wrong_after": float(
                ((actions == "flip") != flipped)[actions != "drop"].mean()
            ),
        }
        for name, actions in decided.items()
    }


def _judges(config: DenoiseConfig, world: worlds.World, seed: int) -> dict[str, Any]:
    size = config.eval_rows
    noisy = {"size": size, "seed": seed, "flip_rate": config.flip_rate, "min_gap": 0.0}
    return {
        "clean": world.pairs(worlds.rows("val_id", size=size, seed=seed)),
        "noisy": world.pairs(worlds.rows("val_id", **noisy, temperature=0.05)),
        "unseen": world.pairs(worlds.rows("val_both_ood", size=size, seed=seed)),
    }


def _train_and_judge(
    world: worlds.World,
    train: Callable[..., Any],
    rows: Any,
    seed: int,
    judges: dict[str, Any],
) -> dict[str, float]:
    params = train(world, world.start(seed), world.pairs(rows), seed)
    return {k: worlds.accuracy(world, params, pairs) for k, pairs in judges.items()}


def _detection(results: list[dict[str, Any]]) -> Table:
    table = Table(title="finding the flipped labels: area under the ROC curve")
    table.add_column("detector")
    table.add_column("AUC", justify="right")
    for name in DETECTORS:
        table.add_row(name, interval([r["auc"][name] for r in results]).plain())
    share = interval([r["below_zero"] for r in results]).plain()
    table.caption = f"share of the pairs with strength below 0: {share}"
    return table


def _methods(results: list[dict[str, Any]], judge: str, meaning: str) -> Table:
    table = Table(title=f"accuracy on {meaning}")
    for name in ("training labels", "accuracy", "against BT"):
        table.add_column(name, justify="left" if name[0] == "t" else "right")
    values = {
        name: [r["methods"][name][judge] for r in results]
        for name in (*METHODS, CEILING)
    }
    for name, found in values.items():
        against = "" if name == "BT" else str(paired(found, values["BT"]))
        table.add_row(name, interval(found).plain(), against)
    return table


def _slices(results: list[dict[str, Any]]) -> Table:
    table = Table(title="training on one fifth of the pairs, by strength")
    for name in ("fifth", "flipped in it", "accuracy on gold labels"):
        table.add_column(name, justify="right")
    for n in range(SLICES):
        table.add_row(
            str(n + 1),
            f"{np.mean([r['flipped_in_slice'][n] for r in results]):.2f}",
            interval([r["slices"][n] for r in results]).plain(),
        )
    return table
