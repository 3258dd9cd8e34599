"""The value loss of PPO, and how much of the returns the values explain."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses import masked, shapes


def clipped_value(
    values: Float[Array, "*shape"],
    old_values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
    *,
    clip_eps: float | None = 0.2,
) -> Float[Array, "*shape"]:
    """Half the squared error of the values, their movement clipped, per token.

    loss = 1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2)

    Args:
        values: V.
        old_values: V_old, same shape, from when the completions were sampled.
        returns: G, same shape, see `rl.gae`.
        mask: same shape, True = counts; None = all count.
        clip_eps: eps, > 0, in units of value; None = 1/2 (V - G)^2.

    Returns:
        Same shape, float32; 0 with gradient 0 where the mask is False. The gradient
        flows through `values` alone.

    Raises:
        ValueError: shapes differ, or clip_eps is not positive.

    Source: Dhariwal et al. 2017, OpenAI Baselines, ppo2; Wang et al. 2024,
    arXiv:2401.06080 (code: MOSS-RLHF).
    """
    shapes.require_same_shape(
        values=values, old_values=old_values, returns=returns, mask=mask
    )
    if clip_eps is not None and clip_eps <= 0:
        raise ValueError(
            f"clip_eps: expected a positive number, or None for no clipping, got "
            f"{clip_eps}"
        )
    values = values.astype(jnp.float32)
    old_values = jax.lax.stop_gradient(old_values.astype(jnp.float32))
    returns = jax.lax.stop_gradient(returns.astype(jnp.float32))
    # Selected before the arithmetic: inf - inf and inf * 0 outside the mask stay out.
    if mask is not None:
        values, old_values, returns = (
            jnp.where(mask, x, 0.0) for x in (values, old_values, returns)
        )
    error = (values - returns) ** 2
    if clip_eps is not None:
        near = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
        error = jnp.maximum(error, (near - returns) ** 2)
    return 0.5 * error


def explained_variance(
    values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
) -> Float[Array, ""]:
    """The share of the variance of the returns that the values explain.

    1 - Var[G - V] / Var[G], both over the mask

    Args:
        values: V.
        returns: G, same shape.
        mask: same shape, True = counts.

    Returns:
        [] float32, <= 1, negative where the values are worse than a constant; 0 where
        the returns do not vary. Without gradient. A ratio of whole-batch variances:
        it does not add up over micro-batches as a `Mean` does.

    Raises:
        ValueError: shapes differ.

    Source: Dhariwal et al. 2017, OpenAI Baselines, `explained_variance`.
    """
    shapes.require_same_shape(values=values, returns=returns, mask=mask)
    returns = jnp.where(mask, returns.astype(jnp.float32), 0.0)
    residuals = jnp.where(mask, returns - values.astype(jnp.float32), 0.0)
    total, left = _variance(returns, mask), _variance(residuals, mask)
    explained = 1 - left / jnp.where(total > 0, total, 1.0)
    return jax.lax.stop_gradient(jnp.where(total > 0, explained, 0.0))


def _variance(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    # Measured from the largest: values that are all equal vary by exactly 0.
    top = jnp.max(values, where=mask, initial=-jnp.inf)
    values = jnp.where(mask, values - top, 0.0)
    mean = masked.masked_mean(values, mask).value()
    return masked.masked_mean((values - mean) ** 2, mask).value()
