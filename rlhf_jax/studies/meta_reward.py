"""`rlhf-jax study meta-reward`: does MetaRM judge a shifted policy better?

One policy is shifted by RLOO without a KL penalty; its completions of RL prompts, k to
a prompt and without labels, are the meta set. For every seed, reward models are trained
on the same pairs: Bradley-Terry, and MetaRM with inner steps of several lengths,
to first and to second order. All are judged on held-out pairs as in training, and on
pairs of the shifted policy's completions of other prompts, labelled by the gold reward.
The mean reward gap of these pairs is reported beside: the inner step raises it, and
the outer loss, taken there, answers.

Source: Wang et al. 2024, arXiv:2401.06080, section 4; Dou et al. 2024,
arXiv:2405.00438.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.meta_reward import meta_objective, spread_objective
from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.algorithms.update import Objective, init_state, make_update
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.kwise import KwiseDataset
from rlhf_jax.data.prepare import prepare_kwise
from rlhf_jax.data.store import PairDataset
from rlhf_jax.programs import reward, rloo
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.quickstart import (
    QuickstartConfig,
    reward_config,
    rloo_config,
)
from rlhf_jax.studies.samples import sample
from rlhf_jax.studies.seeds import by_seed, once, study_dir
from rlhf_jax.studies.statistics import interval, paired
from rlhf_jax.types import MetaBatch

META_PROMPTS = 16
"""Prompts of the meta set in a step."""
METHODS: dict[str, dict[str, Any] | None] = {
    "BT": None,
    "MetaRM, eta 5e-6": {"inner_lr": 5e-6},
    "MetaRM, step 0.03": {"inner_lr": 0.03, "normalise": True},
    "MetaRM, step 0.1": {"inner_lr": 0.1, "normalise": True},
    "MetaRM, step 0.3": {"inner_lr": 0.3, "normalise": True},
    "second order, step 0.1": {
        "inner_lr": 0.1,
        "normalise": True,
        "second_order": True,
    },
}


@dataclasses.dataclass(frozen=True)
class MetaStudyConfig:
    """MetaRM against Bradley-Terry on completions of a shifted policy."""

    run_dir: str = "runs/meta-reward"
    """Directory of the study."""
    seeds: int = 5
    """Repetitions, each with its own pairs, heads and orders."""
    pairs: int = 4000
    """Training pairs."""
    flip_rate: float = 0.1
    """Share of the labels that are flipped."""
    steps: int = 200
    """Optimizer steps of every reward model."""
    samples: int = 5
    """k, completions of a prompt in the meta set."""
    rl_steps: int = 40
    """RLOO steps without KL penalty that shift the policy."""
    eval_rows: int = 1000
    """Pairs that judge, of each kind."""
    sft_steps: int = 500
    """Of the policy that everything starts from."""


def run(config: MetaStudyConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the table."""
    with study_dir(config) as root:
        tools = functools.cache(lambda: _tools(config, root))

        def one(seed: int) -> dict[str, Any]:
            world, meta_set, shifted, steps = tools()
            return {
                name: _one(config, world, meta_set, shifted, step, seed)
                for name, step in steps.items()
            }

        results = by_seed(root, config.seeds, one)
    found = {name: [result[name] for result in results] for name in METHODS}
    Console(width=120).print(_table(found))
    return found


def _tools(config: MetaStudyConfig, root: pathlib.Path) -> tuple[Any, ...]:
    """The world, the meta set, the judging pairs, and a step for each method."""
    world = worlds.open_world(root / "sft", sft_steps=config.sft_steps)
    meta_rows = _completions(config, root, "rl", 512, config.samples)
    judge_rows = _completions(config, root, "rl_val", 512, 4)
    meta_set, _ = prepare_kwise([str(meta_rows)], world.encoder, scored=False)
    shifted = world.pairs(_gold_pairs(judge_rows, config.eval_rows))
    steps = {name: _step(config, world, options) for name, options in METHODS.items()}
    return world, meta_set, shifted, steps


def _completions(
    config: MetaStudyConfig, root: pathlib.Path, prompts: str, size: int, samples: int
) -> pathlib.Path:
    """K-wise rows: prompts with completions of the shifted policy."""
    out = root / f"shifted-{prompts}.jsonl"
    if out.exists():
        return out
    base = QuickstartConfig(run_dir=str(root), sft_steps=config.sft_steps)
    once(
        reward.run,
        dataclasses.replace(reward_config(base), run_dir=str(root / "proxy")),
    )
    free = dataclasses.replace(
        rloo_config(base),
        run_dir=str(root / "policy"),
        reward=[str(root / "proxy")],
        steps=config.rl_steps,
        loss=rloo.RlooLossConfig(kl_coef=0.0),
        loop=RLLoopConfig(
            keep=1, save_every=config.rl_steps, eval_every=config.rl_steps
        ),
    )
    policy = once(rloo.run, free)
    source = f"testbed:{prompts}?size={size}&seed=7"
    return sample(policy, out, source, samples=samples)


def _gold_pairs(path: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """Pairs of one prompt's completions whose gold rewards differ by 0.05 or more."""
    pairs = []
    for row in read_jsonl(path):
        for a, b in itertools.combinations(row["responses"], 2):
            better, worse = (a, b) if a["score"] > b["score"] else (b, a)
            if better["score"] - worse["score"] >= 0.05:
                texts = {"chosen": better["text"], "rejected": worse["text"]}
                pairs.append({"prompt": row["prompt"], **texts})
    order = np.random.default_rng(0).permutation(len(pairs))[:count]
    return [pairs[n] for n in order]


def _step(
    config: MetaStudyConfig, world: worlds.World, options: dict[str, Any] | None
) -> Any:
    """(jitted update over MetaBatch, optimizer)."""
    outer = reward_objective(world.apply())
    inner = spread_objective(world.apply())
    objective: Objective = (
        functools.partial(_pairs_alone, outer)
        if options is None
        else meta_objective(inner, outer, split=lambda p: (p, {}), **options)
    )
    settings = OptimizerConfig(
        learning_rate=worlds.LEARNING_RATE,
        schedule="cosine",
        weight_decay=0.01,
        final_scale=0.05,
    )
    tx = make_optimizer(settings, make_schedule(settings, config.steps))
    return jax.jit(make_update(objective, tx), donate_argnums=0), tx


def _pairs_alone(outer: Objective, params: Any, batch: MetaBatch, key: Any) -> Any:
    return outer(params, batch.pairs, key)


def _one(
    config: MetaStudyConfig,
    world: worlds.World,
    meta_set: KwiseDataset,
    shifted: PairDataset,
    step: Any,
    seed: int,
) -> dict[str, float]:
    update, tx = step
    options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
    dataset = world.pairs(worlds.rows("train", **options))
    pairs = Batches(
        dataset, worlds.BATCH_SIZE, seed=seed, shapes=world.shapes, prefetch=0
    )
    groups = Batches(meta_set, META_PROMPTS, seed=seed, num_shapes=1, prefetch=0)
    state = init_state(jax.tree.map(jax.numpy.copy, world.start(seed)), tx)
    key = jax.random.key(seed)
    for (pair, _), (group, _) in itertools.islice(zip(pairs, groups), config.steps):
        state, _ = update(state, MetaBatch(pairs=pair, shifted=group), key)
    size = {"size": config.eval_rows, "seed": seed}
    held_out = world.pairs(worlds.rows("val_id", **size))
    unseen = world.pairs(worlds.rows("val_both_ood", **size))
    chosen, rejected = world.rewards([state.params], shifted)
    return {
        "held_out": worlds.accuracy(world, state.params, held_out),
        "unseen": worlds.accuracy(world, state.params, unseen),
        "shifted": worlds.accuracy(world, state.params, shifted),
        "mean_gap": float(np.abs(chosen - rejected).mean()),
    }


_MEANING = {
    "held_out": "accuracy, held-out pairs",
    "unseen": "accuracy, new prompts and styles",
    "shifted": "accuracy, shifted policy",
    "mean_gap": "mean |reward gap|, shifted",
}


def _table(found: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title="reward models judged by the gold reward", show_lines=True)
    table.add_column("trained with")
    for meaning in _MEANING.values():
        table.add_column(meaning, justify="right")
    for name, results in found.items():
        cells = []
        for key in _MEANING:
            values = [r[key] for r in results]
            against = paired(values, [r[key] for r in found["BT"]])
            cells.append(
                interval(values).plain() + ("" if name == "BT" else f"\n{against}")
            )
        table.add_row(name, *cells)
    return table
