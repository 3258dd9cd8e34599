"""The flat dict of a split: hand-worked numbers, lengths, and what is left out."""

import json
import types

import numpy as np
import pytest

from rlhf_jax.evals import accuracy, length, suite

ROWS = [
    {"prompt": "p", "chosen": "a b c d", "rejected": "a b c d"},
    {"prompt": "p", "chosen": "a b c d e f", "rejected": "a"},
    {"prompt": "q", "chosen": "a", "rejected": "a b c"},
    {"prompt": "r", "chosen": "a b c d e", "rejected": "a b c d"},
]


def test_hand_worked_split():
    found, interval = suite.pair_figures(
        np.array([2.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0]), ROWS
    )
    assert found["n"] == 4
    assert found["n_prompts"] == 3
    assert found["accuracy"] == pytest.approx(0.625)
    assert found["ties"] == 1
    assert found["margin"] == pytest.approx(0.25)
    assert found["longer_is_chosen"] == pytest.approx(0.625)
    # 4/4 and 5/4 words are matched, 6/1 and 1/3 are not.
    assert found["length_matched_n"] == 2
    assert found["length_matched_accuracy"] == pytest.approx(1.0)
    assert interval == "95 % bootstrap over prompts"


def test_all_values_are_numbers_json_can_hold():
    found = suite.evaluate_pairs(np.arange(4.0), np.arange(4.0)[::-1], ROWS)
    assert all(isinstance(v, int | float) for v in found.values())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_rows_there_are_no_length_figures_and_wilson_is_used():
    found, interval = suite.pair_figures(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert not any("length" in key for key in found)
    assert interval == "Wilson 95 %"


@pytest.mark.parametrize("chosen", [0.0, 1.0, -1.0])
def test_the_interval_is_named_by_the_method_that_made_it(chosen):
    found, interval = suite.pair_figures(np.full(4, chosen), np.zeros(4), ROWS)
    low, high = accuracy.wilson_interval(3 * found["accuracy"], 3)
    assert (found["accuracy_low"], found["accuracy_high"]) == (low, high)
    assert interval == "Wilson 95 % on the number of prompts"


def test_no_pair_at_all_gives_n_zero():
    assert suite.evaluate_pairs(np.zeros(0), np.zeros(0), []) == {"n": 0}


def test_messages_and_objects_are_read_like_texts():
    row = types.SimpleNamespace(
        prompt=[{"role": "user", "content": "hi"}],
        chosen=[{"role": "assistant", "content": "one two"}],
        rejected="one",
    )
    found = suite.evaluate_pairs(np.array([1.0]), np.array([0.0]), [row])
    assert found["longer_is_chosen"] == 1.0


def test_a_constant_reward_leaves_its_correlation_out():
    found = suite.evaluate_pairs(np.zeros(4), np.zeros(4), ROWS)
    assert "reward_length_correlation" not in found
    assert found["accuracy"] == 0.5


def test_reward_equal_to_length_correlates_fully():
    chosen = np.array([4.0, 6.0, 1.0, 5.0])
    rejected = np.array([4.0, 1.0, 3.0, 4.0])
    found = suite.evaluate_pairs(chosen, rejected, ROWS)
    assert found["reward_length_correlation"] == pytest.approx(1.0)
    assert found["margin_length_correlation"] == pytest.approx(1.0)
    assert found["accuracy"] == found["longer_is_chosen"]


def test_order_of_pairs_does_not_change_a_number_without_resampling():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=4), rng.normal(size=4)
    order = rng.permutation(4)
    first = suite.evaluate_pairs(chosen, rejected, ROWS)
    second = suite.evaluate_pairs(
        chosen[order], rejected[order], [ROWS[i] for i in order]
    )
    for key, value in first.items():
        if not key.endswith(("_low", "_high")):
            assert second[key] == pytest.approx(value), key


def test_matched_lengths_include_both_ends_of_the_ratio():
    matched = length.length_matched(
        np.array([4, 5, 3, 0, 0]), np.array([5, 4, 4, 0, 1])
    )
    assert matched.tolist() == [True, True, False, True, False]


def test_kwise_reports_the_length_baseline():
    rows = [
        {"responses": [{"text": "a", "score": 1}, {"text": "a b", "score": 2}]},
        {"responses": [{"text": "a b", "score": 1}, {"text": "a", "score": 2}]},
    ]
    found = suite.evaluate_kwise([np.array([0.0, 1.0]), np.array([0.0, 1.0])], rows)
    assert found["kendall_tau"] == 1.0
    assert found["kendall_tau_of_length"] == 0.0


def test_kwise_calibration_and_margins_are_those_of_the_pairs_gold_orders():
    rewards = [np.array([3.0, 1.0, -1.0]), np.array([0.5, 2.0])]
    scores = [(2, 1, 1), (1, 0)]
    rows = [
        {"prompt": p, "responses": [{"text": "a", "score": s} for s in of]}
        for p, of in zip("pq", scores)
    ]
    found = suite.evaluate_kwise(rewards, rows, samples=20)
    # Gold orders 0 above 1 and above 2 in the first row, 0 above 1 in the second.
    pairs = suite.evaluate_pairs(np.array([3.0, 3.0, 0.5]), np.array([1.0, -1.0, 2.0]))
    for key in ("margin", "margin_std", "loss", "brier", "ece"):
        assert found[key] == pytest.approx(pairs[key], rel=1e-12), key
    assert found["n_pairs"] == 3
    assert (found["reward_min"], found["reward_max"]) == (-1.0, 3.0)


def test_kwise_rows_that_gold_does_not_order_have_rewards_but_no_margin():
    row = {"prompt": "p", "responses": [{"text": "a", "score": 1}] * 2}
    found = suite.evaluate_kwise([np.array([0.0, 2.0])], [row], samples=20)
    assert found["reward_max"] == 2.0
    assert not {"margin", "loss", "ece"} & set(found)


def test_a_row_count_that_differs_is_an_error():
    with pytest.raises(ValueError, match="4 rows for 2 pairs"):
        suite.evaluate_pairs(np.zeros(2), np.zeros(2), ROWS)


def test_kwise_length_matched_accuracy_counts_the_pairs_inside_rows():
    texts = ["one two three", "one two four", "one two three four five six seven"]
    row = {
        "prompt": "p",
        "responses": [
            {"text": text, "score": score} for text, score in zip(texts, (1, 2, 3))
        ],
    }
    # Only the first two are about equally long; the second is the better one.
    right = suite.evaluate_kwise([np.array([0.0, 1.0, -5.0])], [row], samples=20)
    assert right["length_matched_n"] == 1
    assert right["length_matched_accuracy"] == 1
    wrong = suite.evaluate_kwise([np.array([1.0, 0.0, 9.0])], [row], samples=20)
    assert wrong["length_matched_accuracy"] == 0
