"""`rlhf-jax score`: texts in, the same rows with rewards out, in order.

Read `run`: rows are taken in chunks, scored, and written before the next are read. `-`
is stdin or stdout. Every row ends either in --out or, with its place and reason, in
--errors.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.rows import Columns
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.scored_rows import Job
from rlhf_jax.programs.scorer import Refusal, Scorer, ScoringConfig, open_scorer


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Score texts with a reward model."""

    model: str
    """Reward model: run directory (its best checkpoint), HF directory, hub id or
    .gguf; or ensemble:DIR, attributes:DIR (see docs/rewards.md)."""
    data: str = "-"
    """Rows: a data SPEC, or - for JSON lines on stdin. Each has prompt + completion
    (adds reward), prompt + chosen + rejected (adds chosen_reward, rejected_reward), or
    prompt + responses (adds rewards)."""
    out: str = "-"
    """JSON lines file to write, or - for stdout."""
    errors: str | None = None
    """Where rows without a reward go, with file, line and reason; null =
    OUT.errors.jsonl, or stderr when out is -."""
    overwrite: bool = False
    """Replace `out` and `errors` where they exist."""
    chunk: int = 512
    """Rows scored and written together."""
    seed: int = 0
    """Seed of a random head (scoring.untrained_head)."""
    columns: Columns = Columns()
    """Names of the columns."""
    scoring: ScoringConfig = ScoringConfig()
    """How texts become rewards."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk}: expected at least 1")


def run(config: ScoreConfig) -> dict[str, int]:
    """Scores; returns how many rows were scored, and set aside for each reason.

    Raises:
        ValueError: an output exists, no model, no row was scored.
    """
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        jobs = _stdin(config.columns) if config.data == "-" else _source(config)
        out, errors = _outputs(config, stack)
        scorer = open_scorer(config.model, config.scoring, seed=config.seed)
        while chunk := list(itertools.islice(jobs, config.chunk)):
            for scored, line in score_chunk(chunk, scorer):
                counts["scored" if scored else line["reason"]] += 1
                (out if scored else errors).write(scored_rows.dump(line))
            out.flush()
            errors.flush()
    scored_count = counts.pop("scored", 0)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in counts.items())
    if not scored_count:
        raise ValueError(f"data {config.data}: no row scored: {reasons or 'none came'}")
    aside = f"; set aside in {_errors_name(config)}: {reasons}" if reasons else ""
    print(f"{scored_count:,} rows scored{aside}", file=sys.stderr)
    return {"scored": scored_count, **counts}


def score_chunk(
    chunk: Sequence[Job | dict[str, Any]], scorer: Scorer
) -> list[tuple[bool, dict[str, Any]]]:
    """(True, row with rewards) or (False, line to set aside) of each, in order."""
    lines: list[tuple[bool, dict[str, Any]]] = []
    places: list[int] = []
    jobs: list[Job] = []
    encoded: list[EncodedCompletion] = []
    read = [job for job in chunk if isinstance(job, Job)]
    ids = iter(scored_rows.encode_jobs(read, scorer))
    for job in chunk:
        if isinstance(job, dict):
            lines.append((False, job))
            continue
        texts = next(ids)
        if isinstance(texts, Refusal):
            aside = scored_rows.set_aside(
                job.where, texts.reason, texts.detail, job.row
            )
            lines.append((False, aside))
            continue
        places.append(len(lines))
        lines.append((True, {}))
        jobs.append(job)
        encoded += texts
    rewards = scored_rows.split_rewards(scorer.rewards(encoded), jobs)
    for place, job, found in zip(places, jobs, rewards, strict=True):
        if np.isfinite(found).all():
            lines[place] = (True, scored_rows.with_rewards(job, found))
        else:
            reason = "reward is not finite"
            lines[place] = (
                False,
                scored_rows.set_aside(job.where, reason, str(found), job.row),
            )
    return lines


def _source(config: ScoreConfig) -> Iterator[Job | dict[str, Any]]:
    """Jobs of a data spec; opened at once, so that a bad one is an early error."""
    source = sources.open_source(config.data, streams=True)
    return (
        scored_rows.read_job(functools.partial(source.__getitem__, n), config.columns)
        for n in range(len(source))
    )


def _stdin(columns: Columns) -> Iterator[Job | dict[str, Any]]:
    """Jobs of stdin as its lines come; blank lines are no rows."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        where = f"stdin:{number}"
        if line.strip():
            yield scored_rows.read_job(
                lambda line=line, where=where: (sources.parse_json(line, where), where),
                columns,
            )


def _errors_name(config: ScoreConfig) -> str:
    if config.errors is not None:
        return config.errors
    return "stderr" if config.out == "-" else f"{config.out}.errors.jsonl"


def _outputs(
    config: ScoreConfig, stack: contextlib.ExitStack
) -> tuple[IO[str], IO[str]]:
    """The files to write; refuses those that exist, and the input itself."""
    names = {"out": config.out, "errors": _errors_name(config)}
    if pathlib.Path(names["out"]) == pathlib.Path(names["errors"]):
        raise ValueError(f"errors {names['errors']}: is `out` too; name another file")
    read = pathlib.Path(config.data.partition("?")[0])
    for field, name in names.items():
        path = pathlib.Path(name)
        if name in ("-", "stderr"):
            continue
        if path.exists() and read.exists() and path.samefile(read):
            raise ValueError(f"{field} {name}: is the input itself; name another file")
        if path.exists() and not config.overwrite:
            raise ValueError(
                f"{field} {name}: exists; name another file or set --overwrite true"
            )
    standard = {"-": sys.stdout, "stderr": sys.stderr}
    out, errors = (
        standard.get(name) or stack.enter_context(_open(field, name))
        for field, name in names.items()
    )
    return out, errors


def _open(field: str, name: str) -> IO[str]:
    try:
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{field} {name}: cannot write there: {error}") from None
