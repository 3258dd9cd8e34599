"""`rlhf-jax study seam-augment`: training rows of the prompts of the lowest SEAM.

For every seed an SFT policy and a reward model, and their SEAM on the RL prompts.
`seam-augment` makes SFT rows and pairs of the lowest prompts (guided) and as many of
random ones (random, the control). With these the policy, the reward model or both are
trained again; then RLOO, on the same prompts in every arm. Gold reward on held-out
prompts, and what became of the pair before RL.

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

from rlhf_jax.curation.seam import scores
from rlhf_jax.programs import reward, rloo, seam, seam_augment, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.scored_rows import read_jsonl, write_whole
from rlhf_jax.programs.seam_select import read_run
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies.augment_tables import difference_table, table
from rlhf_jax.studies.quickstart import QuickstartConfig, reward_config, sft_config
from rlhf_jax.studies.samples import agreement, sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.stages import ESTIMATORS, judged_rloo, summarise

FILES = {
    "random": ("random-sft.jsonl", "random-pairs.jsonl"),
    "guided": ("sft.jsonl", "pairs.jsonl"),
}
"""Added rows -> (their SFT rows, their pairs), files of `seam-augment`."""
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
WORSE = 10
"""Most worse completions of a prompt when the risk of a pair is measured again."""


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
    lowest: float = 0.2
    """Share of the prompts that rows are made of."""
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
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected a share in (0, 1), got {self.share}")


def run(config: SeamAugmentStudyConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json; prints the tables."""
    with study_dir(config) as root:
        found = by_seed(root, config.seeds, lambda seed: _one(config, root, seed))
    console = Console(width=130)
    for part in ("policy", "pair"):
        console.print(table(found, part))
    console.print(difference_table(found))
    return {"seeds": found}


def _one(
    config: SeamAugmentStudyConfig, root: pathlib.Path, seed: int
) -> dict[str, dict[str, float]]:
    """The numbers of each arm."""
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
    found = {}
    for name in ARMS:
        path = once(rloo.run, arm_config(base, name, config.kl_coef))
        found[name] = summarise(read(path))
        found[name]["gain"] = found[name]["gold"] - found["none"]["gold_before"]
    for name, numbers in _pairs(config, root, seed, policies, models).items():
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
    """SEAM of the first pair, and the rows of both kinds."""
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
    seam_augment.run(
        seam_augment.SeamAugmentConfig(
            run_dir=str(measured),
            out=str(measured / "rows"),
            lowest=config.lowest,
            pairs=config.pairs,
            overwrite=True,
            seed=seed,
        )
    )


def remembered(measured: pathlib.Path, share: float, seed: int) -> pathlib.Path:
    """A file of the lowest prompts of a `seam` run and as many others, with the worse
    completions of that run, so that other pairs can be measured on the same texts."""
    _, lines = read_run(str(measured), None)
    seam_of = np.array([scores.of_line(line) for line in lines])
    lowest = scores.lowest(seam_of, share, seed=seed)
    others = np.setdiff1d(np.arange(len(lines)), lowest)
    drawn = np.random.default_rng(seed).permutation(others)[: len(lowest)]
    path = measured / "again.jsonl"
    write_whole(
        path,
        (
            {
                "prompt": lines[n]["prompt"],
                "gold_completion": lines[n]["gold"],
                "worse": [each["text"] for each in lines[n]["worse"][:WORSE]],
                "lowest": kind,
            }
            for kind, chosen in ((True, lowest), (False, drawn))
            for n in chosen
        ),
    )
    return path


def _risks(
    run_dir: pathlib.Path, policy: pathlib.Path, model: pathlib.Path, data: pathlib.Path
) -> dict[str, float]:
    """Mean risk of a pair on the lowest prompts, and on others: finite, unlike SEAM,
    where nothing is misjudged."""
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
