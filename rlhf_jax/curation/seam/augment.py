"""Training rows made of prompts that policy and reward model do not share.

A prompt of low SEAM gives the policy its gold completion (an SFT row) and the reward
model pairs that prefer the gold completion to those it misjudged. The control gives
random prompts, and random worse completions, misjudged or any, in the same numbers.

Source: arXiv:2406.07971 (SEAM), section on augmentation; the construction of the rows
is a reconstruction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Line = Mapping[str, Any]
Row = dict[str, Any]

_CONTROL = 1
"""Stream of the control: `scores.lowest` draws among equal scores with the seed
itself."""


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
    lines: Sequence[Line],
    indices: Sequence[int],
    *,
    pairs: int,
    seed: int,
    misjudged: bool = False,
) -> tuple[list[Row], list[Row]]:
    """As many SFT rows and pairs as `augment` makes of `indices`, of random prompts
    against random worse completions of theirs.

    Against any completion the control differs from `augment` in prompts and in pairs;
    against misjudged ones in prompts, and in which of the misjudged are taken.

    Args:
        lines: see `augment`.
        indices: see `augment`.
        pairs: see `augment`.
        seed: of the draw.
        misjudged: whether only misjudged completions are drawn.
    """
    rng = np.random.default_rng([seed, _CONTROL])
    wanted = [len(augment(lines, [n], pairs=pairs)[1]) for n in indices]
    if misjudged:
        # Many prompts have few or none: what is owed late might find none left.
        wanted.sort(reverse=True)
    order = rng.permutation(len(lines))
    sft = [_sft(lines[n]) for n in order[: len(indices)]]
    # The i-th random prompt has as many pairs as the i-th chosen one: as many prompts
    # share as many pairs. What a prompt cannot give the next ones do.
    preferences: list[Row] = []
    for place, n in enumerate(order):
        owed = sum(wanted[: place + 1]) - len(preferences)
        worse = [e for e in lines[n]["worse"] if e["misjudged"] or not misjudged]
        drawn = rng.permutation(len(worse))[: min(owed, pairs)]
        preferences += [_pair(lines[n], worse[k]) for k in drawn]
    return sft, preferences


def _sft(line: Line) -> Row:
    return {"prompt": line["prompt"], "completion": line["gold"], **_tools(line)}


def _pair(line: Line, worse: Mapping[str, Any]) -> Row:
    return {
        "prompt": line["prompt"],
        "chosen": line["gold"],
        "rejected": worse["text"],
        "source": worse["source"],
        **_tools(line),
    }


def _tools(line: Line) -> Row:
    return {"tools": line["tools"]} if line.get("tools") else {}
