"""Generalised advantage estimation over ragged masks, as one reverse scan."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    rewards: Float[Array, "M C"],
    values: Float[Array, "M C"],
    mask: Bool[Array, "M C"],
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Array, "M C"], Float[Array, "M C"]]:
    """Advantages and returns of every completion token.

    A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t
    G_t = A_t + V_t

    t runs over the tokens of the row whose mask is True, as if the others were not
    there, and V = A = 0 after the last one.

    Args:
        rewards: r, [M C], the terminal reward included.
        values: V, [M C], the estimate before token t is chosen (see design: alignment).
        mask: [M C], True = counts; any pattern, gaps included.
        gamma: discount, in [0, 1].
        gae_lambda: lambda, in [0, 1]; 0 = one-step errors, 1 = sums of rewards.

    Returns:
        (advantages, returns), [M C] float32, 0 where the mask is False whatever the
        inputs hold there; without gradient.

    Raises:
        ValueError: gamma or gae_lambda outside [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; returns as targets of the
    value loss as in MOSS-RLHF (Wang et al. 2024, arXiv:2401.06080).
    """
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number}")
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)

    def step(after, token):
        next_value, next_advantage = after
        reward, value, real = token
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        carried = (
            jnp.where(real, value, next_value),
            jnp.where(real, advantage, next_advantage),
        )
        return carried, jnp.where(real, advantage, 0.0)

    end = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(
        step, (end, end), (rewards.T, values.T, mask.T), reverse=True
    )
    advantages = jax.lax.stop_gradient(advantages.T)
    return advantages, advantages + jax.lax.stop_gradient(values)
