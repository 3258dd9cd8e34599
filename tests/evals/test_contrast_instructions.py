"""Contrast Instructions: hand-worked numbers, ties, identical texts, the files."""

import json

import numpy as np
import pytest

from rlhf_jax.evals import contrast_instructions as contrast
from rlhf_jax.evals.accuracy import wilson_interval

ROW = {
    "query": "Say cat.",
    "retrieval": "Say dog.",
    "query_response_k": "cat",
    "query_response_j": "a cat perhaps",
    "retrieval_response_k": "dog",
    "retrieval_response_j": "a dog perhaps",
}
ITEM = contrast.ContrastItem("Say cat.", "Say dog.", "cat", "dog")


def test_an_item_has_the_preferred_responses_alone():
    assert contrast.contrast_item(ROW, "f:1") == ITEM
    assert ITEM.texts() == ("cat", "dog", "dog", "cat")


def test_a_prefix_stands_before_both_instructions():
    item = contrast.contrast_item(ROW, "f:1", prefix="Do: ")
    assert (item.query, item.retrieval) == ("Do: Say cat.", "Do: Say dog.")
    assert item.texts() == ITEM.texts()


def test_hand_worked_consistencies():
    # R(I, r), R(I, r'), R(I', r'), R(I', r)
    rewards = [
        [3.0, 1.0, 2.0, 0.0],  # consistent throughout
        [3.0, 1.0, 9.0, 7.0],  # the retrieval's prompt has an offset of 6
        [1.0, 1.0, 2.0, 0.0],  # its two responses tie under the query
    ]
    table = contrast.contrast_table(np.array(rewards), [ITEM] * 3)
    query, retrieval = table["query"], table["retrieval"]
    assert query["response"]["value"] == pytest.approx(2 / 3)
    assert query["response"]["ties"] == 1
    assert query["instruction"]["value"] == pytest.approx(2 / 3)
    assert retrieval["response"]["value"] == 1.0
    assert retrieval["instruction"]["value"] == 1.0
    low, high = wilson_interval(2, 3)
    assert (query["response"]["low"], query["response"]["high"]) == (low, high)


def test_the_table_equals_a_slow_loop_over_a_reward_function():
    rng = np.random.default_rng(0)
    items = [
        contrast.ContrastItem(f"i{n}", f"j{n}", f"r{n}", f"s{n}") for n in range(40)
    ]
    scores = {
        (prompt, text): float(rng.integers(0, 4))
        for item in items
        for prompt in (item.query, item.retrieval)
        for text in item.texts()
    }
    rewards = [
        [scores[prompt, text] for prompt, text in zip(prompts, i.texts(), strict=True)]
        for i in items
        for prompts in [(i.query, i.query, i.retrieval, i.retrieval)]
    ]
    table = contrast.contrast_table(np.array(rewards), items)
    for side, flip in (("query", False), ("retrieval", True)):
        right = {"response": 0, "instruction": 0}
        for a, b, r, s in items:
            if flip:
                a, b, r, s = b, a, s, r
            right["response"] += scores[a, r] > scores[a, s]
            right["instruction"] += scores[a, r] > scores[b, r]
        for kind, count in right.items():
            assert table[side][kind]["value"] == pytest.approx(count / 40)


def test_examples_without_an_answer_are_left_out_and_counted():
    same = ITEM._replace(retrieval_response="cat")
    one = ITEM._replace(retrieval="Say cat.")
    rewards = np.array([[1.0, 0.0, 1.0, 0.0]] * 3)
    query = contrast.contrast_table(rewards, [ITEM, same, one])["query"]
    assert (query["response"]["n"], query["response"]["identical"]) == (2, 1)
    assert (query["instruction"]["n"], query["instruction"]["identical"]) == (2, 1)
    none = contrast.contrast_table(rewards[:1], [same])["query"]["response"]
    assert none["n"] == 0
    assert np.isnan(none["value"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": None}, "f:1: query: expected a text, got NoneType"),
        ({"retrieval_response_k": ""}, "retrieval_response_k: .* got an empty one"),
        ({"query_own_reward": 1.0}, "column 'query_own_reward' already"),
    ],
)
def test_bad_rows_name_file_line_and_field(change, match):
    with pytest.raises(ValueError, match=match):
        contrast.contrast_item(ROW | change, "f:1")


def test_rewards_of_a_wrong_shape_or_not_finite_are_errors():
    with pytest.raises(ValueError, match=r"expected \(1, 4\)"):
        contrast.contrast_table(np.zeros((1, 2)), [ITEM])
    with pytest.raises(ValueError, match="not finite"):
        contrast.contrast_table(np.full((1, 4), np.nan), [ITEM])


@pytest.mark.parametrize(
    ("name", "count", "identical"), [("para", 289, 0), ("sum", 36, 16)]
)
def test_the_published_files_are_read_whole(test_data, name, count, identical):
    path = test_data / "data" / f"contrast_instructions_{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = json.loads(path.read_text())
    items = [contrast.contrast_item(row, f"{path}:{n}") for n, row in enumerate(rows)]
    assert len(items) == count
    # A reward that knows which response belongs to which instruction.
    rewards = np.array([[1.0, 0.0, 1.0, 0.0]] * count)
    table = contrast.contrast_table(rewards, items)
    for side in contrast.SIDES:
        for figures in table[side].values():
            assert figures["value"] == 1.0
            assert figures["identical"] == identical
            assert figures["n"] == count - identical
