"""The stages that studies of RL on the testbed share: a reward model on the study's SFT
policy, RLOO that is judged at its start and end on held-out prompts, and its numbers.

Each is the stage of the quickstart with a name of its own and what the study changes.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from rlhf_jax.programs import reward, rloo
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies.quickstart import QuickstartConfig, reward_config, rloo_config
from rlhf_jax.studies.seeds import once

PROMPTS = "testbed:rl_val?size=512&seed=1"
"""Prompts that judge; others than those that settings were chosen on."""
ESTIMATORS: tuple[Estimator, ...] = ("contrast", "given", "perturb", "attack")
"""Of SEAM, without the one that needs a writer."""


def reward_model(base: QuickstartConfig, name: str, **changes: Any) -> pathlib.Path:
    """A reward model trained from the study's SFT policy, not made twice.

    Args:
        base: whose settings, seed and run_dir it has.
        name: of its directory in that of the study.
        changes: fields of RewardConfig.
    """
    made = reward_config(base)
    run_dir = f"{base.run_dir}/{name}"
    return once(reward.run, dataclasses.replace(made, run_dir=run_dir, **changes))


def judged_rloo(
    base: QuickstartConfig, name: str, proxy: object, *, kl_coef: float, **changes: Any
) -> rloo.RlooConfig:
    """RLOO under one reward model, evaluated on PROMPTS before the first and after the
    last step.

    Args:
        base: see `reward_model`.
        name: see `reward_model`.
        proxy: the reward model.
        kl_coef: weight of the KL penalty.
        changes: further fields of RlooConfig.
    """
    steps = base.rloo_steps
    return dataclasses.replace(
        rloo_config(base),
        run_dir=f"{base.run_dir}/{name}",
        reward=[str(proxy)],
        eval_data=[f"val={PROMPTS}"],
        loss=rloo.RlooLossConfig(kl_coef=kl_coef),
        loop=RLLoopConfig(keep=1, save_every=steps, eval_every=steps),
        **changes,
    )


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Numbers of one RLOO run, from its metrics."""
    judged = [row for row in rows if "eval/val/gold" in row]
    gold = np.array([row["reward/gold"] for row in rows if "reward/gold" in row])
    tenth = max(1, len(gold) // 10)
    smooth = np.convolve(gold, np.ones(tenth) / tenth, "valid")
    first, last = judged[0], judged[-1]
    return {
        "gold_before": first["eval/val/gold"],
        "gold": last["eval/val/gold"],
        "gold_gain": last["eval/val/gold"] - first["eval/val/gold"],
        "below_peak": float(smooth.max() - smooth[-1]),
        "proxy_gain": (last["eval/val/proxy"] - first["eval/val/proxy"])
        / rows[1]["reward/proxy_std"],
        "kl": float(np.mean([r["policy/kl"] for r in rows if "policy/kl" in r][-10:])),
        "length": last["eval/val/length"],
    }
