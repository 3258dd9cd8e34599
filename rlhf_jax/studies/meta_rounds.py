"""`rlhf-jax study meta-rounds`: four rounds of MetaRM and RLOO, with clean labels and
with a quarter of them flipped, beside the same rounds under Bradley-Terry models.

For every seed and noise the driver `meta-rounds` samples, meta-trains and runs RLOO in
turns. The control does the same without the meta set: each round a new reward model
from the same start, seed and pairs, then RLOO from its own last policy. So what is
compared is the meta objective alone, and not that a reward model is replaced each
round. After each round: gold reward on held-out prompts, KL to the SFT policy, and how
many pairs of completions of other prompts, sampled from both arms' policies before the
round, each arm's reward model orders as the gold reward does.

Source: Wang et al. 2024, arXiv:2401.06080, section 4.2; Dou et al. 2024,
arXiv:2405.00438.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import meta_reward, meta_rounds, reward, rloo, sft
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.studies.quickstart import (
    GOLD,
    QuickstartConfig,
    reward_config,
    rloo_config,
    sft_config,
)
from rlhf_jax.studies.samples import agreement, sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.statistics import interval, paired

JUDGED = 128
"""Held-out prompts, with four completions each, that judge the reward models."""
LAST_STEPS = 5
"""Over which the KL at the end of a round is averaged."""


@dataclasses.dataclass(frozen=True)
class MetaRoundsStudyConfig:
    """Rounds of MetaRM and RLOO beside rounds without the meta objective."""

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
    driver = _driver(config, root, base, name)
    meta_rounds.run(driver)
    numbers = range(1, config.rounds + 1)
    plain = [root / f"plain-{name}" / f"round-{number}" for number in numbers]
    for number, folder in zip(numbers, plain):
        _plain_round(base, driver, folder, number)
    arms = {"BT": plain, "MetaRM": [driver.folder(number) for number in numbers]}
    # Other prompts than those of any meta set.
    held_out, samples = f"testbed:rl_val?size={JUDGED}&seed={200 + seed}", []
    for folders in arms.values():
        policies = [root / "sft", *(folder / "rloo" for folder in folders[:-1])]
        samples.append(
            [
                sample(policy, folder / "held-out.jsonl", held_out, samples=4)
                for folder, policy in zip(folders, policies, strict=True)
            ]
        )
    return {
        arm: {
            "gold": [_gold(folders[0])[0], *(_gold(folder)[-1] for folder in folders)],
            "kl": [_kl(folder) for folder in folders],
            "agreement": [
                agreement(str(folder / "reward"), judged)
                for folder, *judged in zip(folders, *samples, strict=True)
            ],
        }
        for arm, folders in arms.items()
    }


def _plain_round(
    base: QuickstartConfig,
    driver: meta_rounds.MetaRoundsConfig,
    folder: pathlib.Path,
    number: int,
) -> None:
    """A round of the control: what the driver's round does, but for the meta set."""
    meta, rl = driver.meta_of(number), driver.rl_of(number)
    before = folder.with_name(f"round-{number - 1}") / "rloo"
    trained = dataclasses.replace(
        reward_config(base),
        run_dir=str(folder / "reward"),
        model=meta.model,
        eval_data=meta.eval_data,
        seed=meta.seed,
    )
    once(reward.run, trained)
    policy = dataclasses.replace(
        rl,
        run_dir=str(folder / "rloo"),
        model=driver.policy if number == 1 else str(before),
        reward=[trained.run_dir],
    )
    once(rloo.run, policy)


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
    base: QuickstartConfig,
    name: str,
) -> meta_rounds.MetaRoundsConfig:
    """The meta-rounds run; its parts have the settings of the control's."""
    plain, part = reward_config(base), _rloo(config, base)
    common = ("batch_size", "steps", "rows", "optimizer", "loop", "compute")
    meta = meta_reward.MetaRewardConfig(
        run_dir="set by meta-rounds",
        model=plain.model,
        data=plain.data,
        shifted=["set by meta-rounds"],
        inner=meta_reward.InnerConfig(learning_rate=config.inner_step, normalise=True),
        **{key: getattr(plain, key) for key in common},
    )
    for kind, settings in (("meta", meta), ("rloo", part)):
        write_atomic(root / f"{kind}-{name}.yaml", configs.dump(settings))
    return meta_rounds.MetaRoundsConfig(
        run_dir=str(root / f"rounds-{name}"),
        policy=str(root / "sft"),
        reward_start=str(root / "sft"),
        data=plain.data,
        prompts=part.data[0],
        meta_prompts=f"testbed:rl?size={config.meta_prompts}&seed={100 + base.seed}",
        rounds=config.rounds,
        rl_config=str(root / f"rloo-{name}.yaml"),
        meta_config=str(root / f"meta-{name}.yaml"),
        eval_data=plain.eval_data,
        eval_prompts=part.eval_data,
        gold=GOLD,
        batch_size=64,
        sampling=SamplingConfig(num_samples=config.samples, max_new_tokens=48),
        seed=100 * base.seed,
    )


def _gold(folder: pathlib.Path) -> list[float]:
    """Gold reward of held-out prompts before and after a round's RLOO."""
    rows = read(folder / "rloo")
    return [row["eval/val/gold"] for row in rows if "eval/val/gold" in row]


def _kl(folder: pathlib.Path) -> float:
    found = [row["policy/kl"] for row in read(folder / "rloo") if "policy/kl" in row]
    return float(np.mean(found[-LAST_STEPS:]))


def _table(found: list[dict[str, Any]], title: str) -> Table:
    """Means over seeds, round by round, and what the last round differs in."""
    table = Table(title=title, show_lines=True)
    for name in ("", "round", "BT", "MetaRM", "difference, paired"):
        table.add_column(name, justify="right" if name else "left")
    for key, meaning in (
        ("gold", "gold reward, held-out prompts"),
        ("kl", "KL to SFT (nats)"),
        ("agreement", "agreement with gold on held-out completions"),
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
