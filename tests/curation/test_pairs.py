"""Pairs made from pairs: agreement of two sources, new over old policy, off-prompt."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rlhf_jax.curation import pairs


def rows(count=6, per_prompt=1):
    """Rows whose texts say which prompt they belong to."""
    return [
        {"prompt": f"p{n // per_prompt}", "chosen": f"c{n}", "rejected": f"r{n}"}
        for n in range(count)
    ]


def test_swapping_twice_changes_nothing_and_the_given_row_never():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": 3}
    once = pairs.swapped(row)
    assert once == {"prompt": "p", "chosen": "b", "rejected": "a", "id": 3}
    assert pairs.swapped(once) == row
    assert row["chosen"] == "a"


def test_consensus_keeps_swaps_and_counts_the_rest():
    first = np.array([2.0, -1.0, 0.5, 0.0, 0.0, -3.0])
    second = np.array([0.1, -1.0, -0.5, 1.0, 0.0, 1.0])
    given = rows(6)
    confirmed, kept = pairs.consensus(given, first, second)
    assert confirmed == [given[0], pairs.swapped(given[1])]
    assert kept.tolist() == [True, True, False, False, False, False]


def test_consensus_of_a_source_with_itself_leaves_out_ties_alone():
    gaps = np.random.default_rng(0).integers(-2, 3, 30)
    confirmed, kept = pairs.consensus(rows(30), gaps, gaps)
    assert (kept == (gaps != 0)).all()
    flipped = sum(row["chosen"].startswith("r") for row in confirmed)
    assert flipped == (gaps < 0).sum()


def test_consensus_does_not_depend_on_the_order_of_the_sources():
    first, second = np.random.default_rng(1).integers(-1, 2, (2, 30))
    one = pairs.consensus(rows(30), first, second)
    other = pairs.consensus(rows(30), second, first)
    assert other[0] == one[0] and (other[1] == one[1]).all()


def test_consensus_refuses_other_lengths_and_nan():
    with pytest.raises(ValueError, match="consensus: 3 rows, 3 and 2 votes"):
        pairs.consensus(rows(3), np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="consensus: second of row 1 is nan"):
        pairs.consensus(rows(3), np.ones(3), np.array([1, np.nan, 1]))


def test_new_over_old_leaves_out_what_got_worse_by_a_standard_deviation():
    old_rewards = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # eps = 1
    change = np.array([0.5, -0.5, -1.0, -0.999, -2.0, 3.0])
    made, kept = pairs.new_over_old(
        [f"p{n}" for n in range(6)],
        [f"new{n}" for n in range(5)] + ["same"],
        [f"old{n}" for n in range(5)] + ["same"],
        old_rewards + change,
        old_rewards,
    )
    assert [row["prompt"] for row in made] == ["p0", "p1", "p3"]
    assert made[0] == {"prompt": "p0", "chosen": "new0", "rejected": "old0"}
    assert kept.tolist() == [True, True, False, True, False, False]


def test_new_over_old_follows_the_scale_of_the_rewards():
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(2, 50))
    texts = [f"x{n}" for n in range(50)], [f"y{n}" for n in range(50)]
    one = pairs.new_over_old(range(50), *texts, new, old)
    other = pairs.new_over_old(range(50), *texts, 10 * new + 3, 10 * old + 3)
    assert one[0] == other[0]
    assert 0 < one[1].sum() == len(one[0]) < 50


def test_new_over_old_refuses_other_lengths_and_nan():
    with pytest.raises(ValueError, match=r"new_over_old: .* got lengths \[1, 2\]"):
        pairs.new_over_old(["p"], ["a"], ["b"], np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match="new_over_old: old_rewards of row 0 is nan"):
        pairs.new_over_old(["p"], ["a"], ["b"], np.ones(1), np.array([np.nan]))


def test_new_over_old_of_nothing_is_nothing():
    none = np.zeros(0)
    made, kept = pairs.new_over_old([], [], [], none, none)
    assert made == [] and len(kept) == 0


def test_off_prompt_makes_one_row_eight_pairs_and_six_neutral_ones():
    given = rows(6)
    made, left_out = pairs.off_prompt(given)
    assert len(made) == 6 * (1 + 8 + 6)
    assert left_out == 0
    for prompt in (row["prompt"] for row in given):
        mine = [row for row in made if row["prompt"] == prompt]
        kinds = Counter((row["augmentation"], row["soft_label"]) for row in mine)
        assert kinds == {("none", 1.0): 1, ("off-prompt", 1.0): 8, ("neutral", 0.5): 6}


def test_off_prompt_completions_are_of_two_other_prompts_and_never_its_own():
    given = rows(8, per_prompt=2)
    home = {
        row[side]: row["prompt"] for row in given for side in ("chosen", "rejected")
    }
    made, _ = pairs.off_prompt(given, seed=3)
    for start in range(0, len(made), 15):
        block = made[start : start + 15]
        own, foreign = block[0], [row for row in block if row["augmentation"] != "none"]
        outside = set()
        for row in foreign:
            assert home[row["rejected"]] != row["prompt"]
            outside.add(row["rejected"])
            if row["augmentation"] == "off-prompt":
                assert row["chosen"] in (own["chosen"], own["rejected"])
            else:
                assert home[row["chosen"]] != row["prompt"]
                outside.add(row["chosen"])
        assert len(outside) == 4
        assert len({home[text] for text in outside}) == 2
        neutral = {
            frozenset((row["chosen"], row["rejected"]))
            for row in foreign
            if row["augmentation"] == "neutral"
        }
        assert neutral == {frozenset(p) for p in itertools.combinations(outside, 2)}


def test_off_prompt_keeps_the_rows_in_order_with_their_columns():
    given = [row | {"source": n} for n, row in enumerate(rows(5))]
    made, _ = pairs.off_prompt(given)
    originals = [row for row in made if row["augmentation"] == "none"]
    added = {"soft_label": 1.0, "augmentation": "none"}
    assert originals == [row | added for row in given]


def test_off_prompt_is_drawn_by_its_seed():
    assert pairs.off_prompt(rows(), seed=1) == pairs.off_prompt(rows(), seed=1)
    assert pairs.off_prompt(rows(), seed=1) != pairs.off_prompt(rows(), seed=2)


def test_off_prompt_leaves_out_and_counts_pairs_of_equal_texts():
    given = [{**row, "rejected": "I do not know."} for row in rows(3)]
    made, left_out = pairs.off_prompt(given)
    assert all(row["chosen"] != row["rejected"] for row in made)
    # For each row: its own rejected over two equal ones, and those two against
    # each other.
    assert left_out == 3 * 3
    assert len(made) == 3 * 15 - left_out


def test_prompts_as_messages_are_told_apart_by_their_content():
    given = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        for row in rows(6, per_prompt=2)
    ]
    made, _ = pairs.off_prompt(given)
    assert len(made) == 6 * 15
    with pytest.raises(ValueError, match="2 different prompts; expected at least 3"):
        pairs.off_prompt(given[:4])


@pytest.mark.parametrize("name", ["soft_label", "augmentation"])
def test_off_prompt_overwrites_no_column(name):
    with pytest.raises(ValueError, match=f"column '{name}' already; rename it"):
        pairs.off_prompt([*rows(4), {**rows(1)[0], name: 1.0}])
