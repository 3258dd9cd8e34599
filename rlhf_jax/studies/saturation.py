"""`rlhf-jax study saturation`: does RLHF gain from a better policy or reward model?

A grid on the testbed: policies by the number of their SFT steps, reward models by the
number of their training pairs, and RLOO in every cell, from that policy under that
reward model. Gold reward on held-out prompts before and after, and the gain from one
quality to the next along each axis beside the gain of the stage itself.

What is replicated: a seed has SFT policies of its own (demonstrations, weights, order),
reward models that start from its best policy (pairs, labels, head, order), and RLOO
runs from its own policies (order, sampling). The prompts of RLOO and those that judge
are the same for all. Every reward model sees its pairs once, so more pairs are more
steps too; its rewards are standardised on completions of the policy that it started
from, so that kl_coef weighs the same in every column.

The policies and reward models are runs of the programs. RLOO of all seeds of a cell is
one call of one pure function, `algorithms.rloo_run`, `vmap`ped over seeds; the grid
compiles it once. A cell has a file, so that a stopped study goes on, and more seeds
may be asked for later. Read `run`, then `saturation_cells.measure`.

Source: arXiv:2406.07971, section 4 (its saturation grid is 10 x 10, judged by GPT-4).
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from rlhf_jax.io import heatmap
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import reward, sft
from rlhf_jax.programs.models import load_policy, load_reward_model
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.studies import saturation_bench
from rlhf_jax.studies import saturation_cells as cells
from rlhf_jax.studies import saturation_tables as tables
from rlhf_jax.studies.quickstart import (
    UNROLLED,
    QuickstartConfig,
    reward_config,
    rloo_config,
    sft_config,
)
from rlhf_jax.studies.seeds import once, read, study_dir
from rlhf_jax.studies.world import BATCH_SIZE
from rlhf_jax.types import Rollout

HELD_OUT_PAIRS = "testbed:val_prompt_ood?size=1000&seed=1000"
"""Pairs without label noise that judge every reward model, of tasks in a pool that no
training set is of, in wordings of their own. (val_id would draw from the tasks of the
training pairs.)"""
LOADED = {"policy": load_policy, "reward": load_reward_model}


@dataclasses.dataclass(frozen=True)
class SaturationConfig:
    """RLOO over a grid of SFT and reward model qualities."""

    run_dir: str = "runs/saturation"
    """Directory of the study; each run has its own inside, each cell a file."""
    seeds: int = 3
    """Policies and reward models of each quality, and RLOO runs of each cell."""
    sft_steps: tuple[int, ...] = (60, 120, 250, 500)
    """Optimizer steps of the SFT policies, rising."""
    pairs: tuple[int, ...] = (250, 1000, 4000, 16000)
    """Training pairs of the reward models, rising; each is seen once. They
    start from the last policy of their seed."""
    steps: int = 40
    """RLOO steps of 32 prompts with four completions each."""
    kl_coef: float = 0.1
    """Weight of the KL penalty: standard deviations of reward per nat."""
    least_gain: float = 0.02
    """Smallest gain in gold that matters: saturation is claimed where the interval of a
    gain lies below it."""
    max_new_tokens: int = 32
    """Of a completion: the run computes them all, and 99 of 100 are shorter."""
    eval_prompts: int = 256
    """Held-out prompts, with four completions each."""

    def __post_init__(self) -> None:
        for name in ("sft_steps", "pairs"):
            values = getattr(self, name)
            rising = all(a < b for a, b in itertools.pairwise(values))
            if not values or values[0] < 1 or not rising:
                raise ValueError(
                    f"{name}: expected rising numbers from 1, got {values}"
                )
        for name in ("steps", "eval_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected at least 1, got {getattr(self, name)}"
                )
        if not self.least_gain > 0:
            raise ValueError(
                f"least_gain: expected a number above 0, got {self.least_gain}"
            )
        size = rloo_config(QuickstartConfig()).batch_size
        if self.eval_prompts % size:
            raise ValueError(
                f"eval_prompts {self.eval_prompts}: expected a multiple of {size}, the "
                "prompts of a batch"
            )


def run(config: SaturationConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json and a plot; prints the tables."""
    with study_dir(config) as root:
        policies = {
            (steps, seed): once(sft.run, policy_config(config, steps, seed))
            for steps in config.sft_steps
            for seed in range(config.seeds)
        }
        models = {
            (pairs, seed): once(reward.run, model_config(config, pairs, seed))
            for pairs in config.pairs
            for seed in range(config.seeds)
        }
        # Opened only where a cell is missing; one that is read needs nothing.
        bench = functools.cache(lambda: _open_bench(config))
        load = functools.cache(_params)
        best = config.sft_steps[-1]

        @functools.cache
        def start(steps: int, seed: int) -> cells.Start:
            return cells.begin(bench(), load("policy", policies[steps, seed]), seed)

        @functools.cache
        def for_scale(seed: int) -> Rollout:
            policy = load("policy", policies[best, seed])
            return cells.draw_for_scale(bench(), policy, seed)

        @functools.cache
        def model(pairs: int, seed: int) -> saturation_bench.Standardised:
            policy = load("policy", policies[best, seed])
            params = load("reward", models[pairs, seed])
            return cells.standardise(bench(), policy, params, for_scale(seed))

        def measure(steps: int, pairs: int, seeds: Sequence[int]) -> list[dict]:
            starts = [start(steps, seed) for seed in seeds]
            rewards = [model(pairs, seed) for seed in seeds]
            return cells.measure(bench(), starts, rewards, seeds)

        grid = {
            (steps, pairs): _cell(
                root / f"cell-{steps}-{pairs}.json",
                config.seeds,
                functools.partial(measure, steps, pairs),
            )
            for steps, pairs in itertools.product(config.sft_steps, config.pairs)
        }
        found = _summary(config, grid, policies, models)
        write_atomic(root / "study.json", json.dumps(found, indent=1))
        _plot(config, found, root / "plots" / "saturation.png")
    console = Console(width=120)
    for table in tables.all_tables(found):
        console.print(table)
    return found


def _plot(config: SaturationConfig, found: dict[str, Any], path: pathlib.Path) -> None:
    heatmap.heatmaps(
        tables.panels(found),
        path,
        rows=("SFT steps", [f"{n:,}" for n in config.sft_steps]),
        columns=("pairs of the reward model", [f"{n:,}" for n in config.pairs]),
    )


def policy_config(config: SaturationConfig, steps: int, seed: int) -> sft.SftConfig:
    """The SFT run of a quality and a seed; the last step's policy counts."""
    base = QuickstartConfig(run_dir=config.run_dir, sft_steps=steps, seed=seed)
    return dataclasses.replace(
        sft_config(base),
        run_dir=f"{config.run_dir}/sft-{steps}-{seed}",
        loop=LoopConfig(eval_every=steps, keep=1),
    )


def model_config(
    config: SaturationConfig, pairs: int, seed: int
) -> reward.RewardConfig:
    """The reward model of a quality and a seed: one epoch of its pairs."""
    steps = -(-pairs // BATCH_SIZE)
    base = QuickstartConfig(
        run_dir=config.run_dir, pairs=pairs, reward_steps=steps, seed=seed
    )
    return dataclasses.replace(
        reward_config(base),
        run_dir=f"{config.run_dir}/reward-{pairs}-{seed}",
        model=f"{config.run_dir}/sft-{config.sft_steps[-1]}-{seed}",
        eval_data=[f"held_out={HELD_OUT_PAIRS}"],
        loop=LoopConfig(eval_every=steps, keep=1),
    )


def _open_bench(config: SaturationConfig) -> saturation_bench.Bench:
    """RLOO on the quickstart's prompts and with its optimizer, from any policy."""
    plain = rloo_config(QuickstartConfig(run_dir=config.run_dir))
    return saturation_bench.open_bench(
        str(policy_config(config, config.sft_steps[-1], 0).run_dir),
        data=plain.data,
        held_out=f"testbed:rl_val?size={config.eval_prompts}&seed=1",
        steps=config.steps,
        batch_size=plain.batch_size,
        kl_coef=config.kl_coef,
        num_samples=plain.sampling.num_samples,
        max_new_tokens=config.max_new_tokens,
        optimizer=plain.optimizer,
    )


def _params(kind: str, run_dir: pathlib.Path) -> Any:
    return LOADED[kind](str(run_dir), compute=UNROLLED).params


def _cell(
    path: pathlib.Path,
    seeds: int,
    measure: Callable[[Sequence[int]], list[dict[str, Any]]],
) -> dict[str, Any]:
    """The results of a cell: those in its file, and the seeds that it lacks."""
    found: dict[str, Any] = {"schema": 1, "seeds": [], "wall_s": 0.0}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    missing = range(len(found["seeds"]), seeds)
    if missing:
        started = time.perf_counter()
        found["seeds"] += measure(missing)
        found["wall_s"] += time.perf_counter() - started
        write_atomic(path, json.dumps(found))
        gold = ", ".join(f"{one['after']['gold']:.3f}" for one in found["seeds"])
        print(f"{path.stem}: gold {gold}")
    return found | {"seeds": found["seeds"][:seeds]}


def _summary(
    config: SaturationConfig,
    grid: Mapping[tuple[int, int], dict[str, Any]],
    policies: Mapping[tuple[int, int], pathlib.Path],
    models: Mapping[tuple[int, int], pathlib.Path],
) -> dict[str, Any]:
    """study.json: cells, accuracies and the compute of everything."""
    accuracy: dict[str, list[float]] = {str(pairs): [] for pairs in config.pairs}
    for (pairs, _), path in models.items():
        last = [row for row in read(path) if "eval/held_out/accuracy" in row][-1]
        accuracy[str(pairs)].append(last["eval/held_out/accuracy"])
    seeds = [one["compute"] for cell in grid.values() for one in cell["seeds"]]
    rl = {name: sum(one[name] for one in seeds) for name in seeds[0]}
    rl["wall_s"] = sum(cell["wall_s"] for cell in grid.values())
    return {
        "schema": 1,
        "sft_steps": list(config.sft_steps),
        "pairs": list(config.pairs),
        "least_gain": config.least_gain,
        "accuracy": accuracy,
        "cells": {f"{a}-{b}": cell["seeds"] for (a, b), cell in grid.items()},
        "compute": {
            "SFT": _trained(policies.values()),
            "reward models": _trained(models.values()),
            "RLOO and judging": rl,
        },
    }


def _trained(paths: Any) -> dict[str, float]:
    """Tokens, FLOPs and seconds of the optimizer steps of runs."""
    total = {"sampled": 0.0, "trained": 0.0, "flops": 0.0, "wall_s": 0.0}
    for row in itertools.chain.from_iterable(map(read, paths)):
        seconds = row.get("perf/step_s", 0.0)
        total["wall_s"] += seconds
        if seconds:
            total["trained"] += row["perf/tokens_per_s"] * seconds
            total["flops"] += row["perf/flops_per_s"] * seconds
    return total
