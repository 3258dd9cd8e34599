"""Contrast Instructions: does a reward follow the instruction when two look alike?

An example has two similar instructions I ("query") and I' ("retrieval") with their
preferred responses r and r'. A consistent reward model has
    response consistency     R(I, r) > R(I, r'):  the response that fits I wins,
    instruction consistency  R(I, r) > R(I', r):  the instruction that r fits wins.
The second compares rewards of two prompts, which Bradley-Terry alone leaves free: an
offset that a prompt's rewards share shows here and not in pair accuracy.
Source: Shen et al. 2023, arXiv:2309.16155, section 2, and published code, which takes
the query's side alone; the retrieval's side, I and I' exchanged, is given beside it. A
tie is inconsistent there, and so here; ties are reported.
Differs from the published code: examples whose two responses (or instructions) are the
same text have no answer and are left out, counted; it does so for translation alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evals.accuracy import wilson_interval

SIDES = ("query", "retrieval")
"""The published side first."""
REWARD_COLUMNS = (
    "query_own_reward",
    "query_other_reward",
    "retrieval_own_reward",
    "retrieval_other_reward",
)
"""R(I, r), R(I, r'), R(I', r'), R(I', r): the order of an example's rewards."""


class ContrastItem(NamedTuple):
    """Two similar instructions, each with its preferred response."""

    query: str
    retrieval: str
    query_response: str
    retrieval_response: str

    def texts(self) -> tuple[str, str, str, str]:
        """Responses in the order of REWARD_COLUMNS: two of the query, two of the
        retrieval."""
        own, other = self.query_response, self.retrieval_response
        return own, other, other, own


def contrast_item(
    row: Mapping[str, Any], where: str, *, prefix: str = ""
) -> ContrastItem:
    """An example from a row of the published files.

    Args:
        row: query, retrieval, query_response_k, retrieval_response_k; the dispreferred
            responses *_response_j take no part.
        where: file and line.
        prefix: put before both instructions: the files hold only their inputs.

    Raises:
        ValueError: naming `where`, the field, and what was found.
    """
    fields = ("query", "retrieval", "query_response_k", "retrieval_response_k")
    for name in fields:
        value = row.get(name)
        if not isinstance(value, str) or not value:
            found = "an empty one" if value == "" else type(value).__name__
            raise ValueError(f"{where}: {name}: expected a text, got {found}")
    taken = [name for name in REWARD_COLUMNS if name in row]
    if taken:
        raise ValueError(
            f"{where}: the row has a column {taken[0]!r} already; rename it: it is not "
            "overwritten"
        )
    query, retrieval, own, other = (row[name] for name in fields)
    return ContrastItem(prefix + query, prefix + retrieval, own, other)


def contrast_table(
    rewards: np.ndarray, items: Sequence[ContrastItem]
) -> dict[str, Any]:
    """Both consistencies from both sides, each with its Wilson 95 % interval.

    Args:
        rewards: [n 4], in the order of REWARD_COLUMNS.
        items: the n examples.

    Returns:
        {"n", "query": {"response": figures, "instruction": figures}, "retrieval":
        ...}; figures are n, value, low, high, ties, identical (examples left out).
        "query" is what was published.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape != (len(items), len(REWARD_COLUMNS)) or not len(items):
        raise ValueError(
            f"rewards {rewards.shape}: expected ({len(items)}, {len(REWARD_COLUMNS)}), "
            "one row an example and at least one example"
        )
    if not np.isfinite(rewards).all():
        raise ValueError("Contrast Instructions: a reward is not finite")
    same_response = np.array([i.query_response == i.retrieval_response for i in items])
    same_instruction = np.array([i.query == i.retrieval for i in items])
    table: dict[str, Any] = {"n": len(items)}
    for side, start in zip(SIDES, (0, 2), strict=True):
        own, other = rewards[:, start], rewards[:, start + 1]
        # The same response under the other instruction is that side's second one.
        elsewhere = rewards[:, 3 - start]
        table[side] = {
            "response": _figures(own, other, same_response),
            "instruction": _figures(own, elsewhere, same_instruction),
        }
    return table


def _figures(own: np.ndarray, other: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    own, other = own[~same], other[~same]
    n, right = len(own), int(np.sum(own > other))
    low, high = wilson_interval(right, n)
    return {
        "n": n,
        "value": right / n if n else float("nan"),
        "low": low,
        "high": high,
        "ties": int(np.sum(own == other)),
        "identical": int(same.sum()),
    }
