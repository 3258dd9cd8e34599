"""The final number of a completion is found in every form it comes in."""

import gzip
import json

import pytest

from rlhf_jax.evals.verifiable import exact_number, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 + 24 = 72", 72),
        ("The answer is 72. I used 3 steps.", 72),
        ("Answer: $1,234.50", 1234.5),
        (r"so \boxed{-7} as 1 + 1 = 2", -7),
        ("#### 18", 18),
        ("first answer: 3, no, the answer is 4", 4),
        ("0.50", 0.5),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_form_of_the_number_does_not_matter():
    assert exact_number("It costs $1,000.00", "1000") == 1.0
    assert exact_number("It costs $1,000.01", "1000") == 0.0


def test_an_answer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="expected a number"):
        exact_number("3", "three")


def test_gsm8k_solutions_earn_the_reward(test_data):
    with gzip.open(test_data / "data" / "gsm8k.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:2000]
    right = [
        exact_number(
            f"{row['solution']}\nThe answer is {row['answer']}.", row["answer"]
        )
        for row in rows
    ]
    assert all(right)
    wrong = [
        exact_number(
            f"{row['solution']}\nThe answer is {row['answer']}9.", row["answer"]
        )
        for row in rows
    ]
    assert not any(wrong)
