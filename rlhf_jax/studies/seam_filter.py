"""`rlhf-jax study seam-filter`: RL without the prompts of the lowest SEAM.

For every seed one reward model; SEAM of the SFT policy and that model on the RL prompts
by four estimators; RLOO on all prompts, without the lowest share by one estimator, and
without as many random prompts. Gold reward on held-out prompts; how SEAM ranks the
prompts by what RL then does to their gold reward; and how often the reward model
misorders completions of the policy, before and after RL, beside held-out pairs.

Source: arXiv:2406.07971, sections 4 to 6.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table

from rlhf_jax.curation.seam import scores
from rlhf_jax.programs import rloo, seam, seam_select, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.scored_rows import read_jsonl, write_whole
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.samples import agreement, sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.stages import ESTIMATORS, judged_rloo, reward_model, summarise
from rlhf_jax.studies.statistics import interval, paired
from rlhf_jax.testbed.rows import rows as testbed_rows

SAMPLES = 4
"""Completions of each RL prompt before and after RL."""


@dataclasses.dataclass(frozen=True)
class SeamFilterConfig:
    """RLOO on prompts selected by SEAM."""

    run_dir: str = "runs/seam-filter"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Reward models, and RLOO runs of each selection."""
    prompts: int = 1000
    """RL prompts."""
    drop: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    """Shares dropped by SEAM."""
    random_drop: tuple[float, ...] = (0.2, 0.4)
    """Shares dropped at random, the control."""
    estimator: Estimator = "contrast"
    """Whose scores select."""
    sft_steps: int = 500
    """Optimizer steps of the one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each reward model."""
    steps: int = 60
    """RLOO steps of 32 prompts."""
    kl_coef: float = 0.1
    """Weight of the KL penalty."""

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator {self.estimator}: expected one of {', '.join(ESTIMATORS)}"
            )
        if not set(self.random_drop) <= set(self.drop):
            raise ValueError(
                f"random_drop {self.random_drop}: expected some of drop {self.drop}"
            )


def run(config: SeamFilterConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the tables."""
    with study_dir(config) as root:
        base = QuickstartConfig(
            run_dir=config.run_dir,
            sft_steps=config.sft_steps,
            reward_steps=config.reward_steps,
            rloo_steps=config.steps,
        )
        once(sft.run, sft_config(base))
        found = by_seed(root, config.seeds, lambda seed: _one(config, base, root, seed))
    console = Console(width=120)
    console.print(_rl_table([result["rl"] for result in found]))
    console.print(_estimator_table([result["estimators"] for result in found]))
    console.print(_mismatch_table([result["mismatch"] for result in found]))
    return {"seeds": found}


def _one(
    config: SeamFilterConfig, base: QuickstartConfig, root: pathlib.Path, seed: int
) -> dict[str, Any]:
    base = dataclasses.replace(base, seed=seed)
    policy = root / "sft"
    model = reward_model(base, f"reward-{seed}")
    measured = root / f"seam-{seed}"
    seam.run(
        seam.SeamConfig(
            run_dir=str(measured),
            policy=str(policy),
            reward=str(model),
            data=[f"testbed:worse?size={config.prompts}&count=10&seed={seed}"],
            estimators=list(ESTIMATORS),
            attack=AttackConfig(count=10),
            seed=seed,
        )
    )
    seam_select.run(
        seam_select.SeamSelectConfig(
            run_dir=str(measured),
            out=str(measured / "selected"),
            drop=list(config.drop),
            estimator=config.estimator,
            overwrite=True,
            seed=seed,
        )
    )
    chosen = {"all": measured / "prompts.jsonl"}
    for kind, shares in (("seam", config.drop), ("random", config.random_drop)):
        for share in shares:
            name = f"{kind}-{share:g}"
            chosen[name] = measured / "selected" / f"{name}.jsonl"
    policies = {
        name: once(
            rloo.run,
            judged_rloo(
                base,
                f"rloo-{name}-{seed}",
                model,
                kl_coef=config.kl_coef,
                data=[str(prompts)],
            ),
        )
        for name, prompts in chosen.items()
    }
    samples = {
        name: sample(
            of,
            measured / f"samples-{name}.jsonl",
            str(measured / "prompts.jsonl"),
            samples=SAMPLES,
        )
        for name, of in (("before", policy), ("after", policies["all"]))
    }
    held_out = measured / "held-out.jsonl"
    write_whole(held_out, testbed_rows("quads_val_id", size=400, seed=seed))
    judged = {"held-out": held_out, **samples}
    return {
        "rl": {name: summarise(read(of)) for name, of in policies.items()},
        "estimators": _estimators(
            seam.read_scores(str(measured / "seam.jsonl")),
            {name: read_jsonl(path) for name, path in samples.items()},
        ),
        "mismatch": {
            name: 1 - agreement(str(model), [path]) for name, path in judged.items()
        },
    }


def _estimators(
    lines: list[dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, float]]:
    """Each estimator's figures, and its rank correlation with the gain in gold."""
    gold = {
        name: {row["prompt"]: np.mean([r["score"] for r in row["responses"]])
               for row in rows}
        for name, rows in samples.items()
    }  # fmt: skip
    found = {}
    for name in ESTIMATORS:
        mine = [line for line in lines if line["estimator"] == name]
        both = [
            line for line in mine if all(line["prompt"] in g for g in gold.values())
        ]
        seam_of = scores.ranks(np.array([scores.of_line(line) for line in both]))
        before, after = (
            np.array([gold[when][line["prompt"]] for line in both])
            for when in ("before", "after")
        )
        worse = [each for line in mine for each in line["worse"]]
        found[name] = {
            "gain": _spearman(seam_of, after - before),
            "before": _spearman(seam_of, before),
            "misjudged": float(np.mean([each["misjudged"] for each in worse])),
            "logprob": float(
                np.mean([each["logprob"] / each["num_tokens"] for each in worse])
            ),
        }
    return found


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    result: Any = scipy.stats.spearmanr(first, second)
    return float(result.statistic)


def _rl_table(found: list[dict[str, dict[str, float]]]) -> Table:
    table = Table(
        title=f"RLOO on selected prompts, {len(found)} seeds", show_lines=True
    )
    names = {
        "gold": "gold, held-out prompts",
        "gold_gain": "gain over SFT",
        "kl": "KL to SFT",
    }
    table.add_column("prompts")
    for title in names.values():
        table.add_column(title, justify="right")
    for name in found[0]:
        cells = []
        for key in names:
            values = [result[name][key] for result in found]
            base = [result["all"][key] for result in found]
            against = "" if name == "all" else f"\n{paired(values, base)}"
            cells.append(f"{interval(values).plain()}{against}")
        table.add_row(name, *cells)
    return table


def _estimator_table(found: list[dict[str, dict[str, float]]]) -> Table:
    table = Table(title="estimators")
    names = {
        "gain": "Spearman with gain in gold",
        "before": "with gold before RL",
        "misjudged": "misjudged",
        "logprob": "log p a token",
    }
    table.add_column("estimator")
    for title in names.values():
        table.add_column(title, justify="right")
    for name in ESTIMATORS:
        values = ([result[name][key] for result in found] for key in names)
        table.add_row(name, *(interval(each).plain() for each in values))
    return table


def _mismatch_table(found: list[dict[str, float]]) -> Table:
    table = Table(title="pairs that the reward model misorders")
    for name in ("of", "rate", "above held-out"):
        table.add_column(name, justify="left" if name == "of" else "right")
    base = [result["held-out"] for result in found]
    for name, title in (
        ("held-out", "held-out completions of the training styles"),
        ("before", "completions of the SFT policy"),
        ("after", "completions after RLOO on all prompts"),
    ):
        values = [result[name] for result in found]
        against = "" if name == "held-out" else str(paired(values, base))
        table.add_row(title, interval(values).plain(), against)
    return table
