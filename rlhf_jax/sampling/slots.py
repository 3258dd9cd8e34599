"""The slots that completions are made in, and how they change hands.

A slot holds one completion in the making: its cache, its last token, how far it is.
`fill_all` gives every completion a slot of its own; `empty` and `refill` hand fewer
slots to waiting completions; `record` writes what a step has drawn. What is drawn does
not show here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.decode import DecodeCache
from rlhf_jax.types import Rollout


@struct.dataclass
class Slots:
    """What the loop carries: S slots and the M completions written so far."""

    cache: DecodeCache
    item: Int[Array, "S"]
    """The completion in each slot; M = none."""
    count: Int[Array, "S"]
    """Tokens drawn for it so far."""
    token: Int[Array, "S"]
    """Input of the next step: the last prompt token or the last one drawn."""
    position: Int[Array, "S"]
    """Position of `token`."""
    active: Bool[Array, "S"]
    waiting: Int[Array, ""]
    """The next completion without a slot."""
    seen: Bool[Array, "S V"] | None
    """Tokens used before; None without a repetition penalty."""
    drawn: Rollout


@struct.dataclass
class Prompts:
    """Encoded prompts."""

    last: Int[Array, "B"]
    """The last token of each."""
    length: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None


def fill_all(
    prompts: Prompts, cache: DecodeCache, *, num_samples: int, max_new_tokens: int
) -> Slots:
    """One slot for each completion; the G slots of a prompt share its keys."""
    total = len(prompts.last) * num_samples

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, num_samples, axis=0)

    return Slots(
        cache=cache,
        item=jnp.arange(total),
        count=jnp.zeros(total, jnp.int32),
        token=spread(prompts.last),
        position=spread(prompts.length) - 1,
        active=jnp.ones(total, bool),
        waiting=jnp.int32(total),
        seen=None if prompts.seen is None else spread(prompts.seen),
        drawn=_blank(total, max_new_tokens),
    )


def empty(
    prompts: Prompts,
    cache: DecodeCache,
    *,
    slots: int,
    num_samples: int,
    max_new_tokens: int,
) -> Slots:
    """Free slots, with room for a prompt's keys in each."""
    total = len(prompts.last) * num_samples

    def room(x: jax.Array) -> jax.Array:
        return jnp.zeros((slots, *x.shape[1:]), x.dtype)

    nothing = DecodeCache(
        layers=jax.tree.map(room, cache.layers),
        prompt_positions=room(cache.prompt_positions) - 1,
        positions=room(cache.positions) - 1,
        column=cache.column,
    )
    zeros = jnp.zeros(slots, jnp.int32)
    return Slots(
        cache=nothing,
        item=zeros + total,
        count=zeros,
        token=zeros,
        position=zeros,
        active=jnp.zeros(slots, bool),
        waiting=jnp.int32(0),
        seen=None if prompts.seen is None else room(prompts.seen),
        drawn=_blank(total, max_new_tokens),
    )


def refill(
    slots: Slots, prompts: Prompts, pool: DecodeCache, *, num_samples: int
) -> Slots:
    """Hands the free slots to waiting completions, in their order."""
    total, free = len(slots.drawn.stopped), ~slots.active
    claimed = slots.waiting + jnp.cumsum(free) - 1
    fresh = free & (claimed < total)
    item = jnp.where(fresh, claimed, jnp.where(free, total, slots.item))
    prompt = jnp.where(fresh, item, 0) // num_samples

    def take(new: Any, old: jax.Array) -> jax.Array:
        where = fresh.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(where, new[prompt], old)

    old = slots.cache
    layers = tuple(
        dataclasses.replace(
            here,
            prompt_keys=take(there.prompt_keys, here.prompt_keys),
            prompt_values=take(there.prompt_values, here.prompt_values),
        )
        for here, there in zip(old.layers, pool.layers, strict=True)
    )
    cache = dataclasses.replace(
        old,
        layers=layers,
        prompt_positions=take(pool.prompt_positions, old.prompt_positions),
        positions=jnp.where(fresh[:, None], -1, old.positions),
    )
    return dataclasses.replace(
        slots,
        cache=cache,
        item=item,
        count=jnp.where(fresh, 0, slots.count),
        token=take(prompts.last, slots.token),
        position=take(prompts.length - 1, slots.position),
        active=slots.active | fresh,
        waiting=slots.waiting + jnp.sum(free, dtype=jnp.int32),
        seen=None if slots.seen is None else take(prompts.seen, slots.seen),
    )


def record(
    slots: Slots,
    token: Int[Array, "S"],
    stopped: Bool[Array, "S"],
    logprobs: list[Float[Array, "S"]],
) -> Rollout:
    """The completions with one more token in those of the active slots."""
    drawn = slots.drawn
    item = jnp.where(slots.active, slots.item, len(drawn.stopped))
    at = (item, slots.count)
    put = lambda array, new: array.at[at].set(new, mode="drop")  # noqa: E731
    tempered, plain, sampling = logprobs
    return Rollout(
        tokens=put(drawn.tokens, token),
        mask=put(drawn.mask, True),
        stopped=drawn.stopped.at[item].set(stopped, mode="drop"),
        logprobs=put(drawn.logprobs, tempered),
        policy_logprobs=put(drawn.policy_logprobs, plain),
        sampling_logprobs=put(drawn.sampling_logprobs, sampling),
    )


def _blank(total: int, max_new_tokens: int) -> Rollout:
    shape = (total, max_new_tokens)
    return Rollout(
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.zeros(shape, bool),
        stopped=jnp.zeros(total, bool),
        logprobs=jnp.zeros(shape),
        policy_logprobs=jnp.zeros(shape),
        sampling_logprobs=jnp.zeros(shape),
    )
