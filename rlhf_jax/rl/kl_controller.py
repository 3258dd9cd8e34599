"""The KL coefficient that follows a target. A fixed one needs no function."""

import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_ERROR = 0.2
"""The proportional error is clipped to this, on both sides."""


def adaptive(
    kl_coef: float | Float[Array, ""],
    kl: float | Float[Array, ""],
    *,
    target: float,
    horizon: int,
    count: int,
) -> Float[Array, ""]:
    """The coefficient for the next batch: larger if the KL was above its target.

    beta' = beta (1 + count / horizon * e),  e = clip((KL - target) / target, -0.2, 0.2)

    Args:
        kl_coef: beta, >= 0.
        kl: KL, in nats per completion, measured on the last batch under beta; finite.
        target: in nats per completion, > 0.
        horizon: completions over which beta can change by a factor of about
            e^{+-0.2}, > 0.
        count: completions in the batch, >= 0, and below horizon / 0.2.

    Returns:
        beta', [] float32.

    Raises:
        ValueError: target, horizon or count outside their ranges.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2. Differs from the paper:
    its K_beta = 0.1 is count / horizon here, as in its code, so that the speed does not
    depend on the batch size.
    """
    for name, number in (("target", target), ("horizon", horizon)):
        if number <= 0:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    if not 0 <= count < horizon / MAX_ERROR:
        raise ValueError(
            f"count: expected 0 <= count < horizon / {MAX_ERROR} = "
            f"{horizon / MAX_ERROR:g}, got {count}; a longer horizon keeps kl_coef "
            "positive"
        )
    kl_coef = jnp.asarray(kl_coef, jnp.float32)
    error = jnp.clip((kl - target) / target, -MAX_ERROR, MAX_ERROR)
    return kl_coef * (1 + error * (count / horizon))
