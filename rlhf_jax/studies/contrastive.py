"""`rlhf-jax study contrastive`: SimCSE and SwAV, on pairs and on differences, beside
plain Bradley-Terry, with the testbed's out-of-distribution splits as judges.

"BT, two views" has dropout and both forward passes but no contrastive term: what it
gains is not the term's.

Source: Wang et al. 2024, arXiv:2401.06080, section 3.2.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from rlhf_jax.algorithms.contrastive import (
    ContrastiveConfig,
    contrastive_objective,
    init_prototypes,
    make_contrast,
)
from rlhf_jax.algorithms.reward_model import reward_objective, reward_states_apply
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.comparison import ComparisonConfig, Method, compare, table

DROPOUT = 0.05
VARIANTS = {
    "SimCSE": ContrastiveConfig(kind="simcse"),
    "SimCSE-diff": ContrastiveConfig(kind="simcse", items="differences"),
    "SwAV": ContrastiveConfig(kind="swav"),
    "SwAV-diff": ContrastiveConfig(kind="swav", items="differences"),
}


@dataclasses.dataclass(frozen=True)
class ContrastiveStudyConfig(ComparisonConfig):
    """Contrastive reward models on the four disjoint scenarios."""

    run_dir: str = "runs/contrastive"
    """Directory of the study."""
    seeds: int = 5
    """Repetitions, each with its own pairs, heads and orders."""
    steps: int = 200
    """Optimizer steps of every reward model."""


def run(config: ContrastiveStudyConfig) -> dict[str, Any]:
    """Trains what is not there yet; writes study.json; prints the tables."""
    found = compare(config, lambda root: _methods(config, root))
    console = Console(width=130)
    console.print(
        table(found, "accuracy", "accuracy on pairs, against the gold reward")
    )
    console.print(table(found, "tau", "Kendall's tau on quads"))
    return found


def _methods(config: ContrastiveStudyConfig, root: pathlib.Path) -> dict[str, Method]:
    world = worlds.open_world(root / "sft", sft_steps=config.sft_steps)
    noisy = worlds.open_world(root / "sft", sft_steps=config.sft_steps, dropout=DROPOUT)
    apply = reward_states_apply(noisy.model, deterministic=False)
    methods = {
        "BT": Method(world, reward_objective(world.apply())),
        "BT, two views": Method(
            noisy, contrastive_objective(apply, contrast=no_contrast, coefficient=0.0)
        ),
    }
    for name, variant in VARIANTS.items():
        objective = contrastive_objective(
            apply,
            contrast=make_contrast(variant),
            coefficient=variant.weight,
            differences=variant.differences,
        )
        methods[name] = Method(noisy, objective, _prototypes(noisy, variant.prototypes))
    return methods


def no_contrast(
    params: Any, first: jax.Array, second: jax.Array, weight: jax.Array
) -> jax.Array:
    """A contrastive loss of 0."""
    return jnp.zeros_like(weight)


def _prototypes(world: worlds.World, count: int) -> Callable[[int], dict[str, Any]]:
    def extra(seed: int) -> dict[str, Any]:
        if not count:
            return {}
        key = jax.random.fold_in(jax.random.key(seed), 1)
        width = world.model.config.hidden_size
        return {"prototypes": init_prototypes(count, width, key)}

    return extra
