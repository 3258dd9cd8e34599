"""Log-probabilities and entropies of tokens from hidden states, without a [B T V] array
in memory.

Both functions walk over chunks of tokens; each chunk's logits are made, used and
forgotten, and made again in the backward pass (jax.checkpoint).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 1024
"""Tokens whose logits exist at one time."""


def token_logprobs(
    logits_fn: Callable[[jax.Array], jax.Array],
    before: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Array, "B T"]:
    """log p(tokens[:, t] | what it follows), at a temperature.

    logprob_t = z_t[token_t] - log sum_v exp(z_t[v]),  z_t = logits_fn(before_t) / tau

    Args:
        logits_fn: hidden states [n D] -> logits [n V].
        before: [B T D], for each token the hidden state (after the final norm) of the
            token that it follows; see `models.heads.predecessors`.
        tokens: [B T] ids.
        temperature: tau > 0.
        chunk: tokens whose logits exist at one time.

    Returns:
        [B T] float32, in nats. A token that follows nothing gets whatever `before` says
        there: mask it.

    Source: definition.
    """

    def one(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    return _chunked(one, logits_fn, before, tokens, temperature, chunk)


def token_logprobs_and_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    before: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs`, and the entropy of the distribution each token was one of.

    entropy_t = log sum_v exp(z_t[v]) - sum_v softmax(z_t)[v] z_t[v]

    Args:
        logits_fn: as in `token_logprobs`.
        before: as in `token_logprobs`.
        tokens: [B T] ids.
        temperature: tau > 0.
        chunk: tokens whose logits exist at one time.

    Returns:
        Two arrays [B T] float32, in nats.

    Source: definition.
    """

    def one(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        expected = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return picked - total, total - expected

    return _chunked(one, logits_fn, before, tokens, temperature, chunk)


def _chunked(
    one: Callable[[jax.Array, jax.Array], Any],
    logits_fn: Callable[[jax.Array], jax.Array],
    before: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    temperature: float,
    chunk: int,
) -> Any:
    """one(logits [n V], tokens [n]) of every chunk, put together to [B T]."""
    shape, count = tokens.shape, tokens.size
    chunk = min(chunk, count)
    filler = -count % chunk
    inputs = jnp.pad(before.reshape(count, -1), ((0, filler), (0, 0)))
    targets = jnp.pad(tokens.reshape(-1), (0, filler))

    @jax.checkpoint
    def body(args: tuple[jax.Array, jax.Array]) -> Any:
        logits = logits_fn(args[0]).astype(jnp.float32)
        return one(logits / temperature if temperature != 1 else logits, args[1])

    chunks = (inputs.reshape(-1, chunk, inputs.shape[1]), targets.reshape(-1, chunk))
    results = jax.lax.map(body, chunks)
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), results)
