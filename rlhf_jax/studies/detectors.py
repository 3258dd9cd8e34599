"""`rlhf-jax study detectors`: which signal finds flipped labels, and how many reward
models it needs.

For every seed M models on all the pairs, and M for each of two folds that never saw
the pairs they judge: trained on half the pairs, with half the steps, so as many passes.
What cross-fitting loses is therefore also what half the data costs. Area under the ROC
curve of each detector with 1, 2, ... M of the models, in-sample and cross-fitted.

Source: Wang et al. 2024, arXiv:2401.06080, section 2.2; the confidence rules of SER
(arXiv:2411.00418) and SSRM (arXiv:2409.06903).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.curation.detectors import DETECTORS, auc
from rlhf_jax.curation.strength import Strength
from rlhf_jax.studies import denoise
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.seeds import by_seed, study_dir
from rlhf_jax.studies.statistics import interval, paired

COUNTS = (1, 2, 5)
"""Numbers of models that are tried, besides all of them."""
FOLDS = 2


@dataclasses.dataclass(frozen=True)
class DetectorsConfig:
    """Finding flipped labels on the testbed."""

    run_dir: str = "runs/detectors"
    """Directory of the study."""
    seeds: int = 5
    """Repetitions, each with its own pairs, noise, heads and orders."""
    members: int = 10
    """Reward models, of each fold too."""
    pairs: int = 4000
    """Training pairs."""
    flip_rate: float = 0.25
    """Share of the labels that are flipped."""
    steps: int = 200
    """Optimizer steps of every reward model."""
    sft_steps: int = 500
    """Of the policy that all reward models start from."""


def run(config: DetectorsConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the tables."""
    with study_dir(config) as root:
        tools = functools.cache(lambda: denoise.open_tools(config, root))
        results = by_seed(root, config.seeds, lambda seed: _one(config, *tools(), seed))
    console = Console(width=110)
    console.print(_table(results))
    console.print(_rules(results))
    return {"seeds": results}


def _one(
    config: DetectorsConfig, world: worlds.World, train: Callable[..., Any], seed: int
) -> dict[str, Any]:
    options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
    rows = worlds.rows("train", **options)
    flipped = np.array([row["flipped"] for row in rows])
    found = {
        "in-sample": denoise.measure(config, world, train, seed),
        "cross-fitted": _cross_fitted(config, world, rows, seed),
    }
    counts = [n for n in (*COUNTS, config.members) if n <= config.members]
    return {
        "auc": {
            kind: {
                name: {
                    str(n): auc(detect(Strength(strengths.gaps[:, :n])), flipped)
                    for n in dict.fromkeys(counts)
                }
                for name, detect in DETECTORS.items()
            }
            for kind, strengths in found.items()
        },
        "rules": {kind: denoise.rules(s, flipped) for kind, s in found.items()},
    }


def _cross_fitted(
    config: DetectorsConfig,
    world: worlds.World,
    rows: list[dict[str, Any]],
    seed: int,
) -> Strength:
    """Strengths by models that were trained on the other fold, for as many passes."""
    objective = reward_objective(world.apply())
    halved = worlds.trainer(objective, steps=config.steps // FOLDS)
    start, gaps = world.start(seed), np.zeros((len(rows), config.members))
    fold = np.arange(len(rows)) % FOLDS
    for part in range(FOLDS):
        seen = world.pairs([r for r, f in zip(rows, fold, strict=True) if f != part])
        judged = world.pairs([r for r, f in zip(rows, fold, strict=True) if f == part])
        params = [
            halved(world, start, seen, 1000 * seed + 100 * (part + 1) + member)
            for member in range(config.members)
        ]
        chosen, rejected = world.rewards(params, judged)
        gaps[fold == part] = chosen - rejected
    return Strength(gaps)


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="finding the flipped labels: area under the ROC curve")
    kinds = ("in-sample", "cross-fitted")
    for name in ("detector", "models", *kinds, "difference"):
        table.add_column(name, justify="left" if name == "detector" else "right")
    for name in DETECTORS:
        for count in results[0]["auc"]["in-sample"][name]:
            fitted, crossed = (
                [r["auc"][kind][name][count] for r in results] for kind in kinds
            )
            cells = (interval(values).plain() for values in (fitted, crossed))
            table.add_row(name, count, *cells, str(paired(crossed, fitted)))
    return table


def _rules(results: list[dict[str, Any]]) -> Table:
    table = Table(title="confidence rules on one model's rewards")
    for name in ("rule", "scored", "pairs kept", "wrong labels among them"):
        table.add_column(
            name, justify="left" if name in ("rule", "scored") else "right"
        )
    for kind in ("in-sample", "cross-fitted"):
        for rule in results[0]["rules"][kind]:
            found = [r["rules"][kind][rule] for r in results]
            cells = [
                interval([f[k] for f in found]).plain() for k in ("kept", "wrong_after")
            ]
            table.add_row(rule, kind, *cells)
    return table
