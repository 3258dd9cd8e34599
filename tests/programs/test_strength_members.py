"""Folds of `strength`: no prompt is judged by members that saw it."""

import numpy as np
import pytest

from rlhf_jax.programs import strength, strength_members


def config(folds):
    return strength.StrengthConfig(run_dir="r", model="m", data="d", folds=folds)


def conversation(prompt, answer):
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("implicit", [False, True])
def test_pairs_of_one_prompt_share_their_fold_in_every_shape_of_rows(implicit):
    rows = []
    for n in range(12):
        prompt, texts = f"p{n % 4}", (f"a{n}", f"b{n}")
        if implicit:
            texts = tuple(conversation(prompt, text) for text in texts)
        row = {"chosen": texts[0], "rejected": texts[1]}
        rows.append(row if implicit else row | {"prompt": prompt})
    found = strength_members.folds(rows, config(folds=3)).reshape(3, 4)
    np.testing.assert_array_equal(found, found[:1].repeat(3, axis=0))
    assert set(found[0].tolist()) == {0, 1, 2}


def test_more_folds_than_prompts_are_refused():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 5
    with pytest.raises(ValueError, match="the pairs have 1 prompts; expected at least"):
        strength_members.folds(rows, config(folds=2))
