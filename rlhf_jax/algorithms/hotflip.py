"""HotFlip: the substitutions of single tokens that raise a reward most.

    gain[t, v] = (E_v - E_y_t) . dr / de_t

E is the table of token embeddings, e_t the embedding at column t: to first order, what
the reward r gains where token y_t becomes v. The best by this estimate are then scored
in truth, all in one call.

Source: Ebrahimi et al. 2018, arXiv:1712.06751, section 3 (flips of words).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.heads import RewardModel
from rlhf_jax.types import Sequences

CHUNK = 8
"""Substitutions of every row that are scored together."""


class Flips(NamedTuple):
    """The proposed substitutions of each row, the best by estimate first."""

    rewards: Float[Array, "B"]
    """Of the rows as they are."""
    position: Int[Array, "B F"]
    """Column of the substituted token."""
    token: Int[Array, "B F"]
    """What stands there instead."""
    flipped: Float[Array, "B F"]
    """Rewards with the substitution; -inf where fewer than F are possible."""


def make_flips(
    model: RewardModel, *, count: int
) -> Callable[[Any, Sequences, jax.Array, jax.Array, jax.Array], Flips]:
    """(params, sequences, score_at, editable, allowed) -> Flips.

    sequences: one completion a row. score_at [B]: its last token. editable [B T]: True
    where a token may be substituted. allowed [V]: True on the tokens that may be put
    there. Jit it.

    Args:
        model: the reward model; no mutable state, dropout off.
        count: F, substitutions proposed for each row.
    """

    def flips(
        params: Any,
        sequences: Sequences,
        score_at: Int[Array, "B"],
        editable: Bool[Array, "B T"],
        allowed: Bool[Array, "V"],
    ) -> Flips:
        table = params["backbone"]["embed"]["embedding"]
        tokens = sequences.tokens

        def rewards(tokens: jax.Array, offset: jax.Array | None) -> jax.Array:
            row = sequences.replace(tokens=tokens)  # type: ignore[attr-defined]
            found = model.apply(
                {"params": params}, row, score_at[:, None], offset=offset
            )
            return jnp.asarray(found)[:, 0]

        def total(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = rewards(tokens, offset)
            return found.sum(), found

        zero = jnp.zeros((*tokens.shape, table.shape[1]), jnp.float32)
        slope, now = jax.grad(total, has_aux=True)(zero)
        # Row by row: gains [T V] of all rows together would be the largest array here.
        position, token, possible = jax.lax.map(
            lambda row: _best(table, allowed, count, *row), (slope, tokens, editable)
        )

        def one(flip: tuple[jax.Array, jax.Array]) -> jax.Array:
            at, new = flip
            rows = jnp.arange(len(tokens))
            return rewards(tokens.at[rows, at].set(new), None)

        flipped = jax.lax.map(one, (position.T, token.T), batch_size=CHUNK).T
        return Flips(now, position, token, jnp.where(possible, flipped, -jnp.inf))

    return flips


def _best(
    table: jax.Array,
    allowed: jax.Array,
    count: int,
    slope: Float[Array, "T D"],
    tokens: Int[Array, "T"],
    editable: Bool[Array, "T"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(column, token, whether there is one) of a row's substitutions, [F] each."""
    table = table.astype(jnp.float32)
    gain = jnp.einsum("td,vd->tv", slope, table)
    gain -= jnp.take_along_axis(gain, tokens[:, None], axis=1)
    other = jnp.arange(len(table))[None] != tokens[:, None]
    gain = jnp.where(editable[:, None] & allowed[None] & other, gain, -jnp.inf)
    best, place = jax.lax.top_k(gain.reshape(-1), count)
    return place // len(table), place % len(table), best > -jnp.inf
