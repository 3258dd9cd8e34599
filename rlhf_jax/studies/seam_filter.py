"""`rlhf-jax study seam-filter`: RL without the prompts of the lowest SEAM.

For every seed one reward model; SEAM of the SFT policy and that model on the RL prompts
by four estimators; RLOO on all prompts, without the lowest share by one estimator, and
without as many random prompts. Gold reward on held-out prompts; how SEAM ranks the
prompts by what RL then does to their gold reward; how alike estimators, and reward
models, are in the prompts that they find lowest; and how often the reward model
misorders completions of the policy, before and after RL, beside held-out completions.

The primary comparison, the only one with a p value, is gold after RLOO at the first
share of `random_drop`: the lowest prompts dropped against as many random ones.

Source: arXiv:2406.07971, sections 4 to 6.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.curation.seam import scores
from rlhf_jax.data import sources
from rlhf_jax.programs import rloo, seam, seam_select, sft
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.scored_rows import read_jsonl, write_whole
from rlhf_jax.programs.worse import Estimator
from rlhf_jax.studies import filter_tables as tables
from rlhf_jax.studies.quickstart import GOLD, QuickstartConfig, sft_config
from rlhf_jax.studies.samples import agreement, sample
from rlhf_jax.studies.seeds import by_seed, once, read, study_dir
from rlhf_jax.studies.stages import ESTIMATORS, judged_rloo, reward_model, summarise

SAMPLES = 4
"""Completions of each RL prompt before and after RL."""
_REAL = ("policy", "reward", "data", "eval_data", "held_out", "rloo")
"""Fields of models and data other than the testbed's: all or none."""


@dataclasses.dataclass(frozen=True)
class SeamFilterConfig:
    """RLOO on prompts selected by SEAM."""

    run_dir: str = "runs/seam-filter"
    """Directory of the study; each run has its own inside."""
    seeds: int = 5
    """Reward models, and RLOO runs of each selection."""
    prompts: int = 1000
    """RL prompts, of the testbed."""
    overlap_prompts: int = 400
    """Prompts, of the testbed, the same for all seeds, on which lowest SEAM is compared
    between estimators and reward models."""
    drop: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    """Shares dropped by SEAM."""
    random_drop: tuple[float, ...] = (0.2, 0.4)
    """Shares dropped at random, the control; the first is that of the primary
    comparison."""
    estimators: tuple[Estimator, ...] = ESTIMATORS
    """What is measured; `given` needs a column `worse`, `generate` is not offered."""
    estimator: Estimator = "contrast"
    """Whose scores select."""
    sft_steps: int = 500
    """Optimizer steps of the testbed's one SFT policy."""
    reward_steps: int = 300
    """Optimizer steps of each of the testbed's reward models."""
    steps: int = 60
    """RLOO steps."""
    kl_coef: float = 0.1
    """Weight of the KL penalty."""
    policy: str | None = None
    """Policy that RL starts from; null = trained on the testbed."""
    reward: list[str] = dataclasses.field(default_factory=list)
    """Reward models, at least as many as seeds; none = trained on the testbed."""
    data: list[str] = dataclasses.field(default_factory=list)
    """SPECs of RL prompts with gold completions; none = the testbed's."""
    eval_data: str | None = None
    """SPEC of the prompts that judge; null = the testbed's."""
    held_out: str | None = None
    """SPEC of rows with scored responses, the control of the rate of misordered pairs;
    null = the testbed's, new prompts."""
    gold: str = GOLD
    """Reward that judges: a reward model, package.module:function or address."""
    rloo: str | None = None
    """YAML file of every RLOO run (batch, sampling, optimizer ...), in which steps,
    kl_coef and all that the study varies are the study's; null = the testbed's."""

    def __post_init__(self) -> None:
        offered = [name for name in ESTIMATORS if name in self.estimators]
        if set(self.estimators) - set(ESTIMATORS) or not offered:
            raise ValueError(
                f"estimators {', '.join(self.estimators)}: expected some of "
                f"{', '.join(ESTIMATORS)}"
            )
        if self.estimator not in offered:
            raise ValueError(
                f"estimator {self.estimator}: expected one of {', '.join(offered)}"
            )
        if not self.random_drop or not set(self.random_drop) <= set(self.drop):
            raise ValueError(
                f"random_drop {self.random_drop}: expected some of drop {self.drop}"
            )
        missing = [name for name in _REAL if not getattr(self, name)]
        if missing and len(missing) < len(_REAL):
            raise ValueError(
                f"{', '.join(missing)}: expected too, with "
                f"{', '.join(name for name in _REAL if name not in missing)}; models "
                "and data are all the testbed's or none is"
            )
        if not missing and self.gold == GOLD:
            raise ValueError(
                "gold: expected a reward that knows the data; the testbed's judges its "
                "own prompts alone"
            )
        if missing and self.gold != GOLD:
            raise ValueError("gold: the testbed's own reward judges the testbed")
        if not missing and len(self.reward) < self.seeds:
            raise ValueError(
                f"reward: expected {self.seeds} reward models, one a seed, got "
                f"{len(self.reward)}"
            )


def run(config: SeamFilterConfig) -> dict[str, Any]:
    """Runs what is not there yet; writes study.json and plots; prints the tables."""
    with study_dir(config) as root:
        if config.policy is None:
            once(sft.run, sft_config(_base(config, 0)))
        found = by_seed(root, config.seeds, lambda seed: _one(config, root, seed))
        lines = [_common(config, root, seed) for seed in range(config.seeds)]
        arms = [result["rl"] for result in found]
        tables.plot_curve(
            arms,
            root / "plots" / "filter_rate.png",
            drop=config.drop,
            random=config.random_drop,
        )
    console = Console(width=130)
    console.print(tables.rl_table(arms))
    console.print(tables.control_table(arms, config.random_drop))
    console.print(tables.estimator_table([result["estimators"] for result in found]))
    console.print(
        tables.overlap_table(
            [tables.overlaps(each) for each in lines],
            [tables.model_overlaps(*two) for two in itertools.combinations(lines, 2)],
        )
    )
    console.print(tables.mismatch_table([result["mismatch"] for result in found]))
    return {"seeds": found}


def _base(config: SeamFilterConfig, seed: int) -> QuickstartConfig:
    return QuickstartConfig(
        run_dir=config.run_dir,
        sft_steps=config.sft_steps,
        reward_steps=config.reward_steps,
        rloo_steps=config.steps,
        seed=seed,
    )


def _one(config: SeamFilterConfig, root: pathlib.Path, seed: int) -> dict[str, Any]:
    policy, model = _models(config, root, seed)
    measured = root / f"seam-{seed}"
    data = config.data or [f"testbed:worse?size={config.prompts}&count=10&seed={seed}"]
    _seam(config, measured, policy, model, data, seed)
    if not config.data:
        # On the prompts of every other seed, so that reward models compare.
        same = f"testbed:worse?size={config.overlap_prompts}&count=10&seed=1000"
        _seam(config, root / f"seam-common-{seed}", policy, model, [same], 0)
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
    runs = {
        name: rloo_run(config, f"rloo-{name}-{seed}", policy, model, prompts, seed)
        for name, prompts in chosen.items()
    }
    policies = {name: once(rloo.run, made) for name, made in runs.items()}
    samples = {
        name: sample(
            of,
            measured / f"samples-{name}.jsonl",
            str(measured / "prompts.jsonl"),
            samples=SAMPLES,
            max_new_tokens=runs["all"].sampling.max_new_tokens,
            gold=config.gold,
        )
        for name, of in (("before", policy), ("after", str(policies["all"])))
    }
    held_out = measured / "held-out.jsonl"
    of_others = f"testbed:quads_val_prompt_ood?size=400&seed={seed}"
    rows = sources.open_source(config.held_out or of_others)
    write_whole(held_out, (rows[n][0] for n in range(len(rows))))
    return {
        "rl": {name: summarise(read(of)) for name, of in policies.items()},
        "estimators": _estimators(
            seam.read_scores(str(measured / "seam.jsonl")),
            {name: read_jsonl(path) for name, path in samples.items()},
        ),
        "mismatch": {
            name: 1 - agreement(model, [path])
            for name, path in {"held-out": held_out, **samples}.items()
        },
    }


def _models(config: SeamFilterConfig, root: pathlib.Path, seed: int) -> tuple[str, str]:
    """(policy, reward model) of a seed."""
    if config.policy is not None:
        return config.policy, config.reward[seed]
    return str(root / "sft"), str(reward_model(_base(config, seed), f"reward-{seed}"))


def _common(config: SeamFilterConfig, root: pathlib.Path, seed: int) -> list[Any]:
    """Lines of SEAM on the prompts that all seeds share."""
    name = f"seam-{seed}" if config.data else f"seam-common-{seed}"
    return read_jsonl(root / name / "seam.jsonl")


def _seam(
    config: SeamFilterConfig,
    run_dir: pathlib.Path,
    policy: str,
    model: str,
    data: list[str],
    seed: int,
) -> None:
    seam.run(
        seam.SeamConfig(
            run_dir=str(run_dir),
            policy=policy,
            reward=model,
            data=data,
            estimators=list(config.estimators),
            attack=AttackConfig(count=10),
            seed=seed,
        )
    )


def rloo_run(
    config: SeamFilterConfig,
    name: str,
    policy: str,
    model: str,
    prompts: pathlib.Path,
    seed: int,
) -> rloo.RlooConfig:
    """RLOO of one arm.

    Args:
        config: of the study.
        name: of its directory in that of the study.
        policy: that it starts from.
        model: the reward model.
        prompts: the file of the arm's prompts.
        seed: of the run.
    """
    if config.rloo is None:
        return judged_rloo(
            _base(config, seed),
            name,
            model,
            kl_coef=config.kl_coef,
            data=[str(prompts)],
        )
    made = configs.load(
        rloo.RlooConfig,
        config.rloo,
        {
            "run_dir": f"{config.run_dir}/{name}",
            "model": policy,
            "reward": [model],
            "data": [str(prompts)],
            "eval_data": [f"val={config.eval_data}"],
            "gold": config.gold,
            "steps": config.steps,
            "seed": seed,
        },
    )
    return dataclasses.replace(
        made,
        loss=dataclasses.replace(made.loss, kl_coef=config.kl_coef),
        loop=RLLoopConfig(keep=1, save_every=config.steps, eval_every=config.steps),
    )


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
    for name in dict.fromkeys(line["estimator"] for line in lines):
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
