"""The SEAM score: by hand, in logarithms, and what it must not depend on."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.curation.seam import scores
from rlhf_jax.curation.seam.scores import SeamFormula, log_risk

LOGPROBS = np.log([0.5, 0.25, 0.125])
TOKENS = np.array([1, 2, 3])
REWARDS = np.array([1.0, 3.0, 5.0])


def risk(gold=2.0, logprobs=LOGPROBS, tokens=TOKENS, rewards=REWARDS, **formula):
    found = log_risk(logprobs, tokens, rewards, gold, SeamFormula(**formula))
    return math.exp(found)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        # The second and third are misjudged; each token has probability 1/2.
        ({}, (0.5 + 0.5) / 3),
        ({"reduce": "sum"}, 0.5 + 0.5),
        ({"length": "none"}, (0.25 + 0.125) / 3),
        ({"misjudgement": "soft"}, (1 * 0.5 + 3 * 0.5) / 3),
        ({"misjudgement": "soft", "length": "none"}, (1 * 0.25 + 3 * 0.125) / 3),
        (
            {"length": "gnmt", "alpha": 1.0},
            (0.25 ** (6 / 7) + 0.125 ** (6 / 8)) / 3,
        ),
    ],
)
def test_hand_worked_risks(formula, expected):
    assert risk(**formula) == pytest.approx(expected, rel=1e-12)


def test_a_tie_is_no_misjudgement_and_nothing_misjudged_is_no_risk():
    assert risk(gold=5.0) == 0.0
    assert risk(gold=3.0) == pytest.approx(0.5 / 3)
    assert log_risk(LOGPROBS, TOKENS, REWARDS, 9.0) == -math.inf


def test_long_completions_do_not_underflow():
    """exp(-4000) is 0 in float64; its logarithm is kept."""
    found = log_risk(
        np.array([-4000.0]), np.array([100]), np.ones(1), 0.0, SeamFormula("none")
    )
    assert found == pytest.approx(-4000.0)


@pytest.mark.parametrize(
    "formula",
    [
        SeamFormula(length, 0.6, misjudgement, reduce)
        for length, misjudgement, reduce in itertools.product(
            ("mean", "gnmt", "none"), ("hard", "soft"), ("mean", "sum")
        )
    ],
)
def test_a_likelier_misjudged_completion_raises_the_risk_and_order_is_nothing(formula):
    rng = np.random.default_rng(0)
    logprobs, tokens = -rng.uniform(1, 50, 6), rng.integers(1, 40, 6)
    rewards = rng.normal(size=6)
    before = log_risk(logprobs, tokens, rewards, 0.0, formula)
    likelier = logprobs + (np.arange(6) == rewards.argmax())
    assert log_risk(likelier, tokens, rewards, 0.0, formula) > before
    order = rng.permutation(6)
    again = log_risk(logprobs[order], tokens[order], rewards[order], 0.0, formula)
    assert again == pytest.approx(before, rel=1e-12)
    lower = log_risk(logprobs, tokens, rewards, 0.5, formula)
    assert lower <= before


def test_ranks_and_the_lowest_share():
    seam = np.array([3.0, 1.0, np.inf, 2.0, np.inf])
    assert scores.ranks(seam).tolist() == [3, 1, 4.5, 2, 4.5]
    assert scores.lowest(seam, 0.4).tolist() == [1, 3]
    assert scores.lowest(seam, 0.0).tolist() == []
    assert scores.lowest(seam, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_equal_scores_at_the_cut_are_drawn_not_taken_by_place():
    seam = np.full(100, np.inf)
    drawn = [scores.lowest(seam, 0.2, seed=seed) for seed in range(20)]
    assert {len(each) for each in drawn} == {20}
    assert np.unique(np.concatenate(drawn)).size > 90


def test_jaccard_of_random_sets_is_its_chance():
    rng = np.random.default_rng(0)
    total, a, b = 50, 10, 20
    seen = [
        scores.jaccard(rng.permutation(total)[:a], rng.permutation(total)[:b], total)
        for _ in range(400)
    ]
    found, chance = np.mean(seen, axis=0)
    assert found == pytest.approx(chance, abs=0.01)
    same = np.arange(5)
    assert scores.jaccard(same, same, 50)[0] == 1.0
    assert scores.jaccard(same, same + 5, 50)[0] == 0.0


def test_overlap_of_independent_scores_is_chance_however_many_tie():
    rng = np.random.default_rng(0)
    first, second = np.full((2, 1000), np.inf)
    first[rng.permutation(1000)[:50]] = 1.0
    second[rng.permutation(1000)[:50]] = 1.0
    found = scores.overlap(first, second)
    assert found.jaccard == pytest.approx(found.chance, abs=0.02)
    assert abs(found.spearman) < 0.1
    same = scores.overlap(np.arange(100.0), np.arange(100.0))
    assert (same.jaccard, same.spearman) == (1.0, pytest.approx(1.0))
    assert math.isnan(scores.overlap(np.full(9, np.inf), np.arange(9.0)).spearman)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": []}, "0 log-probabilities, 3 lengths"),
        ({"rewards": REWARDS[:2]}, "2 rewards; expected one of each"),
        ({"rewards": np.array([1.0, np.nan, 2.0])}, "a reward is not finite"),
        ({"gold": math.inf}, "a reward is not finite"),
        ({"tokens": np.array([0, 1, 2])}, "at least 1 token"),
    ],
)
def test_what_cannot_be_scored_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        risk(**change)


def test_options_that_cannot_be_are_said():
    with pytest.raises(ValueError, match="formula.alpha: expected a finite number"):
        SeamFormula(alpha=-1.0)
    with pytest.raises(ValueError, match="formula.reduce 'avg': expected one of mean"):
        SeamFormula(reduce="avg")
    with pytest.raises(ValueError, match=r"fraction: expected a number in \[0, 1\]"):
        scores.lowest(np.zeros(3), 1.5)
