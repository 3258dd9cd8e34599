"""One step's distribution: penalties, temperature, truncation, and a draw from it.

In the order in which transformers applies them: repetition penalty, minimum length,
temperature, top-k, top-p, min-p. Nothing sorts the vocabulary: a truncation keeps the
tokens whose probability reaches a threshold, found by bisection on the bits of a float,
which costs 31 sums. Tokens that tie with the last one kept are kept too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_ONE = 0x3F800000
"""The bits of 1.0; those of floats in [0, 1] are in the order of their values."""
_BLOCK = 128
"""Tokens whose probabilities are summed before they are looked at one by one."""


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], *, penalty: float
) -> Float[Array, "B V"]:
    """Logits of seen tokens divided by the penalty if positive, else multiplied.

    Args:
        logits: [B V].
        seen: tokens that were used before.
        penalty: above 1 to discourage them; 1 = no change.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; the case of negative
    logits as in transformers.
    """
    scaled = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, scaled, logits)


def top_k(probs: Float[Array, "B V"], *, k: int) -> Float[Array, "B V"]:
    """The k most probable tokens of each row, renormalised.

    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """

    def enough(cut: Float[Array, "B 1"]) -> Bool[Array, "B 1"]:
        return jnp.sum(probs >= cut, axis=-1, keepdims=True) >= k

    return _above(probs, _largest(enough, probs))


def top_p(probs: Float[Array, "B V"], *, p: float) -> Float[Array, "B V"]:
    """The fewest most probable tokens that hold a mass of p, renormalised.

    Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    # Rounding may leave the whole row short of 1: p is of what there is.
    wanted = p * probs.sum(axis=-1, keepdims=True)

    def enough(cut: Float[Array, "B 1"]) -> Bool[Array, "B 1"]:
        mass = jnp.sum(jnp.where(probs >= cut, probs, 0), axis=-1, keepdims=True)
        return mass >= wanted

    return _above(probs, _largest(enough, probs))


def min_p(probs: Float[Array, "B V"], *, p: float) -> Float[Array, "B V"]:
    """Tokens at least p times as probable as the most probable one, renormalised.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    return _above(probs, p * probs.max(axis=-1, keepdims=True))


def draw(probs: Float[Array, "B V"], noise: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token whose slice of the cumulative distribution holds the noise.

    token = min {v : sum_{w <= v} p_w > noise sum_w p_w}

    One uniform number draws a token; the sum goes over blocks first, then inside one.
    A token of probability 0 is never drawn.

    Args:
        probs: [B V] >= 0, each row with a positive sum.
        noise: [B] uniform in [0, 1).

    Source: inverse transform sampling.
    """
    filler = -probs.shape[1] % _BLOCK
    blocks = jnp.pad(probs, ((0, 0), (0, filler))).reshape(len(probs), -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    target = noise * sums.sum(axis=-1)
    block, rest = _slice(sums, target)
    inside, _ = _slice(
        jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest
    )
    return block * _BLOCK + inside


def _slice(
    masses: Float[Array, "B n"], target: Float[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The first place where the cumulative mass exceeds target, and what is left of
    target there; the last place with any mass if rounding put target past the end."""
    ends = jnp.cumsum(masses, axis=-1)
    places = jnp.arange(masses.shape[1])[None]
    last = jnp.max(jnp.where(masses > 0, places, 0), axis=-1)
    first = jnp.sum(ends <= target[:, None], axis=-1)
    place = jnp.minimum(first, last)
    at = place[:, None]
    before = jnp.take_along_axis(ends - masses, at, axis=1)[:, 0]
    # `ends <= target` may pass a place without mass only if it is not the answer.
    empty = jnp.take_along_axis(masses, at, axis=1)[:, 0] == 0
    after = jnp.argmax((masses > 0) & (places >= at), axis=-1)
    return jnp.where(empty, after, place), jnp.maximum(target - before, 0.0)


def _largest(
    enough: Callable[[Float[Array, "B 1"]], Bool[Array, "B 1"]],
    probs: Float[Array, "B V"],
) -> Float[Array, "B 1"]:
    """The largest float in [0, 1] for which `enough` holds; it must hold at 0."""

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple:
        low, high = bounds  # enough at low, not above high
        middle = (low + high + 1) // 2
        good = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    zero = jnp.zeros((len(probs), 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + _ONE))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _above(probs: Float[Array, "B V"], cut: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    kept = jnp.where(probs >= cut, probs, 0.0)
    return kept / kept.sum(axis=-1, keepdims=True)
