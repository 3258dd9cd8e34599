"""`rlhf-jax study heads`: BT, hinge, norm, DR, BSR and their controls as heads on the
states of one frozen model, judged on prompts with several scored completions.

What training the whole model does to the states is not seen here (`study scenarios`
does that, small); what the objective does to the head is, on any model's states in
seconds. By default the testbed's policy and scenarios; --model, --data and --eval_data
take real ones.

Numbers and tests are those of `by_prompt`.

Source: Hong et al. 2025, arXiv:2505.07271, table 5.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.studies.by_prompt import METRICS, judge, table
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
    for metric in METRICS:
        console.print(table(found, metric))
    return result


def _judge(kernels: np.ndarray, judged: KwiseStates) -> dict[str, list[float | None]]:
    rewards = [states @ kernels.T for states in judged.states]
    return judge(rewards, [row.responses for row in judged.rows])
