"""Rewards per token and per completion, penalties, whitening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl import shaping


def slow_token_rewards(score, kl, mask, kl_coef):
    rewards = np.zeros(mask.shape)
    for m in range(mask.shape[0]):
        last = None
        for t in range(mask.shape[1]):
            if mask[m, t]:
                rewards[m, t] = -kl_coef * float(kl[m, t])
                last = t
        if last is not None:
            rewards[m, last] += float(score[m])
    return rewards


def slow_whiten(values, mask, shift_mean, eps):
    counted = values[mask].astype(np.float64)
    mean = counted.sum() / len(counted)
    variance = ((counted - mean) ** 2).sum() / len(counted)
    result = np.zeros(values.shape)
    for index in np.ndindex(values.shape):
        if mask[index]:
            scaled = (float(values[index]) - mean) / np.sqrt(variance + eps)
            result[index] = scaled if shift_mean else scaled + mean
    return result


def completions(seed=0, rows=8, length=9):
    """Fractional and negative scores; left, right and gapped masks, one row empty."""
    rng = np.random.default_rng(seed)
    score = rng.normal(-0.4, 1.7, rows).astype(np.float32)
    kl = rng.normal(0.1, 0.3, (rows, length)).astype(np.float32)
    mask = rng.uniform(size=(rows, length)) < 0.5
    mask[0], mask[1] = False, True
    mask[2], mask[3] = np.arange(length) < 4, np.arange(length) >= 4
    return score, kl, mask


def test_score_on_the_last_token_and_kl_on_each_by_hand():
    rewards = shaping.token_rewards(
        jnp.array([-0.75, 2.5]),
        jnp.array([[0.5, -1.0, 7.0], [7.0, 7.0, 0.25]]),
        jnp.array([[True, True, False], [False, False, True]]),
        kl_coef=0.5,
    )
    np.testing.assert_allclose(rewards, [[-0.25, -0.25, 0.0], [0.0, 0.0, 2.375]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_token_rewards_match_the_float64_loop(seed, kl_coef):
    score, kl, mask = completions(seed)
    got = shaping.token_rewards(*map(jnp.array, (score, kl, mask)), kl_coef=kl_coef)
    np.testing.assert_allclose(
        got, slow_token_rewards(score, kl, mask, kl_coef), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.bfloat16])
def test_no_dtype_of_either_input_truncates_the_other(dtype):
    mask = jnp.ones((2, 2), bool)
    fractions = jnp.array([[0.25, 0.5], [-0.75, 0.125]])
    rewards = shaping.token_rewards(
        jnp.array([3, -2], dtype), fractions, mask, kl_coef=1.0
    )
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[-0.25, 2.5], [0.75, -2.125]])
    whole = shaping.token_rewards(
        jnp.array([0.3, -0.7]), jnp.ones((2, 2), dtype), mask, kl_coef=0.05
    )
    np.testing.assert_allclose(whole, [[-0.05, 0.25], [-0.05, -0.75]], atol=1e-7)
    summed = shaping.sequence_rewards(
        jnp.array([3, -2], dtype), fractions.sum(1), kl_coef=0.1
    )
    np.testing.assert_allclose(summed, [2.925, -1.9375], rtol=1e-6)


def test_a_row_without_tokens_gets_nothing():
    rewards = shaping.token_rewards(
        jnp.array([jnp.nan, 5.0]),
        jnp.ones((2, 3)),
        jnp.zeros((2, 3), bool),
        kl_coef=1.0,
    )
    np.testing.assert_array_equal(rewards, 0.0)


def test_masked_kl_is_ignored_whatever_it_holds():
    score, kl, mask = map(jnp.array, completions())
    clean = shaping.token_rewards(score, kl, mask, kl_coef=0.1)
    for junk in (jnp.nan, jnp.inf):
        dirty = shaping.token_rewards(
            score, jnp.where(mask, kl, junk), mask, kl_coef=0.1
        )
        np.testing.assert_array_equal(dirty, clean)


def test_sequence_rewards_are_the_sums_of_token_rewards():
    score, kl, mask = completions()
    mask[0, 3] = True
    tokens = shaping.token_rewards(*map(jnp.array, (score, kl, mask)), kl_coef=0.3)
    sums = np.where(mask, kl, 0.0).sum(1)
    whole = shaping.sequence_rewards(jnp.array(score), jnp.array(sums), kl_coef=0.3)
    np.testing.assert_allclose(tokens.sum(1), whole, atol=1e-5)


def test_a_traced_coefficient_gives_the_same_rewards():
    score, kl, mask = map(jnp.array, completions())
    plain = shaping.token_rewards(score, kl, mask, kl_coef=0.07)
    traced = jax.jit(lambda beta: shaping.token_rewards(score, kl, mask, kl_coef=beta))(
        jnp.float32(0.07)
    )
    np.testing.assert_allclose(plain, traced, atol=1e-7)


def test_penalties_by_hand():
    score = jnp.array([1.5, -0.5, 0.25])
    lengths = jnp.array([3, 10, 14])
    np.testing.assert_allclose(
        shaping.length_penalty(score, lengths, coef=0.125, free_length=10),
        [1.5, -0.5, -0.25],
    )
    ended = jnp.array([True, False, True])
    np.testing.assert_allclose(
        shaping.missing_eos_penalty(score, ended, penalty=1.25), [1.5, -1.75, 0.25]
    )
    whole = jnp.array([2, -1, 0])
    np.testing.assert_allclose(
        shaping.length_penalty(whole, lengths, coef=0.25, free_length=12),
        [2.0, -1.0, -0.5],
    )
    np.testing.assert_allclose(
        shaping.missing_eos_penalty(whole, ended, penalty=0.5), [2.0, -1.5, 0.0]
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_matches_the_float64_loop(seed, shift_mean):
    _, values, mask = completions(seed)
    got = shaping.whiten(jnp.array(values), jnp.array(mask), shift_mean=shift_mean)
    np.testing.assert_allclose(
        got, slow_whiten(values, mask, shift_mean, 1e-6), rtol=1e-5, atol=1e-5
    )


def test_whitening_gives_mean_zero_and_variance_one_over_the_mask():
    _, values, mask = completions()
    result = np.asarray(
        shaping.whiten(jnp.array(values * 40 - 7), jnp.array(mask)), np.float64
    )
    np.testing.assert_allclose(result[mask].mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(result[mask].var(), 1.0, rtol=1e-4)
    kept = shaping.whiten(jnp.array(values - 7), jnp.array(mask), shift_mean=False)
    np.testing.assert_allclose(
        np.asarray(kept)[mask].mean(), (values - 7)[mask].mean(), rtol=1e-5
    )


def test_whitening_ignores_what_is_masked():
    _, values, mask = map(jnp.array, completions())
    clean = shaping.whiten(values, mask)
    dirty = shaping.whiten(jnp.where(mask, values, jnp.nan), mask)
    np.testing.assert_array_equal(clean, dirty)
    assert (np.asarray(clean)[~np.asarray(mask)] == 0).all()


def test_whitening_one_value_equal_values_or_none_is_finite():
    one = jnp.zeros((2, 3), bool).at[1, 1].set(True)
    for mask in (one, jnp.zeros((2, 3), bool), jnp.ones((2, 3), bool)):
        result = shaping.whiten(jnp.full((2, 3), -2.5), mask)
        np.testing.assert_array_equal(result, 0.0)


def test_nothing_here_carries_a_gradient_and_jit_changes_nothing():
    score, kl, mask = map(jnp.array, completions())

    def everything(score, kl):
        tokens = shaping.token_rewards(score, kl, mask, kl_coef=0.1)
        whole = shaping.sequence_rewards(score, kl[:, 0], kl_coef=0.1)
        short = shaping.length_penalty(score, jnp.arange(8), coef=0.1, free_length=2)
        ended = shaping.missing_eos_penalty(score, mask[:, 0], penalty=1.0)
        white = shaping.whiten(kl, mask)
        return jnp.concatenate([tokens.ravel(), whole, short, ended, white.ravel()])

    for grad in jax.grad(lambda s, k: everything(s, k).sum(), (0, 1))(score, kl):
        np.testing.assert_array_equal(grad, 0.0)
    np.testing.assert_allclose(
        everything(score, kl), jax.jit(everything)(score, kl), atol=1e-6
    )


def test_negative_prices_and_zero_eps_are_refused():
    score, lengths = jnp.zeros(2), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="coef: expected a number >= 0, got -0.5"):
        shaping.length_penalty(score, lengths, coef=-0.5)
    with pytest.raises(ValueError, match="free_length: expected a number >= 0"):
        shaping.length_penalty(score, lengths, coef=0.5, free_length=-1)
    with pytest.raises(ValueError, match="penalty: expected a number >= 0"):
        shaping.missing_eos_penalty(score, jnp.ones(2, bool), penalty=-1.0)
    with pytest.raises(ValueError, match="eps: expected a positive number"):
        shaping.whiten(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), eps=0.0)


def test_a_score_per_token_is_refused():
    _, kl, mask = map(jnp.array, completions())
    with pytest.raises(Exception, match="score"):
        shaping.token_rewards(kl, kl, mask, kl_coef=0.1)
