"""Hidden states of the scored completions, set by set: what over-optimisation leaves.

`kept_completions` says whose states are held in memory, `state_figures` turns them into
flat numbers beside a set's accuracy, `states_summary` compares the sets: the spread of
their mean norms, and histograms over shared bins. The formulas are in
`losses.statistics`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import statistics

MAX_COMPLETIONS = 4096
"""Completions of a set whose states are kept: two float32 arrays of this x D."""
_PAIRS_AT_ONCE = 8192
"""K completions have K (K - 1) / 2 pairs: all their differences need not fit."""
_LEAST_WIDTH = 1e-3
"""Of the norms' size: narrower histograms would show the rounding."""

_distribution = jax.jit(statistics.distribution)
_effective_rank = jax.jit(statistics.effective_rank)


class StateFigures(NamedTuple):
    """Numbers of a set's states, and the norms behind them."""

    metrics: dict[str, float]
    """As `state_figures` says."""
    before: np.ndarray
    """|h| of each kept completion, before the final norm."""
    after: np.ndarray
    """After it."""


def kept_completions(
    sizes: Sequence[int], *, limit: int = MAX_COMPLETIONS, seed: int = 0
) -> np.ndarray:
    """Indices of the completions of a seeded subset of rows, whole rows at a time.

    Args:
        sizes: completions of each row.
        limit: completions, at most; rows are drawn until the next would pass it.
        seed: of the draw.

    >>> kept_completions([2, 2, 2]).tolist(), len(kept_completions([2] * 9, limit=5))
    ([0, 1, 2, 3, 4, 5], 4)
    """
    counts = np.asarray(sizes, np.int64)
    drawn = np.random.default_rng(seed).permutation(len(counts))
    fits = np.zeros(len(counts), bool)
    fits[drawn] = np.cumsum(counts[drawn]) <= limit
    return np.flatnonzero(np.repeat(fits, counts))


def state_figures(
    before: np.ndarray, after: np.ndarray, pairs: np.ndarray
) -> StateFigures:
    """Flat numbers of the states of one set.

    Args:
        before: [M D], states at the scored tokens before the final norm.
        after: [M D], after it.
        pairs: [Q 2], the rows of each pair's chosen and rejected completion; of K-wise
            rows the pairs that the gold scores order. See `alternating`.

    Returns:
        states_n; state_norm_ with mean, std, skewness, p99 (|h| after the final norm,
        which bounds it) and state_norm_before_ with the same; effective_rank and
        effective_rank_before (not centred); where there is a pair also difference_norm_
        and difference_norm_before_ (|h_chosen - h_rejected|).

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the hidden states.
    """
    metrics: dict[str, float] = {"states_n": len(after)}
    norms = []
    for suffix, array in (("", after), ("_before", before)):
        states = jnp.asarray(array)
        norms.append(statistics.state_norms(states))
        metrics |= _named(f"state_norm{suffix}", norms[-1])
        if len(pairs):
            apart = _difference_norms(states, np.asarray(pairs))
            metrics |= _named(f"difference_norm{suffix}", apart)
        metrics[f"effective_rank{suffix}"] = float(_effective_rank(states))
    return StateFigures(
        metrics, before=np.asarray(norms[1]), after=np.asarray(norms[0])
    )


def alternating(count: int) -> np.ndarray:
    """[Q 2], the pairs of rows that are chosen, rejected, chosen, rejected ...

    >>> alternating(4).tolist()
    [[0, 1], [2, 3]]
    """
    return np.arange(count).reshape(-1, 2)


def _difference_norms(states: jax.Array, pairs: np.ndarray) -> jax.Array:
    parts = [
        statistics.difference_norms(states[part[:, 0]], states[part[:, 1]])
        for part in np.split(pairs, range(_PAIRS_AT_ONCE, len(pairs), _PAIRS_AT_ONCE))
    ]
    return jnp.concatenate(parts)


def _named(name: str, values: jax.Array) -> dict[str, float]:
    figures = _distribution(values)._asdict()
    return {f"{name}_{key}": float(value) for key, value in figures.items()}


def states_summary(
    figures: Mapping[str, StateFigures], *, head_norm: float | None
) -> dict[str, Any]:
    """What the sets say together.

    Args:
        figures: by set.
        head_norm: |W| of the reward head.

    Returns:
        head_norm; norm_dispersion and norm_dispersion_before, the standard deviation
        across the sets of their mean |h| (population; left out for a single set);
        histograms, {"before", "after": {"edges", "counts": {set: counts}}} over bins
        that the sets share; max_completions.

    Source: Hong et al. 2025, arXiv:2505.07271, figure 3 (|h| by evaluation set).
    """
    summary: dict[str, Any] = {
        "head_norm": head_norm,
        "max_completions": MAX_COMPLETIONS,
    }
    for suffix in ("", "_before"):
        means = [f.metrics[f"state_norm{suffix}_mean"] for f in figures.values()]
        if len(means) > 1:
            summary[f"norm_dispersion{suffix}"] = float(np.std(means))
    summary["histograms"] = {
        part: _histograms({name: getattr(f, part) for name, f in figures.items()})
        for part in ("before", "after")
    }
    return summary


def _histograms(norms: Mapping[str, np.ndarray], num_bins: int = 30) -> dict[str, Any]:
    """Counts by set over shared bins; those of norms that are not finite are empty."""
    finite = {name: n[np.isfinite(n)].astype(np.float64) for name, n in norms.items()}
    together = np.concatenate([*finite.values(), np.zeros(0)])
    low, high = (together.min(), together.max()) if together.size else (0.0, 1.0)
    middle = (low + high) / 2
    half = max((high - low) / 2, _LEAST_WIDTH * abs(middle) / 2, 1e-12)
    edges = np.linspace(middle - half, middle + half, num_bins + 1)
    counts = {n: np.histogram(v, bins=edges)[0].tolist() for n, v in finite.items()}
    return {"edges": edges.tolist(), "counts": counts}
