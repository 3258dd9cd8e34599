"""`rlhf-jax study domains`: a reward head trained on each domain, judged on each.

The model is frozen and its states are computed once. Every domain gives as many
training pairs as the smallest has; "all" has the same number, drawn from all domains in
equal measure, so that what it gains is breadth and not size. By default the domains are
the testbed's prompt families; --train, --test and --model take real ones.

Source: the transfer question of Wang et al. 2024, arXiv:2401.06080, section 3.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax.evals import accuracy
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.studies.frozen import (
    FrozenConfig,
    PairStates,
    head_objective,
    open_frozen,
    open_policy,
    train_heads,
)
from rlhf_jax.studies.seeds import study_dir
from rlhf_jax.testbed.tasks import FAMILIES

ALL = "all"


@dataclasses.dataclass(frozen=True)
class DomainsConfig(FrozenConfig):
    """Accuracy of reward heads by the domain of training and of judging."""

    run_dir: str = "runs/domains"
    """Directory of the study."""
    train: list[str] = dataclasses.field(default_factory=list)
    """Training pairs of each domain as NAME=SPEC; none = the testbed's families."""
    test: list[str] = dataclasses.field(default_factory=list)
    """Pairs that judge as NAME=SPEC."""
    seeds: int = 5
    """Heads of each domain: each has its own start, order and four fifths of the
    pairs."""

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if ALL in configs.parse_named(getattr(self, name), name):
                raise ValueError(
                    f"{name}: {ALL!r} is the name of all domains together; take another"
                )
        if bool(self.train) != bool(self.test):
            raise ValueError(
                "train, test: expected both or none (the testbed's families)"
            )
        if self.train and self.model is None:
            raise ValueError(
                "model: expected one whose states are read, with --train; the "
                "testbed's policy knows the testbed's words alone"
            )


def run(config: DomainsConfig) -> dict[str, Any]:
    """Computes states that are not there, trains the heads, writes study.json, prints
    the matrix."""
    with study_dir(config) as root:
        policy = config.model or open_policy(root, config.sft_steps)
        model = open_frozen(policy, config.states_dir or root / "states", config.rows)
        train = {name: model.pairs(spec) for name, spec in _specs(config, "train")}
        test = {name: model.pairs(spec) for name, spec in _specs(config, "test")}
        objective = head_objective()
        found = {
            name: _judge(config, objective, pairs, test)
            for name, pairs in _equal(train).items()
        }
        sizes = {
            kind: {name: len(pairs.chosen) for name, pairs in sets.items()}
            for kind, sets in (("train", train), ("test", test))
        }
        result = {"schema": 1, "pairs": sizes, "accuracy": found}
        write_atomic(root / "study.json", json.dumps(result, indent=1))
    Console(width=40 + 16 * len(test)).print(_table(found, sizes["test"]))
    return result


def _specs(config: DomainsConfig, kind: str) -> list[tuple[str, str]]:
    named = configs.parse_named(getattr(config, kind), kind)
    if named:
        return list(named.items())
    pool, size = {"train": ("train", 1000), "test": ("val_prompt_ood", 400)}[kind]
    return [(name, f"testbed:{pool}?size={size}&families={name}") for name in FAMILIES]


def _equal(train: dict[str, PairStates]) -> dict[str, PairStates]:
    """As many pairs of each domain, and of all together."""
    count = min(len(pairs.chosen) for pairs in train.values())
    order = np.random.default_rng(0)
    drawn = {
        name: pairs.take(order.permutation(len(pairs.chosen))[:count])
        for name, pairs in train.items()
    }
    parts = [
        pairs.take(np.arange(len(part)))
        for pairs, part in zip(
            drawn.values(), np.array_split(np.arange(count), len(drawn)), strict=True
        )
    ]
    return {**drawn, ALL: PairStates(*map(np.concatenate, zip(*parts, strict=True)))}


def _judge(
    config: DomainsConfig,
    objective: Any,
    pairs: PairStates,
    test: dict[str, PairStates],
) -> dict[str, list[float]]:
    """Accuracy on each test set, mean over seeds, with its interval over prompts."""
    kernels = train_heads(
        objective,
        pairs,
        seeds=config.seeds,
        steps=config.steps,
        optimizer=config.optimizer,
    )
    found = {}
    for name, judged in test.items():
        gaps = (judged.chosen - judged.rejected) @ kernels.T
        right = ((gaps > 0) + 0.5 * (gaps == 0)).mean(axis=1)
        interval = accuracy.mean_with_interval(right, judged.prompt.tolist())
        found[name] = [interval.value, interval.low, interval.high]
    return found


def _table(found: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> Table:
    table = Table(
        title="accuracy: trained on the row, judged on the column",
        caption="means over heads; 95 % intervals over the test prompts",
    )
    table.add_column("trained on")
    for name, count in sizes.items():
        table.add_column(f"{name}\n{count} pairs", justify="right")
    for name, row in found.items():
        cells = [
            f"{value:.3f}\n{low:.2f} .. {high:.2f}" for value, low, high in row.values()
        ]
        table.add_row(name, *cells)
    return table
