"""Statistics of a reward model's hidden states: norms, effective rank, the head.

With r = W . h and d = r_chosen - r_rejected = |W| |h_chosen - h_rejected| cos(angle),
a growing d comes from the head or from the states: `head_norm` measures the one,
`state_norms` and `difference_norms` the other, `effective_rank` how many directions
the states use. Read `distribution` first: the four numbers given of any norm.

Pure and of fixed shape, so they may stand inside a training step, where they are
metrics: no gradient goes through them. Filler rows are left out by a mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EPS = float(jnp.finfo(jnp.float32).eps)


class Distribution(NamedTuple):
    """Where values lie; each a float32 scalar, 0 of no value."""

    mean: Float[Array, ""]
    std: Float[Array, ""]
    """Of the population."""
    skewness: Float[Array, ""]
    """> 0: a tail to the right."""
    p99: Float[Array, ""]
    """99th percentile."""


def distribution(
    values: Float[Array, "Q"], mask: Bool[Array, "Q"] | None = None
) -> Distribution:
    """Mean, standard deviation, skewness and 99th percentile of the values.

    mu = mean x,  m_k = mean (x - mu)^k,  std = m_2^(1/2),  skewness = m_3 / m_2^(3/2)
    p99 = x_(j) + (t - j)(x_(j+1) - x_(j)),  t = 0.99 (n - 1),  j = floor(t)

    over the n counted values, x_(0) <= x_(1) <= ... in order.

    Args:
        values: [Q]; anything, nan too, where the mask is False.
        mask: [Q], True = counts; None = all do.

    Returns:
        The four numbers. The skewness is 0 where the values differ by no more than
        the rounding of float32: there it would be noise.

    Source: definition; skewness is Fisher and Pearson's g_1, the percentile Hyndman and
    Fan 1996, "Sample quantiles in statistical packages", definition 7.

    >>> import jax.numpy as jnp
    >>> print(distribution(jnp.array([0.0, 0.0, 3.0])).skewness)
    0.70710677
    """
    values = jax.lax.stop_gradient(values.astype(jnp.float32))
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    count = jnp.sum(mask)
    n = jnp.maximum(count, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(mask, values, 0.0)) / n
    apart = jnp.where(mask, values - mean, 0.0)
    std = jnp.sqrt(jnp.sum(apart**2) / n)
    spread = std > 8 * _EPS * jnp.abs(mean)
    # Divided by std first: the cube of a small number would underflow.
    unit = apart / jnp.where(spread, std, 1.0)
    skewness = jnp.where(spread, jnp.sum(unit**3) / n, 0.0)
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    place = 0.99 * (n - 1)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
    step = ordered[high] - ordered[low]
    p99 = ordered[low] + (place - low) * jnp.where(high > low, step, 0.0)
    return Distribution(mean, std, skewness, jnp.where(count > 0, p99, 0.0))


def state_norms(states: Float[Array, "Q D"]) -> Float[Array, "Q"]:
    """|h|_2 of each state, float32, without gradient.

    Args:
        states: [Q D], in any float dtype.

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the hidden states.
    """
    states = jax.lax.stop_gradient(states.astype(jnp.float32))
    return jnp.linalg.norm(states, axis=1)


def difference_norms(
    chosen_states: Float[Array, "Q D"], rejected_states: Float[Array, "Q D"]
) -> Float[Array, "Q"]:
    """|h_chosen - h_rejected|_2 of each pair, float32, without gradient.

    The gradient of Bradley-Terry in the head is -sigmoid(-d) (h_chosen - h_rejected):
    this is its size.

    Args:
        chosen_states: [Q D].
        rejected_states: [Q D].

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the hidden states.
    """
    difference = chosen_states.astype(jnp.float32) - rejected_states.astype(jnp.float32)
    return state_norms(difference)


def head_norm(kernel: Float[Array, "D"]) -> Float[Array, ""]:
    """|W|_2 of the reward head, float32, without gradient; about 1 when it is fresh.

    Args:
        kernel: [D].

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the projection head.
    """
    return jnp.linalg.norm(jax.lax.stop_gradient(kernel.astype(jnp.float32)))


def effective_rank(
    states: Float[Array, "N D"],
    mask: Bool[Array, "N"] | None = None,
    *,
    centred: bool = False,
) -> Float[Array, ""]:
    """How many directions the states use: the exponential of a spectrum's entropy.

    erank(H) = exp(-sum_i p_i ln p_i),   p_i = s_i / sum_j s_j

    with the singular values s of H. Between 1 and min(N, D), and equal to it where all
    singular values are equal. It grows with the number of rows: compare at one N.

    Args:
        states: [N D].
        mask: [N], True = a row of H; None = all are.
        centred: whether the mean state is subtracted first.

    Returns:
        A float32 scalar; 0 for a matrix of zeros, which has no direction.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", eq. 4; Hong et al. 2025, arXiv:2505.07271, table 1, where it is
    not said whether the states were centred.

    >>> import jax.numpy as jnp
    >>> print(effective_rank(2 * jnp.eye(4)).round(4))
    4.0
    """
    rows = jax.lax.stop_gradient(states.astype(jnp.float32))
    mask = jnp.ones(rows.shape[:1], bool) if mask is None else mask
    # A row of zeros changes no singular value.
    rows = jnp.where(mask[:, None], rows, 0.0)
    if centred:
        count = jnp.maximum(jnp.sum(mask), 1)
        mean = jnp.sum(rows, axis=0, keepdims=True) / count
        rows = jnp.where(mask[:, None], rows - mean, 0.0)
    largest = jnp.max(jnp.abs(rows))
    rows = rows / jnp.where(largest > 0, largest, 1.0)
    values = jnp.linalg.svd(rows, compute_uv=False)
    total = jnp.sum(values)
    share = values / jnp.where(total > 0, total, 1.0)
    terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)
    return jnp.where(total > 0, jnp.exp(-jnp.sum(terms)), 0.0)


def state_statistics(
    chosen_states: Float[Array, "Q D"],
    rejected_states: Float[Array, "Q D"],
    mask: Bool[Array, "Q"] | None = None,
    *,
    suffix: str = "",
) -> dict[str, Float[Array, ""]]:
    """Flat metrics of a batch of pairs: norms of the states and of their differences.

    Args:
        chosen_states: [Q D], h at the last token of the chosen completions.
        rejected_states: [Q D].
        mask: [Q], True = a pair that counts; None = all do.
        suffix: of the norms' names, such as _before.

    Returns:
        state_norm_ and difference_norm_ with mean, std, skewness and p99: the first
        over both completions of every counted pair, the second over the pairs.

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the hidden states.
    """
    both = jnp.concatenate([chosen_states, rejected_states])
    twice = None if mask is None else jnp.concatenate([mask, mask])
    apart = difference_norms(chosen_states, rejected_states)
    parts = {
        "state_norm": distribution(state_norms(both), twice),
        "difference_norm": distribution(apart, mask),
    }
    return {
        f"{name}{suffix}_{figure}": value
        for name, found in parts.items()
        for figure, value in found._asdict().items()
    }
