"""Preference strength: mean and spread of reward differences over M models."""

import math

import numpy as np
import pytest

from rlhf_jax.curation.strength import (
    Strength,
    below_fraction,
    slices,
    strength,
    u_curve,
)


def rewards(pairs=60, models=4, seed=0):
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(size=(2, pairs, models)) * [1, 2, 5, 0.1][:models]
    return chosen + 0.3, rejected


def test_hand_worked_mean_and_population_std():
    found = strength(
        np.array([[3.0, 1.0], [0.0, 0.0]]),
        np.array([[1.0, 1.0], [1.0, 3.0]]),
        standardise=False,
    )
    np.testing.assert_array_equal(found.gaps, [[2, 0], [-1, -3]])
    np.testing.assert_array_equal(found.mean, [1, -2])
    # Divided by M = 2, not by M - 1, which would give sqrt(2).
    np.testing.assert_array_equal(found.std, [1, 1])


def test_equals_a_loop_over_pairs_and_models():
    chosen, rejected = rewards()
    found = strength(chosen, rejected, standardise=False)
    for i in range(len(chosen)):
        gaps = [float(c) - float(r) for c, r in zip(chosen[i], rejected[i])]
        mean = sum(gaps) / len(gaps)
        std = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
        assert found.mean[i] == pytest.approx(mean, abs=1e-12)
        assert found.std[i] == pytest.approx(std, abs=1e-12)


def test_float32_rewards_are_subtracted_in_float64():
    chosen = np.full((1, 2), 1e8, np.float32)
    found = strength(chosen, chosen - np.float32(8), standardise=False)
    np.testing.assert_array_equal(found.gaps, [[8, 8]])


def test_standardised_gaps_have_unit_scale_and_keep_their_sign():
    chosen, rejected = rewards()
    plain = strength(chosen, rejected, standardise=False)
    found = strength(chosen, rejected, standardise=True)
    np.testing.assert_allclose((found.gaps**2).mean(axis=0), 1)
    np.testing.assert_array_equal(np.sign(found.gaps), np.sign(plain.gaps))


def test_a_models_scale_does_not_matter_once_standardised():
    chosen, rejected = rewards()
    scale = np.array([1.0, 30.0, 0.01, 4.0])
    np.testing.assert_allclose(
        strength(chosen * scale, rejected * scale, standardise=True).gaps,
        strength(chosen, rejected, standardise=True).gaps,
    )


def test_a_model_without_any_opinion_stays_at_zero():
    chosen, rejected = rewards(models=2)
    rejected[:, 1] = chosen[:, 1]
    found = strength(chosen, rejected, standardise=True)
    np.testing.assert_array_equal(found.gaps[:, 1], 0)


def test_swapping_the_pairs_negates_the_mean_and_keeps_the_spread():
    chosen, rejected = rewards()
    one = strength(chosen, rejected, standardise=True)
    other = strength(rejected, chosen, standardise=True)
    np.testing.assert_allclose(other.mean, -one.mean)
    np.testing.assert_allclose(other.std, one.std)


def test_offsets_of_a_prompt_do_not_matter():
    chosen, rejected = rewards()
    offset = np.random.default_rng(1).normal(size=(len(chosen), 1))
    np.testing.assert_allclose(
        strength(chosen + offset, rejected + offset, standardise=False).gaps,
        strength(chosen, rejected, standardise=False).gaps,
    )


def test_a_reward_that_is_nan_is_named():
    chosen, rejected = rewards()
    chosen[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"pair 7 under model 2 are nan and -?\d"):
        strength(chosen, rejected, standardise=False)


def test_two_infinite_rewards_are_named():
    chosen, rejected = rewards()
    chosen[3, 0] = rejected[3, 0] = np.inf
    with pytest.raises(ValueError, match="pair 3 under model 0 are inf and inf"):
        strength(chosen, rejected, standardise=False)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((5, 1), (5, 1)), "1 reward model; .* at least 2"),
        (((5,), (5,)), "expected rewards .pairs, models."),
        (((5, 3), (5, 2)), r"got \(5, 3\) and \(5, 2\)"),
        (((0, 2), (0, 2)), "no pairs"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes, match):
    with pytest.raises(ValueError, match=match):
        strength(*map(np.zeros, shapes), standardise=True)


def test_the_lowest_fraction_is_exact_also_among_ties():
    np.testing.assert_array_equal(
        below_fraction(np.array([3.0, 1, 1, 1, 0]), 0.6), [0, 1, 1, 0, 1]
    )
    assert below_fraction(np.zeros(10), 0.2).sum() == 2
    assert not below_fraction(np.arange(10.0), 0.0).any()


def test_slices_are_a_partition_in_the_order_of_strength():
    gaps = np.random.default_rng(0).normal(size=(23, 3))
    parts = slices(Strength(gaps), 10)
    assert len(parts) == 10
    assert sorted(np.concatenate(parts)) == list(range(23))
    mean = gaps.mean(axis=1)
    for low, high in zip(parts, parts[1:]):
        assert mean[low].max() <= mean[high].min()


def test_u_curve_averages_bins_of_equally_many_pairs():
    gaps = np.array([[5.0, 3], [-4, 0], [1, -1], [2, 2]])  # mean 4 -2 0 2, std 1 2 1 0
    mean, std = u_curve(Strength(gaps), bins=2)
    np.testing.assert_array_equal(mean, [-1, 3])
    np.testing.assert_array_equal(std, [1.5, 0.5])


def test_u_curve_has_no_bin_without_pairs():
    mean, std = u_curve(Strength(np.ones((3, 2))), bins=20)
    assert mean.shape == std.shape == (3,)
