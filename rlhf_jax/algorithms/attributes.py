"""Rewards made of attributes: one linear regression each on frozen states.

    r_k = w_k . h             h: state of the completion's last token
    r'_k = r_k - lambda_k r_verbosity

`fit_attributes` finds W, `fit_penalties` lambda; both are closed forms on the host, in
float64. What weighs the attributes is in `gate`.

Source: Wang et al. 2024, arXiv:2406.12845 (ArmoRM), and its published code.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ALPHAS = tuple(10.0**n for n in range(-4, 5))
"""Ridge penalties to choose from."""
PENALTIES = tuple(n / 200 for n in range(401))
"""Sizes of lambda to try, in units of std(r_k) / std(r_verbosity)."""


class AttributeFit(NamedTuple):
    """The regressions, and what they are worth on the validation rows."""

    weights: np.ndarray
    """W, [A D], float64."""
    alpha: np.ndarray
    """Ridge penalty of each, [A]."""
    mse: np.ndarray
    """Mean squared error, [A]."""
    r2: np.ndarray
    """1 - mse / variance of the targets, [A]; nan where the targets are all equal."""


class Penalties(NamedTuple):
    """What takes the verbosity out of the rewards."""

    weights: np.ndarray
    """lambda, [A]."""
    before: np.ndarray
    """Spearman correlation of r_k and r_verbosity, [A]."""
    after: np.ndarray
    """Spearman correlation of r'_k and r_verbosity, [A]."""


def fit_attributes(
    states: np.ndarray,
    targets: np.ndarray,
    val_states: np.ndarray,
    val_targets: np.ndarray,
    *,
    names: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
) -> AttributeFit:
    """Ridge regressions without intercept, alpha chosen by the validation error.

    w_k = argmin_w sum_i (w . h_i - y_ik)^2 + alpha |w|^2 = (H'H + alpha I)^-1 H'y_k

    over the rows that have a value of attribute k.

    Args:
        states: H, [N D].
        targets: y, [N A]; nan = no value.
        val_states: [V D].
        val_targets: [V A]; nan = no value.
        names: of the attributes, for errors.
        alphas: ridge penalties above 0; of equal errors the first wins.

    Raises:
        ValueError: an attribute without a value in either set, or states or targets
            that are not finite.

    Source: arXiv:2406.12845, section 3.1.
    """
    states, targets, val_states, val_targets = (
        np.asarray(x, np.float64) for x in (states, targets, val_states, val_targets)
    )
    if not (np.isfinite(states).all() and np.isfinite(val_states).all()):
        raise ValueError("fit_attributes: a state is not finite")
    grid = np.array(alphas, np.float64)
    parts: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    fits = []
    for name, y, val_y in zip(names, targets.T, val_targets.T, strict=True):
        has, val_has = (_has_value(name, v) for v in (y, val_y))
        x, y = states[has], y[has]
        if has.tobytes() not in parts:  # H'H once for attributes with the same rows
            parts[has.tobytes()] = np.linalg.eigh(x.T @ x)
        values, vectors = parts[has.tobytes()]
        shrunk = (vectors.T @ (x.T @ y))[:, None] / (
            np.maximum(values, 0)[:, None] + grid[None, :]
        )
        candidates = vectors @ shrunk
        error = val_states[val_has] @ candidates - val_y[val_has][:, None]
        mse = (error**2).mean(axis=0)
        best, variance = int(mse.argmin()), float(val_y[val_has].var())
        r2 = 1 - mse[best] / variance if variance else np.nan
        fits.append((candidates[:, best], grid[best], mse[best], r2))
    return AttributeFit(*(np.array(column) for column in zip(*fits)))


def _has_value(name: str, values: np.ndarray) -> np.ndarray:
    has = ~np.isnan(values)
    if not has.any():
        raise ValueError(
            f"attribute {name!r}: no value in the training or in the validation rows; "
            "give rows that have it, or leave it out"
        )
    if np.isinf(values).any():
        raise ValueError(f"attribute {name!r}: a value is infinite")
    return has


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 if either is constant.

    Source: Spearman 1904; Pearson's correlation of the ranks.
    """
    a, b = (_ranks(x) - (len(x) + 1) / 2 for x in (first, second))
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / size) if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def fit_penalties(
    rewards: np.ndarray,
    verbosity: int,
    *,
    names: Sequence[str],
    max_correlation: float = 0.03,
    sizes: Sequence[float] = PENALTIES,
) -> Penalties:
    """The smallest lambda that leave no correlation with the verbosity reward.

    lambda_k = the first of +- sizes * std(r_k) / std(r_v), with the sign of the
    correlation, for which |spearman(r_k - lambda_k r_v, r_v)| <= max_correlation;
    lambda_v = 1: the verbosity reward itself becomes 0.

    Args:
        rewards: r, [N A], of completions to judge the correlation on.
        verbosity: v, a column of rewards.
        names: of the attributes, for errors.
        max_correlation: bound on the correlation's size, in (0, 1).
        sizes: >= 0, rising.

    Raises:
        ValueError: r_v is constant, or no size is enough, which few rows can cause.

    Source: arXiv:2406.12845, section 3.2, whose code tries fixed values from 0.01 on
    and bounds the correlation from above alone.
    """
    rewards = np.asarray(rewards, np.float64)
    length = rewards[:, verbosity]
    if not length.std():
        raise ValueError(
            f"attribute {names[verbosity]!r}: its reward is the same for all rows, so "
            "there is nothing to take out; leave verbosity out"
        )
    before = np.array([spearman(r, length) for r in rewards.T])
    found = []
    for k, (name, reward) in enumerate(zip(names, rewards.T, strict=True)):
        if k == verbosity:
            found.append((1.0, 0.0))
            continue
        unit = np.sign(before[k]) * reward.std() / length.std()
        least = np.inf
        for size in sizes:
            after = spearman(reward - size * unit * length, length)
            if abs(after) <= max_correlation:
                found.append((size * unit, after))
                break
            least = min(least, abs(after))
        else:
            raise ValueError(
                f"attribute {name!r}: no lambda brings its Spearman correlation with "
                f"{names[verbosity]!r} to {max_correlation} or less ({least:.3f} at "
                f"best, {len(rewards)} rows); give more rows, or allow more"
            )
    weights, after = zip(*found)
    return Penalties(np.array(weights), before, np.array(after))


def debias(rewards: Any, penalties: Any, verbosity: int) -> Any:
    """r' = r - lambda r_v, [N A], of rewards [N A] and lambda [A]."""
    return rewards - penalties[None, :] * rewards[:, verbosity : verbosity + 1]
