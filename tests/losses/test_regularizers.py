"""Regularisers: gradients as the papers derive them, groups, fillers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.regularizers import (
    batch_sum_to_zero,
    bounded_gap,
    centring,
    similarity_bound,
    squared_rewards,
)

CHOSEN = jnp.array([2.0, -1.0, 0.5, 3.0])
REJECTED = jnp.array([1.0, 0.0, -0.5, 1.0])
ONES = jnp.ones(4)


def penalty(chosen, rejected, weight=ONES, **options):
    """What is added to a mean loss over the pairs."""
    values = batch_sum_to_zero(chosen, rejected, weight, **options)
    return jnp.sum(values * weight) / jnp.sum(weight)


def test_the_global_form_is_the_squared_mean_reward():
    mean = float(np.mean([*CHOSEN, *REJECTED]))
    np.testing.assert_allclose(penalty(CHOSEN, REJECTED), mean**2, rtol=1e-6)


def test_the_official_gradient_of_every_reward_is_the_mean_reward():
    """papers: d/dr_i = lambda * mean(r), whatever the batch size."""
    for copies in (1, 3):
        chosen, rejected = jnp.tile(CHOSEN, copies), jnp.tile(REJECTED, copies)
        ones = jnp.ones(len(chosen))
        grads = jax.grad(lambda c, r, w: penalty(c, r, w, scale="official"), (0, 1))(
            chosen, rejected, ones
        )
        mean = float(np.mean([*CHOSEN, *REJECTED]))
        np.testing.assert_allclose(jnp.concatenate(grads), mean, rtol=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [("mean", 1 / 4), ("sum", 16)])
def test_the_other_scales_differ_by_the_stated_factor(scale, factor):
    grad = jax.grad(lambda c: penalty(c, REJECTED, scale=scale))(CHOSEN)
    mean = float(np.mean([*CHOSEN, *REJECTED]))
    np.testing.assert_allclose(grad, factor * mean, rtol=1e-5)


def test_symmetric_growth_costs_nothing_but_squared_rewards_see_it():
    far = jnp.full(4, 100.0)
    np.testing.assert_allclose(penalty(far, -far), 0.0)
    np.testing.assert_allclose(squared_rewards(far, -far, ONES), 1e4)
    np.testing.assert_allclose(centring(far, -far, ONES), 0.0)


def test_groups_are_penalised_apart():
    halves = batch_sum_to_zero(CHOSEN, REJECTED, ONES, num_groups=2)
    first = float(np.mean([2.0, -1.0, 1.0, 0.0])) ** 2
    last = float(np.mean([0.5, 3.0, -0.5, 1.0])) ** 2
    np.testing.assert_allclose(halves, [first, first, last, last], rtol=1e-6)


def test_the_mean_of_the_official_form_is_the_offset_and_its_variance():
    """E[B mean^2] = B mu^2 + Var(pair mean), for pairs drawn at random."""
    size, draws = 8, 20_000
    offsets = 0.5 + 2.0 * jax.random.normal(jax.random.key(0), (draws, size))
    gaps = jax.random.normal(jax.random.key(1), (draws, size))
    values = jax.vmap(
        lambda m, d: batch_sum_to_zero(m + d, m - d, jnp.ones(size), scale="official")[
            0
        ]
    )(offsets, gaps)
    expected = size * 0.5**2 + 2.0**2
    error = float(values.std()) / draws**0.5
    assert abs(float(values.mean()) - expected) < 4 * error


def test_pairs_of_weight_zero_are_not_there():
    weight = jnp.array([1.0, 1.0, 0.0, 0.0])
    filled = batch_sum_to_zero(
        CHOSEN.at[2:].set(jnp.nan), REJECTED, weight, scale="official"
    )
    alone = batch_sum_to_zero(CHOSEN[:2], REJECTED[:2], ONES[:2], scale="official")
    np.testing.assert_allclose(filled[:2], alone, rtol=1e-6)


def test_centring_adds_in_float32():
    """In bfloat16 256 + 1 is 256."""
    chosen, rejected = (jnp.full(4, r, jnp.bfloat16) for r in (256, 1))
    np.testing.assert_array_equal(centring(chosen, rejected, ONES), 257.0**2)


def test_a_number_of_groups_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="num_groups 3: expected a divisor of the 4"):
        batch_sum_to_zero(CHOSEN, REJECTED, ONES, num_groups=3)


def test_the_gap_is_bounded_softly_by_one_number_or_one_a_pair():
    gap = np.asarray(CHOSEN - REJECTED, np.float64)
    np.testing.assert_allclose(
        bounded_gap(CHOSEN, REJECTED, ONES, bound=1.0),
        np.logaddexp(0, gap - 1.0),
        rtol=1e-5,
    )
    bounds = jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        bounded_gap(CHOSEN, REJECTED, ONES, gap_bound=bounds),
        np.logaddexp(0, gap - np.asarray(bounds)),
        rtol=1e-5,
    )


def test_the_bound_tightens_with_similarity_as_published():
    """delta* is about 5 at similarity 1 and 15 at one half."""
    np.testing.assert_allclose(
        similarity_bound(jnp.array([1.0, 0.5])), [5.0, 15.0], atol=0.05
    )


@pytest.mark.parametrize(
    "regularizer", [batch_sum_to_zero, centring, squared_rewards, bounded_gap]
)
def test_finite_in_bfloat16_at_extreme_rewards(regularizer):
    far = jnp.full(4, 1e4, jnp.bfloat16)
    values, grad = jax.value_and_grad(lambda c: regularizer(c, far, ONES).sum())(far)
    assert np.isfinite(values) and np.isfinite(np.asarray(grad, np.float32)).all()
