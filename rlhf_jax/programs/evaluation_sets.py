"""The sets of `evaluate`: rows read, scored by the model, written beside the numbers.

Read `EvalSet`, what a set is, then `score_set`, which makes a `ScoredSet` of it: every
row either has its rewards or is set aside with a reason. The benchmarks differ from
eval_data in how a row is read (`_reader`) alone.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.rows import Columns
from rlhf_jax.evals import contrast_instructions as contrast
from rlhf_jax.evals import hidden_states
from rlhf_jax.evals.hidden_states import StateFigures
from rlhf_jax.evals.ranking import gold_pairs
from rlhf_jax.evals.rmbench import check_domains, rmbench_item
from rlhf_jax.io import progress
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.rewards import Rewards
from rlhf_jax.programs.scored_rows import Job
from rlhf_jax.programs.scorer import Refusal, Scorer


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A set to evaluate on."""

    name: str
    spec: str
    kind: Literal["eval_data", "rmbench", "rewardbench", "contrast"]
    prefix: str = ""
    """Text before the instructions of a contrast set."""


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """A set after scoring."""

    jobs: list[Job]
    rewards: list[np.ndarray]
    """One array a job, an entry a text."""
    available: int
    """Rows of the source."""
    taken: int
    """Rows of the subset, those set aside included."""
    set_aside: list[dict[str, Any]]
    states: StateFigures | None = None
    """Where `states` asks for them."""

    def header(self) -> dict[str, Any]:
        """What every entry of evaluate.json says about its rows."""
        return {
            "n": len(self.jobs),
            "available": self.available,
            "subset": self.taken < self.available,
            "set_aside": dict(Counter(row["reason"] for row in self.set_aside)),
        }


def subset(available: int, limit: int, seed: int) -> list[int]:
    """Indices of a seeded subset in their order; all of them without a limit.

    >>> subset(3, 0, 0), len(subset(100, 7, 0)), subset(100, 7, 0) == subset(100, 7, 0)
    ([0, 1, 2], 7, True)
    """
    if not limit or limit >= available:
        return list(range(available))
    drawn = np.random.default_rng(seed).permutation(available)[:limit]
    return sorted(drawn.tolist())


Reader = Callable[[Any, int], Job | dict[str, Any]]
"""(source, index) -> a row's job, or its line to set aside."""


def score_set(
    data: EvalSet,
    source: Any,
    scorer: Scorer,
    out: pathlib.Path,
    *,
    columns: Columns = Columns(),
    limit: int = 0,
    seed: int = 0,
    states: bool = False,
    gold: Rewards | None = None,
) -> ScoredSet:
    """Reads and scores a set and writes scores/NAME.jsonl.

    Args:
        data: what it is.
        source: its rows.
        scorer: of a reward model.
        out: directory with a folder `scores`.
        columns: names of the columns of eval_data.
        limit: rows, a seeded subset; 0 = all.
        seed: of the subset.
        states: whether the hidden states of eval_data are measured.
        gold: judges every text of eval_data, whose labels and scores are not read: a
            set becomes one of K-wise rows, and its scores are written as
            `gold_rewards`.

    Raises:
        ValueError: no row of the set can be scored, with the reasons; or its rows
            differ in kind.
    """
    taken = subset(len(source), limit, seed)
    read = _reader(data, columns, scored=gold is None)
    rows = [read(source, index) for index in taken]
    found = iter(_encode([job for job in rows if isinstance(job, Job)], scorer, gold))
    jobs: list[Job] = []
    encoded: list[EncodedCompletion] = []
    aside: list[dict[str, Any]] = []
    for job in rows:
        if isinstance(job, dict):
            aside.append({"set": data.name, **job})
            continue
        texts = next(found)
        if isinstance(texts, Refusal):
            line = scored_rows.set_aside(job.where, texts.reason, texts.detail, job.row)
            aside.append({"set": data.name, **line})
        else:
            jobs.append(job)
            encoded += texts
    _check_set(data, jobs, len(taken), aside)
    if gold is not None:
        jobs = _judged(jobs, gold)
    figures = None
    with progress.counting_bar(data.name, len(encoded)) as advance:
        if states and data.kind == "eval_data":
            flat, figures = _with_states(scorer, encoded, jobs, seed, advance)
        else:
            flat = scorer.rewards(encoded, advance)
    rewards = scored_rows.split_rewards(flat, jobs)
    scored_rows.write_jsonl(
        out / "scores" / f"{data.name}.jsonl",
        (
            _with_rewards(j, r, with_gold=gold is not None)
            for j, r in zip(jobs, rewards, strict=True)
        ),
    )
    return ScoredSet(jobs, rewards, len(source), len(taken), aside, figures)


def _judged(jobs: Sequence[Job], gold: Rewards) -> list[Job]:
    """The jobs as K-wise ones, with the gold reward's scores of their texts."""
    found = gold.score(scored_rows.texts_of(jobs))
    scores = scored_rows.split_rewards(found.total, jobs)
    return [
        job._replace(kind="kwise", gold=tuple(part.tolist()))
        for job, part in zip(jobs, scores, strict=True)
    ]


def _reader(data: EvalSet, columns: Columns, *, scored: bool = True) -> Reader:
    """How a set's rows become jobs."""
    if data.kind in ("eval_data", "rewardbench"):
        own = columns if data.kind == "eval_data" else Columns()
        return lambda source, index: scored_rows.read_job(
            lambda: source[index], own, scored=scored
        )
    job_of = (
        _rmbench_job if data.kind == "rmbench" else partial(_contrast_job, data.prefix)
    )

    def read(source: Any, index: int) -> Job | dict[str, Any]:
        try:
            row, where = source[index]
        except sources.SourceError as error:
            return scored_rows.set_aside(error.where, "cannot be read", error.reason)
        try:
            return job_of(row, where)
        except ValueError as error:
            return scored_rows.set_aside(where, "malformed", str(error), row)

    return read


def _rmbench_job(row: dict[str, Any], where: str) -> Job:
    item = rmbench_item(row, where)
    return Job(row, where, "rmbench", item.prompt, item.chosen + item.rejected)


def _contrast_job(prefix: str, row: dict[str, Any], where: str) -> Job:
    item = contrast.contrast_item(row, where, prefix=prefix)
    return Job(row, where, "contrast", item, item.texts())


def _encode(
    jobs: Sequence[Job], scorer: Scorer, gold: Rewards | None
) -> list[list[EncodedCompletion] | Refusal]:
    """`scored_rows.encode_jobs`, also of contrast jobs; a job with a text that the gold
    reward cannot take has none."""
    parts = [_parts(job) for job in jobs]
    each = iter(scored_rows.encode_jobs([p for some in parts for p in some], scorer))
    found = [_joined([next(each) for _ in some]) for some in parts]
    if gold is not None:
        refusals = iter(gold.refusals(scored_rows.texts_of(jobs)))
        for n, job in enumerate(jobs):
            refused = [why for why in [next(refusals) for _ in job.texts] if why]
            if refused and not isinstance(found[n], Refusal):
                found[n] = Refusal(f"gold: {refused[0].reason}", refused[0].detail)
    return found


def _parts(job: Job) -> list[Job]:
    """The job itself; of a contrast job, whose prompt is its item, one a prompt."""
    if job.kind != "contrast":
        return [job]
    item = job.prompt
    return [
        job._replace(prompt=item.query, texts=job.texts[:2]),
        job._replace(prompt=item.retrieval, texts=job.texts[2:]),
    ]


def _joined(
    parts: Sequence[list[EncodedCompletion] | Refusal],
) -> list[EncodedCompletion] | Refusal:
    """The texts of all parts, or the first Refusal."""
    texts = []
    for part in parts:
        if isinstance(part, Refusal):
            return part
        texts += part
    return texts


def _with_rewards(job: Job, rewards: np.ndarray, *, with_gold: bool) -> dict[str, Any]:
    if job.kind != "contrast":
        own = {scored_rows.GOLD_COLUMN: list(job.gold)} if with_gold else {}
        return scored_rows.with_rewards(job, rewards) | own
    values = zip(contrast.REWARD_COLUMNS, rewards.tolist(), strict=True)
    return {**job.row, **dict(values), "schema": scored_rows.SCHEMA}


def _with_states(
    scorer: Scorer,
    encoded: Sequence[EncodedCompletion],
    jobs: Sequence[Job],
    seed: int,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, StateFigures]:
    """Rewards of all completions, and the figures of the states of a subset."""
    keep = hidden_states.kept_completions([len(job.texts) for job in jobs], seed=seed)
    found = scorer.rewards_and_states(encoded, keep, advance)
    return found.rewards, hidden_states.state_figures(
        found.before, found.after, _state_pairs(jobs, keep)
    )


def _state_pairs(jobs: Sequence[Job], keep: np.ndarray) -> np.ndarray:
    """[Q 2], (better, worse) among the kept completions, whose rows are kept whole."""
    if jobs[0].kind == "pairs":
        return hidden_states.alternating(len(keep))
    sizes = np.array([len(job.texts) for job in jobs])
    firsts = np.cumsum(sizes) - sizes
    rows = zip(jobs, np.isin(firsts, keep), np.searchsorted(keep, firsts), strict=True)
    pairs = [
        np.array(gold_pairs(np.array(job.gold)), np.int64).reshape(-1, 2) + place
        for job, kept, place in rows
        if kept
    ]
    return np.concatenate([np.zeros((0, 2), np.int64), *pairs])


def _check_set(
    data: EvalSet,
    jobs: Sequence[Job],
    taken: int,
    aside: Sequence[Mapping[str, Any]],
) -> None:
    kinds = dict.fromkeys(job.kind for job in jobs)
    if not jobs:
        reasons = Counter(str(line["reason"]) for line in aside)
        counts = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        first = (
            f" (the first: {aside[0]['where']}: {aside[0]['detail']})" if aside else ""
        )
        raise ValueError(
            f"{data.name}: none of {taken} rows can be scored: {counts}{first}"
        )
    wanted = {"eval_data": ("pairs", "kwise"), "rewardbench": ("pairs",)}
    expected = wanted.get(data.kind, (data.kind,))
    if len(kinds) > 1 or not set(kinds) <= set(expected):
        raise ValueError(
            f"{data.name}: the rows are {' and '.join(kinds)}; expected "
            f"{' or '.join(expected)}, one kind in a set"
        )
    if data.kind == "rmbench":
        check_domains([str(job.row["domain"]) for job in jobs])
