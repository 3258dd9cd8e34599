"""Best-of-n curves equal brute force over all subsets."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evals.best_of_n import best_of_n, best_of_n_kl


def brute_force(proxy, gold, n):
    """Mean over prompts and subsets of size n; ties share."""
    totals = {"proxy": [], "gold": []}
    for row_proxy, row_gold in zip(proxy, gold):
        picked = {"proxy": [], "gold": []}
        for subset in itertools.combinations(range(len(row_proxy)), n):
            best = max(row_proxy[i] for i in subset)
            tied = [i for i in subset if row_proxy[i] == best]
            picked["proxy"].append(best)
            picked["gold"].append(np.mean([row_gold[i] for i in tied]))
        for name, values in picked.items():
            totals[name].append(np.mean(values))
    return {name: np.mean(values) for name, values in totals.items()}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_curve_equals_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    found = best_of_n(proxy, gold, sizes=[n])
    expected = brute_force(proxy, gold, n)
    assert found.proxy[0] == pytest.approx(expected["proxy"], abs=1e-12)
    assert found.gold[0] == pytest.approx(expected["gold"], abs=1e-12)


def test_ties_do_not_favour_an_order_of_the_samples():
    proxy = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    gold = np.array([[0.0, 1.0, 0.5], [0.5, 1.0, 0.0]])
    found = best_of_n(proxy, gold, sizes=[3])
    assert found.gold[0] == pytest.approx(0.5)


def test_default_sizes_are_powers_of_two_and_the_number_of_samples():
    zeros = np.zeros((2, 6))
    assert best_of_n(zeros, zeros).n.tolist() == [1, 2, 4, 6]


def test_kl_is_the_analytic_one():
    n = np.array([1, 2, 16])
    expected = [math.log(k) - (k - 1) / k for k in (1, 2, 16)]
    np.testing.assert_allclose(best_of_n_kl(n), expected, rtol=1e-12)


def test_many_samples_do_not_overflow():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(3, 1000))
    found = best_of_n(proxy, proxy)
    assert found.proxy[-1] == pytest.approx(proxy.max(axis=1).mean())
    assert np.isfinite(found.proxy).all()


def test_wrong_shapes_and_sizes_are_named():
    with pytest.raises(ValueError, match="one shape"):
        best_of_n(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="numbers in 1 .. 3"):
        best_of_n(np.zeros((2, 3)), np.zeros((2, 3)), sizes=[4])
