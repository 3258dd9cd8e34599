"""`rlhf-jax study ablation`: the techniques of *Secrets of RLHF II* together, and each
one taken out in turn, under 25 % label noise.

    all           the weakest fifth flipped, strength as margin, SimCSE on pairs
    without X     the others
    BT            none of them

Dropout and both forward passes stay everywhere: what SimCSE gains is the term's own.

Source: Wang et al. 2024, arXiv:2401.06080, sections 2 and 3.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from rich.console import Console

from rlhf_jax.algorithms.contrastive import (
    ContrastiveConfig,
    contrastive_objective,
    make_contrast,
)
from rlhf_jax.algorithms.reward_model import reward_objective, reward_states_apply
from rlhf_jax.curation.clean import CleanConfig
from rlhf_jax.studies import denoise
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.comparison import ComparisonConfig, Method, compare, table
from rlhf_jax.studies.contrastive import DROPOUT, no_contrast

FLIP = 0.2


@dataclasses.dataclass(frozen=True)
class AblationConfig(ComparisonConfig):
    """Each technique removed in turn."""

    run_dir: str = "runs/ablation"
    """Directory of the study."""
    seeds: int = 5
    """Repetitions, each with its own pairs, noise, heads and orders."""
    pairs: int = 4000
    """Training pairs."""
    flip_rate: float = 0.25
    """Share of the labels that are flipped."""
    steps: int = 200
    """Optimizer steps of every reward model."""
    members: int = 5
    """Reward models that measure the strength."""
    margin_scale: float = 0.2
    """Factor of the margin, as in the denoise study."""


def run(config: AblationConfig) -> dict[str, Any]:
    """Trains what is not there yet; writes study.json; prints the tables."""
    found = compare(config, lambda root: _methods(config, root))
    console = Console(width=130)
    console.print(
        table(found, "accuracy", "accuracy on pairs, against the gold reward")
    )
    console.print(
        table(found, "accuracy", "the same, against all techniques", base="all")
    )
    return found


def _methods(config: AblationConfig, root: pathlib.Path) -> dict[str, Method]:
    world = worlds.open_world(root / "sft", sft_steps=config.sft_steps)
    noisy = worlds.open_world(root / "sft", sft_steps=config.sft_steps, dropout=DROPOUT)
    plain = reward_objective(world.apply())
    apply = reward_states_apply(noisy.model, deterministic=False)
    simcse = contrastive_objective(
        apply, contrast=make_contrast(ContrastiveConfig(kind="simcse"))
    )
    views = contrastive_objective(apply, contrast=no_contrast, coefficient=0.0)
    strength_of = functools.lru_cache(
        functools.partial(
            denoise.measure, config, world, worlds.trainer(plain, steps=config.steps)
        )
    )

    def rows(seed: int, *, flip: bool, margin: bool) -> list[dict[str, Any]]:
        options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
        made = worlds.rows("train", **options)
        if not flip and not margin:
            return made
        clean = CleanConfig(
            flip_fraction=FLIP if flip else 0.0,
            margin=margin,
            margin_scale=config.margin_scale,
        )
        return denoise.cleaned(made, strength_of(seed), clean)

    def given(flip: bool, margin: bool) -> Any:
        return functools.partial(rows, flip=flip, margin=margin)

    return {
        "BT": Method(noisy, views),
        "all": Method(noisy, simcse, rows=given(True, True)),
        "without flip": Method(noisy, simcse, rows=given(False, True)),
        "without margin": Method(noisy, simcse, rows=given(True, False)),
        "without SimCSE": Method(noisy, views, rows=given(True, True)),
    }
