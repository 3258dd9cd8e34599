"""What is done with a pair of a given strength: flips, margins, soft labels."""

import numpy as np
import pytest

from rlhf_jax.curation.clean import (
    ACTIONS,
    CleanConfig,
    changed_row,
    decide,
    soft_label,
)
from rlhf_jax.curation.strength import Strength

ROW = {"prompt": "p", "chosen": "good", "rejected": "bad", "source": "hh"}


def of_means(*means):
    """A Strength with these means."""
    return Strength(np.array(means, np.float64)[:, None] + [[-0.5, 0.5]])


def test_nothing_asked_for_keeps_all_rows_as_they_are():
    config = CleanConfig()
    assert decide(of_means(-2, 0, 3), config).tolist() == ["keep"] * 3
    assert changed_row(ROW, "keep", 3.0, config) == ROW


def test_fractions_take_the_lowest_and_thresholds_take_what_is_below():
    found = of_means(3, -1, 0, 2, -2)
    lowest = decide(found, CleanConfig(flip_fraction=0.4))
    assert lowest.tolist() == ["keep", "flip", "keep", "keep", "flip"]
    below = decide(found, CleanConfig(soft_below=0.0))  # 0 itself is not below 0
    assert below.tolist() == ["keep", "soft", "keep", "keep", "soft"]


def test_drop_goes_before_flip_and_flip_before_soft():
    found = of_means(-3, -2, -1, 1)
    config = CleanConfig(drop_below=-2.5, flip_below=-1.5, soft_below=0.0)
    assert decide(found, config).tolist() == ["drop", "flip", "soft", "keep"]


def test_decisions_equal_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=(101, 3))
    config = CleanConfig(drop_fraction=0.1, flip_fraction=0.25, soft_below=0.2)
    mean = gaps.mean(axis=1).tolist()
    rank = {i: n for n, i in enumerate(sorted(range(101), key=mean.__getitem__))}
    expected = []
    for i in range(101):
        if rank[i] < round(0.1 * 101):
            expected.append("drop")
        elif rank[i] < round(0.25 * 101):
            expected.append("flip")
        else:
            expected.append("soft" if mean[i] < 0.2 else "keep")
    found = decide(Strength(gaps), config)
    assert found.tolist() == expected
    assert set(expected) == set(ACTIONS)


def test_a_flip_swaps_the_two_completions_and_nothing_else():
    new = changed_row(ROW, "flip", -1.0, CleanConfig(flip_below=0.0))
    assert new == ROW | {"chosen": "bad", "rejected": "good"}
    assert ROW["chosen"] == "good"  # the row given is not changed


def test_two_flips_are_none():
    config = CleanConfig(flip_below=0.0)
    once = changed_row(ROW, "flip", -1.0, config)
    assert once is not None
    assert changed_row(once, "flip", 1.0, config) == ROW


def test_flips_follow_the_names_of_the_columns():
    row = {"prompt": "p", "a": "good", "b": "bad"}
    new = changed_row(
        row, "flip", -1.0, CleanConfig(flip_below=0.0), chosen="a", rejected="b"
    )
    assert new == {"prompt": "p", "a": "bad", "b": "good"}


@pytest.mark.parametrize(
    ("action", "mean", "margin"),
    [("keep", 1.5, 3.0), ("keep", -1.5, -3.0), ("soft", -1.5, -3.0), ("flip", -2, 4.0)],
)
def test_the_margin_is_the_strength_with_the_other_sign_after_a_flip(
    action, mean, margin
):
    config = CleanConfig(flip_below=0.0, margin=True, margin_scale=2.0)
    new = changed_row(ROW, action, mean, config)
    assert new is not None
    assert new["margin"] == margin


def test_a_flipped_pair_has_the_margin_that_its_swapped_rewards_would_give():
    gaps = np.array([[-1.0, -3.0]])
    config = CleanConfig(flip_below=0.0, margin=True)
    flipped = changed_row(ROW, "flip", Strength(gaps).mean[0], config)
    swapped = changed_row(ROW, "keep", Strength(-gaps).mean[0], config)
    assert flipped is not None and swapped is not None
    assert flipped["margin"] == swapped["margin"] == 2.0


def test_all_rows_get_a_soft_label_once_any_can():
    config = CleanConfig(soft_below=0.0, soft_label=0.3)
    labels = {}
    for action in ("keep", "flip", "soft"):
        new = changed_row(ROW, action, -1.0, config)
        assert new is not None
        labels[action] = new["soft_label"]
    assert labels == {"keep": 1.0, "flip": 1.0, "soft": 0.3}
    assert "soft_label" not in (changed_row(ROW, "keep", 1.0, CleanConfig()) or {})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_with_a_temperature_the_soft_label_is_the_sigmoid_of_the_strength(temperature):
    config = CleanConfig(soft_below=0.5, soft_temperature=temperature)
    found = of_means(-2.0, 0.0, 0.25, 3.0)
    labels = []
    for action, mean in zip(decide(found, config), found.mean, strict=True):
        new = changed_row(ROW, str(action), mean, config)
        assert new is not None
        labels.append(new["soft_label"])
    expected = [1 / (1 + np.exp(-mu / temperature)) for mu in (-2.0, 0.0, 0.25)]
    np.testing.assert_allclose(labels, [*expected, 1.0], rtol=1e-12)


def test_soft_labels_of_all_pairs_are_symmetric_and_finite():
    """p(mu) + p(-mu) = 1: a swapped pair says the same."""
    config = CleanConfig(soft_fraction=1.0, soft_temperature=1e-3)
    found = of_means(-1e4, -1e-3, 1e-3, 1e4)
    assert decide(found, config).tolist() == ["soft"] * 4
    labels = [soft_label(mean, config) for mean in found.mean]
    assert labels[0] == 0.0 and labels[3] == 1.0
    np.testing.assert_allclose(np.add(labels, labels[::-1]), 1.0)


def test_dropped_rows_are_none():
    assert changed_row(ROW, "drop", -1.0, CleanConfig(drop_below=0.0)) is None


@pytest.mark.parametrize("action", ["keep", "drop"])
@pytest.mark.parametrize("name", ["margin", "soft_label"])
def test_a_column_that_is_there_already_is_not_overwritten(name, action):
    config = CleanConfig(margin=True, soft_below=0.0)
    with pytest.raises(ValueError, match=f"column '{name}' already; rename it"):
        changed_row(ROW | {name: 1.0}, action, 1.0, config)


def test_columns_that_are_not_written_may_be_there():
    row = ROW | {"margin": 7.0}
    assert changed_row(row, "keep", 1.0, CleanConfig()) == row


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"flip_fraction": 1.0}, r"clean.flip_fraction: .* \[0, 1\), got 1.0"),
        ({"soft_fraction": -0.1}, "clean.soft_fraction"),
        ({"drop_fraction": float("nan")}, "clean.drop_fraction.*nan"),
        ({"flip_below": float("inf")}, "clean.flip_below: expected a finite"),
        ({"soft_fraction": 0.1, "soft_below": 0.0}, "give one of the two"),
        ({"soft_fraction": 1.1}, r"clean.soft_fraction: .* \[0, 1\], got 1.1"),
        ({"soft_temperature": 1.0}, r"soft_temperature: no pair gets .*1 = all"),
        (
            {"soft_fraction": 1.0, "soft_temperature": 0.0},
            "clean.soft_temperature: expected a finite number above 0, got 0.0",
        ),
        (
            {"soft_below": 0.0, "soft_temperature": 1.0, "soft_label": 0.4},
            "clean.soft_label and clean.soft_temperature: give one",
        ),
        ({"soft_label": 1.5}, "clean.soft_label: .* got 1.5"),
        ({"margin_scale": float("nan")}, "clean.margin_scale"),
        ({"margin_scale": -1.0}, "clean.margin_scale: .* above 0, got -1.0"),
    ],
)
def test_bad_settings_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        CleanConfig(**changes)
