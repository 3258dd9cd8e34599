"""Importance weights that move preference data towards the policy of now."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def importance_weights(
    chosen_logratio: Float[Array, "Q"],
    rejected_logratio: Float[Array, "Q"],
    *,
    flattening: float = 0.01,
    mixing: float = 0.1,
) -> Float[Array, "Q"]:
    """The weight of each pair: its likelihood under the policy of now against before.

    w = exp(s (log rho_chosen + log rho_rejected))
    log rho = log p - log(a p + (1 - a) q)
            = -log(a + (1 - a) exp(-x)),   x = log p - log q

    the relative ratio, at most 1 / a; a = 0 is the plain ratio p / q. It is computed
    from x alone, so long completions, whose p and q are 0 in float32, are no problem.

    Args:
        chosen_logratio: x of the chosen completions, [Q]: log-probability, summed over
            tokens, under the policy of now minus under the policy that wrote the data.
        rejected_logratio: x of the rejected ones.
        flattening: s.
        mixing: a in [0, 1).

    Returns:
        [Q] weights > 0, float32, for the `weight` column of the pairs.

    Source: arXiv:2507.15507 (OCRM); relative ratios as Yamada et al. 2011. The scripts
    of its code use s = 0.001, its arguments default to 0.01. Differs from that code:
    its loss is mean(w * loss), and dividing w by its mean over the batch is an option;
    `algorithms.reward_model` always divides by the batch's sum of weights, so only the
    ratios of the weights within a batch count.

    >>> import jax.numpy as jnp
    >>> print(importance_weights(jnp.zeros(1), jnp.zeros(1)))
    [1.]
    """
    logs = [
        -jnp.logaddexp(_log(mixing), _log(1 - mixing) - x.astype(jnp.float32))
        for x in (chosen_logratio, rejected_logratio)
    ]
    return jnp.exp(flattening * (logs[0] + logs[1]))


def _log(x: float) -> jax.Array:
    return jnp.log(jnp.asarray(x, jnp.float32))
