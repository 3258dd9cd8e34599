"""What RLOO and PPO share: a policy's log-probabilities, and how far it has moved."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.sft import hidden_before
from rlhf_jax.losses import kl, policy
from rlhf_jax.losses.logprobs import token_logprobs_and_entropy
from rlhf_jax.losses.masked import masked_mean
from rlhf_jax.models.llama import Llama
from rlhf_jax.types import Experience, Mean, Sequences

PolicyApply: TypeAlias = Callable[
    [Any, Sequences, jax.Array], tuple[jax.Array, jax.Array]
]
"""(params, sequences, key) -> log-probabilities and entropies, each [B T]."""


def policy_apply(
    model: Llama, *, temperature: float, deterministic: bool
) -> PolicyApply:
    """(params, sequences, key) -> (logprobs [B T], entropy [B T]), in nats.

    Args:
        model: the module.
        temperature: of the sampling, > 0: ratios and KL compare distributions that were
            sampled from.
        deterministic: False draws the dropout masks from the key.
    """

    def apply(
        params: Any, sequences: Sequences, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params}
        before, follows = hidden_before(
            model, variables, sequences, None if deterministic else key
        )
        logits: Any = functools.partial(model.apply, variables, method="logits")
        logprobs, entropy = token_logprobs_and_entropy(
            logits, before, sequences.tokens, temperature=temperature
        )
        return jnp.where(follows, logprobs, 0.0), jnp.where(follows, entropy, 0.0)

    return apply


def counted(batch: Experience) -> jax.Array:
    """[B T] True on the tokens of completions that carry weight."""
    return batch.sequences.completion_mask & (batch.weight > 0)[batch.sample]


def policy_metrics(
    batch: Experience,
    logprobs: jax.Array,
    entropy: jax.Array,
    mask: jax.Array,
    *,
    clip_eps: float,
) -> dict[str, Mean]:
    """Ratio, clip fraction, entropy, and the distance moved in this step, per token.

    Args:
        batch: what is learnt from.
        logprobs: [B T] of the policy now.
        entropy: [B T].
        mask: [B T] from `counted`.
        clip_eps: what counts as clipped.
    """
    moved = policy.policy_statistics(
        logprobs, batch.old_logprobs, mask, clip_eps=clip_eps
    )
    away = kl.k3(logprobs, batch.ref_logprobs, mask)
    return {
        "policy/ratio": moved.ratio,
        "policy/clip_fraction": moved.clip_fraction,
        "policy/kl_step": moved.kl,
        "policy/kl_ref_k3": masked_mean(away, mask),
        "policy/entropy": masked_mean(entropy, mask),
    }
