"""`rlhf-jax study heads`: BT, hinge, norm, DR, BSR and their controls as heads on the
states of one frozen model, judged on prompts with several scored completions.

What training the whole model does to the states is not seen here (`study scenarios`
does that, small); what the objective does to the head is, on any model's states in
seconds. By default the testbed's policy and scenarios; --model, --data and --eval_data
take real ones.

Numbers are means over the heads' seeds; intervals and paired t tests are over the
prompts, which are what a result must generalise to.

Source: Hong et al. 2025, arXiv:2505.07271, table 5.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax.evals.length import length_matched, num_words
from rlhf_jax.evals.ranking import gold_pairs, kendall_tau
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.studies.frozen import (
    FrozenConfig,
    KwiseStates,
    head_objective,
    open_frozen,
    open_policy,
    train_heads,
)
from rlhf_jax.studies.quickstart import SCENARIOS
from rlhf_jax.studies.scenarios import TERMS
from rlhf_jax.studies.seeds import study_dir
from rlhf_jax.studies.statistics import interval, paired

METRICS = {
    "accuracy": "accuracy on the pairs inside the rows",
    "kendall_tau": "Kendall's tau",
    "length_matched_accuracy": "accuracy on pairs of about equal length",
    "reward_mean": "mean reward",
}


@dataclasses.dataclass(frozen=True)
class HeadsConfig(FrozenConfig):
    """Objectives side by side, as heads of a frozen model."""

    run_dir: str = "runs/heads"
    """Directory of the study."""
    data: str | None = None
    """Training pairs, SPEC; null = testbed pairs of which a tenth is flipped."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Rows of scored completions as NAME=SPEC; none = the testbed's scenarios."""
    seeds: int = 8
    """Heads of each objective: each has its own start, order and four fifths of the
    pairs."""

    def __post_init__(self) -> None:
        given = [self.model is not None, self.data is not None, bool(self.eval_data)]
        if any(given) and not all(given):
            raise ValueError(
                "model, data, eval_data: expected all three, or none for the testbed"
            )
        configs.parse_named(self.eval_data, "eval_data")


def run(config: HeadsConfig) -> dict[str, Any]:
    """Computes states that are not there, trains the heads, writes study.json, prints
    the tables."""
    data = config.data or "testbed:train?size=4000&flip_rate=0.1"
    judges = configs.parse_named(config.eval_data, "eval_data") or {
        name: f"testbed:quads_{name}?size=400" for name in SCENARIOS
    }
    with study_dir(config) as root:
        policy = config.model or open_policy(root, config.sft_steps)
        model = open_frozen(policy, config.states_dir or root / "states", config.rows)
        pairs = model.pairs(data)
        sets = {name: model.kwise(spec) for name, spec in judges.items()}
        found = {}
        for name, terms in TERMS.items():
            kernels = train_heads(
                head_objective(**terms),
                pairs,
                seeds=config.seeds,
                steps=config.steps,
                optimizer=config.optimizer,
            )
            found[name] = {key: _judge(kernels, judged) for key, judged in sets.items()}
        result = {
            "schema": 1,
            "pairs": len(pairs.chosen),
            "prompts": {name: len(each.rows) for name, each in sets.items()},
            "heads": found,
        }
        write_atomic(root / "study.json", json.dumps(result, indent=1))
    console = Console(width=130)
    for metric, meaning in METRICS.items():
        console.print(_table(found, metric, meaning))
    return result


def _judge(kernels: np.ndarray, judged: KwiseStates) -> dict[str, list[float | None]]:
    """Every metric, a number a prompt: the mean over the heads; None where a prompt has
    no pair to judge by."""
    found: dict[str, list[float | None]] = {metric: [] for metric in METRICS}
    for states, row in zip(judged.states, judged.rows, strict=True):
        rewards = states @ kernels.T  # [K S]
        gold = np.array([response.score for response in row.responses])
        words = np.array([num_words(response.text) for response in row.responses])
        better, worse = np.array(gold_pairs(gold), int).reshape(-1, 2).T
        gaps = rewards[better] - rewards[worse]
        right = ((gaps > 0) + 0.5 * (gaps == 0)).mean(axis=1)
        matched = length_matched(words[better], words[worse])
        taus = [kendall_tau(column, gold) for column in rewards.T]
        values = {
            "accuracy": right.mean() if len(right) else None,
            "kendall_tau": np.nan_to_num(taus).mean() if len(right) else None,
            "length_matched_accuracy": right[matched].mean() if matched.any() else None,
            "reward_mean": rewards.mean(),
        }
        for metric, value in values.items():
            found[metric].append(None if value is None else float(value))
    return found


def _table(found: dict[str, dict[str, Any]], metric: str, title: str) -> Table:
    """One row an objective, one column a set: the mean over prompts with its 95 %
    interval, and below it the difference from BT, paired by prompt."""
    shown = Table(title=title, show_lines=True)
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
