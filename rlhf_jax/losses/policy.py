"""Clipped policy losses per token (PPO) and per completion (RLOO), and statistics.

Read `ppo_clip`. `sequence_clip` is the same function of sums over completions, which
`sequence_sums` takes from packed rows. Old log-probabilities and advantages are
constants here: the gradient flows through the new log-probabilities alone.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.losses import kl, masked, shapes
from rlhf_jax.types import Mean


def ppo_clip(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
    *,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Array, "*shape"]:
    """The clipped surrogate, as a loss per token.

    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps_high)),  rho = pi_new / pi_old
    with dual_clip c, where A < 0:  min(that, -c A)

    Args:
        logprobs: log pi_new, in nats.
        old_logprobs: log pi_old, same shape, in nats.
        advantages: A, same shape.
        mask: same shape, True = counts; None = all count.
        clip_eps: eps, in (0, 1].
        clip_eps_high: eps_high, > 0; None = clip_eps.
        dual_clip: c, > 1; None = off.

    Returns:
        Same shape, float32; 0 with gradient 0 where the mask is False. Infinite where
        A < 0 and log rho > 88 (see the note in the code), else finite.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is outside its range.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; the two-sided range as Yu et
    al. 2025, arXiv:2503.14476; dual clip: Ye et al. 2020, arXiv:1912.09729.
    """
    shapes.require_same_shape(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    low, high = _log_range(clip_eps, clip_eps_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: expected a number > 1 or None, got {dual_clip}")
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    if mask is not None:
        advantages = jnp.where(mask, advantages, 0.0)
    # The maximum is -A rho with rho bounded on one side, by the sign of A. Bounding
    # log rho keeps exp from overflowing in the branch that is not taken, where
    # 0 * inf would make the gradient nan. A < 0 has no upper bound without dual clip:
    # an overflow there is the true loss, and the update's check for non-finite
    # losses has to see it.
    ceiling = math.inf if dual_clip is None else math.log(dual_clip)
    log_ratio = jnp.clip(
        log_ratio,
        jnp.where(advantages < 0, low, -math.inf),
        jnp.where(advantages < 0, ceiling, high),
    )
    return -advantages * jnp.exp(log_ratio)


def sequence_clip(
    logprob_sums: Float[Array, "M"],
    old_sums: Float[Array, "M"],
    advantages: Float[Array, "M"],
    mask: Bool[Array, "M"] | None = None,
    *,
    clip_eps: float = 0.2,
) -> Float[Array, "M"]:
    """The clipped surrogate with one ratio per completion, as a loss per completion.

    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
    rho = exp(sum_t log pi_new(t) - sum_t log pi_old(t))

    Only the difference of the sums matters, and two sums over a thousand tokens differ
    by 1e-3 of a nat from rounding alone. Sum the difference instead, which rounds at
    1e-8: pass sequence_sums(logprobs - old_logprobs, ...) and zeros.

    Args:
        logprob_sums: [M] log-probabilities summed over each completion, in nats.
        old_sums: [M], the same under the old policy.
        advantages: A, [M].
        mask: [M], True = counts (`rl.baselines.usable`, flattened); None = all count.
        clip_eps: eps, in (0, 1].

    Returns:
        [M] float32; 0 with gradient 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or clip_eps is outside its range.

    Source: Ahmadian et al. 2024, arXiv:2402.14740; Hong et al. 2025, arXiv:2505.07271
    (code: async_rloo_trainer.py). OpenRLHF and verl call RLOO the token-level loss.
    """
    return ppo_clip(logprob_sums, old_sums, advantages, mask, clip_eps=clip_eps)


def sequence_sums(
    values: Float[Array, "B T"],
    sample: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    count: int,
) -> Float[Array, "M"]:
    """The sum of a per-token quantity over each completion of a packed batch.

    S_m = sum of values[b, t] over mask[b, t] and sample[b, t] = m

    Args:
        values: [B T] per token.
        sample: [B T], the completion's number in [0, count); anything where the mask is
            False. A number outside that range belongs to no completion and is left out.
        mask: [B T], True on completion tokens.
        count: M, the completions in the batch.

    Returns:
        [M] float32, 0 for a completion without tokens; gradient 0 where the mask is
        False.

    Raises:
        ValueError: count not positive.

    Source: definition.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 completion, got {count}")
    values = jnp.where(mask, values, 0.0).astype(jnp.float32)
    sample = jnp.where(mask, sample, 0)
    return jax.ops.segment_sum(values.ravel(), sample.ravel(), num_segments=count)


class PolicyStatistics(NamedTuple):
    """How far the policy has moved from the one that sampled."""

    ratio: Mean
    """Mean of pi_new / pi_old; 1 in expectation."""
    clip_fraction: Mean
    """Share of ratios outside [1 - eps, 1 + eps_high], whatever the advantage."""
    kl: Mean
    """k3 estimate of KL[pi_old || pi_new], in nats per element."""


def policy_statistics(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    *,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
) -> PolicyStatistics:
    """Ratio, clip fraction and KL against the old policy, as addable means.

    ratio = mean rho,  clip_fraction = mean [rho outside [1 - eps, 1 + eps_high]]
    kl = mean (rho - 1 - log rho): samples come from the old policy

    Args:
        logprobs: log pi_new, per token or summed per completion, in nats.
        old_logprobs: log pi_old, same shape.
        mask: same shape, True = counts.
        clip_eps: eps, in (0, 1].
        clip_eps_high: eps_high, > 0; None = clip_eps.

    Returns:
        PolicyStatistics of three Means over the mask, without gradient.

    Raises:
        ValueError: shapes differ, or a hyper-parameter is outside its range.

    Source: definition; the KL: Schulman 2020, "Approximating KL divergence", k3.
    """
    shapes.require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    low, high = _log_range(clip_eps, clip_eps_high)
    log_ratio = jax.lax.stop_gradient(_log_ratio(logprobs, old_logprobs, mask))
    outside = (log_ratio < low) | (log_ratio > high)
    return PolicyStatistics(
        ratio=masked.masked_mean(jnp.exp(log_ratio), mask),
        clip_fraction=masked.masked_mean(outside.astype(jnp.float32), mask),
        kl=masked.masked_mean(kl.k3(jnp.zeros_like(log_ratio), log_ratio), mask),
    )


def _log_range(clip_eps: float, clip_eps_high: float | None) -> tuple[float, float]:
    """log(1 - eps) and log(1 + eps_high)."""
    if not 0 < clip_eps <= 1:
        raise ValueError(f"clip_eps: expected a number in (0, 1], got {clip_eps}")
    if clip_eps_high is None:
        clip_eps_high = clip_eps
    elif clip_eps_high <= 0:
        raise ValueError(
            f"clip_eps_high: expected a positive number or None, got {clip_eps_high}"
        )
    low = math.log1p(-clip_eps) if clip_eps < 1 else -math.inf
    return low, math.log1p(clip_eps_high)


def _log_ratio(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None,
) -> Float[Array, "*shape"]:
    """log pi_new - log pi_old with the old one constant, and 0 outside the mask."""
    old_logprobs = jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    difference = logprobs.astype(jnp.float32) - old_logprobs
    return difference if mask is None else jnp.where(mask, difference, 0.0)
