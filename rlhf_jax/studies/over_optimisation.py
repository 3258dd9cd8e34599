"""`rlhf-jax study over-optimisation`: gold against proxy, with and without KL penalty.

For every seed: a reward model for each annotator bias, RLOO and PPO with the KL penalty
on the unbiased one, and RLOO without it on each. All start from one SFT policy. The
table tests whether RL raises the gold reward of held-out prompts over SFT; the plot is
the over-optimisation curve of Gao et al. 2023 (arXiv:2210.10760, figure 1), a panel a
bias. Finished runs are read, not repeated: a study can be stopped and started again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.io import rl_plots
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import ppo, reward, rloo, sft
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.studies.quickstart import (
    FEW_SHAPES,
    GOLD,
    UNROLLED,
    QuickstartConfig,
    sft_config,
)
from rlhf_jax.studies.seeds import once, read, study_dir

BINS = 12
"""Bins of the square root of the KL in the plot."""


@dataclasses.dataclass(frozen=True)
class OverOptimisationConfig:
    """Gold and proxy reward under RL on the testbed."""

    run_dir: str = "runs/over-optimisation"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Reward models and RL runs for each setting."""
    biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Annotator's bias towards flattery, in units of gold reward."""
    sft_steps: int = 600
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""
    steps: int = 60
    """RL steps with the KL penalty."""
    free_steps: int = 80
    """RL steps without it."""
    kl_coef: float = 0.3
    """Of RLOO with the penalty, in units of the reward."""
    ppo_kl_coef: float = 0.5
    """Of PPO, whose rewards are scaled to a standard deviation of 1."""


def run(config: OverOptimisationConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json and plots; prints the table."""
    with study_dir(config) as root:
        base = QuickstartConfig(run_dir=config.run_dir, sft_steps=config.sft_steps)
        once(sft.run, sft_config(base))
        runs: dict[str, list[pathlib.Path]] = {}
        for seed in range(config.seeds):
            for bias in config.biases:
                once(reward.run, _reward(config, seed, bias))
                name = f"RLOO, no KL, bias {bias:g}"
                free = _rloo(config, seed, bias, kl_coef=0.0, steps=config.free_steps)
                runs.setdefault(name, []).append(once(rloo.run, free))
            first = config.biases[0]
            kept = _rloo(
                config, seed, first, kl_coef=config.kl_coef, steps=config.steps
            )
            runs.setdefault("RLOO", []).append(once(rloo.run, kept))
            runs.setdefault("PPO", []).append(once(ppo.run, _ppo(config, seed, first)))
        found = {name: summarise(paths) for name, paths in runs.items()}
        write_atomic(root / "study.json", json.dumps({"schema": 1, **found}, indent=1))
        free = {name: curve(paths) for name, paths in runs.items() if "no KL" in name}
        plot = rl_plots.over_optimisation(
            free, root / "plots" / "over_optimisation.png"
        )
    console = Console()
    console.print(_table(found))
    console.print(f"plot   {plot}", highlight=False)
    return found


def _reward(
    config: OverOptimisationConfig, seed: int, bias: float
) -> reward.RewardConfig:
    return reward.RewardConfig(
        run_dir=f"{config.run_dir}/reward-{bias:g}-{seed}",
        model=f"{config.run_dir}/sft",
        data=[f"testbed:train?size=12000&seed={seed}&flattery_bias={bias}"],
        eval_data=[f"id=testbed:val_id?size=400&seed={seed}"],
        batch_size=64,
        steps=config.reward_steps,
        seed=seed,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", weight_decay=0.01, final_scale=0.05
        ),
        rows=FEW_SHAPES,
        loop=LoopConfig(eval_every=config.reward_steps, keep=1),
        compute=UNROLLED,
    )


def _shared(config: OverOptimisationConfig, seed: int, bias: float, steps: int) -> dict:
    """What every RL run has in common; 128 completions a step. The prompts that judge
    are not those that the settings were chosen on."""
    return {
        "model": f"{config.run_dir}/sft",
        "data": ["testbed:rl?size=4000"],
        "reward": [f"{config.run_dir}/reward-{bias:g}-{seed}"],
        "gold": GOLD,
        "eval_data": ["val=testbed:rl_val?size=512&seed=1"],
        "steps": steps,
        "seed": seed,
        "loop": RLLoopConfig(keep=1, save_every=steps, eval_every=steps),
        "compute": UNROLLED,
    }


def _rloo(
    config: OverOptimisationConfig,
    seed: int,
    bias: float,
    *,
    kl_coef: float,
    steps: int,
) -> rloo.RlooConfig:
    kind = "rloo" if kl_coef else "free"
    return rloo.RlooConfig(
        run_dir=f"{config.run_dir}/{kind}-{bias:g}-{seed}",
        batch_size=32,
        loss=rloo.RlooLossConfig(kl_coef=kl_coef),
        sampling=SamplingConfig(num_samples=4, max_new_tokens=48),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05),
        **_shared(config, seed, bias, steps),
    )


def _ppo(config: OverOptimisationConfig, seed: int, bias: float) -> ppo.PpoConfig:
    return ppo.PpoConfig(
        run_dir=f"{config.run_dir}/ppo-{bias:g}-{seed}",
        batch_size=128,
        epochs=2,
        minibatches=2,
        loss=ppo.PpoLossConfig(kl_coef=config.ppo_kl_coef, critic_warmup=5),
        sampling=SamplingConfig(max_new_tokens=48),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=0.05, beta2=0.95),
        critic_optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.95),
        **_shared(config, seed, bias, config.steps),
    )


def summarise(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Held-out rewards before and after, over seeds.

    The interval of the gain is Student's t over seeds; p is the one-sided paired test.
    """
    pairs = {"gold": [], "proxy": []}
    peaks, kl = [], []
    for path in paths:
        rows = read(path)
        judged = [row for row in rows if "eval/val/gold" in row]
        for name, values in pairs.items():
            values.append(
                (judged[0][f"eval/val/{name}"], judged[-1][f"eval/val/{name}"])
            )
        gold = np.array([row["reward/gold"] for row in rows if "reward/gold" in row])
        width = max(1, len(gold) // 10)
        smooth = np.convolve(gold, np.ones(width) / width, "valid")
        peaks.append(float(smooth.max() - smooth[-1]))
        kl.append(rows[-1]["policy/kl"])
    found: dict[str, Any] = {"seeds": len(paths), "kl": float(np.mean(kl))}
    for name, values in pairs.items():
        before, after = np.array(values).T
        gain = after - before
        spread = scipy.stats.sem(gain) if len(gain) > 1 else float("nan")
        half = spread * scipy.stats.t.ppf(0.975, max(len(gain) - 1, 1))
        test: Any = scipy.stats.ttest_1samp(gain, 0, alternative="greater")
        found[name] = {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gain": float(gain.mean()),
            "half_width": float(half),
            "p": float(test.pvalue),
        }
    found["gold"]["below_peak"] = float(np.mean(peaks))
    return found


def curve(paths: Sequence[pathlib.Path]) -> dict[str, list[float]]:
    """Proxy and gold in bins of root KL: means over seeds, 95 % half widths.

    Each run's steps are averaged inside a bin first, so that seeds count alike. The
    proxy is in units of its own standard deviation at the start of its run.
    """
    per_run = []
    for path in paths:
        rows = [row for row in read(path) if "policy/kl" in row]
        kl = np.array([max(row["policy/kl"], 0.0) for row in rows])
        proxy = np.array([row["reward/proxy"] for row in rows])
        scale = rows[0]["reward/proxy_std"]
        gold = np.array([row["reward/gold"] for row in rows])
        per_run.append((np.sqrt(kl), (proxy - proxy[0]) / scale, gold))
    top = min(root.max() for root, _, _ in per_run)
    edges = np.linspace(0, top, BINS + 1)
    found: dict[str, list[float]] = {
        name: [] for name in ("kl", "proxy", "gold", "proxy_error", "gold_error")
    }
    for low, high in zip(edges, edges[1:]):
        inside = [
            (root[m].mean(), proxy[m].mean(), gold[m].mean())
            for root, proxy, gold in per_run
            if (m := (root >= low) & (root <= high)).any()
        ]
        if len(inside) < 2:
            continue
        values = np.array(inside)
        half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
        found["kl"].append(float(values[:, 0].mean() ** 2))
        for place, name in ((1, "proxy"), (2, "gold")):
            found[name].append(float(values[:, place].mean()))
            found[f"{name}_error"].append(float(half[place]))
    return found


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="gold reward on held-out prompts")
    for name in ("run", "seeds", "SFT", "after", "gain", "p", "below its peak", "KL"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, row in found.items():
        gold = row["gold"]
        table.add_row(
            name,
            str(row["seeds"]),
            f"{gold['before']:.3f}",
            f"{gold['after']:.3f}",
            f"{gold['gain']:+.3f} ± {gold['half_width']:.3f}",
            f"{gold['p']:.2g}",
            f"{gold['below_peak']:.3f}",
            f"{row['kl']:.1f}",
        )
    return table
