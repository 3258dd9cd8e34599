"""SimCSE, SwAV and Sinkhorn against loops, and what must not matter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.contrastive import simcse, sinkhorn, swav, unit

FIRST, SECOND, CENTRES = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate([(5, 3), (5, 3), (4, 3)])
)
ONES = jnp.ones(5)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def log_softmax(values):
    peak = max(values)
    total = peak + math.log(sum(math.exp(v - peak) for v in values))
    return [v - total for v in values]


def test_simcse_equals_the_double_loop():
    expected = [
        -log_softmax([cosine(h, other) / 0.05 for other in SECOND])[i]
        for i, h in enumerate(FIRST)
    ]
    np.testing.assert_allclose(
        simcse(FIRST, SECOND, ONES), expected, rtol=1e-5, atol=1e-5
    )


def test_simcse_does_not_see_the_length_of_the_states():
    scaled = simcse(1e4 * FIRST, 1e-2 * SECOND, ONES)
    np.testing.assert_allclose(scaled, simcse(FIRST, SECOND, ONES), rtol=1e-4)


def test_filler_is_nobodys_negative():
    weight = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    filled = simcse(FIRST, SECOND.at[3:].set(9.0), weight)
    np.testing.assert_allclose(
        filled[:3], simcse(FIRST[:3], SECOND[:3], ONES[:3]), rtol=1e-5
    )


def slow_sinkhorn(scores, epsilon, iterations):
    q = np.exp(np.asarray(scores, np.float64) / epsilon)
    for _ in range(iterations):
        q = q / q.sum(axis=0, keepdims=True)
        q = q / q.sum(axis=1, keepdims=True)
    return q


def test_sinkhorn_equals_alternating_normalisation():
    scores = unit(FIRST) @ unit(CENTRES).T
    np.testing.assert_allclose(
        sinkhorn(scores, ONES), slow_sinkhorn(scores, 0.05, 3), rtol=1e-3, atol=1e-6
    )


def test_sinkhorn_fills_the_clusters_equally_in_the_end():
    scores = unit(FIRST) @ unit(CENTRES).T
    q = sinkhorn(scores, ONES, epsilon=0.5, iterations=200)
    np.testing.assert_allclose(q.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(q.sum(axis=0), 5 / 4, rtol=1e-3)


def test_swav_equals_its_formula():
    views = [unit(h) @ unit(CENTRES).T for h in (FIRST, SECOND)]
    q = [slow_sinkhorn(s, 0.05, 3) for s in views]
    expected = [
        -sum(
            float(q[1 - view][i, k])
            * log_softmax([float(v) / 0.1 for v in views[view][i]])[k]
            for view in (0, 1)
            for k in range(4)
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(swav(FIRST, SECOND, CENTRES, ONES), expected, rtol=1e-3)


def test_filler_takes_no_room_in_a_cluster():
    weight = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    filled = swav(FIRST.at[3:].set(9.0), SECOND, CENTRES, weight)
    alone = swav(FIRST[:3], SECOND[:3], CENTRES, ONES[:3])
    np.testing.assert_allclose(filled[:3], alone, rtol=1e-4)


def test_assignments_get_no_gradient():
    """With one cluster the guess is sure and nothing is left to learn."""
    grad = jax.grad(lambda h: swav(h, SECOND, CENTRES[:1], ONES).sum())(FIRST)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_with_gradients_in_bfloat16(scale):
    states = (scale * FIRST).astype(jnp.bfloat16)
    for loss in (
        lambda h: simcse(h, states, ONES),
        lambda h: swav(h, states, CENTRES, ONES),
    ):
        value, grad = jax.value_and_grad(lambda h, loss=loss: loss(h).sum())(states)
        assert np.isfinite(value) and np.isfinite(np.asarray(grad, np.float32)).all()
