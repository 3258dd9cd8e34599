"""`rlhf-jax curate`: pairs in, filtered, weighed, bounded and augmented pairs out.

Read `run`: each step is a function on rows, taken if the config asks for it, in this
order:

    new, old, reward   pairs that prefer a new policy's completions (Mutual-Taught)
    agree_with         keep the pairs that a second source labels alike (consensus)
    weight             how likely the pair is under the policy of now (OCRM)
    bound              an upper bound on the reward gap, by similarity (PCRM)
    off_prompt         pairs with completions of other prompts (RRM)

--out gets rows {"prompt", "chosen", "rejected", ...} with the input's other columns;
OUT.errors.jsonl every row that was left out, with its place and the reason. Training
names the columns it uses: `--rows.columns.weight weight`.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rlhf_jax.curation import pairs as curation
from rlhf_jax.data import sources
from rlhf_jax.data.rows import Columns
from rlhf_jax.evals.length import num_words
from rlhf_jax.losses.importance import importance_weights
from rlhf_jax.losses.regularizers import similarity_bound
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.likelihood import open_likelihood
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.scored_rows import Job
from rlhf_jax.programs.scorer import Refusal, Scorer, ScoringConfig, open_scorer


@dataclasses.dataclass(frozen=True)
class WeightConfig:
    """OCRM: importance weights that move the data towards the policy of now."""

    policy: str | None = None
    """The policy of now; null = no weights."""
    reference: str | None = None
    """The policy that wrote the completions, or the SFT policy."""
    flattening: float = 0.01
    """s, the exponent of the weights; the authors' scripts use 0.001."""
    mixing: float = 0.1
    """a of the relative ratio, which is at most 1 / a."""

    def __post_init__(self) -> None:
        if (self.policy is None) != (self.reference is None):
            raise ValueError("weight: expected policy and reference, or neither")
        if not 0 <= self.mixing < 1 or not 0 <= self.flattening < float("inf"):
            raise ValueError(
                f"weight: mixing {self.mixing}, flattening {self.flattening}: expected "
                "a number in [0, 1) and a finite one of at least 0"
            )


@dataclasses.dataclass(frozen=True)
class BoundConfig:
    """PCRM: the more alike two completions are, the smaller the gap they may have."""

    by: Literal["none", "length", "states"] = "none"
    """Similarity: ratio of the numbers of words, or angle between the states of a
    model."""
    model: str | None = None
    """Whose states, for `states`."""
    scale: float = 10.0
    """beta_1: bound = scale / (similarity + 0.001) + offset."""
    offset: float = -5.0
    """beta_3."""

    def __post_init__(self) -> None:
        if (self.by == "states") != (self.model is not None):
            raise ValueError(
                f"bound: by {self.by}, model {self.model}: expected a model with by "
                "states, and none otherwise"
            )


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """Filter, weigh, bound and augment preference pairs."""

    out: str
    """JSON lines file to write."""
    data: str | None = None
    """Pairs, SPEC."""
    new: str | None = None
    """Instead of data: prompts with a completion of the new policy, SPEC of `generate`
    output."""
    old: str | None = None
    """The same prompts, in the same order, with a completion of the policy before."""
    reward: str | None = None
    """Of new and old: the reward model that trained the new policy."""
    agree_with: str | None = None
    """A second source of labels: package.module:function, http://... or a reward model.
    Pairs that it orders otherwise are left out."""
    weight: WeightConfig = WeightConfig()
    """Importance weights."""
    bound: BoundConfig = BoundConfig()
    """Bounds on the gap."""
    off_prompt: bool = False
    """Add 14 pairs with completions of other prompts to each, with soft labels."""
    overwrite: bool = False
    """Replace `out` where it exists."""
    timeout_s: float = 60.0
    """Longest call of a reward that is a function or HTTP."""
    seed: int = 0
    """Of the draws of off_prompt."""
    columns: Columns = Columns()
    """Names of the columns of data."""
    scoring: ScoringConfig = ScoringConfig()
    """How models read texts."""

    def __post_init__(self) -> None:
        both = (self.new is None, self.old is None, self.reward is None)
        if any(both) != all(both) or all(both) == (self.data is None):
            raise ValueError(
                "data: expected pairs as --data, or else --new, --old and --reward"
            )
        steps = (
            self.new,
            self.agree_with,
            self.weight.policy,
            self.bound.by != "none",
            self.off_prompt,
        )
        if not any(steps):
            raise ValueError(
                "nothing to do: give new and old, agree_with, weight.policy, bound.by "
                "or off_prompt"
            )


Row = dict[str, Any]


@dataclasses.dataclass
class Curated:
    """The pairs so far, and what was left out on the way."""

    rows: list[Row]
    where: list[str]
    left_out: list[Row]

    def keep(self, kept: np.ndarray, reason: str) -> None:
        """Leaves out the rows that `kept` [Q] does not name."""
        for row, where, stays in zip(self.rows, self.where, kept, strict=True):
            if not stays:
                self.left_out.append(scored_rows.set_aside(where, reason, "", row))
        self.rows = [row for row, stays in zip(self.rows, kept) if stays]
        self.where = [where for where, stays in zip(self.where, kept) if stays]
        if not self.rows:
            raise ValueError(f"no pair left: the last were left out as {reason!r}")

    def add_column(self, name: str, values: np.ndarray) -> None:
        """A number for every row."""
        for row, where, value in zip(self.rows, self.where, values, strict=True):
            if name in row:
                raise ValueError(
                    f"{where}: the row has a column {name!r} already; rename it: it is "
                    "not overwritten"
                )
            row[name] = float(value)


def run(config: CurateConfig) -> pathlib.Path:
    """Takes the steps that are asked for; returns the path of the pairs."""
    out = pathlib.Path(config.out).expanduser()
    if out.exists() and not config.overwrite:
        raise ValueError(
            f"out {config.out}: exists; name another file or set --overwrite true"
        )
    found = _read(config) if config.data else _new_over_old(config)
    read = len(found.rows)
    if config.agree_with:
        _agree(found, config)
    if config.weight.policy:
        _weigh(found, config)
    if config.bound.by != "none":
        _bound(found, config)
    if config.off_prompt:
        found.rows, equal = curation.off_prompt(found.rows, seed=config.seed)
        _say(
            f"off_prompt: {len(found.rows):,} pairs ({equal:,} of equal texts not made)"
        )
    _write(out, found.rows)
    _write(out.with_name(f"{out.name}.errors.jsonl"), found.left_out)
    reasons = Counter(line["reason"] for line in found.left_out)
    aside = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    _say(
        f"{read:,} pairs read, {len(found.rows):,} written; left out: {aside or 'none'}"
    )
    names = ("weight", "gap_bound", "soft_label")
    flags = [f"--rows.columns.{n} {n}" for n in names if n in found.rows[0]]
    _say(" ".join(["next  rlhf-jax reward --data", str(out), *flags, "--run_dir ..."]))
    return out


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """A whole file or none."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        scored_rows.write_jsonl(partial, rows)
    except OSError as error:
        raise ValueError(f"out {path}: cannot write there: {error}") from None
    partial.replace(path)


def _read(config: CurateConfig) -> Curated:
    """The pairs of --data in the standard columns."""
    found = Curated([], [], [])
    source = sources.open_source(str(config.data))
    names = {getattr(config.columns, n) for n in ("prompt", "chosen", "rejected")}
    for n in range(len(source)):
        job = scored_rows.read_job(lambda n=n: source[n], config.columns)
        if isinstance(job, Job) and job.kind != "pairs":
            job = scored_rows.set_aside(job.where, "no pair", job.kind, job.row)
        if not isinstance(job, Job):
            found.left_out.append(job)
            continue
        others = {key: value for key, value in job.row.items() if key not in names}
        texts = {"chosen": job.texts[0], "rejected": job.texts[1]}
        found.rows.append({"prompt": job.prompt, **texts, **others})
        found.where.append(job.where)
    if not found.rows:
        first = found.left_out[0] if found.left_out else {}
        raise ValueError(
            f"data {config.data}: no pair in {len(source)} rows: "
            f"{first.get('where', '')} {first.get('detail', '')}"
        )
    return found


def _new_over_old(config: CurateConfig) -> Curated:
    """Pairs from two policies' completions of the same prompts."""
    new, old = (_completions(str(spec), config) for spec in (config.new, config.old))
    if [job.prompt for job in new] != [job.prompt for job in old]:
        raise ValueError(
            f"new, old: expected completions of the same prompts in the same order; "
            f"got {len(new):,} and {len(old):,} rows with other prompts; sample both "
            "with one --data"
        )
    reward = open_rewards(
        [str(config.reward)], scoring=config.scoring, timeout_s=config.timeout_s
    )
    prompts = [job.prompt for job in new]
    rewards = [
        reward(prompts, [j.texts[0] for j in jobs], [j.row for j in jobs]).total
        for jobs in (new, old)
    ]
    rows, kept = curation.new_over_old(
        prompts,
        [job.texts[0] for job in new],
        [job.texts[0] for job in old],
        *rewards,
    )
    if not rows:
        raise ValueError(
            "new, old: no pair: the completions are the same, or the reward model is "
            "sure that every new one is worse"
        )
    left_out = [
        scored_rows.set_aside(job.where, "equal to the old, or worse", "", job.row)
        for job, stays in zip(new, kept)
        if not stays
    ]
    return Curated(rows, [j.where for j, stays in zip(new, kept) if stays], left_out)


def _completions(spec: str, config: CurateConfig) -> list[Job]:
    source = sources.open_source(spec)
    jobs = []
    for row, where in map(source.__getitem__, range(len(source))):
        # What `generate` and `score` add is not read again.
        texts = {k: v for k, v in row.items() if k not in ("reward", "schema")}
        try:
            job = scored_rows.job_of(texts, where, config.columns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if job.kind != "completion":
            raise ValueError(
                f"{where}: expected a prompt and a completion, as `rlhf-jax generate` "
                f"writes them, got {job.kind}"
            )
        jobs.append(job)
    return jobs


def _agree(found: Curated, config: CurateConfig) -> None:
    """Leaves out the pairs that the second source orders otherwise, or ties."""
    reward = open_rewards(
        [str(config.agree_with)], scoring=config.scoring, timeout_s=config.timeout_s
    )
    prompts = [row["prompt"] for row in found.rows]
    chosen, rejected = (
        reward(prompts, [row[side] for row in found.rows], found.rows).total
        for side in ("chosen", "rejected")
    )
    # The label says +1; the filter that also swaps, for two models, is in `curation`.
    found.keep(chosen > rejected, "second source disagrees")


def _weigh(found: Curated, config: CurateConfig) -> None:
    """OCRM's weight column."""
    ratios = np.zeros((len(found.rows), 2))
    for spec, sign in ((config.weight.policy, 1), (config.weight.reference, -1)):
        scorer = open_likelihood(str(spec), config.scoring)
        ratios = ratios + sign * _both(found, scorer, scorer.rewards)
    weights = importance_weights(
        jnp.asarray(ratios[:, 0]),
        jnp.asarray(ratios[:, 1]),
        flattening=config.weight.flattening,
        mixing=config.weight.mixing,
    )
    found.add_column("weight", np.asarray(weights))


def _both(
    found: Curated, scorer: Scorer, values: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """[Q 2 ...] of the chosen and rejected completions.

    Raises:
        ValueError: a text is too long for the model, or cannot be encoded.
    """
    encoded = []
    for row, where in zip(found.rows, found.where, strict=True):
        for side in ("chosen", "rejected"):
            text = scorer.encode(row["prompt"], row[side], tools=row.get("tools"))
            if isinstance(text, Refusal):
                raise ValueError(
                    f"{where}: {side}: {text.reason}: {text.detail}; leave such rows "
                    "out of --data, or raise scoring.max_length"
                )
            encoded.append(text)
    result = values(encoded)
    return result.reshape(len(found.rows), 2, *result.shape[1:])


def _bound(found: Curated, config: CurateConfig) -> None:
    """PCRM's gap_bound column."""
    if config.bound.by == "length":
        words = np.array(
            [[num_words(row[s]) for s in ("chosen", "rejected")] for row in found.rows]
        )
        alike = words.min(axis=1) / np.maximum(words.max(axis=1), 1)
    else:
        scoring = dataclasses.replace(config.scoring, untrained_head=True)
        scorer = open_scorer(str(config.bound.model), scoring)

        def states(encoded: Any) -> np.ndarray:
            return scorer.rewards_and_states(encoded, np.arange(len(encoded))).after

        alike = _angular_similarity(_both(found, scorer, states))
    bounds = similarity_bound(
        jnp.asarray(alike), scale=config.bound.scale, offset=config.bound.offset
    )
    found.add_column("gap_bound", np.asarray(bounds))


def _angular_similarity(states: np.ndarray) -> np.ndarray:
    """(pi - angle) / pi of the two states of each pair, [Q 2 D] -> [Q]."""
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    cosine = np.clip((unit[:, 0] * unit[:, 1]).sum(axis=-1), -1.0, 1.0)
    return 1.0 - np.arccos(cosine) / np.pi
