"""Chunked log-probabilities and entropies equal float64 ones; gradients; memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.logprobs import token_logprobs, token_logprobs_and_entropy

KEY = jax.random.key(0)
ROWS, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11


def inputs():
    keys = jax.random.split(KEY, 3)
    before = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (WIDTH, VOCAB))
    return before, head, jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB)


def slow(before, head, tokens, temperature):
    """(logprobs, entropies) in float64, token by token."""
    before, head = np.asarray(before, np.float64), np.asarray(head, np.float64)
    logprobs, entropies = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for place in np.ndindex(tokens.shape):
        weights = np.exp(before[place] @ head / temperature)
        p = weights / weights.sum()
        logprobs[place] = np.log(p[tokens[place]])
        entropies[place] = -(p * np.log(p)).sum()
    return logprobs, entropies


def slow_gradient(before, head, tokens, temperature, weights):
    """Of sum(weights[0] logprobs + weights[1] entropies), written out.

    d logprob / d z = onehot - p,  d entropy / d z = -p (log p + entropy)
    """
    before, head = np.asarray(before, np.float64), np.asarray(head, np.float64)
    to_before, to_head = np.zeros_like(before), np.zeros_like(head)
    _, entropies = slow(before, head, tokens, temperature)
    for place in np.ndindex(tokens.shape):
        p = np.exp(before[place] @ head / temperature)
        p /= p.sum()
        to_logits = weights[0][place] * (np.eye(VOCAB)[tokens[place]] - p)
        to_logits -= weights[1][place] * p * (np.log(p) + entropies[place])
        to_before[place] = head @ to_logits / temperature
        to_head += np.outer(before[place], to_logits) / temperature
    return to_before, to_head


def test_two_tokens_by_hand():
    """Logits log 1 and log 3: probabilities 1/4 and 3/4; at temperature 1/2, 1/10."""
    before, tokens = jnp.ones((1, 2, 1)), jnp.array([[0, 1]])
    logits = jnp.log(jnp.array([[1.0, 3.0]]))
    found = token_logprobs_and_entropy(lambda h: h @ logits, before, tokens)
    np.testing.assert_allclose(found[0], np.log([[0.25, 0.75]]), atol=1e-6)
    entropy = np.log(4) - 0.75 * np.log(3)
    np.testing.assert_allclose(found[1], [[entropy, entropy]], atol=1e-6)
    sharp = token_logprobs(lambda h: h @ logits, before, tokens, temperature=0.5)
    np.testing.assert_allclose(sharp, np.log([[0.1, 0.9]]), atol=1e-6)


@pytest.mark.parametrize(
    ("chunk", "temperature"), [(1, 1.0), (4, 0.5), (4, 2.5), (21, 1.0), (1000, 0.5)]
)
def test_any_chunk_gives_the_float64_values(chunk, temperature):
    before, head, tokens = inputs()
    expected = slow(before, head, tokens, temperature)
    options = {"temperature": temperature, "chunk": chunk}
    found = token_logprobs_and_entropy(lambda h: h @ head, before, tokens, **options)
    alone = token_logprobs(lambda h: h @ head, before, tokens, **options)
    for got, want in zip((*found, alone), (*expected, expected[0]), strict=True):
        assert got.shape == tokens.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_any_chunk_gives_the_float64_gradients(chunk):
    before, head, tokens = inputs()
    weights = jax.random.normal(KEY, (2, ROWS, LENGTH))

    def total(before, head):
        logprobs, entropies = token_logprobs_and_entropy(
            lambda h: h @ head, before, tokens, temperature=0.7, chunk=chunk
        )
        return (logprobs * weights[0] + entropies * weights[1]).sum()

    got = jax.grad(total, (0, 1))(before, head)
    want = slow_gradient(before, head, tokens, 0.7, np.asarray(weights))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_token_changes_its_own_logprob_alone():
    before, head, tokens = inputs()
    grad = jax.grad(
        lambda b: token_logprobs(lambda h: h @ head, b, tokens, chunk=4)[1, 3]
    )(before)
    touched = np.abs(grad).sum(axis=-1) > 0
    assert touched[1, 3] and touched.sum() == 1


def test_extreme_logits_stay_finite():
    before, tokens = jnp.ones((1, 2, 1)), jnp.array([[0, 1]])
    logits = jnp.array([[3e4, -3e4, 0.0]])

    def total(logits):
        found = token_logprobs_and_entropy(lambda h: h @ logits, before, tokens)
        return sum(x.sum() for x in found)

    value, grad = jax.value_and_grad(total)(logits)
    np.testing.assert_allclose(value, -6e4)
    assert np.isfinite(grad).all()


def test_bfloat16_logits_are_summed_in_float32():
    """As soon as the head has rounded: the rest adds no error to speak of."""
    before, head, tokens = inputs()
    rounded = (before @ head).astype(jnp.bfloat16)
    logits = rounded.reshape(-1, VOCAB)
    got, entropy = token_logprobs_and_entropy(
        lambda h: h, rounded, tokens, temperature=0.7, chunk=4
    )
    eye = jnp.eye(VOCAB)
    want = slow(logits.reshape(ROWS, LENGTH, VOCAB), eye, tokens, 0.7)
    assert got.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(got, want[0], atol=1e-5)
    np.testing.assert_allclose(entropy, want[1], atol=1e-5)


@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_and_entropy])
def test_forward_and_backward_never_hold_all_logits(function):
    rows, length, vocab = 8, 1024, 4096
    before = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    head = jax.ShapeDtypeStruct((16, vocab), jnp.float32)

    def loss(before, head, tokens):
        found = function(lambda h: h @ head, before, tokens, chunk=128)
        return sum(x.sum() for x in jax.tree.leaves(found))

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    memory = step.lower(before, head, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * length * vocab * 4 / 8
