"""Advantages and returns against the textbook loop over the real tokens of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.gae import gae


def slow_gae(rewards, values, mask, gamma, gae_lambda):
    """The definition as a double sum over the real tokens alone, in float64."""
    advantages = np.zeros(mask.shape)
    returns = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        at = [t for t in range(mask.shape[1]) if mask[row, t]]
        r = [float(rewards[row, t]) for t in at]
        v = [float(values[row, t]) for t in at] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
        for i, t in enumerate(at):
            for j in range(i, len(at)):
                advantages[row, t] += (gamma * gae_lambda) ** (j - i) * deltas[j]
            returns[row, t] = advantages[row, t] + v[i]
    return advantages, returns


def ragged(seed=0, rows=7, length=11):
    """Fractional and negative rewards; gaps, empty and full rows in the mask."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(-0.3, 1.0, (rows, length)).astype(np.float32)
    values = rng.normal(0.5, 2.0, (rows, length)).astype(np.float32)
    mask = rng.uniform(size=(rows, length)) < 0.6
    mask[0], mask[1] = False, True
    mask[2] = np.arange(length) < 5
    return rewards, values, mask


def test_two_tokens_by_hand():
    # delta_1 = 1 - 2 = -1;  delta_0 = 0.5 + 0.5 * 2 - 1 = 0.5
    # A_1 = -1;  A_0 = 0.5 + 0.5 * 0.5 * -1 = 0.25
    advantages, returns = gae(
        jnp.array([[0.5, 1.0]]),
        jnp.array([[1.0, 2.0]]),
        jnp.ones((1, 2), bool),
        gamma=0.5,
        gae_lambda=0.5,
    )
    np.testing.assert_allclose(advantages, [[0.25, -1.0]])
    np.testing.assert_allclose(returns, [[1.25, 1.0]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)]
)
def test_matches_the_float64_loop_on_ragged_masks(seed, gamma, gae_lambda):
    rewards, values, mask = ragged(seed)
    got = gae(*map(jnp.array, ragged(seed)), gamma=gamma, gae_lambda=gae_lambda)
    want = slow_gae(rewards, values, mask, gamma, gae_lambda)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_lambda_one_returns_are_the_rewards_to_go():
    rewards, values, mask = ragged()
    _, returns = gae(*map(jnp.array, (rewards, values, mask)), gae_lambda=1.0)
    to_go = np.cumsum(np.where(mask, rewards, 0.0)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0.0), atol=1e-5)


def test_masked_columns_anywhere_change_nothing():
    rewards, values, _ = map(jnp.array, ragged())
    rows, length = rewards.shape
    plain = gae(rewards, values, jnp.ones((rows, length), bool))
    columns = np.array([1, 2, 4, 5, 6, 9, 10, 11, 13, 14, 16])
    wide = jnp.full((rows, 18), jnp.nan)
    mask = jnp.zeros((rows, 18), bool).at[:, columns].set(True)
    spread = gae(
        wide.at[:, columns].set(rewards), wide.at[:, columns].set(values), mask
    )
    for a, b in zip(spread, plain, strict=True):
        np.testing.assert_allclose(a[:, columns], b, rtol=1e-6)


def test_masked_tokens_are_zero_and_ignored_whatever_they_hold():
    rewards, values, mask = ragged()
    clean = gae(*map(jnp.array, (rewards, values, mask)))
    dirty = gae(
        jnp.where(mask, rewards, jnp.inf),
        jnp.where(mask, values, jnp.nan),
        jnp.array(mask),
    )
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a)[~mask] == 0).all()


def test_rows_are_independent_and_jit_changes_nothing():
    arrays = tuple(map(jnp.array, ragged()))
    order = np.random.default_rng(1).permutation(len(arrays[0]))
    plain = gae(*arrays)
    permuted = gae(*(x[order] for x in arrays))
    jitted = jax.jit(gae, static_argnames=("gamma", "gae_lambda"))(*arrays)
    for a, b, c in zip(plain, permuted, jitted, strict=True):
        np.testing.assert_array_equal(a[order], b)
        np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-6)


def test_carries_no_gradient():
    rewards, values, mask = map(jnp.array, ragged())

    def total(r, v):
        advantages, returns = gae(r, v, mask)
        return advantages.sum() + returns.sum()

    for grad in jax.grad(total, (0, 1))(rewards, values):
        np.testing.assert_array_equal(grad, 0.0)


def test_float32_from_bfloat16_inputs():
    rewards, values, mask = map(jnp.array, ragged())
    for x in gae(rewards.astype(jnp.bfloat16), values.astype(jnp.bfloat16), mask):
        assert x.dtype == jnp.float32


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("number", [-0.1, 1.5])
def test_factor_outside_the_unit_interval_is_refused(name, number):
    rewards, values, mask = map(jnp.array, ragged())
    with pytest.raises(ValueError, match=f"{name}: expected a number in"):
        gae(rewards, values, mask, **{name: number})


def test_values_of_another_shape_are_refused_not_broadcast():
    rewards, values, mask = map(jnp.array, ragged())
    with pytest.raises(Exception, match="values"):
        gae(rewards, values[:, :1], mask)
