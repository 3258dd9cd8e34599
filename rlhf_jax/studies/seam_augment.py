"""`rlhf-jax study seam-augment`: training rows of the prompts of the lowest SEAM.

For every seed an SFT policy and a reward model, and their SEAM on the RL prompts, which
are cut into two halves. Of the first, SFT rows and pairs are made as `seam-augment`
makes them: of the lowest prompts (guided) and as many of random ones (random, the
control). With these the policy, the reward model or both are trained again; then RLOO,
on the same prompts in every arm. Gold reward on held-out prompts, and what became of
the pair before RL: its risk is measured on the second half, of which no arm has a row.

The primary comparison, the only one with a p value, is gold after RLOO, guided rows
against random ones, both policy and reward model taught.

What is equal in all arms: optimizer steps, rows of a step, seeds and orders, and the
base. A policy is trained anew, from the weights that the first one started from; a
reward model from the first policy. In `share` of the places of its stream added rows
stand, and elsewhere its own; without added rows all are its own. So an arm never has
more training than another. Random rows show what more gold completions are worth, and
guided rows beside them what SEAM is.

Source: arXiv:2406.07971, section on augmentation; how the paper built its rows is not
published, see `curation.seam.augment`.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax.programs import reward, rloo, seam, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies.augment_rows import FILES, count_rows, make_rows, remembered
from rlhf_jax.studies.augment_tables import difference_table, row_table, table
from rlhf_jax.studies.quickstart import QuickstartConfig, reward_config, sft_config
from rlhf_jax.studies.samples import agreement, sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.stages import ESTIMATORS, judged_rloo, summarise

ROWS = ("none", *FILES)
ARMS = {
    "none": ("none", "none"),
    **{f"policy, {rows}": (rows, "none") for rows in FILES},
    **{f"reward model, {rows}": ("none", rows) for rows in FILES},
    **{f"both, {rows}": (rows, rows) for rows in FILES},
}
"""Name -> (rows added for the policy, rows added for the reward model)."""
JUDGED = 128
"""Held-out prompts, four completions each, on which a pair's agreement with gold is
measured."""


@dataclasses.dataclass(frozen=True)
class SeamAugmentStudyConfig:
    """Policy and reward model trained on rows of the prompts of the lowest SEAM."""

    run_dir: str = "runs/seam-augment"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Policies, each with its reward models and RLOO runs."""
    prompts: int = 1000
    """RL prompts."""
    estimator: Estimator = "contrast"
    """Whose scores choose the prompts."""
    lowest: float = 0.4
    """Share of the prompts of a half that counts as lowest: rows are made of it in the
    first half, and risk is measured on it in the second."""
    pairs: int = 4
    """Most pairs of a prompt."""
    share: float = 0.1
    """Share of the rows in training that are added ones."""
    sft_steps: int = 500
    """Optimizer steps of each SFT policy."""
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
        if not 0 < self.lowest <= 0.5 or self.pairs < 1:
            raise ValueError(
                f"lowest {self.lowest}, pairs {self.pairs}: expected a share in "
                "(0, 0.5], as many prompts being left to compare with, and at least 1"
            )
        if round(self.lowest * (self.prompts // 2)) < 1:
            raise ValueError(
                f"prompts {self.prompts}: the lowest {self.lowest:g} of a half is no "
                "prompt; take more prompts or a larger share"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected a share in (0, 1), got {self.share}")


def run(config: SeamAugmentStudyConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the tables."""
    with study_dir(config) as root:
        found = by_seed(root, config.seeds, lambda seed: _one(config, root, seed))
    console = Console(width=130)
    arms = [result["arms"] for result in found]
    console.print(row_table([result["rows"] for result in found]))
    for part in ("policy", "pair"):
        console.print(table(arms, part))
    console.print(difference_table(arms))
    return {"seeds": found}


def _one(
    config: SeamAugmentStudyConfig, root: pathlib.Path, seed: int
) -> dict[str, dict[str, Any]]:
    """arms: the numbers of each; rows: numbers of the added rows."""
    base = QuickstartConfig(
        run_dir=str(root),
        sft_steps=config.sft_steps,
        reward_steps=config.reward_steps,
        rloo_steps=config.steps,
        seed=seed,
    )
    policies: dict[str, pathlib.Path] = {}
    models: dict[str, pathlib.Path] = {}
    for rows in ROWS:
        policies[rows] = once(sft.run, policy_config(base, rows, config.share))
        models[rows] = once(reward.run, model_config(base, rows, config.share))
        if rows == "none":
            _augment(config, root / f"seam-{seed}", policies[rows], models[rows], seed)
    arms = _arms(config, root, base, policies, models)
    return {"arms": arms, "rows": count_rows(root / f"seam-{seed}")}


def _arms(
    config: SeamAugmentStudyConfig,
    root: pathlib.Path,
    base: QuickstartConfig,
    policies: dict[str, pathlib.Path],
    models: dict[str, pathlib.Path],
) -> dict[str, dict[str, float]]:
    """RLOO of each arm, and its numbers."""
    found = {}
    for name in ARMS:
        path = once(rloo.run, arm_config(base, name, config.kl_coef))
        found[name] = summarise(read(path))
        found[name]["gain"] = found[name]["gold"] - found["none"]["gold_before"]
    for name, numbers in _pairs(config, root, base.seed, policies, models).items():
        found[name] |= numbers
    return found


def _pairs(
    config: SeamAugmentStudyConfig,
    root: pathlib.Path,
    seed: int,
    policies: dict[str, pathlib.Path],
    models: dict[str, pathlib.Path],
) -> dict[str, dict[str, float]]:
    """What each arm's policy and reward model are before RLOO."""
    measured = root / f"seam-{seed}"
    # Prompts of a pool that no training set is of.
    held_out = f"testbed:rl_val?size={JUDGED}&seed={200 + seed}"
    samples = {
        rows: sample(of, measured / f"samples-{rows}.jsonl", held_out, samples=4)
        for rows, of in policies.items()
    }
    again = remembered(measured, config.lowest, seed)
    found = {}
    for name, (of_policy, of_model) in ARMS.items():
        policy, model = policies[of_policy], models[of_model]
        found[name] = {
            "agreement": agreement(str(model), [samples[of_policy]]),
            **_accuracies(model),
            **_risks(root / f"again-{slug(name)}-{seed}", policy, model, again),
        }
    return found


def slug(name: str) -> str:
    """An arm's name in those of directories."""
    return name.replace(", ", "-").replace(" ", "-")


def policy_config(base: QuickstartConfig, rows: str, share: float) -> sft.SftConfig:
    """The policy with some added rows; the last step's is the one that counts."""
    made = sft_config(base)
    return dataclasses.replace(
        made,
        run_dir=f"{base.run_dir}/sft-{rows}-{base.seed}",
        data=_mixture(base, made.data, rows, share, place=0),
        loop=LoopConfig(eval_every=base.sft_steps, keep=1),
    )


def model_config(
    base: QuickstartConfig, rows: str, share: float
) -> reward.RewardConfig:
    """The reward model with some added rows, on the policy without any."""
    made = reward_config(base)
    new = f"testbed:val_prompt_ood?size={base.eval_rows}&seed={base.seed}"
    return dataclasses.replace(
        made,
        run_dir=f"{base.run_dir}/reward-{rows}-{base.seed}",
        model=f"{base.run_dir}/sft-none-{base.seed}",
        data=_mixture(base, made.data, rows, share, place=1),
        eval_data=[*made.eval_data, f"new={new}"],
        loop=LoopConfig(eval_every=base.reward_steps, keep=1),
    )


def _mixture(
    base: QuickstartConfig, own: list[str], rows: str, share: float, *, place: int
) -> list[str]:
    if rows == "none":
        return own
    added = f"{base.run_dir}/seam-{base.seed}/rows/{FILES[rows][place]}"
    return [*(f"{1 - share:g}*{spec}" for spec in own), f"{share:g}*{added}"]


def arm_config(base: QuickstartConfig, name: str, kl_coef: float) -> rloo.RlooConfig:
    """RLOO of an arm's policy under its reward model."""
    of_policy, of_model = ARMS[name]
    return judged_rloo(
        base,
        f"rloo-{slug(name)}-{base.seed}",
        f"{base.run_dir}/reward-{of_model}-{base.seed}",
        kl_coef=kl_coef,
        model=f"{base.run_dir}/sft-{of_policy}-{base.seed}",
        data=[f"{base.run_dir}/seam-{base.seed}/prompts.jsonl"],
    )


def _augment(
    config: SeamAugmentStudyConfig,
    measured: pathlib.Path,
    policy: pathlib.Path,
    model: pathlib.Path,
    seed: int,
) -> None:
    """SEAM of the first pair, and rows of both kinds of the first half."""
    seam.run(
        seam.SeamConfig(
            run_dir=str(measured),
            policy=str(policy),
            reward=str(model),
            data=[f"testbed:worse?size={config.prompts}&count=10&seed={seed}"],
            estimators=[config.estimator],
            attack=AttackConfig(count=10),
            seed=seed,
        )
    )
    make_rows(measured, config.lowest, config.pairs, seed)


def _risks(
    run_dir: pathlib.Path, policy: pathlib.Path, model: pathlib.Path, data: pathlib.Path
) -> dict[str, float]:
    """Mean risk of a pair on the lowest prompts of the second half, and on others of
    it: finite, unlike SEAM, where nothing is misjudged."""
    seam.run(
        seam.SeamConfig(
            run_dir=str(run_dir),
            policy=str(policy),
            reward=str(model),
            data=[str(data)],
            estimators=["given"],
        )
    )
    lines = seam.read_scores(str(run_dir / "seam.jsonl"))
    kinds = [row["lowest"] for row in read_jsonl(run_dir / "prompts.jsonl")]
    lowest = np.array([kinds[line["index"]] for line in lines])
    risk = np.array([line["risk"] for line in lines])
    return {
        "risk_lowest": float(risk[lowest].mean()),
        "risk_others": float(risk[~lowest].mean()),
    }


def _accuracies(model: pathlib.Path) -> dict[str, float]:
    """Of a reward model on held-out pairs, after its last step."""
    last = [row for row in read(model) if "eval/id/accuracy" in row][-1]
    return {
        "accuracy": last["eval/id/accuracy"],
        "accuracy_new": last["eval/new/accuracy"],
    }
