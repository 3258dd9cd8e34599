"""`rlhf-jax study meta-rounds`: four rounds of MetaRM and RLOO, with clean labels and
with a quarter of them flipped, beside RLOO under one Bradley-Terry model.

For every seed and noise the driver `meta-rounds` samples, meta-trains and runs RLOO in
turns; the control trains one reward model on the same pairs for as many steps and runs
RLOO under it for as many steps as all rounds have together. After each round: gold
reward on held-out prompts and KL to the SFT policy; and of the completions that the
round began with, how many pairs the round's reward model and the control's order as the
gold reward does.

Source: Wang et al. 2024, arXiv:2401.06080, section 4.2; Dou et al. 2024,
arXiv:2405.00438.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import meta_reward, meta_rounds, reward, rloo, sft
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.studies.quickstart import (
    GOLD,
    QuickstartConfig,
    reward_config,
    rloo_config,
    sft_config,
)
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.statistics import interval, paired

LAST_STEPS = 5
"""Over which the KL at the end of a round is averaged."""


@dataclasses.dataclass(frozen=True)
class MetaRoundsStudyConfig:
    """Rounds of MetaRM and RLOO against one reward model."""

    run_dir: str = "runs/meta-rounds"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Repetitions, each with its own pairs, noise, heads and orders."""
    rounds: int = 4
    """Rounds of sampling, meta-training and RLOO."""
    flip_rates: tuple[float, ...] = (0.0, 0.25)
    """Shares of the labels that are flipped."""
    pairs: int = 4000
    """Training pairs."""
    reward_steps: int = 150
    """Optimizer steps of every reward model."""
    inner_step: float = 0.1
    """Length of the (normalised) inner step."""
    meta_prompts: int = 128
    """Prompts of each round's meta set."""
    samples: int = 5
    """k, completions of each."""
    steps: int = 15
    """RLOO steps of a round."""
    kl_coef: float = 0.05
    """Weight of RLOO's KL penalty."""
    sft_steps: int = 500
    """Of the policy that everything starts from."""

    def __post_init__(self) -> None:
        if not self.flip_rates:
            raise ValueError("flip_rates: expected at least one, got none")


def run(config: MetaRoundsStudyConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the tables."""
    with study_dir(config) as root:
        base = QuickstartConfig(run_dir=config.run_dir, sft_steps=config.sft_steps)
        once(sft.run, sft_config(base))
        results = by_seed(root, config.seeds, functools.partial(_one, config, root))
    console = Console(width=110)
    for name in results[0]:
        found = [result[name] for result in results]
        console.print(_table(found, f"share of flipped labels {name}, per round"))
    return {"seeds": results}


def _one(config: MetaRoundsStudyConfig, root: pathlib.Path, seed: int) -> dict:
    return {
        f"{rate:g}": _at_noise(config, root, seed, rate) for rate in config.flip_rates
    }


def _at_noise(
    config: MetaRoundsStudyConfig, root: pathlib.Path, seed: int, rate: float
) -> dict[str, Any]:
    """Both arms of a seed: a list with an entry a round for each number."""
    base = QuickstartConfig(
        run_dir=str(root),
        sft_steps=config.sft_steps,
        pairs=config.pairs,
        reward_steps=config.reward_steps,
        flip_rate=rate,
        seed=seed,
    )
    name = f"{rate:g}-{seed}"
    plain = dataclasses.replace(
        reward_config(base),
        run_dir=str(root / f"reward-{name}"),
        model=str(root / "sft"),
    )
    control = str(once(reward.run, plain))
    alone = dataclasses.replace(
        _rloo(config, base),
        run_dir=str(root / f"rloo-{name}"),
        reward=[control],
        steps=config.steps * config.rounds,
    )
    policy = once(rloo.run, alone)
    driver = _driver(config, root, plain, _rloo(config, base), name)
    meta_rounds.run(driver)
    folders = [driver.folder(number + 1) for number in range(config.rounds)]
    runs = [read(folder / "rloo") for folder in folders]
    files = [folder / "shifted.jsonl" for folder in folders]
    return {
        "MetaRM": {
            "gold": [runs[0][0]["eval/val/gold"], *(_judged(r)[-1] for r in runs)],
            "kl": [_kl(rows) for rows in runs],
            "agreement": [
                _agreement(str(folder / "reward"), file)
                for folder, file in zip(folders, files)
            ],
        },
        "BT": {
            "gold": _judged(read(policy)),
            "kl": [_kl(rows) for rows in _parts(read(policy), config.steps)],
            "agreement": [_agreement(control, file) for file in files],
        },
    }


def _rloo(config: MetaRoundsStudyConfig, base: QuickstartConfig) -> rloo.RlooConfig:
    """RLOO of a round; its learning rate does not decay, so that rounds count alike."""
    made = rloo_config(base)
    return dataclasses.replace(
        made,
        steps=config.steps,
        loss=rloo.RlooLossConfig(kl_coef=config.kl_coef),
        eval_data=["val=testbed:rl_val?size=512&seed=1"],
        optimizer=dataclasses.replace(made.optimizer, schedule="constant", warmup=0.0),
        loop=RLLoopConfig(keep=1, save_every=config.steps, eval_every=config.steps),
    )


def _driver(
    config: MetaRoundsStudyConfig,
    root: pathlib.Path,
    plain: reward.RewardConfig,
    part: rloo.RlooConfig,
    name: str,
) -> meta_rounds.MetaRoundsConfig:
    """The meta-rounds run: its parts have the control's settings, from YAML files."""
    common = ("batch_size", "steps", "rows", "optimizer", "loop", "compute")
    meta = meta_reward.MetaRewardConfig(
        run_dir="set by meta-rounds",
        model=plain.model,
        data=plain.data,
        shifted=["set by meta-rounds"],
        inner=meta_reward.InnerConfig(learning_rate=config.inner_step, normalise=True),
        **{key: getattr(plain, key) for key in common},
    )
    files = {"meta": meta, "rloo": part}
    for kind, settings in files.items():
        write_atomic(root / f"{kind}-{name}.yaml", configs.dump(settings))
    return meta_rounds.MetaRoundsConfig(
        run_dir=str(root / f"rounds-{name}"),
        policy=str(root / "sft"),
        reward_start=str(root / "sft"),
        data=plain.data,
        prompts=part.data[0],
        meta_prompts=f"testbed:rl?size={config.meta_prompts}&seed={100 + plain.seed}",
        rounds=config.rounds,
        rl_config=str(root / f"rloo-{name}.yaml"),
        meta_config=str(root / f"meta-{name}.yaml"),
        eval_data=plain.eval_data,
        eval_prompts=part.eval_data,
        gold=GOLD,
        batch_size=64,
        sampling=SamplingConfig(num_samples=config.samples, max_new_tokens=48),
        seed=100 * plain.seed,
    )


def _judged(rows: list[dict[str, Any]]) -> list[float]:
    """Gold reward of held-out prompts: before, and after each evaluation."""
    return [row["eval/val/gold"] for row in rows if "eval/val/gold" in row]


def _parts(rows: list[dict[str, Any]], steps: int) -> list[list[dict[str, Any]]]:
    taken = [row for row in rows if "policy/kl" in row]
    return [taken[n : n + steps] for n in range(0, len(taken), steps)]


def _kl(rows: list[dict[str, Any]]) -> float:
    found = [row["policy/kl"] for row in rows if "policy/kl" in row]
    return float(np.mean(found[-LAST_STEPS:]))


def _agreement(model: str, path: pathlib.Path) -> float:
    """Share of a round's pairs of completions that a reward model orders as gold."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines]
    scorer = open_scorer(model, ScoringConfig())
    encoded = [
        scorer.encoder.encode(row["prompt"], response["text"])
        for row in rows
        for response in row["responses"]
    ]
    rewards = scorer.rewards(encoded).reshape(len(rows), -1)
    gold = [np.array([r["score"] for r in row["responses"]]) for row in rows]
    return evaluate_ranking(list(rewards), gold, samples=2)["accuracy"]


def _table(found: list[dict[str, Any]], title: str) -> Table:
    """Means over seeds, round by round, and what the last round differs in."""
    table = Table(title=title, show_lines=True)
    for name in ("", "round", "BT, once", "MetaRM, each round", "difference, paired"):
        table.add_column(name, justify="right" if name else "left")
    for key, meaning in (
        ("gold", "gold reward, held-out prompts"),
        ("kl", "KL to SFT (nats)"),
        ("agreement", "agreement with gold on the round's completions"),
    ):
        first = 0 if key == "gold" else 1
        for n in range(len(found[0]["BT"][key])):
            values = {arm: [r[arm][key][n] for r in found] for arm in ("BT", "MetaRM")}
            table.add_row(
                meaning if n == 0 else "",
                str(n + first),
                interval(values["BT"]).plain(),
                interval(values["MetaRM"]).plain(),
                str(paired(values["MetaRM"], values["BT"])),
            )
    return table
