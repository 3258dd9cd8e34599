"""The leave-one-out baseline: by hand, against a loop, and its identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.baselines import leave_one_out, usable


def slow_leave_one_out(rewards, counts):
    """For each counted sample, average the other counted ones; float64."""
    advantages = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        for i in range(rewards.shape[1]):
            others = [
                float(rewards[b, j])
                for j in range(rewards.shape[1])
                if j != i and counts[b, j]
            ]
            if counts[b, i] and others:
                advantages[b, i] = float(rewards[b, i]) - sum(others) / len(others)
    return advantages


def groups(seed=0, prompts=9, samples=4):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(-1.3, 2.5, (prompts, samples)).astype(np.float32)
    counts = rng.uniform(size=(prompts, samples)) < 0.6
    counts[0], counts[1], counts[2] = False, True, np.arange(samples) == 2
    return rewards, counts


def test_three_samples_by_hand():
    advantages = leave_one_out(
        jnp.array([[0.5, -1.5, 2.0], [0.25, 100.0, -0.5]]),
        jnp.array([[True, True, True], [True, False, True]]),
    )
    np.testing.assert_allclose(
        advantages, [[0.25, -2.75, 2.5], [0.75, 0.0, -0.75]], rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_matches_the_float64_loop(seed, samples):
    rewards, counts = groups(seed, samples=samples)
    got = leave_one_out(jnp.array(rewards), jnp.array(counts))
    np.testing.assert_allclose(
        got, slow_leave_one_out(rewards, counts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_equals_k_over_k_minus_1_times_the_deviation(samples):
    rewards, _ = groups(samples=samples)
    got = leave_one_out(jnp.array(rewards), jnp.ones(rewards.shape, bool))
    deviation = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(got, samples / (samples - 1) * deviation, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 0.0, atol=1e-5)


def test_a_common_offset_and_equal_rewards_leave_no_trace():
    rewards, counts = groups()
    plain = leave_one_out(jnp.array(rewards), jnp.array(counts))
    # 2^12 and rewards in multiples of 2^-8: the sum is exact in float32
    exact = np.round(rewards * 256) / 256
    for offset in (0.0, 4096.0):
        np.testing.assert_allclose(
            leave_one_out(jnp.array(exact + offset), jnp.array(counts)),
            slow_leave_one_out(exact, counts),
            atol=1e-5,
        )
    equal = leave_one_out(jnp.full((3, 7), 0.1), jnp.ones((3, 7), bool))
    np.testing.assert_array_equal(equal, 0.0)
    assert np.abs(plain).max() > 0.1


def test_uncounted_samples_are_absent_whatever_they_hold():
    rewards, counts = groups()
    clean = leave_one_out(jnp.array(rewards), jnp.array(counts))
    for junk in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        dirty = leave_one_out(jnp.where(counts, rewards, junk), jnp.array(counts))
        np.testing.assert_array_equal(dirty, clean)


def test_usable_needs_company():
    counts = jnp.array([[True, True, False], [False, True, False], [False] * 3])
    np.testing.assert_array_equal(
        usable(counts), [[True, True, False], [False] * 3, [False] * 3]
    )
    rewards = jnp.array([[3.0, 1.0, 9.0]] * 3)
    advantages = np.asarray(leave_one_out(rewards, counts))
    np.testing.assert_array_equal(advantages != 0, usable(counts))


def test_permutes_with_samples_and_prompts_and_jit_changes_nothing():
    rewards, counts = map(jnp.array, groups())
    rng = np.random.default_rng(2)
    rows, columns = rng.permutation(len(rewards)), rng.permutation(rewards.shape[1])
    plain = leave_one_out(rewards, counts)
    permuted = leave_one_out(rewards[rows][:, columns], counts[rows][:, columns])
    np.testing.assert_allclose(plain[rows][:, columns], permuted, atol=1e-6)
    np.testing.assert_allclose(
        plain, jax.jit(leave_one_out)(rewards, counts), atol=1e-6
    )


def test_carries_no_gradient():
    rewards, counts = map(jnp.array, groups())
    grad = jax.grad(lambda r: (leave_one_out(r, counts) ** 2).sum())(rewards)
    np.testing.assert_array_equal(grad, 0.0)


def test_flat_rewards_are_refused():
    with pytest.raises(Exception, match="rewards"):
        leave_one_out(jnp.zeros(8), jnp.ones((2, 4), bool))
