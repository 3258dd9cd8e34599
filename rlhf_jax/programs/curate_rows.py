"""The pairs of `curate`: read, or made of two policies' completions, with an account of
every row that is left out on the way.

Read `Curated`, then `read_pairs` and `new_over_old`, which begin one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.curation import pairs as curation
from rlhf_jax.data import rows as row_shapes
from rlhf_jax.data import sources
from rlhf_jax.data.rows import Columns, ConversationRow
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.rewards import Rewards
from rlhf_jax.programs.scorer import Refusal

Row = dict[str, Any]
_TEXTS = ("prompt", "chosen", "rejected", "tools")
"""Standard columns of a pair; the last is there if the data has tools."""
SIDES = ("chosen", "rejected")


@dataclasses.dataclass
class Curated:
    """The pairs so far, and what was left out on the way."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    where: list[str] = dataclasses.field(default_factory=list)
    left_out: list[Row] = dataclasses.field(default_factory=list)
    added: list[str] = dataclasses.field(default_factory=list)
    """Columns that this run wrote."""

    def add(self, where: str, row: Row) -> None:
        """One more pair."""
        self.rows.append(row)
        self.where.append(where)

    def set_aside(self, where: str, reason: str, detail: str, row: Row) -> None:
        """One more row that is left out."""
        self.left_out.append(scored_rows.set_aside(where, reason, detail, row))

    def keep(self, reasons: Sequence[str | None]) -> None:
        """Leaves out the pairs that have a reason, "REASON" or "REASON: DETAIL".

        Raises:
            ValueError: none is left.
        """
        before = list(zip(self.rows, self.where, reasons, strict=True))
        self.rows, self.where = [], []
        for row, where, reason in before:
            if reason is None:
                self.add(where, row)
            else:
                short, _, detail = reason.partition(": ")
                self.set_aside(where, short, detail, row)
        if not self.rows:
            raise ValueError(
                f"no pair is left; the last one was left out: {before[-1][2]}"
            )

    def add_column(self, name: str, values: Any) -> None:
        """A number for every pair."""
        for row, value in zip(self.rows, np.asarray(values), strict=True):
            row[name] = float(value)
        self.added.append(name)


def read_pairs(spec: str, columns: Columns) -> Curated:
    """The pairs of a spec in the standard columns, beside the other ones.

    Raises:
        ValueError: no row is a pair.
    """
    found = Curated()
    own = {getattr(columns, name) for name in _TEXTS}

    def read(row: Row) -> Row:
        record = row_shapes.pair_row(row, columns)
        for name in _TEXTS:
            if name in row and name not in own:
                raise row_shapes.RowError(
                    f"the row has a column {name!r} beside its "
                    f"{getattr(columns, name)!r}; rename it: it is not overwritten"
                )
        texts = {name: getattr(record, name) for name in _TEXTS}
        others = {key: value for key, value in row.items() if key not in own}
        return {k: v for k, v in texts.items() if v is not None} | others

    for where, row in _records(spec, found, read):
        found.add(where, row)
    if not found.rows:
        raise _nothing(f"data {spec}", found)
    return found


def new_over_old(new: str, old: str, reward: Rewards, columns: Columns) -> Curated:
    """Pairs that prefer one policy's completions to another's, see
    `curation.pairs.new_over_old`.

    Args:
        new: SPEC of prompts with completions.
        old: the same prompts in the same order.
        reward: that trained the new policy.
        columns: names.

    Raises:
        ValueError: other prompts, or no pair.
    """
    found, records = Curated(), []
    for spec in (new, old):
        source = sources.open_source(spec)
        records.append([_completion(source, n, columns) for n in range(len(source))])
    if len(records[0]) != len(records[1]):
        raise ValueError(
            f"new, old: expected completions of the same prompts in the same order, "
            f"got {len(records[0]):,} and {len(records[1]):,}; sample both with one "
            "--data"
        )
    for (where, mine), (before, theirs) in zip(*records, strict=True):
        if isinstance(mine, str) or isinstance(theirs, str):
            both = ((where, mine), (before, theirs))
            place, why = next((p, m) for p, m in both if isinstance(m, str))
            found.set_aside(place, "no completion", why, {})
        elif mine.prompt != theirs.prompt:
            raise ValueError(
                f"{where}: expected the prompt of {before}: new and old are compared "
                "in order; sample both with one --data"
            )
        else:
            texts = {"chosen": mine.completion, "rejected": theirs.completion}
            tools = {"tools": mine.tools} if mine.tools else {}
            found.add(where, {"prompt": mine.prompt, **texts, **tools})
    if not found.rows:
        raise _nothing(f"new {new}", found)
    rewards = side_rewards(found, reward)
    prompts, chosen, rejected = (
        [row[name] for row in found.rows] for name in _TEXTS[:3]
    )
    _, kept = curation.new_over_old(prompts, chosen, rejected, *rewards)
    found.keep([None if stays else "equal to the old, or worse" for stays in kept])
    return found


def texts_of(rows: Sequence[Row]) -> Texts:
    """Chosen and rejected of each pair, in turn."""
    return Texts(
        [row["prompt"] for row in rows for _ in SIDES],
        [row[side] for row in rows for side in SIDES],
        [row for row in rows for _ in SIDES],
    )


def reasons_of(found: Sequence[Any]) -> list[str | None]:
    """Why a pair has no rewards, "REASON: DETAIL", from what is found of its texts in
    the order of `texts_of`: a Refusal, or anything else."""
    reasons: list[str | None] = []
    for pair in zip(found[::2], found[1::2], strict=True):
        refused = [
            f"{why.reason}: {side}: {why.detail}"
            for side, why in zip(SIDES, pair, strict=True)
            if isinstance(why, Refusal)
        ]
        reasons.append(refused[0] if refused else None)
    return reasons


def side_rewards(found: Curated, reward: Rewards) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [Q] of the chosen completions and of the rejected ones; pairs with a text
    that the reward cannot take are left out first.

    Raises:
        ValueError: no pair is left, or a reward fails.
    """
    texts = texts_of(found.rows)
    reasons = reasons_of(reward.refusals(texts))
    found.keep(reasons)
    kept = [2 * n for n, reason in enumerate(reasons) if reason is None]
    chosen = reward.score(texts.take(kept))
    rejected = reward.score(texts.take([n + 1 for n in kept]))
    return chosen.total, rejected.total


def _records(
    spec: str, found: Curated, read: Callable[[Row], Row]
) -> Iterator[tuple[str, Row]]:
    """(where, what `read` makes of it) of each row; the others are set aside."""
    source = sources.open_source(spec)
    for n in range(len(source)):
        try:
            row, where = source[n]
        except sources.SourceError as error:
            found.set_aside(error.where, "cannot be read", error.reason, {})
            continue
        try:
            yield where, read(row)
        except ValueError as error:
            reason = getattr(error, "kind", "malformed")
            found.set_aside(where, reason, str(error), row)


def _completion(
    source: sources.Source, n: int, columns: Columns
) -> tuple[str, ConversationRow | str]:
    """(where, the row of a prompt and its completion, or why it is none)."""
    try:
        record = row_shapes.conversation_row(source[n][0], columns)
    except ValueError as error:
        return source.where(n), str(error)
    if record.completion is None:
        return source.where(n), "expected a prompt and a completion"
    return source.where(n), record


def _nothing(what: str, found: Curated) -> ValueError:
    first = found.left_out[0] if found.left_out else {"where": "", "detail": "no row"}
    return ValueError(
        f"{what}: none of {len(found.left_out)} rows can be used; the first: "
        f"{first['where']}: {first['detail']}"
    )
