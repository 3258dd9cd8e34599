"""DPO: a policy is its own reward model, so every pair loss trains it directly.

    apply = implicit_reward_apply(policy, reference, beta=0.1)
    objective = reward_objective(apply, loss=bradley_terry)     this is DPO

Source: Rafailov et al. 2023, arXiv:2305.18290.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Sequences


def implicit_reward_apply(
    policy: Callable[..., jax.Array],
    reference: Callable[..., jax.Array],
    *,
    beta: float,
) -> Callable[..., jax.Array]:
    """(params, sequences, score_at, key) -> implicit rewards [B S].

    r(x, y) = beta [log pi(y | x) - log pi_ref(y | x)], summed over the tokens of y

    Args:
        policy: (params, sequences, key) -> log-probabilities [B T].
        reference: the same of the reference policy; gets no gradient.
        beta: strength of the KL penalty that the reward stands for, > 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5 without its constant.
    """

    def apply(
        params: Any, sequences: Sequences, score_at: jax.Array, key: jax.Array
    ) -> jax.Array:
        before = jax.lax.stop_gradient(reference(params, sequences, key))
        ratio = policy(params, sequences, key) - before
        return beta * completion_sums(ratio, sequences, score_at)

    return apply


def completion_sums(
    values: Float[Array, "B T"], sequences: Sequences, score_at: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """The sum of `values` over the tokens of each completion.

    Args:
        values: [B T], aligned to tokens.
        sequences: rows in any layout.
        score_at: column of each completion's last token; unused slots give the sum of
            whatever completion they point at.
    """
    segment = jnp.take_along_axis(sequences.segment, score_at, axis=1)
    own = segment[:, :, None] == sequences.segment[:, None, :]
    own &= sequences.completion_mask[:, None, :]
    return jnp.sum(jnp.where(own, values[:, None, :], 0.0), axis=2)
