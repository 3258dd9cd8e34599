"""Intervals over seeds against the textbook."""

import math

import numpy as np
import pytest

from rlhf_jax.studies.statistics import interval, paired


def test_interval_is_students():
    values = [0.5, 0.6, 0.7]
    found = interval(values)
    # t with 2 degrees of freedom at 97.5 %: 4.302653.
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


def test_paired_takes_the_seeds_apart():
    """A gain of 0.1 in every seed is sure, however far the seeds lie apart."""
    base = np.array([0.1, 0.5, 0.9])
    sure = paired(base + 0.1 + np.array([1e-3, 0, -1e-3]), base)
    assert sure.mean == pytest.approx(0.1) and sure.half < 0.01 and sure.p < 1e-3


def test_one_seed_has_no_interval():
    assert math.isnan(interval([0.5]).half)
    assert math.isnan(paired([0.5], [0.4]).p)


def test_no_difference_at_all_has_no_p():
    assert math.isnan(paired([0.5, 0.6], [0.5, 0.6]).p)
