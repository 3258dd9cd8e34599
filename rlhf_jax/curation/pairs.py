"""Pairs from pairs and from completions: filters and augmentations on rows.

Every function takes and gives rows {"prompt", "chosen", "rejected", ...} and says what
became of those it leaves out.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
OFF_PROMPT = 4
"""RRM pairs each own completion with as many completions of other prompts."""


def consensus(
    rows: Sequence[Mapping[str, Any]], first: np.ndarray, second: np.ndarray
) -> tuple[list[Row], np.ndarray]:
    """(the pairs whose labels two independent sources confirm, which rows those are
    [Q]).

    Args:
        rows: pairs.
        first: [Q] gaps r_chosen - r_rejected, or +1 / -1 votes, of one source.
        second: [Q] of the other.

    A pair is kept where both signs agree; where both say that the label is wrong it is
    swapped. A tie agrees with nothing.

    Raises:
        ValueError: lengths differ, or a vote is nan.

    Source: Zhang et al. 2025, arXiv:2501.07301 (lessons on process reward models),
    which keeps a sample only if Monte Carlo estimate and judge agree.
    """
    signs = np.sign(np.asarray(first)), np.sign(np.asarray(second))
    _refuse_nan("consensus", first=signs[0], second=signs[1])
    if not len(rows) == len(signs[0]) == len(signs[1]):
        raise ValueError(
            f"consensus: {len(rows)} rows, {len(signs[0])} and {len(signs[1])} votes; "
            "expected one of each for every row"
        )
    kept = (signs[0] == signs[1]) & (signs[0] != 0)
    confirmed = [
        dict(rows[n]) if signs[0][n] > 0 else swapped(rows[n])
        for n in np.flatnonzero(kept).tolist()
    ]
    return confirmed, kept


def swapped(row: Mapping[str, Any]) -> Row:
    """The pair with chosen and rejected exchanged."""
    return dict(row) | {"chosen": row["rejected"], "rejected": row["chosen"]}


def new_over_old(
    prompts: Sequence[Any],
    new: Sequence[str],
    old: Sequence[str],
    new_rewards: np.ndarray,
    old_rewards: np.ndarray,
) -> tuple[list[Row], np.ndarray]:
    """(pairs that prefer the new policy's completion to the old one's, which prompts
    gave one [Q]).

    A pair is left out where the two texts are the same, or r_new - r_old <= -eps with
    eps the standard deviation of the old rewards: there the reward model is sure that
    the policy got worse.

    Args:
        prompts: [Q].
        new: completions of the new policy, [Q].
        old: of the one before, [Q].
        new_rewards: [Q] under the reward model that trained the new policy.
        old_rewards: [Q].

    Raises:
        ValueError: lengths differ, or a reward is nan.

    Source: arXiv:2506.06292 (Mutual-Taught), M-step.
    """
    new_rewards, old_rewards = np.asarray(new_rewards), np.asarray(old_rewards)
    sizes = {len(x) for x in (prompts, new, old, new_rewards, old_rewards)}
    if len(sizes) != 1:
        raise ValueError(
            f"new_over_old: expected one of everything for each prompt, got lengths "
            f"{sorted(sizes)}"
        )
    _refuse_nan("new_over_old", new_rewards=new_rewards, old_rewards=old_rewards)
    if not len(prompts):
        return [], np.zeros(0, bool)
    eps = float(old_rewards.std())  # one nan in it would leave out every pair
    differ = np.array([a != b for a, b in zip(new, old, strict=True)])
    kept = differ & (new_rewards - old_rewards > -eps)
    pairs = [
        {"prompt": prompts[n], "chosen": new[n], "rejected": old[n]}
        for n in np.flatnonzero(kept).tolist()
    ]
    return pairs, kept


def off_prompt(
    rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> tuple[list[Row], int]:
    """(RRM's augmentation, left out): the rows themselves, and pairs with completions
    of other prompts, which teach that an answer must be to its prompt.

    For each row two other rows j, k with other prompts are drawn. Their four
    completions are off-prompt for this one:

        8 pairs    each of its own two completions over each of the four
        6 pairs    the four among each other, neutral: soft_label 0.5

    New rows have the prompt and the tools of their row. Every row gets a `soft_label`
    column (1 for the originals and the eight) and `augmentation`: "none", "off-prompt"
    or "neutral". A pair of two equal texts is left
    out: prompts may share an answer.

    Args:
        rows: pairs, with at least three different prompts.
        seed: of the draws.

    Raises:
        ValueError: fewer than three prompts, or rows with a column that would be
            written.

    Source: Liu et al. 2024, arXiv:2409.13156 (RRM). Differs from the released code,
    which allows j = i.
    """
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    if len(set(keys)) < 3:
        raise ValueError(
            f"off_prompt: {len(set(keys))} different prompts; expected at least 3, to "
            "draw two others for each"
        )
    for name in ("soft_label", "augmentation"):
        if any(name in row for row in rows):
            raise ValueError(
                f"off_prompt: the rows have a column {name!r} already; rename it: it "
                "is not overwritten"
            )
    rng = np.random.default_rng(seed)
    made: list[Row] = []
    for index, row in enumerate(rows):
        others = _others(index, keys, rng)
        texts = [rows[n][side] for n in others for side in ("chosen", "rejected")]
        made.append(dict(row) | {"soft_label": 1.0, "augmentation": "none"})
        for own in ("chosen", "rejected"):
            for text in texts:
                made.append(_pair(row, row[own], text, 1.0, "off-prompt"))
        for a in range(OFF_PROMPT):
            for b in range(a + 1, OFF_PROMPT):
                made.append(_pair(row, texts[a], texts[b], 0.5, "neutral"))
    kept = [row for row in made if row["chosen"] != row["rejected"]]
    return kept, len(made) - len(kept)


def _refuse_nan(what: str, **values: np.ndarray) -> None:
    for name, array in values.items():
        if np.isnan(array).any():
            raise ValueError(
                f"{what}: {name} of row {np.isnan(array).argmax()} is nan; expected a "
                "number"
            )


def _others(index: int, keys: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Two rows with prompts that differ from this one's and from each other's."""
    found: list[int] = []
    while len(found) < 2:
        n = int(rng.integers(len(keys)))
        if keys[n] not in {keys[index], *(keys[m] for m in found)}:
            found.append(n)
    return found


def _pair(
    row: Mapping[str, Any], chosen: Any, rejected: Any, soft_label: float, kind: str
) -> Row:
    own = {name: row[name] for name in ("prompt", "tools") if name in row}
    return own | {
        "chosen": chosen,
        "rejected": rejected,
        "soft_label": soft_label,
        "augmentation": kind,
    }
