"""Attribute regressions equal the normal equations; penalties remove verbosity."""

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.algorithms import attributes

NAMES = ["helpful", "correct", "verbose"]


def problem(rows=60, val_rows=40, width=5, noise=0.3, seed=0):
    """(states, targets, validation states, validation targets) of linear attributes."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(width, len(NAMES)))
    states, val_states = (
        rng.normal(size=(rows, width)),
        rng.normal(size=(val_rows, width)),
    )
    targets, val_targets = (
        x @ true + noise * rng.normal(size=(len(x), len(NAMES)))
        for x in (states, val_states)
    )
    return states, targets, val_states, val_targets


def slow_ridge(states, targets, alpha):
    """The normal equations, solved directly."""
    return np.linalg.solve(
        states.T @ states + alpha * np.eye(states.shape[1]), states.T @ targets
    )


def test_hand_worked_ridge_without_intercept():
    # w = sum x y / (sum x^2 + alpha) = 10 / (4 + 1); an intercept would give another.
    fit = attributes.fit_attributes(
        np.array([[2.0]]),
        np.array([[5.0]]),
        np.array([[1.0], [2.0]]),
        np.array([[3.0], [5.0]]),
        names=["a"],
        alphas=[1.0],
    )
    np.testing.assert_allclose(fit.weights, [[2.0]])
    np.testing.assert_allclose(fit.mse, [1.0])  # errors 2 - 3 and 4 - 5
    np.testing.assert_allclose(fit.r2, [1 - 1.0 / 1.0])


@pytest.mark.parametrize("alpha", [1e-4, 1.0, 1e4])
def test_weights_equal_the_normal_equations(alpha):
    states, targets, *val = problem()
    fit = attributes.fit_attributes(states, targets, *val, names=NAMES, alphas=[alpha])
    for k in range(3):
        np.testing.assert_allclose(
            fit.weights[k], slow_ridge(states, targets[:, k], alpha), rtol=1e-8
        )


def test_alpha_is_the_one_with_the_least_validation_error():
    # As few rows as columns, so that the penalty matters.
    states, targets, val_states, val_targets = problem(rows=6, noise=1.0)
    fit = attributes.fit_attributes(
        states, targets, val_states, val_targets, names=NAMES
    )
    for k in range(3):
        errors = {
            alpha: np.mean(
                (val_states @ slow_ridge(states, targets[:, k], alpha)
                 - val_targets[:, k]) ** 2
            )
            for alpha in attributes.ALPHAS
        }  # fmt: skip
        best = min(errors, key=errors.__getitem__)
        assert fit.alpha[k] == best
        assert fit.mse[k] == pytest.approx(errors[best])
        variance = np.mean((val_targets[:, k] - val_targets[:, k].mean()) ** 2)
        assert fit.r2[k] == pytest.approx(1 - errors[best] / variance)
    assert len(attributes.ALPHAS) == 9
    assert attributes.ALPHAS[0] == 1e-4 and attributes.ALPHAS[-1] == 1e4


def test_missing_values_are_left_out_attribute_by_attribute():
    states, targets, val_states, val_targets = problem()
    rng = np.random.default_rng(1)
    for y in (targets, val_targets):
        y[rng.random(y.shape) < 0.4] = np.nan
    fit = attributes.fit_attributes(
        states, targets, val_states, val_targets, names=NAMES, alphas=[0.1]
    )
    for k in range(3):
        has, val_has = ~np.isnan(targets[:, k]), ~np.isnan(val_targets[:, k])
        weights = slow_ridge(states[has], targets[has, k], 0.1)
        np.testing.assert_allclose(fit.weights[k], weights, rtol=1e-8)
        errors = val_states[val_has] @ weights - val_targets[val_has, k]
        assert fit.mse[k] == pytest.approx(np.mean(errors**2))


def test_more_columns_than_rows_have_a_finite_answer():
    states, targets, *val = problem(rows=8, width=30)
    fit = attributes.fit_attributes(states, targets, *val, names=NAMES)
    for k in range(3):
        expected = slow_ridge(states, targets[:, k], fit.alpha[k])
        np.testing.assert_allclose(fit.weights[k], expected, rtol=1e-5, atol=1e-8)


def test_equal_validation_targets_have_no_r2():
    states, targets, val_states, val_targets = problem()
    val_targets[:, 1] = 2.0
    fit = attributes.fit_attributes(
        states, targets, val_states, val_targets, names=NAMES
    )
    assert np.isnan(fit.r2).tolist() == [False, True, False]
    assert np.isfinite(fit.mse).all()


@pytest.mark.parametrize("which", [1, 3])
def test_an_attribute_without_any_value_is_named(which):
    arrays = problem()
    arrays[which][:, 1] = np.nan
    with pytest.raises(ValueError, match="attribute 'correct': no value in"):
        attributes.fit_attributes(*arrays, names=NAMES)


def test_values_that_are_not_finite_are_refused():
    arrays = problem()
    arrays[1][3, 2] = np.inf
    with pytest.raises(ValueError, match="attribute 'verbose': a value is infinite"):
        attributes.fit_attributes(*arrays, names=NAMES)
    arrays = problem()
    arrays[0][3, 2] = np.nan
    with pytest.raises(ValueError, match="a state is not finite"):
        attributes.fit_attributes(*arrays, names=NAMES)


@pytest.mark.parametrize("levels", [4, 10**6])
def test_spearman_equals_an_independent_one_with_ties(levels):
    first, second = np.random.default_rng(levels).integers(0, levels, (2, 80))
    expected = scipy.stats.spearmanr(first, second + first)[0]
    assert attributes.spearman(first, second + first) == pytest.approx(expected)


def test_spearman_of_hand_worked_ranks_and_of_a_constant():
    # Ranks 1 2 3 4 and 1 2 4 3: 1 - 6 * 2 / (4 * 15) = 0.8.
    value = attributes.spearman(np.array([1, 2, 3, 9]), np.array([0, 5, 7, 6]))
    assert value == pytest.approx(0.8)
    assert attributes.spearman(np.zeros(4), np.arange(4)) == 0


def correlated(rows=500, seed=0):
    """Rewards of NAMES of which the first rises and the second falls with the third."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(rows, 3))
    rewards[:, 0] = 5 * (rewards[:, 0] + 0.8 * rewards[:, 2])
    rewards[:, 1] = 0.1 * (rewards[:, 1] - 0.3 * rewards[:, 2])
    return rewards


def test_penalties_are_the_smallest_of_the_grid_that_suffice():
    rewards = correlated()
    found = attributes.fit_penalties(rewards, 2, names=NAMES)
    for k in range(2):
        before = scipy.stats.spearmanr(rewards[:, k], rewards[:, 2])[0]
        assert found.before[k] == pytest.approx(before)
        unit = np.sign(before) * rewards[:, k].std() / rewards[:, 2].std()
        for size in attributes.PENALTIES:
            adjusted = rewards[:, k] - size * unit * rewards[:, 2]
            after = scipy.stats.spearmanr(adjusted, rewards[:, 2])[0]
            if abs(after) <= 0.03:
                break
        assert found.weights[k] == pytest.approx(size * unit)
        assert found.after[k] == pytest.approx(after)
    assert found.weights[0] > 0 > found.weights[1]


def test_debiased_rewards_do_not_follow_the_verbosity_which_is_0_itself():
    rewards = correlated()
    found = attributes.fit_penalties(rewards, 2, names=NAMES)
    clean = attributes.debias(rewards, found.weights, 2)
    for k in range(2):
        assert abs(scipy.stats.spearmanr(rewards[:, k], rewards[:, 2])[0]) > 0.2
        assert abs(scipy.stats.spearmanr(clean[:, k], rewards[:, 2])[0]) <= 0.03
    np.testing.assert_array_equal(clean[:, 2], 0)


def test_uncorrelated_attributes_are_left_alone():
    length = np.tile([1.0, 2, 3, 4], 50)
    other = np.repeat([1.0, 2, 3, 4, 5], 40)  # every value beside every length
    found = attributes.fit_penalties(
        np.stack([other, length], axis=1), 1, names=["a", "v"]
    )
    np.testing.assert_array_equal(found.weights, [0, 1])


def test_penalties_follow_the_scale_of_the_rewards():
    rewards = correlated()
    one = attributes.fit_penalties(rewards, 2, names=NAMES)
    other = attributes.fit_penalties(rewards * [7, 0.1, 3], 2, names=NAMES)
    np.testing.assert_allclose(other.weights, one.weights * [7 / 3, 0.1 / 3, 1])


def test_a_correlation_that_cannot_be_taken_out_is_named():
    rewards = np.array([[1.0, 1], [2, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"attribute 'a': no lambda .* 3 rows"):
        attributes.fit_penalties(rewards, 1, names=["a", "v"])


def test_a_verbosity_that_says_nothing_is_refused():
    rewards = np.array([[1.0, 2], [2, 2]])
    with pytest.raises(ValueError, match="'v': its reward is the same for all rows"):
        attributes.fit_penalties(rewards, 1, names=["a", "v"])
