"""`rlhf-jax study heads`: BT, hinge, norm, DR, BSR and their controls as heads on the
states of one frozen model, judged on prompts with several scored completions.

What training the whole model does to the states is not seen here (`study scenarios`
does that, small); what the objective does to the head is, on any model's states in
seconds. By default the testbed's policy and scenarios; --model, --data and --eval_data
take real ones.

Source: Hong et al. 2025, arXiv:2505.07271, table 5.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.evals.suite import evaluate_kwise
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.studies.comparison import table
from rlhf_jax.studies.frozen import (
    KwiseStates,
    head_objective,
    open_frozen,
    open_policy,
    train_heads,
)
from rlhf_jax.studies.quickstart import SCENARIOS
from rlhf_jax.studies.scenarios import TERMS
from rlhf_jax.studies.seeds import study_dir

METRICS = {
    "accuracy": "accuracy on the pairs inside the rows",
    "kendall_tau": "Kendall's tau",
    "length_matched_accuracy": "accuracy on pairs of about equal length",
    "reward_mean": "mean reward",
    "reward_std": "standard deviation of the rewards",
}


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Objectives side by side, as heads of a frozen model."""

    run_dir: str = "runs/heads"
    """Directory of the study."""
    model: str | None = None
    """Whose states are read: HF directory, hub id, .gguf, run; null = an SFT policy
    trained on the testbed."""
    data: str | None = None
    """Training pairs, SPEC; null = testbed pairs of which a tenth is flipped."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Rows of scored completions as NAME=SPEC; none = the testbed's scenarios."""
    states_dir: str | None = None
    """Where states are kept; null = inside run_dir. Studies may share it."""
    seeds: int = 8
    """Heads of each objective: each has its own start, order and four fifths of the
    pairs."""
    steps: int = 400
    """Optimizer steps of every head, of 64 pairs."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3, schedule="cosine", weight_decay=0.01
    )
    """Of every head."""
    rows: DataConfig = DataConfig()
    """How rows are read."""
    sft_steps: int = 500
    """Of the testbed's policy."""

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
            found[name] = [_judge(kernel, sets) for kernel in kernels]
        result = {
            "schema": 1,
            "pairs": len(pairs.chosen),
            "prompts": {name: len(each.rows) for name, each in sets.items()},
            "heads": found,
        }
        write_atomic(root / "study.json", json.dumps(result, indent=1))
    console = Console(width=130)
    for metric, meaning in METRICS.items():
        console.print(table(found, metric, meaning, sets=tuple(sets)))
    return result


def _judge(kernel: np.ndarray, sets: dict[str, KwiseStates]) -> dict[str, float]:
    result = {}
    for name, judged in sets.items():
        rewards = [states @ kernel for states in judged.states]
        figures = evaluate_kwise(rewards, judged.rows, samples=2)
        for metric in METRICS:
            result[f"{metric}/{name}"] = figures[metric]
    return result
