"""Preference strength: how clearly, and how consistently, M reward models prefer the
chosen completion of each pair.

    d_m = r_m(x, y_chosen) - r_m(x, y_rejected)
    mean strength mu = mean_m d_m,   std sigma = population standard deviation of d_m

Source: Wang et al. 2024, arXiv:2401.06080, eq. 4.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Strength:
    """Strengths of Q pairs under M reward models."""

    gaps: np.ndarray
    """d, [Q M], in units of reward, or of each model's standard deviation."""

    @property
    def mean(self) -> np.ndarray:
        """mu, [Q]: below 0 the models together prefer the rejected completion."""
        return self.gaps.mean(axis=1)

    @property
    def std(self) -> np.ndarray:
        """sigma, [Q], divided by M."""
        return self.gaps.std(axis=1)


def strength(
    chosen_rewards: np.ndarray, rejected_rewards: np.ndarray, *, standardise: bool
) -> Strength:
    """The strengths from rewards [Q M].

    Args:
        chosen_rewards: [Q M] of M models trained on the same data in different orders.
        rejected_rewards: [Q M].
        standardise: divide each model's gaps by their root mean square over the pairs,
            so that no model counts more because its scale is larger (the paper takes
            them as they are). It keeps the sign, which a z-score would not.

    Raises:
        ValueError: shapes differ, no pairs, fewer than two models, or a reward that is
            not finite, with the pair and the model.
    """
    chosen, rejected = (
        np.asarray(r, np.float64) for r in (chosen_rewards, rejected_rewards)
    )
    if chosen.shape != rejected.shape or chosen.ndim != 2:
        raise ValueError(
            "strength: expected rewards [pairs, models] of one shape, got "
            f"{chosen.shape} and {rejected.shape}"
        )
    if chosen.shape[1] < 2:
        raise ValueError(
            f"strength: {chosen.shape[1]} reward model; the spread between models "
            "needs at least 2 (the paper takes 10)"
        )
    if not len(chosen):
        raise ValueError("strength: no pairs; expected at least 1")
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    if not finite.all():
        pair, model = np.argwhere(~finite)[0]
        raise ValueError(
            f"strength: the rewards of pair {pair} under model {model} are "
            f"{chosen[pair, model]} and {rejected[pair, model]}; expected finite "
            "numbers"
        )
    gaps = chosen - rejected
    if standardise:
        scale = np.sqrt((gaps**2).mean(axis=0, keepdims=True))
        gaps = gaps / np.where(scale > 0, scale, 1.0)
    return Strength(gaps)


def below_fraction(values: np.ndarray, fraction: float) -> np.ndarray:
    """A mask of the round(fraction * Q) lowest values; ties by position."""
    lowest = np.argsort(values, kind="stable")[: round(fraction * len(values))]
    mask = np.zeros(len(values), bool)
    mask[lowest] = True
    return mask


def u_curve(found: Strength, *, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(mean of mu, mean of sigma) in bins of equally many pairs, by mu.

    The paper finds sigma U-shaped in mu (its figure 2): the models disagree about the
    size of what they are sure of.
    """
    order = np.array_split(np.argsort(found.mean, kind="stable"), bins)
    filled = [part for part in order if len(part)]
    return (
        np.array([found.mean[part].mean() for part in filled]),
        np.array([found.std[part].mean() for part in filled]),
    )


def slices(found: Strength, count: int) -> list[np.ndarray]:
    """Numbers of the pairs in `count` slices by mu, the lowest first.

    Source: ibid., section 2.3: models trained on one slice of 10 % each.
    """
    return np.array_split(np.argsort(found.mean, kind="stable"), count)
