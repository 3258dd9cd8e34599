"""Decoding behind shared prompts: the full forward's hidden states, slots and rings.

Two prompts, two continuations of each. Row 1 and row 2 are handed to a new continuation
half way, as a refill does, so that the ring wraps around while others read it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import decode
from rlhf_jax.models.cache import init_cache
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.models.decode import DecodeLayer, DecodeVisibility
from rlhf_jax.models.llama import Llama
from rlhf_jax.testing import tiny_config
from rlhf_jax.types import Sequences
from tests.parameters import random_parameters

CONFIG = tiny_config(vocab_size=61, num_layers=1, qk_norm=True)
PROMPTS = ([3, 1, 4, 1, 5], [9, 2])
WIDTH, RING, STEPS = 6, 5, 8
REFILLED_AT = {1: 3, 2: 5}
"""Row -> step from which it holds another continuation of its prompt."""


@functools.cache
def setup(window=None, dtype="float32"):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    compute = ComputeConfig(scan_layers=False, dtype=dtype)
    model = Llama(config, compute)
    return model, random_parameters(model)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, sequences, cache=None):
    return model.apply({"params": params}, sequences, cache=cache)


def prefilled(model, params, dtype="float32"):
    """A cache behind the prompts, the second one padded on the left."""
    tokens, positions = np.zeros((2, 2, WIDTH), np.int32)
    segment = np.zeros((2, WIDTH), np.int32)
    for row, (prompt, start) in enumerate(zip(PROMPTS, (0, WIDTH - 2), strict=True)):
        here = slice(start, start + len(prompt))
        tokens[row, here], segment[row, here] = prompt, 1
        positions[row, here] = np.arange(len(prompt))
    sequences = Sequences(
        tokens=jnp.array(tokens),
        positions=jnp.array(positions),
        segment=jnp.array(segment),
        completion_mask=jnp.zeros((2, WIDTH), bool),
    )
    _, filled = apply(
        model, params, sequences, init_cache(model.config, 2, WIDTH, dtype)
    )
    return decode.init_decode(
        filled,
        jnp.array(np.where(segment, positions, -1)),
        model.config,
        num_samples=2,
        columns=RING,
    )


def one_token(tokens, positions, active):
    return Sequences(
        tokens=jnp.array(tokens)[:, None],
        positions=jnp.array(positions)[:, None],
        segment=jnp.array(active, jnp.int32)[:, None],
        completion_mask=jnp.array(active)[:, None],
    )


def freed(cache, row):
    return dataclasses.replace(cache, positions=cache.positions.at[row].set(-1))


def continuations(seed=0):
    """Row -> its continuations, one after the other, none longer than the ring."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 61, (4, STEPS))
    parts = {}
    for row in range(4):
        # a row without a refill stops when its ring is full
        start = REFILLED_AT.get(row, RING)
        parts[row] = [tokens[row, :start], tokens[row, start : start + RING]]
        if row not in REFILLED_AT:
            parts[row] = parts[row][:1]
    return parts


def full_hidden(model, params, prompt, continuation):
    tokens = np.zeros((1, 12), np.int32)
    size = len(prompt) + len(continuation)
    tokens[0, :size] = [*prompt, *continuation]
    ones = jnp.ones((1, 12), jnp.int32)
    sequences = Sequences(
        tokens=jnp.array(tokens),
        positions=jnp.arange(12)[None],
        segment=ones,
        completion_mask=ones > 0,
    )
    return np.asarray(apply(model, params, sequences))[0, len(prompt) : size]


def decoded(model, params, parts, dtype="float32"):
    """Row -> hidden states of all its steps [n D]; the last cache."""
    cache = prefilled(model, params, dtype)
    hidden = {row: [] for row in parts}
    for step in range(STEPS):
        tokens, positions, active = np.zeros((3, 4), np.int32)
        for row, (first, *later) in parts.items():
            start = REFILLED_AT.get(row, STEPS)
            if step == start:
                cache = freed(cache, row)
            part, at = (first, step) if step < start else (later[0], step - start)
            active[row] = at < len(part)
            tokens[row] = part[at] if active[row] else 60
            positions[row] = len(PROMPTS[row // 2]) + at
        out, cache = apply(
            model, params, one_token(tokens, positions, active > 0), cache
        )
        for row in np.flatnonzero(active):
            hidden[int(row)].append(np.asarray(out)[row, 0])
    return hidden, cache


@pytest.mark.parametrize("window", [None, 3])
def test_every_row_decodes_its_full_forward_around_the_ring(window):
    model, params = setup(window)
    parts = continuations()
    hidden, cache = decoded(model, params, parts)
    assert int(cache.column) == STEPS % RING
    for row, owned in parts.items():
        prompt = PROMPTS[row // 2]
        expected = [full_hidden(model, params, prompt, part) for part in owned]
        np.testing.assert_allclose(hidden[row], np.concatenate(expected), atol=1e-4)


def test_a_row_reads_nothing_of_its_neighbours_and_predecessor():
    model, params = setup()
    parts, changed = continuations(), continuations(seed=1)
    first, _ = decoded(model, params, parts)
    # the second continuation of row 2 stays, all else changes
    second, _ = decoded(model, params, changed | {2: [changed[2][0], parts[2][1]]})
    kept = len(parts[2][1])
    np.testing.assert_allclose(first[2][-kept:], second[2][-kept:], atol=1e-5)
    assert np.abs(first[2][0] - second[2][0]).max() > 0.1


def slow_attention(q, layer, visible, samples):
    """[R N H] float64."""
    q = np.asarray(q, np.float64)[:, 0]
    shared, own = np.asarray(visible.prompt), np.asarray(visible.own)
    arrays = (layer.prompt_keys, layer.keys, layer.prompt_values, layer.values)
    old_keys, keys, old_values, values = (np.asarray(x, np.float64) for x in arrays)
    out, per_key = np.zeros_like(q), q.shape[1] // keys.shape[1]
    for row, head in np.ndindex(q.shape[:2]):
        b, g, k = row // samples, row % samples, head // per_key
        here, there = shared[b, g], own[row]
        seen = np.concatenate([old_keys[b, k, here], keys[row, k, there]])
        read = np.concatenate([old_values[b, k, here], values[row, k, there]])
        weights = np.exp(seen @ q[row, head] / q.shape[2] ** 0.5)
        out[row, head] = weights / weights.sum() @ read
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_equals_a_float64_loop(heads, kv_heads):
    """3 prompts of 7 columns, 2 continuations of each, rings of 5."""
    keys = jax.random.split(jax.random.key(0), 7)
    normal = jax.random.normal
    layer = DecodeLayer(
        prompt_keys=normal(keys[0], (3, kv_heads, 7, 8)),
        prompt_values=normal(keys[1], (3, kv_heads, 7, 8)),
        keys=normal(keys[2], (6, kv_heads, 5, 8)),
        values=normal(keys[3], (6, kv_heads, 5, 8)),
    )
    own = jax.random.bernoulli(keys[4], 0.5, (6, 5)).at[:, 2].set(True)
    prompt = jax.random.bernoulli(keys[5], 0.5, (3, 2, 7)).at[1].set(False)
    visible = DecodeVisibility(prompt=prompt, own=own)
    q = 3 * normal(keys[6], (6, 1, heads, 8))
    got = jax.jit(decode.attention)(q, layer, visible)
    assert got.shape == q.shape and got.dtype == q.dtype
    np.testing.assert_allclose(
        got[:, 0], slow_attention(q, layer, visible, samples=2), atol=1e-5
    )


def test_a_row_that_reads_nothing_stays_finite():
    zeros = jnp.zeros((1, 1, 3, 4))
    nothing = DecodeVisibility(jnp.zeros((1, 1, 3), bool), jnp.zeros((1, 3), bool))
    out = jax.jit(decode.attention)(
        jnp.ones((1, 1, 2, 4)), DecodeLayer(zeros, zeros, zeros, zeros), nothing
    )
    assert np.isfinite(out).all()


def test_a_step_writes_one_column_and_leaves_the_prompt():
    model, params = setup()
    before = prefilled(model, params)
    before = dataclasses.replace(before, column=jnp.int32(3))
    new = one_token([1, 2, 3, 4], [5, 5, 2, 2], [True, True, True, False])
    _, after = apply(model, params, new, before)
    assert int(after.column) == 4
    for old, layer in zip(before.layers, after.layers, strict=True):
        np.testing.assert_array_equal(layer.prompt_keys, old.prompt_keys)
        np.testing.assert_array_equal(layer.prompt_values, old.prompt_values)
        for ring in (layer.keys, layer.values):
            written = np.abs(ring).sum(axis=(0, 1, 3)) > 0
            np.testing.assert_array_equal(written, [False, False, False, True, False])
    expected = np.full((4, RING), -1)
    expected[:, 3] = [5, 5, 2, -1]
    np.testing.assert_array_equal(after.positions, expected)


def test_prompts_are_kept_once_however_many_continue_them():
    cache = prefilled(*setup())
    layer = cache.layers[0]
    assert layer.prompt_keys.shape == (2, 2, WIDTH, 8)
    assert layer.keys.shape == layer.values.shape == (4, 2, RING, 8)
    assert cache.positions.shape == (4, RING) and (cache.positions == -1).all()


def test_bfloat16_keys_stay_bfloat16():
    model, params = setup(dtype="bfloat16")
    hidden, cache = decoded(model, params, continuations(), "bfloat16")
    layer = cache.layers[0]
    assert layer.prompt_values.dtype == layer.keys.dtype == jnp.bfloat16
    assert hidden[0][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(4, 2), (2, 1)])
def test_anything_but_one_token_a_row_is_refused(shape):
    model, params = setup()
    ones = jnp.ones(shape, jnp.int32)
    new = Sequences(tokens=ones, positions=ones, segment=ones, completion_mask=ones > 0)
    message = (
        rf"cache of 4 rows: expected tokens \[4, 1\], got \[{shape[0]}, {shape[1]}"
    )
    with pytest.raises(ValueError, match=message):
        apply(model, params, new, prefilled(model, params))


def test_scanned_layers_are_refused():
    model, params = setup()
    scanned = model.clone(compute=ComputeConfig(scan_layers=True))
    new = one_token([1] * 4, [5] * 4, [True] * 4)
    with pytest.raises(ValueError, match="set scan_layers to false and convert"):
        scanned.apply({"params": params}, new, cache=prefilled(model, params))
