"""`rlhf-jax study attacks`: searches that know the reward model beside estimators that
do not, and what the policy thinks of what they find.

For every seed one reward model, and the same RL prompts for each method: seam's other
estimators, and attacks of growing budget. How often a method finds a
completion that the reward model prefers to gold, how far above, how good that is by the
gold reward, and how likely the policy writes it: an attack that no policy would write
says little about RL.

The estimator generate needs a writer that does what it is told. The testbed's policy
does not: asked for a worse answer it writes unrelated words. `given`, the testbed's
known corruptions, stands in its stead; with `writer` generate is there too.

By default everything is the testbed's. With `policy` and `reward` ready checkpoints are
attacked, on any prompts with gold completions.

A method may find nothing for a prompt. Success is therefore a share of all prompts
whose gold completion can be scored; the other figures are means over the prompts that
every method has a completion of, the same for all.

Source: arXiv:2406.07971, section on the three estimators; Ebrahimi et al. 2018,
arXiv:1712.06751.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from rlhf_jax.programs import seam, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.rewards import Rewards, open_rewards, parse_spec
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam_scoring import Line
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.programs.writer import WriterConfig
from rlhf_jax.studies import attacks_figures
from rlhf_jax.studies.quickstart import GOLD, QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import by_seed, once, study_dir
from rlhf_jax.studies.stages import reward_model

Measured: TypeAlias = list[list[Line]]
"""For each estimator its lines, one a prompt."""
ATTACKS = {
    "greedy, 1 edit": AttackConfig(max_edits=1),
    "greedy, 30 %": AttackConfig(budget=0.3),
    "greedy, 60 %": AttackConfig(budget=0.6),
    "beam of 4, 30 %": AttackConfig(budget=0.3, beam=4),
}


@dataclasses.dataclass(frozen=True)
class AttacksConfig:
    """Attacks on reward models, side by side."""

    run_dir: str = "runs/attacks"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Reward models."""
    prompts: int = 200
    """RL prompts of each, if they are the testbed's."""
    sft_steps: int = 500
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""
    policy: str | None = None
    """A ready policy, with reward: run directory, HF directory, hub id or .gguf; null =
    it is trained on the testbed, and so are the reward models."""
    reward: list[str] = dataclasses.field(default_factory=list)
    """Ready reward models, with policy, at least as many as seeds."""
    data: list[str] = dataclasses.field(default_factory=list)
    """Prompts with gold completions, SPEC, for ready models; repeat for several; none =
    the testbed's, others for each seed."""
    gold_column: str = "gold_completion"
    """Column of the gold completion; `chosen` for pairs."""
    gold: str | None = None
    """Reward that judges the completions, [WEIGHT*]SPEC; null = the testbed's on its
    prompts, on others none."""
    writer: WriterConfig = WriterConfig()
    """Who writes the completions of generate; nobody = there are none."""
    scoring: ScoringConfig = ScoringConfig()
    """How both models read texts."""

    def __post_init__(self) -> None:
        if (self.policy is None) != (not self.reward):
            raise ValueError(
                f"policy {self.policy}, reward {self.reward}: expected both, ready "
                "models that fit together, or neither, to train them on the testbed"
            )
        if self.reward and len(self.reward) < self.seeds:
            raise ValueError(
                f"reward: expected {self.seeds} reward models, one a seed, got "
                f"{len(self.reward)}; name more, or set seeds to {len(self.reward)}"
            )
        if self.data and self.policy is None:
            raise ValueError(
                f"data {self.data}: models of the testbed read its prompts alone; name "
                "ready ones with policy and reward, or leave data out"
            )
        if self.gold is not None:
            parse_spec(self.gold)
        for spec in self.reward:
            # It refuses rewards that cannot be attacked.
            seam.SeamConfig(
                run_dir=self.run_dir,
                policy=str(self.policy),
                reward=spec,
                data=["-"],
                estimators=["attack"],
            )

    @property
    def on_testbed(self) -> bool:
        """Whether all prompts are the testbed's."""
        return all(spec.startswith("testbed:") for spec in self.data)

    @property
    def others(self) -> list[Estimator]:
        """The estimators that do not attack."""
        writes = self.writer.model or self.writer.chat.base_url
        return [
            "contrast",
            *(["generate"] if writes else []),
            *([] if self.data else ["given"]),
            "perturb",
        ]


def run(config: AttacksConfig) -> dict[str, Any]:
    """Attacks what is not attacked yet; writes study.json and a plot; prints the
    table."""
    with study_dir(config) as root:
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
        )
        if config.policy is None:
            once(sft.run, sft_config(base))
        gold = functools.cache(lambda: _open_gold(config))
        found = by_seed(
            root, config.seeds, lambda seed: _one(config, base, root, seed, gold())
        )
        attacks_figures.plot(found, root / "plots" / "attacks.png")
    Console(width=140).print(attacks_figures.table(found))
    return {"seeds": found}


def _open_gold(config: AttacksConfig) -> Rewards | None:
    spec = config.gold or (GOLD if config.on_testbed else None)
    if spec is None:
        return None
    return open_rewards([spec], scoring=config.scoring, timeout_s=60.0)


def _one(
    config: AttacksConfig,
    base: QuickstartConfig,
    root: pathlib.Path,
    seed: int,
    gold: Rewards | None,
) -> dict[str, Any]:
    if config.policy is None:
        policy = str(root / "sft")
        model = str(
            reward_model(dataclasses.replace(base, seed=seed), f"reward-{seed}")
        )
    else:
        policy, model = config.policy, config.reward[seed]
    testbed = [f"testbed:worse?size={config.prompts}&seed={seed}"]

    def measure(number: int, estimators: list[Estimator], **options: Any) -> Measured:
        """Of each estimator all prompts, also those without a completion."""
        done = seam.run(
            seam.SeamConfig(
                run_dir=str(root / f"seam-{number}-{seed}"),
                policy=policy,
                reward=model,
                data=config.data or testbed,
                gold_column=config.gold_column,
                estimators=estimators,
                scoring=config.scoring,
                seed=seed,
                **options,
            )
        )
        return [read_jsonl(done / f"scores-{name}.jsonl") for name in estimators]

    others = measure(0, config.others, writer=config.writer)
    methods = dict[str, list[Line]](zip(config.others, others, strict=True))
    for number, (name, attack) in enumerate(ATTACKS.items(), start=1):
        (methods[name],) = measure(number, ["attack"], attack=attack)
    rows = read_jsonl(root / f"seam-0-{seed}" / "prompts.jsonl")
    return attacks_figures.figures(methods, _judge(gold, rows))


def _judge(gold: Rewards | None, rows: Sequence[Line]) -> attacks_figures.Judge | None:
    """The gold rewards of completions of lines, whose rows functions may ask for."""
    if gold is None:
        return None

    def judge(lines: Sequence[Line], texts: Sequence[str]) -> np.ndarray:
        own = [rows[line["index"]] for line in lines]
        return gold([line["prompt"] for line in lines], texts, own).total

    return judge
