"""Rows on their way through a reward model: which texts to score, where rewards go.

    prompt + completion, or messages     + reward
    prompt + chosen + rejected           + chosen_reward, rejected_reward
    prompt + responses                   + rewards, in the order of responses

`job_of` reads a row, `encode_jobs` turns many into ids or a `Refusal`, `with_rewards`
gives a row back with its rewards and `schema: 1`. Input columns are never
overwritten: a row that already has one of these columns is refused.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import rows, sources
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs.scorer import Refusal, Scorer

REWARD_COLUMNS = {
    "completion": ("reward",),
    "pairs": ("chosen_reward", "rejected_reward"),
    "kwise": ("rewards",),
}
GOLD_COLUMN = "gold_rewards"
"""Scores that `evaluate --gold` gave the responses of a row."""
SCHEMA = 1


class Job(NamedTuple):
    """A row, and the texts of it that get a reward."""

    row: dict[str, Any]
    where: str
    kind: str
    """completion, pairs, kwise or rmbench."""
    prompt: Any
    texts: tuple[str, ...]
    gold: tuple[float, ...] = ()
    """Gold scores of the texts of a K-wise row."""
    tools: list | None = None


def job_of(
    row: dict[str, Any],
    where: str,
    columns: rows.Columns = rows.Columns(),
    *,
    scored: bool = True,
) -> Job:
    """The job of a row.

    Args:
        row: of any shape with a text to score.
        where: file and line.
        columns: names.
        scored: False takes responses without gold scores, and reads none; the row's
            texts then get `rewards` and `gold_rewards`.

    Raises:
        ValueError: no shape fits, or a reward column is there already.
    """
    record = rows.normalise(row, columns, scored=scored)
    if isinstance(record, rows.PairRow):
        texts = (record.chosen, record.rejected)
        job = Job(row, where, "pairs", record.prompt, texts, tools=record.tools)
    elif isinstance(record, rows.KwiseRow):
        texts = tuple(response.text for response in record.responses)
        gold = tuple(response.score for response in record.responses)
        job = Job(row, where, "kwise", record.prompt, texts, gold, record.tools)
    elif isinstance(record, rows.ConversationRow):
        job = _conversation_job(row, where, record)
    else:
        raise rows.RowError(
            "nothing to score: expected a completion, chosen and rejected, or "
            "responses beside the prompt"
        )
    written = REWARD_COLUMNS[job.kind] if scored else ("rewards", GOLD_COLUMN)
    taken = [name for name in written if name in row]
    if taken:
        raise rows.RowError(
            f"the row has a column {taken[0]!r} already; rename it: it is not "
            f"overwritten"
        )
    if row.get("schema", SCHEMA) != SCHEMA:
        raise rows.RowError(
            f"the row has schema {row['schema']!r}; this version writes schema {SCHEMA}"
        )
    return job


def _conversation_job(
    row: dict[str, Any], where: str, record: rows.ConversationRow
) -> Job:
    if record.completion is not None:
        texts = (record.completion,)
        return Job(row, where, "completion", record.prompt, texts, tools=record.tools)
    *history, answer = record.messages or [{}]
    text = answer.get("content")
    if answer.get("role") != "assistant" or answer.get("tool_calls") or not text:
        raise rows.RowError("the last turn must be the assistant's text to be scored")
    if not history:
        raise rows.RowError("nothing before the assistant's answer")
    return Job(row, where, "completion", history, (text,), tools=record.tools)


def texts_of(jobs: Sequence[Job]) -> Texts:
    """All texts of the jobs, one after another."""
    rows = [{**job.row, "tools": job.tools} for job in jobs]
    return Texts(
        [job.prompt for job in jobs for _ in job.texts],
        [text for job in jobs for text in job.texts],
        [row for row, job in zip(rows, jobs, strict=True) for _ in job.texts],
    )


def encode_jobs(
    jobs: Sequence[Job], scorer: Scorer
) -> list[list[EncodedCompletion] | Refusal]:
    """Ids of every text of each job, or why its row has none: all of it or nothing."""
    found = iter(scorer.encode_all(texts_of(jobs)))
    return [_whole([next(found) for _ in job.texts]) for job in jobs]


def _whole(
    texts: Sequence[EncodedCompletion | Refusal],
) -> list[EncodedCompletion] | Refusal:
    encoded = []
    for n, found in enumerate(texts, start=1):
        if isinstance(found, Refusal):
            which = f"text {n} of {len(texts)}: " if len(texts) > 1 else ""
            return Refusal(found.reason, which + found.detail)
        encoded.append(found)
    return encoded


def read_job(
    read: Callable[[], tuple[dict[str, Any], str]],
    columns: rows.Columns = rows.Columns(),
    *,
    scored: bool = True,
) -> Job | dict[str, Any]:
    """The job of the (row, where) that `read` gives, or its line to set aside; see
    `job_of`."""
    try:
        row, where = read()
    except sources.SourceError as error:
        return set_aside(error.where, "cannot be read", error.reason)
    try:
        return job_of(row, where, columns, scored=scored)
    except ValueError as error:
        return set_aside(where, getattr(error, "kind", "malformed"), str(error), row)


def set_aside(
    where: str, reason: str, detail: str, row: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The line of a row that got no reward."""
    line = {"schema": SCHEMA, "where": where, "reason": reason, "detail": detail}
    return line if row is None else line | {"row": row}


def split_rewards(rewards: np.ndarray, jobs: Sequence[Job]) -> list[np.ndarray]:
    """Rewards of all texts, one after another, cut into one array a job."""
    sizes = np.cumsum([len(job.texts) for job in jobs])
    return np.split(rewards, sizes[:-1]) if len(jobs) else []


def with_rewards(job: Job, rewards: np.ndarray) -> dict[str, Any]:
    """The input row with its rewards and `schema: 1`."""
    values = [float(reward) for reward in rewards]
    if job.kind == "kwise":
        found: dict[str, Any] = {"rewards": values}
    elif job.kind == "rmbench":
        half = len(values) // 2
        found = {"chosen_rewards": values[:half], "rejected_rewards": values[half:]}
    else:
        found = dict(zip(REWARD_COLUMNS[job.kind], values, strict=True))
    return {**job.row, **found, "schema": SCHEMA}


def dump(row: dict[str, Any]) -> str:
    """One line of JSON; text stays readable, lone surrogates are escaped."""
    try:
        text = json.dumps(row, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_jsonl` wrote.

    Lines end with a line feed alone: a text may hold the other characters that
    str.splitlines takes as ends.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_jsonl(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    """A file of one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(dump(line))


def write_whole(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    """`write_jsonl`, a whole file or none."""
    partial = path.with_name(f"{path.name}.partial")
    write_jsonl(partial, lines)
    partial.replace(path)
