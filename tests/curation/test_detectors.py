"""Detectors of wrong labels: which way they point, and how well that is measured."""

import math

import numpy as np
import pytest

from rlhf_jax.curation import detectors
from rlhf_jax.curation.strength import Strength

GAPS = np.array([[2.0, 4.0], [1.0, -1.0], [-3.0, -1.0], [0.0, -2.0]])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_auc(suspicion, wrong):
    """All pairs of a wrong and a right label, ties one half."""
    won = total = 0.0
    for s, is_wrong in zip(suspicion, wrong):
        for t, other_is_wrong in zip(suspicion, wrong):
            if is_wrong and not other_is_wrong:
                won += 1.0 if s > t else 0.5 if s == t else 0.0
                total += 1
    return won / total


def test_hand_worked_suspicions():
    found = Strength(GAPS)  # means 3 0 -2 -1, std 1 1 1 1
    expected = {
        "mean_strength": [-3, 0, 2, 1],
        "single_margin": [-2, -1, 3, 0],
        "signal_to_noise": [-3, 0, 2, 1],
        "vote": [0, 0.5, 1, 0.75],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            detectors.DETECTORS[name](found), values, atol=1e-9, err_msg=name
        )


def test_entropy_equals_a_loop_and_is_highest_where_models_cannot_say():
    found = detectors.entropy(Strength(GAPS))
    for i, gaps in enumerate(GAPS.tolist()):
        p = sum(map(sigmoid, gaps)) / 2
        assert found[i] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert found.argmax() == 1
    assert found[1] == pytest.approx(math.log(2))


def test_entropy_is_symmetric_so_it_cannot_find_a_label_all_are_sure_is_wrong():
    found = detectors.entropy(Strength(np.array([[50.0, 50.0], [-50.0, -50.0]])))
    np.testing.assert_allclose(found, 0, atol=1e-9)


def test_disagreement_takes_a_pair_towards_the_middle():
    found = detectors.signal_to_noise(Strength(np.array([[-2.0, -2.2], [-7, 1.0]])))
    assert found[0] > found[1] > 0


def test_agreement_without_any_spread_is_finite():
    found = detectors.signal_to_noise(Strength(np.array([[-2.0, -2.0], [0, 0]])))
    assert found[0] > 1e9 and found[1] == 0
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "name", ["mean_strength", "single_margin", "signal_to_noise", "vote"]
)
def test_swapping_all_pairs_turns_the_order_of_suspicion_round(name):
    gaps = np.random.default_rng(0).normal(size=(40, 3))
    one, other = (detectors.DETECTORS[name](Strength(g)) for g in (gaps, -gaps))
    offset = 1.0 if name == "vote" else 0.0
    np.testing.assert_allclose(other, offset - one, atol=1e-12)


def test_flipped_labels_are_found_and_ambiguity_alone_does_not_find_them():
    rng = np.random.default_rng(0)
    true = np.abs(rng.normal(size=400)) * 2
    wrong = rng.random(400) < 0.25
    gaps = np.where(wrong, -true, true)[:, None] + rng.normal(size=(400, 5))
    found = {
        name: detectors.auc(detect(Strength(gaps)), wrong)
        for name, detect in detectors.DETECTORS.items()
    }
    assert found["mean_strength"] > 0.9
    assert found["mean_strength"] > found["single_margin"]  # five heads beat one
    assert abs(found["entropy"] - 0.5) < 0.1


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_equals_a_loop_over_all_pairs_with_ties(levels):
    rng = np.random.default_rng(levels)
    suspicion = rng.integers(0, levels, 60).astype(float)
    wrong = rng.random(60) < 0.3
    assert detectors.auc(suspicion, wrong) == pytest.approx(slow_auc(suspicion, wrong))


def test_auc_of_perfect_reversed_and_tied_suspicion():
    wrong = np.array([False, False, True, True])
    assert detectors.auc(np.array([0.0, 1, 2, 3]), wrong) == 1
    assert detectors.auc(np.array([3.0, 2, 1, 0]), wrong) == 0
    assert detectors.auc(np.zeros(4), wrong) == 0.5


def test_auc_is_unchanged_by_monotone_maps_and_order():
    rng = np.random.default_rng(0)
    suspicion, wrong = rng.normal(size=50), rng.random(50) < 0.4
    value = detectors.auc(suspicion, wrong)
    order = rng.permutation(50)
    assert detectors.auc(np.exp(suspicion), wrong) == value
    assert detectors.auc(suspicion[order], wrong[order]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("suspicion", "wrong", "match"),
    [
        (np.zeros(3), np.zeros(3), "right and wrong labels, got 3 and 0"),
        (np.zeros(3), np.ones(3), "right and wrong labels, got 0 and 3"),
        (np.zeros(3), np.array([True, False]), r"shapes \(3,\) and \(2,\)"),
        (np.array([0, np.nan]), np.array([1, 0]), "suspicion 1 is nan"),
    ],
)
def test_auc_without_an_answer_is_refused(suspicion, wrong, match):
    with pytest.raises(ValueError, match=match):
        detectors.auc(suspicion, wrong)


def test_ser_keeps_flips_and_holds_back():
    # sigmoid of 0.21 is .5523, of -0.21 .4477, of 3 .953, of 1 .731
    chosen = np.array([0.21, -0.21, 0.1, 3.0, 1.0, 0.19])
    rejected = np.array([-0.21, 0.21, 0.0, 0.0, 3.0, -0.21])
    expected = ["keep", "flip", "drop", "keep", "drop", "drop"]
    assert detectors.ser_rule(chosen, rejected).tolist() == expected


def test_ser_equals_the_rule_in_a_loop_and_swaps_with_the_pair():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 200))
    found = detectors.ser_rule(chosen, rejected).tolist()
    for action, x, y in zip(found, chosen, rejected):
        a, b = sigmoid(x), sigmoid(y)
        if (a > 0.55 and b < 0.45) or a - b > 0.3:
            assert action == "keep"
        elif (b > 0.55 and a < 0.45) or b - a > 0.3:
            assert action == "flip"
        else:
            assert action == "drop"
    other = {"keep": "flip", "flip": "keep", "drop": "drop"}
    assert detectors.ser_rule(rejected, chosen).tolist() == [other[a] for a in found]
    assert len(set(found)) == 3


def test_ssrm_takes_the_models_own_label_where_it_is_confident():
    # sigmoid of 2 is .881, of 0.5 .622
    gaps = np.array([2.0, -2.0, 0.5, -0.5, 0.0])
    assert detectors.ssrm_rule(gaps).tolist() == ["keep", "flip"] + ["drop"] * 3
    loose = detectors.ssrm_rule(gaps, confidence=0.6)
    assert loose.tolist() == ["keep", "flip", "keep", "flip", "drop"]


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_ssrm_refuses_a_confidence_that_is_none(confidence):
    with pytest.raises(ValueError, match=r"confidence: .* \[0.5, 1\), got"):
        detectors.ssrm_rule(np.zeros(2), confidence=confidence)
