"""OCRM's weights against the ratio of probabilities in float64."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses.importance import importance_weights


def slow_weight(chosen, rejected, flattening, mixing):
    """From p and q themselves, with q = 1."""
    ratios = []
    for x in (chosen, rejected):
        p = np.exp(np.float64(x))
        ratios.append(p / (mixing * p + (1 - mixing)))
    return float(np.prod(ratios) ** flattening)


def test_equals_the_relative_ratio():
    chosen, rejected = np.array([0.0, 2.0, -3.0]), np.array([1.0, -2.0, 0.5])
    got = importance_weights(
        jnp.array(chosen), jnp.array(rejected), flattening=0.5, mixing=0.1
    )
    expected = [slow_weight(c, r, 0.5, 0.1) for c, r in zip(chosen, rejected)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_plain_ratio_at_mixing_zero():
    got = importance_weights(
        jnp.array([2.0]), jnp.array([-1.0]), flattening=1.0, mixing=0.0
    )
    np.testing.assert_allclose(got, np.exp(1.0), rtol=1e-5)


def test_long_completions_neither_underflow_nor_explode():
    got = importance_weights(
        jnp.array([500.0, -500.0]), jnp.array([500.0, -500.0]), flattening=1.0
    )
    np.testing.assert_allclose(got[0], 100.0, rtol=1e-4)  # 1 / mixing, twice
    assert np.isfinite(got).all() and got[1] >= 0
