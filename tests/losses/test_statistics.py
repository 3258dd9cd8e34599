"""Statistics of hidden states against float64 NumPy, with filler and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import statistics

RNG = np.random.default_rng(0)
FIGURES = ("mean", "std", "skewness", "p99")


def slow_distribution(values):
    values = np.asarray(values, np.float64)
    mean = sum(values) / len(values)
    second, third = (
        sum((v - mean) ** power for v in values) / len(values) for power in (2, 3)
    )
    return {
        "mean": mean,
        "std": second**0.5,
        "skewness": third / second**1.5,
        "p99": np.percentile(values, 99),
    }


def slow_rank(states, centred=False):
    states = np.asarray(states, np.float64)
    if centred:
        states = states - states.mean(0)
    # Through the Gram matrix's eigenvalues, not an SVD.
    squares = np.linalg.eigvalsh(states.T @ states)
    values = np.sqrt(np.clip(squares, 0, None))
    p = values[values > 1e-9 * values.max()] / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def check(found, values):
    expected = slow_distribution(values)
    for name in FIGURES:
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-5)


@pytest.mark.parametrize("n", [2, 7, 100, 101, 1000])
def test_a_distribution_equals_the_slow_one(n):
    values = RNG.gamma(2.0, 3.0, n).astype(np.float32)
    check(statistics.distribution(jnp.asarray(values)), values)


def test_filler_does_not_count_even_where_it_is_not_finite():
    values = RNG.gamma(2.0, 3.0, 60).astype(np.float32)
    mask = RNG.random(60) < 0.6
    filled = jnp.asarray(np.where(mask, values, np.nan))
    check(statistics.distribution(filled, jnp.asarray(mask)), values[mask])


def test_the_order_of_the_values_changes_nothing():
    values = jnp.asarray(RNG.normal(5, 1, 50).astype(np.float32))
    found = statistics.distribution(values)
    again = statistics.distribution(values[::-1])
    np.testing.assert_allclose(found, again, rtol=1e-5)


def test_equal_values_have_no_spread_and_no_skewness():
    rounding = 1 + jnp.asarray(RNG.choice([0, 1e-7], 100).astype(np.float32))
    for values in (jnp.full(9, 3.3), 5.65 * rounding):
        found = statistics.distribution(values)
        assert float(found.skewness) == 0.0
        assert float(found.std) < 1e-5
        np.testing.assert_allclose(found.p99, found.mean, rtol=1e-6)


def test_no_value_gives_zeros():
    found = statistics.distribution(jnp.ones(4), jnp.zeros(4, bool))
    np.testing.assert_array_equal(found, 0.0)
    one = statistics.distribution(jnp.array([2.0, 9.0]), jnp.array([True, False]))
    np.testing.assert_allclose(one, [2.0, 0.0, 0.0, 2.0])


def test_norms_are_computed_in_float32():
    chosen = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    rejected = jnp.full((1, 4096), -1.0, jnp.bfloat16)
    np.testing.assert_allclose(statistics.state_norms(chosen), [64.0])
    found = statistics.difference_norms(chosen, rejected)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [128.0])


def test_the_head_norm_is_euclidean():
    np.testing.assert_allclose(statistics.head_norm(jnp.array([3.0, -4.0])), 5.0)


@pytest.mark.parametrize("shape", [(5, 12), (40, 8), (12, 12)])
@pytest.mark.parametrize("centred", [False, True])
def test_the_effective_rank_equals_the_slow_one(shape, centred):
    states = RNG.normal(1, 1, shape) * np.geomspace(1, 0.01, shape[1])
    states = jnp.asarray(states.astype(np.float32))
    found = statistics.effective_rank(states, centred=centred)
    np.testing.assert_allclose(found, slow_rank(states, centred), rtol=1e-4)


def test_the_effective_rank_of_hand_worked_matrices():
    one = jnp.outer(jnp.arange(1.0, 6.0), jnp.ones(3))
    np.testing.assert_allclose(statistics.effective_rank(one), 1.0, rtol=1e-4)
    np.testing.assert_allclose(statistics.effective_rank(jnp.eye(5)), 5.0, rtol=1e-5)
    # p = 3/4, 1/4.
    found = statistics.effective_rank(jnp.diag(jnp.array([3.0, 1.0])))
    np.testing.assert_allclose(found, 0.75**-0.75 * 0.25**-0.25, rtol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_filler_rows_are_no_rows_of_the_matrix(centred):
    states = RNG.normal(2, 1, (20, 6)).astype(np.float32)
    mask = RNG.random(20) < 0.6
    filled = jnp.asarray(np.where(mask[:, None], states, np.inf))
    found = statistics.effective_rank(filled, jnp.asarray(mask), centred=centred)
    np.testing.assert_allclose(found, slow_rank(states[mask], centred), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_effective_rank_does_not_depend_on_the_scale(scale):
    states = jnp.asarray(RNG.normal(size=(9, 5)).astype(np.float32))
    found = statistics.effective_rank(states * scale)
    np.testing.assert_allclose(found, statistics.effective_rank(states), rtol=1e-4)


def test_a_matrix_of_zeros_has_effective_rank_zero():
    assert float(statistics.effective_rank(jnp.zeros((4, 3)))) == 0.0
    masked = statistics.effective_rank(jnp.ones((4, 3)), jnp.zeros(4, bool))
    assert float(masked) == 0.0


def test_a_batch_gives_the_statistics_of_its_real_pairs_under_jit():
    chosen, rejected = RNG.normal(1, 2, (2, 16, 8)).astype(np.float32)
    mask = np.arange(16) < 11
    found = jax.jit(statistics.state_statistics)(
        jnp.asarray(np.where(mask[:, None], chosen, 1e20)),
        jnp.asarray(np.where(mask[:, None], rejected, np.nan)),
        jnp.asarray(mask),
    )
    both = np.concatenate([chosen[mask], rejected[mask]]).astype(np.float64)
    apart = chosen[mask].astype(np.float64) - rejected[mask]
    for name, states in (("state_norm", both), ("difference_norm", apart)):
        expected = slow_distribution(np.sqrt((states**2).sum(1)))
        for figure in FIGURES:
            np.testing.assert_allclose(
                found[f"{name}_{figure}"], expected[figure], rtol=1e-4
            )


def test_no_gradient_goes_through_a_metric():
    states = jnp.asarray(RNG.normal(size=(4, 3)).astype(np.float32))

    def total(states):
        figures = statistics.state_statistics(states, states)
        return sum(figures.values()) + statistics.effective_rank(states)

    np.testing.assert_array_equal(jax.grad(total)(states), 0.0)
