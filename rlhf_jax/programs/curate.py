"""`rlhf-jax curate`: pairs in, filtered, weighed, bounded and augmented pairs out.

Read `run`: each step is a function on rows, taken if the config asks for it, in this
order:

    new, old, reward   pairs that prefer a new policy's completions (Mutual-Taught)
    agree_with         keep the pairs that a second source labels alike (consensus)
    off_prompt         add pairs with completions of other prompts (RRM)
    weight             how likely the pair is under the policy of now (OCRM)
    bound              an upper bound on the reward gap, by similarity (PCRM)

--out gets rows {"prompt", "chosen", "rejected", ...} with the other columns of --data;
OUT.errors.jsonl every row that was left out, with its place and the reason. The command
that trains on the result, with the columns it names, is printed.
"""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rlhf_jax.curation import pairs as curation
from rlhf_jax.data.rows import Columns
from rlhf_jax.losses.importance import importance_weights
from rlhf_jax.losses.regularizers import similarity_bound
from rlhf_jax.programs import curate_rows, scored_rows
from rlhf_jax.programs.curate_rows import Curated, Row
from rlhf_jax.programs.likelihood import open_likelihood
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.scorer import Scorer, ScoringConfig, open_scorer

PART = 512
"""Pairs whose states are held at a time."""


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
    """Similarity: ratio of the numbers of characters, or angle between the states of a
    model."""
    model: str | None = None
    """Whose states, for `states`."""
    scale: float = 10.0
    """beta_1: bound = scale / (similarity + 0.001) + offset."""
    offset: float = -5.0
    """beta_3."""
    shuffled: bool = False
    """Give each pair the bound of another one, drawn at random: the control, in which
    bounds are as large as before and say nothing about their pairs."""

    def __post_init__(self) -> None:
        if (self.by == "states") != (self.model is not None):
            raise ValueError(
                f"bound: by {self.by}, model {self.model}: expected a model with by "
                "states, and none otherwise"
            )
        if self.shuffled and self.by == "none":
            raise ValueError(
                "bound: shuffled, and no bounds to shuffle; set by to length or states"
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
    """Of the draws of off_prompt and bound.shuffled."""
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


def run(config: CurateConfig) -> pathlib.Path:
    """Takes the steps that are asked for; returns the path of the pairs."""
    out = _output(config)
    found = _pairs(config)
    _check_columns(found, config)
    read = len(found.rows)
    try:
        if config.agree_with:
            _agree(found, config)
        if config.off_prompt:
            _off_prompt(found, config)
        if config.weight.policy:
            _weigh(found, config)
        if config.bound.by != "none":
            _bound(found, config)
    finally:
        scored_rows.write_whole(
            out.with_name(f"{out.name}.errors.jsonl"), found.left_out
        )
    scored_rows.write_whole(out, found.rows)
    reasons = Counter(line["reason"] for line in found.left_out)
    aside = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    _say(f"{read:,} pairs read, {len(found.rows):,} written")
    _say(f"left out: {aside or 'none'}")
    flags = [f"--rows.columns.{name} {name}" for name in found.added]
    flags += ["--regularizers 1*bounded_gap"] * ("gap_bound" in found.added)
    _say(" ".join(["next  rlhf-jax reward --data", str(out), *flags, "--run_dir ..."]))
    return out


def _pairs(config: CurateConfig) -> Curated:
    if config.data is not None:
        return curate_rows.read_pairs(config.data, config.columns)
    return curate_rows.new_over_old(
        str(config.new),
        str(config.old),
        open_rewards(
            [str(config.reward)], scoring=config.scoring, timeout_s=config.timeout_s
        ),
        config.columns,
    )


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _output(config: CurateConfig) -> pathlib.Path:
    """--out, found writable before anything is paid for."""
    out = pathlib.Path(config.out).expanduser()
    if out.exists() and not config.overwrite:
        raise ValueError(
            f"out {config.out}: exists; name another file or set --overwrite true"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"out {config.out}: cannot write there: {error}") from None
    return out


def _check_columns(found: Curated, config: CurateConfig) -> None:
    """Nothing that will be written is there already."""
    written = ["weight"] * (config.weight.policy is not None)
    written += ["gap_bound"] * (config.bound.by != "none")
    written += ["soft_label", "augmentation"] * config.off_prompt
    for row, where in zip(found.rows, found.where, strict=True):
        for name in written:
            if name in row:
                raise ValueError(
                    f"{where}: the row has a column {name!r} already; rename it: it is "
                    "not overwritten"
                )


def _agree(found: Curated, config: CurateConfig) -> None:
    """Leaves out the pairs that the second source orders otherwise, or ties."""
    reward = open_rewards(
        [str(config.agree_with)], scoring=config.scoring, timeout_s=config.timeout_s
    )
    chosen, rejected = curate_rows.side_rewards(found, reward)
    # The label itself is the first source, and it always says +1.
    _, kept = curation.consensus(found.rows, np.ones(len(chosen)), chosen - rejected)
    found.keep([None if stays else "second source disagrees" for stays in kept])


def _off_prompt(found: Curated, config: CurateConfig) -> None:
    """RRM's pairs, each at the place of the row whose prompt it has."""
    places: dict[str, str] = {}
    for row, where in zip(found.rows, found.where, strict=True):
        places.setdefault(json.dumps(row["prompt"], sort_keys=True), where)
    found.rows, equal = curation.off_prompt(found.rows, seed=config.seed)
    found.where = [
        places[json.dumps(row["prompt"], sort_keys=True)] for row in found.rows
    ]
    found.added.append("soft_label")
    _say(f"off_prompt: {len(found.rows):,} pairs; {equal:,} of equal texts not made")


def _weigh(found: Curated, config: CurateConfig) -> None:
    """OCRM's weight column."""
    ratios = np.zeros((len(found.rows), 2))
    refused: list[str | None] = [None] * len(found.rows)
    for spec, sign in ((config.weight.policy, 1), (config.weight.reference, -1)):
        _say(f"log-probabilities under {spec}")
        scorer = open_likelihood(str(spec), config.scoring)
        logprobs, reasons = _both(found.rows, scorer, scorer.rewards)
        ratios = ratios + sign * logprobs
        refused = [old or new for old, new in zip(refused, reasons)]
        del scorer  # one policy in memory at a time
    found.keep(refused)
    ratios = jnp.asarray(ratios[[reason is None for reason in refused]])
    weights = importance_weights(
        ratios[:, 0],
        ratios[:, 1],
        flattening=config.weight.flattening,
        mixing=config.weight.mixing,
    )
    found.add_column("weight", weights)


def _both(
    rows: Sequence[Row], scorer: Scorer, values: Callable[[Any], np.ndarray]
) -> tuple[np.ndarray, list[str | None]]:
    """([Q 2 ...] of the chosen and rejected completions, why a row has none).

    Rows of refused texts hold nan.
    """
    encoded = scorer.encode_all(curate_rows.texts_of(rows))
    reasons = curate_rows.reasons_of(encoded)
    fit = [n for n, reason in enumerate(reasons) if reason is None]
    if not fit:
        return np.full((len(rows), 2), np.nan), reasons
    found = values([text for n in fit for text in encoded[2 * n : 2 * n + 2]])
    result = np.full((len(rows), 2, *found.shape[1:]), np.nan)
    result[fit] = found.reshape(len(fit), 2, *found.shape[1:])
    return result, reasons


def _bound(found: Curated, config: CurateConfig) -> None:
    """PCRM's gap_bound column."""
    if config.bound.by == "length":
        sizes = np.array([[len(r["chosen"]), len(r["rejected"])] for r in found.rows])
        alike = sizes.min(axis=1) / sizes.max(axis=1)
    else:
        alike = _alike_by_states(found, config)
    if config.bound.shuffled:
        alike = np.random.default_rng(config.seed).permutation(alike)
    bounds = similarity_bound(
        jnp.asarray(alike), scale=config.bound.scale, offset=config.bound.offset
    )
    found.add_column("gap_bound", bounds)


def _alike_by_states(found: Curated, config: CurateConfig) -> np.ndarray:
    """`angle_similarity` of each pair, [Q], of the rows that stay."""
    scoring = dataclasses.replace(config.scoring, untrained_head=True)
    scorer = open_scorer(str(config.bound.model), scoring)
    scorer.check_states()

    def states(encoded: Any) -> np.ndarray:
        return scorer.rewards_and_states(encoded, np.arange(len(encoded))).after

    alike, refused = [], []
    for start in range(0, len(found.rows), PART):
        pairs, reasons = _both(found.rows[start : start + PART], scorer, states)
        refused += reasons
        if pairs.ndim == 3:
            alike += angle_similarity(pairs).tolist()
        else:
            alike += [np.nan] * len(reasons)
    found.keep(refused)
    return np.array([a for a, reason in zip(alike, refused) if reason is None])


def angle_similarity(states: np.ndarray) -> np.ndarray:
    """(pi - arccos(max(cosine, 0))) / pi of each pair of states [Q 2 D]: in [1/2, 1].

    Obtuse angles count as right ones, so no bound is looser than that of similarity one
    half.

    Source: Zhou et al. 2024, arXiv:2404.00978 (PCRM), and its published code, which
    reads the states of a frozen encoder of its own.
    """
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    cosine = np.clip((unit[:, 0] * unit[:, 1]).sum(axis=-1), 0.0, 1.0)
    return 1.0 - np.arccos(cosine) / np.pi
