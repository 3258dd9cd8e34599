"""Three estimators of KL[policy || ref] from log-probabilities of sampled tokens.

Each takes log-probabilities of tokens that the *first* argument's distribution sampled,
and gives one number a token. With d = log ref - log policy:

    k1 = -d               unbiased, high variance, either sign
    k2 = d^2 / 2          biased, low variance, >= 0
    k3 = e^d - 1 - d      unbiased, low variance, >= 0; overflows where ref >> policy

As a penalty inside the reward (no gradient) their values matter; as a loss term their
gradients do, and those are not the KL's in general: see each function.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses import shapes


def k1(
    logprobs: Float[Array, "*shape"],
    ref_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """The log-ratio: unbiased for the KL.

    k1 = log pi(x) - log ref(x)

    Gradient: that of log pi, which is 0 in expectation over x ~ pi: as a loss term it
    pulls nowhere. Use it inside the reward.

    Args:
        logprobs: log pi(x), in nats.
        ref_logprobs: log ref(x), same shape, in nats.
        mask: same shape, True = counts; None = all count.

    Returns:
        Same shape, float32, in nats; 0 with gradient 0 where the mask is False.

    Raises:
        ValueError: shapes differ.

    Source: Schulman 2020, "Approximating KL divergence",
    http://joschu.net/blog/kl-approx.html.
    """
    return -_log_ratio(logprobs, ref_logprobs, mask)


def k2(
    logprobs: Float[Array, "*shape"],
    ref_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Half the squared log-ratio: biased for the KL, exact to second order near 0.

    k2 = (log pi(x) - log ref(x))^2 / 2

    Gradient: (log pi - log ref) grad log pi, whose expectation over x ~ pi is exactly
    grad KL[pi || ref]: of the three, the one to use as a loss term on fresh samples.

    Args:
        logprobs: log pi(x), in nats.
        ref_logprobs: log ref(x), same shape, in nats.
        mask: same shape, True = counts; None = all count.

    Returns:
        Same shape, float32, in nats, >= 0; 0 with gradient 0 where the mask is False.

    Raises:
        ValueError: shapes differ.

    Source: Schulman 2020, "Approximating KL divergence",
    http://joschu.net/blog/kl-approx.html.
    """
    return 0.5 * _log_ratio(logprobs, ref_logprobs, mask) ** 2


def k3(
    logprobs: Float[Array, "*shape"],
    ref_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """The log-ratio with a control variate: unbiased for the KL, never negative.

    k3 = e^d - 1 - d,  d = log ref(x) - log pi(x)

    Gradient: (1 - e^d) grad log pi, whose expectation over x ~ pi is the gradient of
    KL[ref || pi]: the KL the other way round, equal to second order near 0.

    Args:
        logprobs: log pi(x), in nats.
        ref_logprobs: log ref(x), same shape, in nats.
        mask: same shape, True = counts; None = all count.

    Returns:
        Same shape, float32, in nats, >= 0 up to rounding (3e-7 |d|), infinite for
        d > 88; 0 with gradient 0 where the mask is False.

    Raises:
        ValueError: shapes differ.

    Source: Schulman 2020, "Approximating KL divergence",
    http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = _log_ratio(logprobs, ref_logprobs, mask)
    # e^d - 1 rounds at 1e-7 whatever d is: more than all of k3 for |d| below 5e-4.
    return jnp.expm1(log_ratio) - log_ratio


def _log_ratio(
    logprobs: Float[Array, "*shape"],
    ref_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None,
) -> Float[Array, "*shape"]:
    """log ref - log pi, and 0 outside the mask."""
    shapes.require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    difference = ref_logprobs.astype(jnp.float32) - logprobs.astype(jnp.float32)
    # Before exp and squares: their derivative at inf times 0 would be nan.
    return difference if mask is None else jnp.where(mask, difference, 0.0)
