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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.programs import seam, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.seam_scoring import Line
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import by_seed, once, study_dir
from rlhf_jax.studies.stages import reward_model
from rlhf_jax.studies.statistics import interval
from rlhf_jax.testbed.gold import gold

OTHERS: dict[Estimator, str] = {
    "contrast": "gold of other prompts (contrast)",
    "given": "known corruptions (given)",
    "perturb": "random perturbations (perturb)",
}
ATTACKS = {
    "greedy, 1 edit": AttackConfig(max_edits=1),
    "greedy, 30 %": AttackConfig(budget=0.3),
    "greedy, 60 %": AttackConfig(budget=0.6),
    "beam of 4, 30 %": AttackConfig(budget=0.3, beam=4),
}
MEANING = {
    "found": "prompts with a completion",
    "success": "prompts with a misjudged one",
    "misjudged": "completions misjudged",
    "logprob": "log p a token",
    "gap": "best: reward above gold's",
    "gold": "best: gold reward",
    "best_logprob": "best: log p a token",
}
"""The figures of a method; the best is a prompt's completion of the highest reward."""


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
    """Attacks what is not attacked yet; writes study.json; prints the table."""
    with study_dir(config) as root:
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
        )
        once(sft.run, sft_config(base))
        found = by_seed(root, config.seeds, lambda seed: _one(config, base, root, seed))
    Console(width=130).print(table(found))
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

    methods = dict(zip(OTHERS.values(), lines(0, list(OTHERS)), strict=True))
    for number, (name, attack) in enumerate(ATTACKS.items(), start=1):
        (methods[name],) = lines(number, ["attack"], attack=attack)
    return figures(methods)


def figures(methods: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """MEANING's figures of each method, on the same prompts.

    Args:
        methods: lines of `seam_scoring.score_part`, one a prompt, in one order.

    Returns:
        `scorable`, how many prompts have a gold completion that both models take, of
        which found and success are shares; `common`, how many of them have a completion
        by every method, over which the rest are means; `gold_logprob` a token of their
        gold completions; `methods`.

    Raises:
        ValueError: no prompt has a completion by every method; says how many each has.
    """
    scorable = [
        n
        for n, line in enumerate(next(iter(methods.values())))
        if line["gold_reward"] is not None
    ]
    has = {
        name: [n for n in scorable if lines[n]["worse"]]
        for name, lines in methods.items()
    }
    common = sorted(set(scorable).intersection(*has.values()))
    if not common:
        counts = ", ".join(f"{name} {len(found)}" for name, found in has.items())
        raise ValueError(
            f"attacks: none of {len(scorable)} prompts has a worse completion by every "
            f"method, so nothing can be compared; prompts with one: {counts}"
        )
    return {
        "scorable": len(scorable),
        "common": len(common),
        "gold_logprob": float(
            np.mean(
                [
                    line["gold_logprob"] / line["gold_num_tokens"]
                    for line in (next(iter(methods.values()))[n] for n in common)
                ]
            )
        ),
        "methods": {
            name: {
                "found": len(has[name]) / len(scorable),
                "success": sum(_misjudged(lines[n]) > 0 for n in has[name])
                / len(scorable),
                **_means([lines[n] for n in common]),
            }
            for name, lines in methods.items()
        },
    }


def _means(lines: Sequence[Line]) -> dict[str, float]:
    best = [max(line["worse"], key=lambda each: each["reward"]) for line in lines]
    pairs = list(zip(lines, best, strict=True))
    return {
        "misjudged": float(np.mean([_misjudged(line) for line in lines])),
        "logprob": float(
            np.mean([np.mean([_a_token(w) for w in line["worse"]]) for line in lines])
        ),
        "gap": float(np.mean([b["reward"] - line["gold_reward"] for line, b in pairs])),
        "gold": float(np.mean([gold(line["prompt"], b["text"]) for line, b in pairs])),
        "best_logprob": float(np.mean([_a_token(b) for b in best])),
    }


def _misjudged(line: Line) -> float:
    """Share of the prompt's completions."""
    return float(np.mean([each["misjudged"] for each in line["worse"]]))


def _a_token(worse: Mapping[str, Any]) -> float:
    return worse["logprob"] / worse["num_tokens"]


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The methods, means over seeds.

    Args:
        found: from `figures`, one a seed.
    """
    shown = Table(title=f"attacks on {len(found)} reward models", show_lines=True)
    shown.add_column("")
    for title in MEANING.values():
        shown.add_column(title, justify="right")
    for name in found[0]["methods"]:
        rows = [result["methods"][name] for result in found]
        columns = ([row[key] for row in rows] for key in MEANING)
        shown.add_row(name, *(interval(values).plain() for values in columns))
    scorable, common = (sum(f[name] for f in found) for name in ("scorable", "common"))
    gold_logprob = interval([result["gold_logprob"] for result in found])
    shown.caption = (
        f"means and 95 % intervals over seeds. The first two columns: shares of all "
        f"{scorable:,} prompts with a gold completion that both models take; the "
        f"others: means over the {common:,} of them with a completion by every method. "
        f"Best: the completion with the highest reward. Gold completions: "
        f"{gold_logprob.plain()} log p a token. `given` stands in for `generate`: the "
        "testbed's policy does not follow a writer's instruction"
    )
    return shown
