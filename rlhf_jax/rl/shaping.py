"""From a score per completion and a KL per token to rewards, and whitening.

Read `token_rewards` (PPO) or `sequence_rewards` (RLOO), which place the same total; the
two penalties before them change the score, `whiten` the advantages after GAE.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from rlhf_jax.losses import masked


def token_rewards(
    score: Num[Array, "M"],
    kl: Num[Array, "M C"],
    mask: Bool[Array, "M C"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "M C"]:
    """Rewards per token: the KL penalty on each, the score on the last.

    r_t = -beta kl_t + [t is the last token of the completion] score

    Args:
        score: [M] of any dtype, for the whole completion.
        kl: [M C], in nats, log pi_old - log pi_ref of the sampled token.
        mask: [M C], True on completion tokens, end of sequence included.
        kl_coef: beta >= 0, in units of score per nat.

    Returns:
        [M C] float32, 0 where the mask is False, without gradient; a row without any
        token gets nothing, not even its score.

    Source: Stiennon et al. 2020, arXiv:2009.01325; Wang et al. 2024, arXiv:2401.06080
    (code: MOSS-RLHF).

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, False]])
    >>> print(token_rewards(jnp.ones(1), jnp.ones((1, 3)), mask, kl_coef=0.25))
    [[-0.25  0.75  0.  ]]
    """
    # Both to float32 first: added into an integer array, rewards lose their fractions.
    score = score.astype(jnp.float32)
    penalty = jnp.where(mask, -kl_coef * kl.astype(jnp.float32), 0.0)
    from_here = jax.lax.cumsum(mask.astype(jnp.int32), axis=1, reverse=True)
    last = mask & (from_here == 1)
    return jax.lax.stop_gradient(penalty + jnp.where(last, score[:, None], 0.0))


def sequence_rewards(
    score: Num[Array, "M"],
    kl: Num[Array, "M"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "M"]:
    """One reward per completion, the KL penalty inside: the sum of `token_rewards`.

    R = score - beta sum_t kl_t

    Args:
        score: [M] of any dtype.
        kl: [M], in nats, summed over the tokens of the completion.
        kl_coef: beta >= 0, in units of score per nat.

    Returns:
        [M] float32, without gradient.

    Source: Ahmadian et al. 2024, arXiv:2402.14740; Hong et al. 2025,
    arXiv:2505.07271 (code: async_rloo_trainer.py).
    """
    rewards = score.astype(jnp.float32) - kl_coef * kl.astype(jnp.float32)
    return jax.lax.stop_gradient(rewards)


def length_penalty(
    score: Num[Array, "M"],
    lengths: Int[Array, "M"],
    *,
    coef: float,
    free_length: int = 0,
) -> Float[Array, "M"]:
    """The score less a price for every token beyond a free length.

    score - coef max(length - free_length, 0)

    Args:
        score: [M] of any dtype.
        lengths: [M], in tokens of the completion.
        coef: >= 0, in units of score per token.
        free_length: >= 0, in tokens.

    Returns:
        [M] float32, without gradient.

    Raises:
        ValueError: a negative coef or free_length.

    Source: definition; other length penalties: Singhal et al. 2023, arXiv:2310.03716.
    """
    _not_negative(coef=coef, free_length=free_length)
    excess = jnp.maximum(lengths - free_length, 0).astype(jnp.float32)
    return jax.lax.stop_gradient(score.astype(jnp.float32) - coef * excess)


def missing_eos_penalty(
    score: Num[Array, "M"], ended: Bool[Array, "M"], *, penalty: float
) -> Float[Array, "M"]:
    """The score, less a fixed amount for completions cut off before their end.

    Args:
        score: [M] of any dtype.
        ended: [M], True where the completion holds its end-of-sequence token.
        penalty: >= 0, in units of score.

    Returns:
        [M] float32, without gradient.

    Raises:
        ValueError: a negative penalty.

    Source: `missing_eos_penalty` in TRL; Huang et al. 2024, arXiv:2403.17031, replace
    the score by a constant instead.
    """
    _not_negative(penalty=penalty)
    score = score.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.where(ended, score, score - penalty))


def whiten(
    values: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-6,
) -> Float[Array, "*shape"]:
    """Values scaled to unit variance over the mask, and by default to mean 0.

    y = (x - mu) / sqrt(sigma^2 + eps) [+ mu if not shift_mean]
    sigma^2 = 1/n sum (x - mu)^2, the biased estimate: defined for n = 1

    Args:
        values: x, any shape; the moments run over all of it.
        mask: same shape, True = counts.
        shift_mean: False keeps the mean where it was.
        eps: added to the variance, > 0.

    Returns:
        Same shape, float32, 0 where the mask is False, without gradient.

    Raises:
        ValueError: eps not positive: equal values would give 0 / 0.

    Source: MOSS-RLHF (Wang et al. 2024, arXiv:2401.06080), advantage whitening. TRL's
    divides by n - 1.
    """
    if eps <= 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    mean = masked.masked_mean(values, mask).value()
    centred = values - mean
    variance = masked.masked_mean(centred**2, mask).value()
    whitened = centred * jax.lax.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return jax.lax.stop_gradient(jnp.where(mask, whitened, 0.0))


def _not_negative(**numbers: float | int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number}")
