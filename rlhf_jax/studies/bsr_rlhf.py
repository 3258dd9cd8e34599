"""`rlhf-jax study bsr-rlhf`: RLOO under a Bradley-Terry and under a BSR reward model.

The BSR paper's downstream claim, on the testbed: for every seed one reward model of
each kind, trained on the same pairs from the same policy, and one RLOO run under each,
from that policy on the same prompts. Held-out gold and proxy reward, KL, length, and
how often one policy's completion beats the other's by gold. Finished runs are read, not
repeated.

Source: Hong et al. 2025, arXiv:2505.07271, section 5 and figure 5.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.programs import rloo, sft
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.samples import sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.stages import PROMPTS, judged_rloo, reward_model, summarise
from rlhf_jax.studies.statistics import interval, paired

KINDS = {
    "BT": [],
    "BSR": ["1e-3*batch_sum_to_zero?scale=official&num_groups=devices"],
}


@dataclasses.dataclass(frozen=True)
class BsrRlhfConfig:
    """RLOO under two reward models."""

    run_dir: str = "runs/bsr-rlhf"
    """Directory of the study; each run has its own inside."""
    seeds: int = 8
    """Reward models and RLOO runs of each kind."""
    sft_steps: int = 500
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""
    steps: int = 60
    """RLOO steps."""
    kl_coef: float = 0.05
    """Weight of the KL penalty: the paper's, low enough for a policy to outrun its
    reward model."""
    flip_rate: float = 0.1
    """Share of training labels that are flipped."""


def run(config: BsrRlhfConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the table."""
    with study_dir(config):
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
            rloo_steps=config.steps,
            flip_rate=config.flip_rate,
        )
        once(sft.run, sft_config(base))
        results = by_seed(
            pathlib.Path(config.run_dir),
            config.seeds,
            lambda seed: _one(config, base, seed),
        )
    found = {kind: [result[kind] for result in results] for kind in KINDS}
    Console(width=110).print(_table(found))
    return found


def _one(
    config: BsrRlhfConfig, base: QuickstartConfig, seed: int
) -> dict[str, dict[str, float]]:
    """Numbers of both RLOO runs of a seed."""
    found: dict[str, dict[str, float]] = {}
    gold: dict[str, list[float]] = {}
    for kind, regularizers in KINDS.items():
        name = f"{kind.lower()}-{seed}"
        model = reward_model(
            dataclasses.replace(base, seed=seed),
            f"reward-{name}",
            regularizers=regularizers,
        )
        # The prompts are those of seed 0, in an order of each seed.
        trained = judged_rloo(
            base, f"rloo-{name}", model, kl_coef=config.kl_coef, seed=seed
        )
        policy = once(rloo.run, trained)
        found[kind], gold[kind] = summarise(read(policy)), _completions(policy)
    for kind, other in (("BT", "BSR"), ("BSR", "BT")):
        pairs = zip(gold[kind], gold[other], strict=True)
        wins = [(a > b) + 0.5 * (a == b) for a, b in pairs]
        found[kind]["win_rate"] = float(np.mean(wins))
    return found


def _completions(policy: pathlib.Path) -> list[float]:
    """Gold rewards of one sampled completion for each judging prompt."""
    rows = read_jsonl(sample(policy, policy / "judged.jsonl", PROMPTS))
    return [float(row["gold"]) for row in rows]


_MEANING = {
    "gold": "gold reward after RLOO",
    "gold_gain": "gold gain over SFT",
    "below_peak": "gold below its peak in training",
    "proxy_gain": "proxy gain, in its own standard deviations",
    "kl": "KL to SFT, last ten steps (nats)",
    "length": "completion length (tokens)",
    "win_rate": "win rate against the other, by gold",
}


def _table(found: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=f"RLOO under two reward models, {len(found['BT'])} seeds")
    for name in ("", "BT", "BSR", "BSR - BT, paired"):
        table.add_column(name, justify="right" if name else "left")
    for key, meaning in _MEANING.items():
        values = {kind: [r[key] for r in results] for kind, results in found.items()}
        table.add_row(
            meaning,
            str(interval(values["BT"])),
            str(interval(values["BSR"])),
            str(paired(values["BSR"], values["BT"])),
        )
    return table
