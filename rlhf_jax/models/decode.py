"""Decoding: one new token for each of G continuations of each of B prompts.

Read `DecodeCache` first. The keys of a prompt are kept once and read by all G of its
continuations; what a continuation wrote itself lies in a ring of C columns. All rows
write the same column, so a write is one update in place, while each row may have begun
at another time: `positions` says which columns a row may read. A row of at most C
tokens never overwrites one of its own.

Rows are continuations, R = B G of them, G after G. Heads come before columns because
the two products of attention then read the cache as it lies in memory (3 times faster
on CPU than columns first). A ring is read in the shape in which it is written: a
reshape between the two makes XLA repeat the write, and copy the whole ring each time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.cache import KVCache
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.types import Sequences

HIDDEN = -1e30
"""Score of an invisible key, finite."""


@struct.dataclass
class DecodeLayer:
    """The keys and values of one layer."""

    prompt_keys: Float[Array, "B K P H"]
    prompt_values: Float[Array, "B K P H"]
    keys: Float[Array, "R K C H"]
    values: Float[Array, "R K C H"]


@struct.dataclass
class DecodeCache:
    """What the G continuations of each of B prompts read."""

    layers: tuple[DecodeLayer, ...]
    prompt_positions: Int[Array, "B P"]
    """Position of each prompt token, -1 on what nobody reads."""
    positions: Int[Array, "R C"]
    """Position of the token in each column of the ring, -1 = not this row's."""
    column: Int[Array, ""]
    """Column of the ring that the next token goes to."""


@struct.dataclass
class DecodeVisibility:
    """Which keys the one query of each row reads."""

    prompt: Bool[Array, "B G P"]
    own: Bool[Array, "R C"]


def init_decode(
    prefilled: KVCache,
    prompt_positions: Int[Array, "B P"],
    config: LlamaConfig,
    *,
    num_samples: int,
    columns: int,
) -> DecodeCache:
    """An empty ring behind prompts that were encoded into `prefilled`.

    Args:
        prefilled: the cache of a forward over the prompts [B P].
        prompt_positions: position of each prompt token, -1 on what nobody reads.
        config: of the model.
        num_samples: G, continuations of each prompt.
        columns: C, most tokens that a continuation feeds.
    """
    rows = prompt_positions.shape[0]
    shape = (rows * num_samples, config.num_kv_heads, columns, config.head_dim)

    def layer(keys: jax.Array, values: jax.Array) -> DecodeLayer:
        empty = jnp.zeros(shape, keys.dtype)
        return DecodeLayer(keys.swapaxes(1, 2), values.swapaxes(1, 2), empty, empty)

    return DecodeCache(
        layers=tuple(map(layer, prefilled.keys, prefilled.values)),
        prompt_positions=prompt_positions,
        positions=jnp.full((rows * num_samples, columns), -1),
        column=jnp.zeros((), jnp.int32),
    )


def admit(cache: DecodeCache, sequences: Sequences) -> DecodeCache:
    """The cache with the positions of one new token a row; its keys come later.

    Raises:
        ValueError: not one token for each of the cache's B G rows.
    """
    rows = len(cache.positions)
    if sequences.tokens.shape != (rows, 1):
        raise ValueError(
            f"decode cache of {rows} rows: expected tokens [{rows}, 1], got "
            f"{list(sequences.tokens.shape)}"
        )
    new = jnp.where(sequences.segment != 0, sequences.positions, -1)
    positions = jax.lax.dynamic_update_slice_in_dim(
        cache.positions, new, cache.column, axis=1
    )
    return dataclasses.replace(cache, positions=positions)


def write(
    layer: DecodeLayer,
    keys: Float[Array, "R 1 K H"],
    values: Float[Array, "R 1 K H"],
    column: Int[Array, ""],
) -> DecodeLayer:
    """The layer with one new key and value a row."""

    def put(ring: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(ring.dtype)
        return jax.lax.dynamic_update_slice_in_dim(ring, new, column, axis=2)

    return dataclasses.replace(
        layer, keys=put(layer.keys, keys), values=put(layer.values, values)
    )


def advance(cache: DecodeCache, layers: tuple[DecodeLayer, ...]) -> DecodeCache:
    """The cache after a forward, ready for the next token."""
    column = (cache.column + 1) % cache.positions.shape[1]
    return dataclasses.replace(cache, layers=layers, column=column)


def visibility(
    cache: DecodeCache, sequences: Sequences, window: int | None
) -> DecodeVisibility:
    """Each row reads its prompt and its own tokens, the new one included.

    Args:
        cache: with the new positions in it (`admit`).
        sequences: one token a row.
        window: a query reads positions less than this far back; None = all.
    """
    position = sequences.positions
    prompt = cache.prompt_positions[:, None, :]

    def visible(keys: jax.Array, position: jax.Array) -> jax.Array:
        near = position - keys < (window or jnp.iinfo(jnp.int32).max)
        return (keys >= 0) & near

    return DecodeVisibility(
        prompt=visible(prompt, position.reshape(len(prompt), -1, 1)),
        own=visible(cache.positions, position),
    )


def attention(
    q: Float[Array, "R 1 N H"], layer: DecodeLayer, visible: DecodeVisibility
) -> Float[Array, "R 1 N H"]:
    """softmax(q k^T / sqrt(H)) v over the prompt's keys and the row's own.

    The two parts share one softmax: exponentials under a common maximum, divided by the
    common sum at the end. Scores and sums are float32.
    """
    f32, scale = jnp.float32, q.shape[-1] ** -0.5
    prompts, heads = layer.prompt_keys.shape[:2]
    own_q = q.reshape(len(q), heads, -1, q.shape[-1])
    shared_q = own_q.reshape(prompts, -1, *own_q.shape[1:])
    shared = jnp.einsum(
        "bgknh,bkph->bgknp", shared_q, layer.prompt_keys, preferred_element_type=f32
    )
    shared = jnp.where(visible.prompt[:, :, None, None], shared * scale, HIDDEN)
    shared = shared.reshape(*own_q.shape[:3], -1)
    own = jnp.einsum("rknh,rkch->rknc", own_q, layer.keys, preferred_element_type=f32)
    own = jnp.where(visible.own[:, None, None], own * scale, HIDDEN)
    top = own.max(axis=-1, keepdims=True)
    top = jnp.maximum(top, shared.max(axis=-1, keepdims=True))
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    total = shared.sum(axis=-1, keepdims=True) + own.sum(axis=-1, keepdims=True)
    dtype = layer.values.dtype
    # k before g: for the other order XLA's CPU backend lacks the bfloat16 product.
    out = jnp.einsum(
        "bgknp,bkph->bkgnh",
        shared.reshape(*shared_q.shape[:4], -1).astype(dtype),
        layer.prompt_values,
        preferred_element_type=f32,
    )
    out = out.swapaxes(1, 2).reshape(own_q.shape)
    out += jnp.einsum(
        "rknc,rkch->rknh", own.astype(dtype), layer.values, preferred_element_type=f32
    )
    return (out / total).astype(q.dtype).reshape(q.shape)
