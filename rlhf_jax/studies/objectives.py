"""`rlhf-jax study objectives`: BT, hinge, norm, DR and BSR, whole models trained on
given pairs, judged on prompts with several scored completions.

For each objective and seed one run of `reward` and one of `evaluate`, each with its own
head and order of the pairs; finished ones are read, not repeated. `study heads` is the
same with heads alone, `study scenarios` on the testbed. Numbers and tests are those of
`by_prompt`.

Source: Hong et al. 2025, arXiv:2505.07271, table 5.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.rows import kwise_row
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.programs import evaluate, reward
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.studies.by_prompt import METRICS, judge, table
from rlhf_jax.studies.seeds import once, study_dir

OBJECTIVES: dict[str, dict[str, Any]] = {
    "BT": {},
    "hinge": {"loss": "hinge"},
    "norm": {"loss": "normalised"},
    "DR": {"loss": "direct"},
    "BSR": {
        "regularizers": ["1e-3*batch_sum_to_zero?scale=official&num_groups=devices"]
    },
}


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig:
    """Objectives side by side, whole models trained."""

    model: str
    """Backbone: HF directory, hub id, .gguf, preset name or run directory."""
    data: str
    """Training pairs, SPEC."""
    eval_data: list[str]
    """Rows of scored completions as NAME=SPEC; repeat for several sets."""
    run_dir: str = "runs/objectives"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Models of each objective: each has its own head and order of the pairs."""
    batch_size: int = 16
    """Pairs in an optimizer step."""
    epochs: float = 1.0
    """Passes over the pairs."""
    rows: DataConfig = DataConfig()
    """How rows are read."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of every model."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        if not configs.parse_named(self.eval_data, "eval_data"):
            raise ValueError(
                "eval_data: expected rows of scored completions as NAME=SPEC, one set "
                "or more"
            )


def run(config: ObjectivesConfig) -> dict[str, Any]:
    """Trains and scores what is not there yet; writes study.json; prints the tables."""
    names = list(configs.parse_named(config.eval_data, "eval_data"))
    with study_dir(config) as root:
        found = {}
        for objective in OBJECTIVES:
            scores = [
                _scores(config, root, objective, seed) for seed in range(config.seeds)
            ]
            found[objective] = {
                name: _judge([each / f"{name}.jsonl" for each in scores])
                for name in names
            }
        result = {"schema": 1, "models": found}
        write_atomic(root / "study.json", json.dumps(result, indent=1))
    console = Console(width=130)
    for metric in METRICS:
        console.print(table(found, metric))
    return result


def _scores(
    config: ObjectivesConfig, root: pathlib.Path, objective: str, seed: int
) -> pathlib.Path:
    """Directory with the scored rows of one model."""
    trained = reward.RewardConfig(
        run_dir=str(root / f"{objective.lower()}-{seed}"),
        model=config.model,
        data=[config.data],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=seed,
        rows=config.rows,
        optimizer=config.optimizer,
        loop=LoopConfig(keep=1),
        compute=config.compute,
        mesh=config.mesh,
        **OBJECTIVES[objective],
    )
    model = once(reward.run, trained)
    if not (model / "evaluate.json").exists():
        evaluate.run(
            evaluate.EvaluateConfig(
                model=str(model),
                out=str(model),
                eval_data=config.eval_data,
                columns=config.rows.columns,
                scoring=ScoringConfig(
                    template=config.rows.template,
                    max_length=config.rows.max_length,
                    compute=dataclasses.replace(config.compute, dropout=0.0),
                    mesh=config.mesh,
                ),
            )
        )
    return model / "scores"


def _judge(files: list[pathlib.Path]) -> dict[str, list[float | None]]:
    """One set under the models of one objective, a file of scored rows each."""
    scored = [read_jsonl(file) for file in files]
    rewards = [
        np.stack([row["rewards"] for row in rows], axis=1)
        for rows in zip(*scored, strict=True)
    ]
    return judge(rewards, [kwise_row(row).responses for row in scored[0]])
