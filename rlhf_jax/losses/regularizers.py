"""Regularisers of reward models: values a pair, to be weighted and added to its loss.

Each has the signature f(chosen_rewards [Q], rejected_rewards [Q], weight [Q], *,
hyper-parameters) -> [Q]; the weights tell filler and down-weighted pairs. The objective
adds coefficient * value to a pair's loss before the weighted mean. `batch_sum_to_zero`
couples the pairs of a batch: its value is the same for all pairs of a group.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.losses.masked import weighted_mean


def batch_sum_to_zero(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    weight: Float[Array, "Q"],
    *,
    num_groups: int = 1,
    scale: Literal["mean", "official", "sum"] = "mean",
) -> Float[Array, "Q"]:
    """BSR: the squared mean reward of the batch.

    m_g = sum_{i in g} w_i (r_chosen,i + r_rejected,i) / (2 sum_{i in g} w_i)

        scale     value            gradient in one reward of group g of B pairs
        mean      m_g^2            coefficient * m_g / B
        official  B m_g^2          coefficient * m_g
        sum       (2 B m_g)^2      coefficient * 4 B m_g

    relative to a loss that is a mean over the same B pairs, with B = sum_g w. The
    group is the whole batch by default. The published code has "official" with a
    device's micro-batch as the group; by E[B mean^2] = B mu^2 + variance of the pair
    means, that also penalises the variance of the prompts' offsets, and its weight
    against Bradley-Terry grows with B.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        weight: [Q]; 0 leaves a pair out.
        num_groups: groups of equally many pairs next to each other; the number of
            devices gives the per-device form.
        scale: see above.

    Returns:
        [Q], float32: for each pair the value of its group.

    Raises:
        ValueError: num_groups does not divide Q.

    Source: Hong et al. 2025, arXiv:2505.07271, section 4 and published code.

    >>> import jax.numpy as jnp
    >>> r = jnp.array([3.0, 1.0])
    >>> print(batch_sum_to_zero(r, jnp.zeros(2), jnp.ones(2)))
    [1. 1.]
    """
    size = len(weight)
    if num_groups < 1 or size % num_groups:
        raise ValueError(
            f"num_groups {num_groups}: expected a divisor of the {size} pairs of the "
            "batch"
        )
    weight = weight.astype(jnp.float32)
    sums = chosen_rewards.astype(jnp.float32) + rejected_rewards.astype(jnp.float32)
    means = jax.vmap(lambda v, w: weighted_mean(v, w).value())(
        0.5 * sums.reshape(num_groups, -1), weight.reshape(num_groups, -1)
    )
    count = weight.reshape(num_groups, -1).sum(axis=1)
    factor = {"mean": 1.0, "official": count, "sum": (2 * count) ** 2}[scale]
    return jnp.repeat(factor * means**2, size // num_groups)


def centring(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    weight: Float[Array, "Q"],
) -> Float[Array, "Q"]:
    """(r_chosen + r_rejected)^2: each pair's rewards lie around 0.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        weight: [Q], not used: the pairs do not touch.

    Source: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2; coefficient 0.01 usual.
    """
    del weight
    # Cast first: in bfloat16 256 + 1 is 256.
    chosen, rejected = (
        r.astype(jnp.float32) for r in (chosen_rewards, rejected_rewards)
    )
    return (chosen + rejected) ** 2


def squared_rewards(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    weight: Float[Array, "Q"],
) -> Float[Array, "Q"]:
    """(r_chosen^2 + r_rejected^2) / 2, the mean square: it also bounds r and -r.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        weight: [Q], not used: the pairs do not touch.

    Source: the usual L2 penalty on outputs; here the control for BSR, which leaves
    growth of r_chosen = -r_rejected free.
    """
    del weight
    chosen, rejected = (
        r.astype(jnp.float32) for r in (chosen_rewards, rejected_rewards)
    )
    return 0.5 * (chosen**2 + rejected**2)


def bounded_gap(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    weight: Float[Array, "Q"],
    *,
    gap_bound: Float[Array, "Q"] | None = None,
    bound: float = 5.0,
) -> Float[Array, "Q"]:
    """softplus(d - delta): a soft upper bound on the gap of a pair.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        weight: [Q], not used: the pairs do not touch.
        gap_bound: delta of each pair, [Q], in units of reward, a column of the data
            (`similarity_bound` makes one); None = the same for all.
        bound: delta where there is no column.

    Source: Zhou et al. 2024, arXiv:2404.00978 (PCRM), with coefficient 1; one bound for
    all pairs is its control. Differs from its code: that bounds the gap of every token
    from the first one in which the completions differ, this the gap of the pair.
    """
    del weight
    gap = chosen_rewards.astype(jnp.float32) - rejected_rewards.astype(jnp.float32)
    return jax.nn.softplus(gap - (bound if gap_bound is None else gap_bound))


def similarity_bound(
    similarity: Float[Array, "Q"], *, scale: float = 10.0, offset: float = -5.0
) -> Float[Array, "Q"]:
    """delta* = scale / (similarity + 0.001) + offset: the more alike, the tighter.

    Args:
        similarity: [Q] in [0, 1], of the two completions.
        scale: beta_1.
        offset: beta_3.

    Source: Zhou et al. 2024, arXiv:2404.00978 (PCRM); the defaults are those of its
    summarisation runs (5 at similarity 1, 15 at one half).
    """
    return scale / (similarity + 0.001) + offset
