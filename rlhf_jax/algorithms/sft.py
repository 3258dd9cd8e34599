"""Supervised fine-tuning: next-token loss on completion tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses.logprobs import token_logprobs
from rlhf_jax.losses.masked import masked_mean
from rlhf_jax.models.heads import predecessors
from rlhf_jax.models.llama import Llama
from rlhf_jax.types import Mean, Sequences


def sft_objective(apply: Callable[..., jax.Array]) -> Objective:
    """An objective (params, Sequences, key) -> (Mean, metrics): mean token loss, nats.

    loss = - sum_t mask_t logprob_t / sum_t mask_t,  over all tokens t of the batch

    Args:
        apply: (params, sequences, key) -> log-probabilities [B T], aligned to tokens.

    Returns:
        The objective. Metric: `completion_tokens`, the tokens a row trains on.
    """

    def objective(
        params: Any, batch: Sequences, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        logprobs = apply(params, batch, key)
        loss = masked_mean(-logprobs, batch.completion_mask)
        rows = jnp.float32(batch.tokens.shape[0])
        return loss, {"completion_tokens": Mean(loss.weight, rows)}

    return objective


def logprobs_apply(model: Llama, *, deterministic: bool) -> Callable[..., jax.Array]:
    """(params, sequences, key) -> log-probabilities [B T] of a Linen language model.

    Tokens that follow nothing (the first of a sequence, padding) get 0.

    Args:
        model: the module.
        deterministic: False draws the dropout masks from the key.
    """

    def apply(params: Any, sequences: Sequences, key: jax.Array) -> jax.Array:
        variables = {"params": params}
        before, follows = hidden_before(
            model, variables, sequences, None if deterministic else key
        )
        logits: Any = functools.partial(model.apply, variables, method="logits")
        logprobs = token_logprobs(logits, before, sequences.tokens)
        return jnp.where(follows, logprobs, 0.0)

    return apply


def hidden_before(
    model: Llama, variables: Any, sequences: Sequences, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(hidden state of what each token follows [B T D], whether there is one [B T]).

    Args:
        model: the module.
        variables: {"params": ...}.
        sequences: rows in any layout.
        key: draws the dropout masks; None = no dropout.
    """
    hidden: Any = model.apply(
        variables,
        sequences,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    before = predecessors(sequences)
    columns = jnp.maximum(before, 0)[:, :, None]
    return jnp.take_along_axis(hidden, columns, axis=1), before >= 0
