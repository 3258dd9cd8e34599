"""`rlhf-jax study attacks`: searches that know the reward model beside estimators that
do not, and what the policy thinks of what they find.

For every seed one reward model, and the same RL prompts for each method: three of
seam's other estimators, and attacks of growing budget. How often a method finds a
completion that the reward model prefers to gold, how far above, how good that is by the
gold reward, and how likely the policy writes it: an attack that no policy would write
says little about RL.

The estimator generate needs a writer that does what it is told. The testbed's policy
does not: asked for a worse answer it writes unrelated words. `given`, the testbed's
known corruptions, stands in its stead.

A method may find nothing for a prompt. Success is therefore a share of all prompts
whose gold completion can be scored; the other figures are means over the prompts that
every method has a completion of, the same for all.

Source: arXiv:2406.07971, section on the three estimators; Ebrahimi et al. 2018,
arXiv:1712.06751.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from rlhf_jax.programs import seam, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.seam_scoring import Line
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies import attacks_figures
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import by_seed, once, study_dir
from rlhf_jax.studies.stages import reward_model

OTHERS: tuple[Estimator, ...] = ("contrast", "given", "perturb")
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
    """RL prompts of each."""
    sft_steps: int = 500
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""


def run(config: AttacksConfig) -> dict[str, Any]:
    """Attacks what is not attacked yet; writes study.json and a plot; prints the
    table."""
    with study_dir(config) as root:
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
        )
        once(sft.run, sft_config(base))
        found = by_seed(root, config.seeds, lambda seed: _one(config, base, root, seed))
        attacks_figures.plot(found, root / "plots" / "attacks.png")
    Console(width=140).print(attacks_figures.table(found))
    return {"seeds": found}


def _one(
    config: AttacksConfig, base: QuickstartConfig, root: pathlib.Path, seed: int
) -> dict[str, Any]:
    model = reward_model(dataclasses.replace(base, seed=seed), f"reward-{seed}")

    def lines(
        number: int, estimators: Sequence[Estimator], **options: Any
    ) -> list[list[Line]]:
        """Of each estimator all prompts, also those without a completion."""
        measured = seam.run(
            seam.SeamConfig(
                run_dir=str(root / f"seam-{number}-{seed}"),
                policy=str(root / "sft"),
                reward=str(model),
                data=[f"testbed:worse?size={config.prompts}&seed={seed}"],
                estimators=list(estimators),
                seed=seed,
                **options,
            )
        )
        return [read_jsonl(measured / f"scores-{name}.jsonl") for name in estimators]

    methods = dict[str, list[Line]](zip(OTHERS, lines(0, OTHERS), strict=True))
    for number, (name, attack) in enumerate(ATTACKS.items(), start=1):
        (methods[name],) = lines(number, ["attack"], attack=attack)
    return attacks_figures.figures(methods)
