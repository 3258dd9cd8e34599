"""Running mean and standard deviation of the scores, and scores measured by them.

Read `RunningMoments`, `update`, then `scale` (by the standard deviation alone) or
`normalise` (mean too). Part of the training state: a checkpoint has to hold it.

Precision: float32 suffices because only deviations from a mean are ever squared (sums
of squares would cancel), and because each update adds one batch: a batch of n scores
still counts until about 2^24 n of them have been seen. The mean is as fine as float32
is at its size, about 1e-7 of it.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# Under the import hook of the tests a checked pytree cannot pass through jax.tree.map,
# vmap or device_get, which put other leaves into it.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen."""

    count: Float[Array, ""]
    """How many scores have been seen."""
    mean: Float[Array, ""]
    """Their mean, 0 before the first."""
    m2: Float[Array, ""]
    """Sum of (score - mean)^2."""


def init() -> RunningMoments:
    """Moments of nothing yet."""
    return RunningMoments(
        count=jnp.zeros((), jnp.float32),
        mean=jnp.zeros((), jnp.float32),
        m2=jnp.zeros((), jnp.float32),
    )


def update(
    moments: RunningMoments, values: Float[Array, "M"], mask: Bool[Array, "M"]
) -> RunningMoments:
    """The moments with one more batch in them.

    delta = mu_b - mu,  n = n_a + n_b
    mu' = mu + delta n_b / n
    M2' = M2 + M2_b + delta^2 n_a n_b / n

    a is what was seen before, b the batch.

    Args:
        moments: of the scores so far.
        values: [M] scores of the batch.
        mask: [M], True = counts.

    Returns:
        New moments, without gradient; unchanged by a batch without counted scores.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances", eq. 2.1.
    """
    values = jax.lax.stop_gradient(values.astype(jnp.float32))
    batch = jnp.sum(mask, dtype=jnp.float32)
    size = jnp.maximum(batch, 1)
    # Measured from the largest, so that equal scores leave exactly no deviation.
    top = jnp.where(batch > 0, jnp.max(values, where=mask, initial=-jnp.inf), 0.0)
    offset = jnp.sum(jnp.where(mask, values - top, 0.0)) / size
    squares = jnp.sum(jnp.where(mask, values - top - offset, 0.0) ** 2)

    count = moments.count + batch
    share = batch / jnp.maximum(count, 1)
    delta = jnp.where(batch > 0, top + offset - moments.mean, 0.0)
    return RunningMoments(
        count=count,
        mean=moments.mean + delta * share,
        m2=moments.m2 + squares + delta**2 * moments.count * share,
    )


def std(moments: RunningMoments) -> Float[Array, ""]:
    """Standard deviation of the scores seen, from the unbiased variance.

    std = sqrt(M2 / (n - 1)), and 1 where it is undefined or 0

    Args:
        moments: of the scores so far.

    Returns:
        [] float32, > 0: 1 for fewer than two scores and for scores that are all equal,
        so that dividing by it leaves them alone.

    Source: MOSS-RLHF (Wang et al. 2024, arXiv:2401.06080): sqrt(var n / (n - 1)).
    """
    spread = jnp.sqrt(moments.m2 / jnp.maximum(moments.count - 1, 1))
    return jnp.where((moments.count >= 2) & (spread != 0), spread, 1.0)


def scale(
    scores: Float[Array, "M"], moments: RunningMoments, *, clip: float | None = None
) -> Float[Array, "M"]:
    """Scores in units of their running standard deviation, the mean left in.

    s / std, then clipped to [-clip, clip]

    Args:
        scores: s, [M].
        moments: of the scores so far, this batch included (`update` first).
        clip: > 0, in standard deviations; None = no clipping.

    Returns:
        [M] float32, without gradient.

    Raises:
        ValueError: clip not positive.

    Source: MOSS-RLHF (Wang et al. 2024, arXiv:2401.06080), `use_reward_scaling`.
    """
    return _clipped(scores.astype(jnp.float32) / std(moments), clip)


def normalise(
    scores: Float[Array, "M"], moments: RunningMoments, *, clip: float | None = None
) -> Float[Array, "M"]:
    """Scores as deviations from their running mean, in standard deviations.

    (s - mean) / std, then clipped to [-clip, clip]

    Args:
        scores: s, [M].
        moments: of the scores so far, this batch included (`update` first).
        clip: > 0, in standard deviations; None = no clipping.

    Returns:
        [M] float32, without gradient.

    Raises:
        ValueError: clip not positive.

    Source: MOSS-RLHF (Wang et al. 2024, arXiv:2401.06080), `use_reward_norm`.
    """
    deviations = scores.astype(jnp.float32) - moments.mean
    return _clipped(deviations / std(moments), clip)


def _clipped(scores: Float[Array, "M"], clip: float | None) -> Float[Array, "M"]:
    if clip is not None:
        if clip <= 0:
            raise ValueError(
                f"clip: expected a positive number of standard deviations, got {clip}; "
                "leave it None for no clipping"
            )
        scores = jnp.clip(scores, -clip, clip)
    return jax.lax.stop_gradient(scores)
