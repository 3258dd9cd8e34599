"""One reward from the rewards of M models."""

from collections.abc import Callable

import numpy as np


def mean(rewards: np.ndarray) -> np.ndarray:
    """The average, [N] of [N M]."""
    return rewards.mean(axis=1)


def worst(rewards: np.ndarray) -> np.ndarray:
    """The least reward of any model: what all of them grant.

    Source: Coste et al. 2023, arXiv:2310.02743, worst-case optimisation.
    """
    return rewards.min(axis=1)


def mean_minus_std(rewards: np.ndarray) -> np.ndarray:
    """The average less the population standard deviation: disagreement costs.

    Source: Coste et al. 2023, arXiv:2310.02743, uncertainty-weighted optimisation with
    coefficient 1 (theirs is on the variance).
    """
    return rewards.mean(axis=1) - rewards.std(axis=1)


COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": mean,
    "min": worst,
    "mean-std": mean_minus_std,
}
