"""K-wise losses against loops over permutations and pairs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.losses.ranking import plackett_luce, spread

REWARDS = jnp.array([[0.3, -1.2, 2.0, 0.4], [1.0, 0.0, -3.0, 9.0]])
SCORES = jnp.array([[3.0, 1.0, 2.0, 0.0], [5.0, 7.0, 6.0, -1.0]])
ALL = jnp.ones((2, 4), bool)


def slow_plackett_luce(rewards, scores):
    """-log of the probability of drawing the ranking, one pick after the other."""
    left = [float(rewards[i]) for i in np.argsort(-np.asarray(scores))]
    loss = 0.0
    while len(left) > 1:
        loss -= left[0] - math.log(sum(math.exp(r) for r in left))
        left = left[1:]
    return loss


def test_equals_the_ranking_drawn_one_pick_at_a_time():
    expected = [slow_plackett_luce(r, s) for r, s in zip(REWARDS, SCORES)]
    np.testing.assert_allclose(plackett_luce(REWARDS, SCORES, ALL), expected, rtol=1e-5)


def test_two_responses_are_bradley_terry():
    loss = plackett_luce(
        REWARDS[:, :2], jnp.array([[1.0, 0.0], [1.0, 0.0]]), ALL[:, :2]
    )
    np.testing.assert_allclose(
        loss, bradley_terry(REWARDS[:, 0], REWARDS[:, 1]), rtol=1e-5
    )


def test_missing_responses_are_not_there():
    mask = ALL.at[:, 3].set(False)
    broken = REWARDS.at[:, 3].set(jnp.nan)
    np.testing.assert_allclose(
        plackett_luce(broken, SCORES, mask),
        plackett_luce(REWARDS[:, :3], SCORES[:, :3], ALL[:, :3]),
        rtol=1e-6,
    )
    grad = jax.grad(lambda r: plackett_luce(r, SCORES, mask).sum())(REWARDS)
    assert (grad[:, 3] == 0).all() and np.isfinite(grad).all()


def test_the_order_inside_a_tie_is_not_learned():
    tied = jnp.array([[1.0, 1.0, 0.0]])
    rewards = jnp.array([[0.2, 0.9, -0.5]])
    swapped = jnp.array([[0.9, 0.2, -0.5]])
    ones = jnp.ones((1, 3), bool)
    np.testing.assert_allclose(
        plackett_luce(rewards, tied, ones), plackett_luce(swapped, tied, ones)
    )
    np.testing.assert_allclose(plackett_luce(rewards, 0 * tied, ones), 0.0)


@pytest.mark.parametrize("loss", ["plackett_luce", "spread"])
def test_finite_with_gradients_at_extreme_rewards_in_bfloat16(loss):
    rewards = jnp.array([[1e4, -1e4, 0.0, 1e4]], jnp.bfloat16)
    function = {
        "plackett_luce": lambda r: plackett_luce(r, SCORES[:1], ALL[:1]),
        "spread": lambda r: spread(r, ALL[:1]),
    }[loss]
    value, grad = jax.value_and_grad(lambda r: function(r).sum())(rewards)
    assert np.isfinite(value) and np.isfinite(np.asarray(grad, np.float32)).all()


# MetaRM's difference loss.


def slow_spread(rewards):
    k, total = len(rewards), 0.0
    for i in range(k):
        for j in range(i + 1, k):
            total += 1 / (1 + math.exp(-abs(float(rewards[i]) - float(rewards[j]))))
    return 2 * total / k**2


def test_spread_equals_the_double_loop():
    expected = [slow_spread(row) for row in REWARDS]
    np.testing.assert_allclose(spread(REWARDS, ALL), expected, rtol=1e-5)


@pytest.mark.parametrize("k", [2, 5])
def test_spread_lies_between_its_bounds(k):
    """J is in [(k - 1) / 2k, (k - 1) / k)."""
    mask = jnp.ones((1, k), bool)
    np.testing.assert_allclose(spread(jnp.zeros((1, k)), mask), (k - 1) / (2 * k))
    far = spread(1e3 * jnp.arange(k, dtype=jnp.float32)[None], mask)
    np.testing.assert_allclose(far, (k - 1) / k, rtol=1e-6)


def test_tied_rewards_are_not_pushed_apart():
    rewards = jnp.array([[1.0, 1.0, 1.0]])
    grad = jax.grad(lambda r: spread(r, jnp.ones((1, 3), bool)).sum())(rewards)
    np.testing.assert_array_equal(grad, 0.0)


def test_spread_ignores_missing_responses_and_a_lone_one():
    mask = jnp.array([[True, True, False, False], [True, False, False, False]])
    got = spread(REWARDS.at[:, 2:].set(jnp.nan), mask)
    np.testing.assert_allclose(got, [slow_spread(REWARDS[0, :2]), 0.0], rtol=1e-5)
