"""`rlhf-jax evaluate`: a reward model against pairs, K-wise rows and benchmarks.

Read `run`: load, then one entry a set, then the files. Into --out go evaluate.json
(every number), scores/NAME.jsonl (every row with its rewards, schema 1),
set_aside.jsonl (every row without, and why), plots/*.png and report.html.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.data import sources
from rlhf_jax.data.rows import Columns
from rlhf_jax.evals import calibration, distribution, length, suite
from rlhf_jax.evals.contrast_instructions import contrast_table
from rlhf_jax.evals.hidden_states import states_summary
from rlhf_jax.evals.rewardbench import rewardbench_table
from rlhf_jax.evals.rmbench import rmbench_table
from rlhf_jax.io import report
from rlhf_jax.programs import evaluation_tables, scored_rows
from rlhf_jax.programs.evaluation_sets import EvalSet, ScoredSet, score_set, subset
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.scored_rows import Job
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer

MAX_POINTS = 600
"""Completions of a set kept for the plot of reward against length."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a reward model."""

    model: str
    """Reward model: run directory (its best checkpoint), HF directory, hub id or
    .gguf; or ensemble:DIR, attributes:DIR (see docs/rewards.md)."""
    out: str
    """Directory for evaluate.json, scores, plots and report.html; may be a run's
    own."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Pairs or K-wise rows as NAME=SPEC; repeat for several sets."""
    rmbench: str | None = None
    """RM-Bench file (json: prompt, 3 chosen, 3 rejected, domain)."""
    rewardbench: str | None = None
    """RewardBench-style pairs with a `subset` or `source` column."""
    contrast_instructions: list[str] = dataclasses.field(default_factory=list)
    """Contrast Instructions files as NAME=SPEC (query, retrieval and their
    _response_k); repeat for several."""
    contrast_prefix: list[str] = dataclasses.field(default_factory=list)
    """Text before the instructions of such a file, which hold only inputs, as
    NAME=TEXT: "para=Paraphrase the following sentence: "."""
    gold: str | None = None
    """A reward that judges every text of eval_data, whose labels and scores are not
    read: package.module:function, http://..., or a model. Of completions sampled from a
    policy (`generate --grouped`) the result is the mismatch rate; of held-out pairs its
    control."""
    states: bool = False
    """Statistics of the hidden states of eval_data: norms, effective rank, head norm.
    Holds two float32 [N, D] of a set, N at most 4096 completions (a seeded subset)."""
    limit: int = 0
    """Rows of each set, a seeded subset, said with the numbers; 0 = all."""
    seed: int = 0
    """Seed of subsets and intervals."""
    bootstrap_samples: int = 2000
    """Resamples of an interval."""
    timeout_s: float = 60.0
    """Longest call of `gold`, if it is a function or HTTP."""
    columns: Columns = Columns()
    """Names of the columns of eval_data."""
    scoring: ScoringConfig = ScoringConfig()
    """How texts become rewards."""

    def __post_init__(self) -> None:
        benches = self.rmbench or self.rewardbench or self.contrast_instructions
        if not (self.eval_data or benches):
            raise ValueError(
                "nothing to evaluate on: give --eval_data NAME=SPEC, --rmbench PATH, "
                "--rewardbench PATH or --contrast_instructions NAME=SPEC"
            )
        for name in ("states", "gold"):
            if getattr(self, name) and not self.eval_data:
                raise ValueError(
                    f"{name}: measured on eval_data, and there is none; give "
                    "--eval_data NAME=SPEC"
                )
        if self.limit < 0 or self.bootstrap_samples < 1:
            raise ValueError(
                f"limit {self.limit}, bootstrap_samples {self.bootstrap_samples}: "
                "expected 0 or more and 1 or more"
            )


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Scores and evaluates; returns what evaluate.json holds."""
    sets = _sets(config)
    opened = [(data, sources.open_source(data.spec)) for data in sets]
    out = _directory(config.out)
    gold = (
        open_rewards([config.gold], scoring=config.scoring, timeout_s=config.timeout_s)
        if config.gold
        else None
    )
    scorer = open_scorer(config.model, config.scoring, seed=config.seed)
    if config.states:
        scorer.check_states()
    scored = {
        data.name: score_set(
            data,
            source,
            scorer,
            out,
            columns=config.columns,
            limit=config.limit,
            seed=config.seed,
            states=config.states,
            gold=gold if data.kind == "eval_data" else None,
        )
        for data, source in opened
    }
    result: dict[str, Any] = {
        "schema": 1,
        "model": config.model,
        "random_head": scorer.random_head,
        "seed": config.seed,
        "limit": config.limit,
        "config": configs.to_dict(config),
        "sets": [
            {"name": data.name, "spec": data.spec}
            | set_entry(scored[data.name], config)
            for data in sets
            if data.kind == "eval_data"
        ],
    }
    for name, table in (("rmbench", _rmbench), ("rewardbench", _rewardbench)):
        if name in scored:
            result[name] = scored[name].header() | {"table": table(scored[name])}
    if config.contrast_instructions:
        result["contrast_instructions"] = [
            {"name": data.name, "spec": data.spec, "prefix": data.prefix}
            | scored[data.name].header()
            | {"table": _contrast(scored[data.name])}
            for data in sets
            if data.kind == "contrast"
        ]
    if config.states:
        figures = {name: done.states for name, done in scored.items() if done.states}
        result["states"] = states_summary(figures, head_norm=scorer.head_norm)
    result = _finite(result)
    aside = [line for done in scored.values() for line in done.set_aside]
    scored_rows.write_jsonl(out / "set_aside.jsonl", aside)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "evaluate.json").write_text(text + "\n", encoding="utf-8")
    evaluation_tables.show(result, _console())
    print(f"report: {report.write_report(out)}")
    return result


def _sets(config: EvaluateConfig) -> list[EvalSet]:
    """Every set that the config names.

    Raises:
        ValueError: two sets of one name, or a prefix of no contrast set.
    """
    named = configs.parse_named(config.eval_data, "--eval_data")
    contrasts = configs.parse_named(
        config.contrast_instructions, "--contrast_instructions"
    )
    prefixes = configs.parse_named(config.contrast_prefix, "--contrast_prefix")
    if {"rmbench", "rewardbench"} & {*named, *contrasts}:
        raise ValueError(
            "--eval_data, --contrast_instructions: the names rmbench and rewardbench "
            "are taken; choose others"
        )
    for name in contrasts:
        if name in named:
            raise ValueError(
                f"--contrast_instructions: the name {name!r} is a set of --eval_data "
                "too; choose another: each writes scores/NAME.jsonl"
            )
    for name in prefixes:
        if name not in contrasts:
            raise ValueError(
                f"--contrast_prefix {name!r}: expected the name of a set of "
                f"--contrast_instructions, of which there are: {list(contrasts)}"
            )
    sets = [EvalSet(name, spec, "eval_data") for name, spec in named.items()]
    if config.rmbench:
        sets.append(EvalSet("rmbench", config.rmbench, "rmbench"))
    if config.rewardbench:
        sets.append(EvalSet("rewardbench", config.rewardbench, "rewardbench"))
    return sets + [
        EvalSet(name, spec, "contrast", prefixes.get(name, ""))
        for name, spec in contrasts.items()
    ]


def _console() -> Console:
    """stdout; wide enough for the tables where nobody's window limits it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def _directory(out: str) -> pathlib.Path:
    path = pathlib.Path(out).expanduser()
    try:
        (path / "scores").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out}: cannot write there: {error}") from None
    return path


def set_entry(scored: ScoredSet, config: EvaluateConfig) -> dict[str, Any]:
    """The entry of a set of pairs or K-wise rows in evaluate.json."""
    options = {"samples": config.bootstrap_samples, "seed": config.seed}
    states = scored.states.metrics if scored.states else {}
    if scored.jobs[0].kind == "kwise":
        rows = [
            {"responses": [{"text": t, "score": g} for t, g in zip(j.texts, j.gold)]}
            for j in scored.jobs
        ]
        return scored.header() | {
            "kind": "kwise",
            "interval": "95 % bootstrap over prompts",
            "metrics": suite.evaluate_kwise(scored.rewards, rows, **options) | states,
        }
    chosen, rejected = np.array(scored.rewards).T
    rows = [
        {"prompt": j.prompt, "chosen": j.texts[0], "rejected": j.texts[1]}
        for j in scored.jobs
    ]
    metrics, interval = suite.pair_figures(chosen, rejected, rows, **options)
    bins = calibration.reliability(chosen.astype(np.float64) - rejected)
    return scored.header() | {
        "kind": "pairs",
        "interval": interval,
        "metrics": metrics | states,
        "reliability": [dataclasses.asdict(b) for b in bins],
        "histogram": distribution.histograms({"chosen": chosen, "rejected": rejected}),
        "points": _points(scored.jobs, chosen, rejected, config.seed),
    }


def _points(
    jobs: Sequence[Job], chosen: np.ndarray, rejected: np.ndarray, seed: int
) -> dict[str, list[Any]]:
    kept = subset(len(jobs), MAX_POINTS // 2, seed)
    texts = [jobs[i].texts[part] for part in (0, 1) for i in kept]
    return {
        "words": [length.num_words(text) for text in texts],
        "reward": [float(r[i]) for r in (chosen, rejected) for i in kept],
        "chosen": [part == 0 for part in (0, 1) for _ in kept],
    }


def _rmbench(scored: ScoredSet) -> dict[str, Any]:
    rewards = np.array(scored.rewards)
    domains = [str(job.row["domain"]) for job in scored.jobs]
    return rmbench_table(rewards[:, :3], rewards[:, 3:], domains)


def _rewardbench(scored: ScoredSet) -> dict[str, Any]:
    chosen, rejected = np.array(scored.rewards).T
    names = [
        str(job.row.get("subset") or job.row.get("source") or "no name")
        for job in scored.jobs
    ]
    return rewardbench_table(chosen, rejected, names)


def _contrast(scored: ScoredSet) -> dict[str, Any]:
    items = [job.prompt for job in scored.jobs]
    return contrast_table(np.array(scored.rewards), items)


def _finite(value: Any) -> Any:
    """A copy for JSON, in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
