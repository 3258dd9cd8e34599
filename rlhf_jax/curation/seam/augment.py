"""Training rows made of prompts that policy and reward model do not share.

A prompt of low SEAM gives the policy its gold completion (an SFT row) and the reward
model pairs that prefer the gold completion to those it misjudged. The control gives
random prompts, and random worse completions, in the same numbers.

Source: arXiv:2406.07971 (SEAM), section on augmentation; the construction of the rows
is a reconstruction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Line = Mapping[str, Any]
Row = dict[str, Any]


def augment(
    lines: Sequence[Line], indices: Sequence[int], *, pairs: int
) -> tuple[list[Row], list[Row]]:
    """(SFT rows, pairs) of some prompts.

    Args:
        lines: of a seam.jsonl, one estimator.
        indices: of the lines that are used.
        pairs: most pairs of a prompt: against the misjudged completions that the policy
            is most likely to write.
    """
    sft, preferences = [], []
    for index in indices:
        line = lines[index]
        sft.append(_sft(line))
        bad = [each for each in line["worse"] if each["misjudged"]]
        bad.sort(key=lambda each: -each["logprob"] / each["num_tokens"])
        preferences += [_pair(line, each) for each in bad[:pairs]]
    return sft, preferences


def random_control(
    lines: Sequence[Line], indices: Sequence[int], *, pairs: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """As many SFT rows and pairs as `augment` makes of `indices`, of random prompts
    against random worse completions of theirs.

    Args:
        lines: see `augment`.
        indices: see `augment`.
        pairs: see `augment`.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    _, wanted = augment(lines, indices, pairs=pairs)
    order = rng.permutation(len(lines))
    sft = [_sft(lines[n]) for n in order[: len(indices)]]
    each_prompt = [
        [
            _pair(lines[n], lines[n]["worse"][k])
            for k in rng.permutation(len(lines[n]["worse"]))
        ]
        for n in order
    ]
    # First of the very prompts of the SFT rows, then, if they do not do, of others.
    preferences: list[Row] = []
    for made in each_prompt:
        preferences += made[: min(pairs, len(wanted) - len(preferences))]
    return sft, preferences


def _sft(line: Line) -> Row:
    return {"prompt": line["prompt"], "completion": line["gold"]}


def _pair(line: Line, worse: Mapping[str, Any]) -> Row:
    return {
        "prompt": line["prompt"],
        "chosen": line["gold"],
        "rejected": worse["text"],
        "source": worse["source"],
    }
