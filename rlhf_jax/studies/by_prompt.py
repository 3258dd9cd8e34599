"""Reward models judged prompt by prompt, on prompts with several scored completions.

Numbers of a prompt are means over models that differ in their seed alone; intervals and
paired t tests are over the prompts, which are what a result must generalise to.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from rlhf_jax.data.rows import Response
from rlhf_jax.evals.length import length_matched, num_words
from rlhf_jax.evals.ranking import gold_pairs, kendall_tau
from rlhf_jax.studies.statistics import interval, paired

METRICS = {
    "accuracy": "accuracy on the pairs inside the rows",
    "kendall_tau": "Kendall's tau",
    "length_matched_accuracy": "accuracy on pairs of about equal length",
    "reward_mean": "mean reward",
}


def judge(
    rewards: Sequence[np.ndarray], responses: Sequence[Sequence[Response]]
) -> dict[str, list[float | None]]:
    """Every metric, a number a prompt: the mean over the models; None where a prompt
    has no pair to judge by.

    Args:
        rewards: [K S] of each prompt: K completions under S models.
        responses: the completions of each prompt, with their gold scores.
    """
    found: dict[str, list[float | None]] = {metric: [] for metric in METRICS}
    for columns, texts in zip(rewards, responses, strict=True):
        gold = np.array([response.score for response in texts])
        words = np.array([num_words(response.text) for response in texts])
        better, worse = np.array(gold_pairs(gold), int).reshape(-1, 2).T
        gaps = columns[better] - columns[worse]
        right = ((gaps > 0) + 0.5 * (gaps == 0)).mean(axis=1)
        matched = length_matched(words[better], words[worse])
        taus = [kendall_tau(column, gold) for column in columns.T]
        values = {
            "accuracy": right.mean() if len(right) else None,
            "kendall_tau": np.nan_to_num(taus).mean() if len(right) else None,
            "length_matched_accuracy": right[matched].mean() if matched.any() else None,
            "reward_mean": columns.mean(),
        }
        for metric, value in values.items():
            found[metric].append(None if value is None else float(value))
    return found


def table(found: Mapping[str, Mapping[str, Any]], metric: str) -> Table:
    """One row an objective, one column a set: the mean over prompts with its 95 %
    interval, and below it the difference from BT, paired by prompt."""
    shown = Table(title=METRICS[metric], show_lines=True)
    shown.add_column("objective")
    for name, judged in found["BT"].items():
        count = sum(value is not None for value in judged[metric])
        shown.add_column(f"{name}\n{count} prompts", justify="right")
    for objective, sets in found.items():
        cells = []
        for name, judged in sets.items():
            values = [v for v in judged[metric] if v is not None]
            base = [v for v in found["BT"][name][metric] if v is not None]
            against = "" if objective == "BT" else f"\n{paired(values, base)}"
            cells.append(f"{interval(values).plain()}{against}" if values else "-")
        shown.add_row(objective, *cells)
    return shown
