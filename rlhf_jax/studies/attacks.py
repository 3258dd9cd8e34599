"""`rlhf-jax study attacks`: random perturbations beside searches that know the reward
model, and what the policy thinks of what they find.

For every seed one reward model; each method edits the gold completions of the same RL
prompts. How often it finds a completion that the reward model prefers to gold, how far
above, how good that is by the gold reward, and how likely the policy writes it: an
attack that no policy would write says little about RL.

Source: arXiv:2406.07971, section on the three estimators; Ebrahimi et al. 2018,
arXiv:1712.06751.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.programs import seam, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import by_seed, once, study_dir
from rlhf_jax.studies.stages import reward_model
from rlhf_jax.studies.statistics import interval
from rlhf_jax.testbed.gold import gold

METHODS: dict[str, dict[str, Any]] = {
    "random perturbations": {"estimators": ["perturb"]},
    "greedy, 1 edit": {"attack": AttackConfig(max_edits=1)},
    "greedy, 30 %": {"attack": AttackConfig(budget=0.3)},
    "greedy, 60 %": {"attack": AttackConfig(budget=0.6)},
    "beam of 4, 30 %": {"attack": AttackConfig(budget=0.3, beam=4)},
}
MEANING = {
    "success": "prompts with a misjudged completion",
    "gap": "reward of the best above gold's",
    "gold": "gold reward of the best",
    "logprob": "log p a token of the best",
    "gold_logprob": "log p a token of the gold completion",
}


@dataclasses.dataclass(frozen=True)
class AttacksConfig:
    """Attacks on reward models, side by side."""

    run_dir: str = "runs/attacks"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Reward models."""
    prompts: int = 200
    """RL prompts of each."""
    sft_steps: int = 500
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""


def run(config: AttacksConfig) -> dict[str, list[dict[str, float]]]:
    """Attacks what is not attacked yet; writes study.json; prints the table."""
    with study_dir(config) as root:
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
        )
        once(sft.run, sft_config(base))
        results = by_seed(
            root, config.seeds, lambda seed: _one(config, base, root, seed)
        )
    found = {name: [result[name] for result in results] for name in METHODS}
    table = Table(title=f"attacks on {config.seeds} reward models", show_lines=True)
    table.add_column("")
    for title in MEANING.values():
        table.add_column(title, justify="right")
    for name, figures in found.items():
        columns = ([each[key] for each in figures] for key in MEANING)
        table.add_row(name, *(interval(values).plain() for values in columns))
    Console(width=130).print(table)
    return found


def _one(
    config: AttacksConfig, base: QuickstartConfig, root: pathlib.Path, seed: int
) -> dict[str, dict[str, float]]:
    model = reward_model(dataclasses.replace(base, seed=seed), f"reward-{seed}")
    found = {}
    for number, (name, method) in enumerate(METHODS.items()):
        options: dict[str, Any] = {"estimators": ["attack"], **method}
        measured = seam.run(
            seam.SeamConfig(
                run_dir=str(root / f"seam-{number}-{seed}"),
                policy=str(root / "sft"),
                reward=str(model),
                data=[f"testbed:rl?size={config.prompts}&seed={seed}"],
                seed=seed,
                **options,
            )
        )
        found[name] = figures(seam.read_scores(str(measured / "seam.jsonl")))
    return found


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """MEANING's numbers, means over the prompts of lines of seam.jsonl."""
    best = [max(line["worse"], key=lambda each: each["reward"]) for line in lines]
    pairs = list(zip(lines, best, strict=True))
    return {
        "success": float(np.mean([each["misjudged"] for each in best])),
        "gap": float(np.mean([b["reward"] - line["gold_reward"] for line, b in pairs])),
        "gold": float(np.mean([gold(line["prompt"], b["text"]) for line, b in pairs])),
        "logprob": float(np.mean([b["logprob"] / b["num_tokens"] for b in best])),
        "gold_logprob": float(
            np.mean([line["gold_logprob"] / line["gold_num_tokens"] for line in lines])
        ),
    }
