"""Running moments: one pass in batches equals all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl import moments


def batches(seed=0, count=12, size=16, mean=-0.7, spread=2.3):
    rng = np.random.default_rng(seed)
    scores = rng.normal(mean, spread, (count, size)).astype(np.float32)
    mask = rng.uniform(size=(count, size)) < 0.7
    mask[0], mask[3], mask[5] = False, np.arange(size) == 4, True
    return scores, mask


def accumulate(scores, mask):
    state = moments.init()
    for values, real in zip(jnp.array(scores), jnp.array(mask), strict=True):
        state = moments.update(state, values, real)
    return state


def everything(state):
    return np.array([state.count, state.mean, state.m2, moments.std(state)], np.float64)


def direct(scores):
    """Count, mean, m2 and unbiased std of all scores at once, float64."""
    scores = np.asarray(scores, np.float64)
    return np.array(
        [
            len(scores),
            scores.mean(),
            ((scores - scores.mean()) ** 2).sum(),
            scores.std(ddof=1),
        ]
    )


def test_two_batches_by_hand():
    state = accumulate([[1.0, 3.0], [-2.5, 99.0]], [[True, True], [True, False]])
    # mean of 1, 3, -2.5 = 0.5; m2 = 0.25 + 6.25 + 9 = 15.5
    np.testing.assert_allclose(
        everything(state), [3, 0.5, 15.5, np.sqrt(7.75)], rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_batches_equal_all_scores_at_once(seed):
    scores, mask = batches(seed)
    np.testing.assert_allclose(
        everything(accumulate(scores, mask)), direct(scores[mask]), rtol=1e-5
    )


def test_a_large_mean_does_not_eat_the_spread():
    # sums of squares would: 1000^2 rounds at 0.06 in float32
    scores, mask = batches(mean=1000.0, spread=0.5)
    np.testing.assert_allclose(
        everything(accumulate(scores, mask)), direct(scores[mask]), rtol=1e-5
    )


def test_ten_thousand_updates_stay_precise():
    rng = np.random.default_rng(3)
    drift = np.linspace(-1.0, 4.0, 10_000)[:, None]
    scores = (rng.normal(size=(10_000, 32)) + drift).astype(np.float32)
    mask = jnp.ones(32, bool)
    state, _ = jax.lax.scan(
        lambda state, x: (moments.update(state, x, mask), None),
        moments.init(),
        jnp.array(scores),
    )
    np.testing.assert_allclose(everything(state), direct(scores.ravel()), rtol=1e-4)


def test_order_of_batches_and_of_scores_does_not_matter():
    scores, mask = batches()
    rng = np.random.default_rng(4)
    rows, columns = rng.permutation(12), rng.permutation(16)
    np.testing.assert_allclose(
        everything(accumulate(scores, mask)),
        everything(accumulate(scores[rows][:, columns], mask[rows][:, columns])),
        rtol=1e-5,
    )


def test_masked_scores_are_ignored_whatever_they_hold():
    scores, mask = batches()
    clean = everything(accumulate(scores, mask))
    for junk in (np.nan, np.inf, -np.inf):
        dirty = everything(accumulate(np.where(mask, scores, junk), mask))
        np.testing.assert_array_equal(dirty, clean)


def test_an_empty_batch_changes_nothing():
    scores, mask = batches()
    for state in (moments.init(), accumulate(scores, mask)):
        after = moments.update(state, jnp.full(16, jnp.nan), jnp.zeros(16, bool))
        np.testing.assert_array_equal(everything(after), everything(state))


def test_std_is_one_for_no_score_one_score_and_equal_scores():
    assert float(moments.std(moments.init())) == 1.0
    assert float(moments.std(accumulate([[-3.3]], [[True]]))) == 1.0
    equal = accumulate(np.full((5, 7), 0.1, np.float32), np.ones((5, 7), bool))
    assert float(moments.std(equal)) == 1.0
    assert float(equal.m2) == 0.0


def test_scale_keeps_the_mean_and_normalise_removes_it():
    state = accumulate([[1.0, 3.0, 5.0]], [[True] * 3])  # mean 3, std 2
    scores = jnp.array([-2.5, 3.0, 11.0])
    np.testing.assert_allclose(moments.scale(scores, state), [-1.25, 1.5, 5.5])
    np.testing.assert_allclose(moments.normalise(scores, state), [-2.75, 0.0, 4.0])


def test_clip_is_in_standard_deviations_and_two_sided():
    state = accumulate([[1.0, 3.0, 5.0]], [[True] * 3])
    scores = jnp.array([-9.0, 3.0, 11.0])
    np.testing.assert_allclose(moments.scale(scores, state, clip=2.0), [-2.0, 1.5, 2.0])
    np.testing.assert_allclose(
        moments.normalise(scores, state, clip=2.0), [-2.0, 0.0, 2.0]
    )


def test_without_history_scaling_leaves_scores_alone():
    scores = jnp.array([-0.3, 1.7])
    np.testing.assert_array_equal(moments.scale(scores, moments.init()), scores)
    np.testing.assert_array_equal(moments.normalise(scores, moments.init()), scores)


def test_is_a_pytree_of_float32_that_jit_vmap_and_the_host_accept():
    scores, mask = map(jnp.array, batches())
    state = moments.update(moments.init(), scores[5], mask[5])
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    jitted = jax.jit(moments.update)(moments.init(), scores[5], mask[5])
    np.testing.assert_allclose(everything(jitted), everything(state), rtol=1e-6)
    seeds = jax.vmap(moments.update, (None, 0, 0))(moments.init(), scores, mask)
    np.testing.assert_allclose(
        everything(jax.tree.map(lambda x: x[5], seeds)), everything(state), rtol=1e-6
    )
    np.testing.assert_array_equal(everything(jax.device_get(state)), everything(state))


def test_carries_no_gradient():
    scores, mask = map(jnp.array, batches())

    def total(x):
        state = moments.update(moments.init(), x, mask[5])
        return (moments.scale(x, state) + moments.normalise(x, state)).sum() + state.m2

    np.testing.assert_array_equal(jax.grad(total)(scores[5]), 0.0)


@pytest.mark.parametrize("measure", [moments.scale, moments.normalise])
def test_a_clip_that_is_not_positive_is_refused(measure):
    with pytest.raises(ValueError, match="clip: expected a positive number"):
        measure(jnp.zeros(3), moments.init(), clip=0.0)


def test_scores_of_another_rank_are_refused():
    with pytest.raises(Exception, match="values"):
        moments.update(moments.init(), jnp.zeros((3, 1)), jnp.ones(3, bool))
