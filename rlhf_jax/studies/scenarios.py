"""`rlhf-jax study scenarios`: BT, hinge, norm, DR and BSR on the four disjoint
scenarios of the testbed: accuracy on pairs and Kendall's tau on quads, paired over
seeds.

Controls: BSR in eight groups instead of one, BSR on other losses, and squared rewards,
which bound what BSR leaves free. The p values are those of single comparisons.

Source: Hong et al. 2025, arXiv:2505.07271, table 5, and its ablations.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.losses import preference, regularizers
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.comparison import (
    ComparisonConfig,
    Method,
    compare,
    overall_table,
    split_table,
    table,
)
from rlhf_jax.studies.quickstart import SCENARIOS

BSR = (regularizers.batch_sum_to_zero, 1e-3 * worlds.BATCH_SIZE)
"""The published form: lambda 1e-3 times the pairs of the batch, on one device."""
EIGHT_GROUPS = functools.partial(
    regularizers.batch_sum_to_zero, num_groups=8, scale="official"
)
"""As eight devices with eight pairs each would have it: papers differ in the group."""
TERMS: dict[str, dict[str, Any]] = {
    "BT": {},
    "hinge": {"loss": preference.hinge},
    "norm": {"loss": preference.normalised},
    "DR": {"loss": preference.direct},
    "BSR": {"regularizers": [BSR]},
    "BSR, 8 groups": {"regularizers": [(EIGHT_GROUPS, 1e-3)]},
    "hinge + BSR": {"loss": preference.hinge, "regularizers": [BSR]},
    "DR + BSR": {"loss": preference.direct, "regularizers": [BSR]},
    "BT + L2": {"regularizers": [(regularizers.squared_rewards, 1e-2)]},
}


@dataclasses.dataclass(frozen=True)
class ScenariosConfig(ComparisonConfig):
    """Objectives on the four disjoint scenarios."""

    run_dir: str = "runs/scenarios"
    """Directory of the study."""


def run(config: ScenariosConfig) -> dict[str, Any]:
    """Trains what is not there yet; writes study.json; prints the tables."""

    def methods(root: pathlib.Path) -> dict[str, Method]:
        world = worlds.open_world(root / "sft", sft_steps=config.sft_steps)
        return {
            name: Method(world, reward_objective(world.apply(), **terms))
            for name, terms in TERMS.items()
        }

    found = compare(config, methods)
    console = Console(width=160)
    console.print(
        table(found, "accuracy", "accuracy on pairs, against the gold reward")
    )
    console.print(table(found, "tau", "Kendall's tau on quads"))
    console.print(table(found, "reward_std", "standard deviation of the rewards"))
    console.print(overall_table(found, STATES, "hidden states, by scenario"))
    console.print(states_by_split(found))
    return found


def states_by_split(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Spread of |h| and effective rank of each split beside accuracy, BT and BSR."""
    title = "hidden states and accuracy by split (train: against the labels it has)"
    return split_table(found, BY_SPLIT, title, methods=("BT", "BSR"))


def _of(key: str, split: str, result: Mapping[str, float]) -> float:
    return result[f"{key}/{split}"]


def _spread(split: str, result: Mapping[str, float]) -> float:
    return _of("state_norm_before_std", split, result) / _of(
        "state_norm_before_mean", split, result
    )


BY_SPLIT: dict[str, Callable[[str, Mapping[str, float]], float]] = {
    "accuracy": functools.partial(_of, "accuracy"),
    "std of |h|": functools.partial(_of, "state_norm_std"),
    "before the norm": functools.partial(_of, "state_norm_before_std"),
    "that / mean |h|": _spread,
    "effective rank": functools.partial(_of, "effective_rank"),
    "rank before the norm": functools.partial(_of, "effective_rank_before"),
}
"""Figures of a split: the dispersion of its norms and the rank of its states."""


def _mean_over(key: str, result: Mapping[str, float]) -> float:
    return float(np.mean([result[f"{key}/{name}"] for name in SCENARIOS]))


def _above_training(result: Mapping[str, float]) -> float:
    return _mean_over("effective_rank", result) - result["effective_rank/train"]


STATES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "head norm": lambda result: result["head_norm"],
    "|h| before the norm": functools.partial(_mean_over, "state_norm_before_mean"),
    "its spread over scenarios": lambda result: result["norm_dispersion_before"],
    "spread after the norm": lambda result: result["norm_dispersion"],
    "effective rank": functools.partial(_mean_over, "effective_rank"),
    "above that in training": _above_training,
    "mean accuracy": functools.partial(_mean_over, "accuracy"),
}
"""The paper's account of what BSR does, beside the accuracy it should explain."""
