"""Losses on the rewards of K responses to one prompt: [R K] in, [R] out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def plackett_luce(
    rewards: Float[Array, "R K"],
    scores: Float[Array, "R K"],
    mask: Bool[Array, "R K"],
) -> Float[Array, "R"]:
    """Negative log-likelihood of the ranking by `scores` under Plackett-Luce.

    loss = sum_j [ log sum_{i: s_i <= s_j} exp(r_i) - r_j ]

    over the counted responses j that are not in the lowest class of scores. Responses
    with equal scores stand in each other's sums (Breslow's treatment of ties), and the
    order inside a tie is not learned. With K = 2 it is Bradley-Terry.

    Args:
        rewards: [R K], R prompts with up to K responses.
        scores: [R K], higher is better; only their order counts.
        mask: [R K], True = a response.

    Returns:
        [R] losses in nats, float32; 0 for a prompt all of whose responses tie.

    Source: Plackett 1975; Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (K-wise
    data); Zhu et al. 2023, arXiv:2301.11270, eq. 4; ties as Breslow 1974.

    >>> import jax.numpy as jnp
    >>> r = jnp.zeros((1, 3))
    >>> print(plackett_luce(r, jnp.array([[2.0, 1.0, 0.0]]), jnp.ones((1, 3), bool)))
    [1.7917595]
    """
    rewards = jnp.where(mask, rewards, 0.0).astype(jnp.float32)
    not_better = (scores[:, None, :] <= scores[:, :, None]) & mask[:, None, :]
    beaten = (scores[:, None, :] < scores[:, :, None]) & mask[:, None, :]
    # A row of the mask that is all False would make logsumexp -inf, its gradient nan.
    counted = mask & beaten.any(axis=2)
    among = not_better | ~mask[:, :, None]
    pool = jax.nn.logsumexp(
        jnp.broadcast_to(rewards[:, None, :], among.shape), axis=2, where=among
    )
    return jnp.sum(jnp.where(counted, pool - rewards, 0.0), axis=1)


def spread(rewards: Float[Array, "R K"], mask: Bool[Array, "R K"]) -> Float[Array, "R"]:
    """J, MetaRM's difference loss: how far the rewards of one prompt lie apart.

    J = (2 / k^2) sum_{i<j} sigmoid(|r_i - r_j|)

    over the k counted responses; between (k - 1) / 2k, all equal, and (k - 1) / k.
    |.| has gradient 0 at a tie (jax.numpy.abs has 1 there), so equal rewards are not
    pushed apart in an arbitrary direction.

    Args:
        rewards: [R K], k >= 2 of them counted in each row that matters.
        mask: [R K], True = a response.

    Returns:
        [R] values, float32; 0 for a prompt with fewer than two responses.

    Source: Wang et al. 2024, arXiv:2401.06080, eq. 11; Dou et al. 2024,
    arXiv:2405.00438, eq. 4.

    >>> import jax.numpy as jnp
    >>> print(spread(jnp.zeros((1, 5)), jnp.ones((1, 5), bool)))
    [0.4]
    """
    rewards = jnp.where(mask, rewards, 0.0).astype(jnp.float32)
    difference = rewards[:, :, None] - rewards[:, None, :]
    apart = difference * jax.lax.stop_gradient(jnp.sign(difference))
    pairs = mask[:, :, None] & mask[:, None, :]
    pairs &= ~jnp.eye(rewards.shape[1], dtype=bool)[None]
    total = jnp.sum(jnp.where(pairs, jax.nn.sigmoid(apart), 0.0), axis=(1, 2))
    count = jnp.sum(mask, axis=1).astype(jnp.float32)
    return total / jnp.maximum(count, 1.0) ** 2
