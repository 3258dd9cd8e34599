"""Rows of the `attributes` program: completions with numbers, and pairs, as token ids.

    prompt + completion + attributes   {name: number or null}; null = not rated
    prompt + chosen + rejected         for the gate

Malformed rows stop with file and line; rows without text, of two equal texts, or too
long are set aside with their reason.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import rows, sources, specs
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.scorer import Refusal, Scorer


class Item(NamedTuple):
    """A row that can be used."""

    prompt: str
    """The prompt as JSON: what rows are held out by."""
    encoded: tuple[EncodedCompletion, ...]
    """The completion; or prompt alone, chosen, rejected."""
    values: dict[str, float]
    """Attributes that have a value; none in pairs."""


def read_rated(
    data: Sequence[str], scorer: Scorer, columns: rows.Columns, attributes: str
) -> tuple[list[Item], list[dict[str, Any]]]:
    """(completions with attributes, lines set aside) of some specs.

    Args:
        data: specs.
        scorer: encodes.
        columns: of prompt and completion.
        attributes: name of that column.

    Raises:
        ValueError: a malformed row, with file and line, or no row left.
    """
    items, aside = [], []
    for row, where in _rows("data", data):
        record = _record(row, where, columns, aside)
        if record is None:
            continue
        if not isinstance(record, rows.ConversationRow) or record.completion is None:
            raise ValueError(
                f"{where}: expected prompt, completion and {attributes}, got "
                f"{', '.join(map(repr, row))}"
            )
        values = _values(row, where, attributes)
        encoded = scorer.encode(record.prompt, record.completion, tools=record.tools)
        if isinstance(encoded, Refusal):
            aside.append(_aside(where, encoded.reason, encoded.detail, row))
        else:
            items.append(Item(_key(record.prompt), (encoded,), values))
    return _some("data", items, aside), aside


def read_pairs(
    pairs: Sequence[str], scorer: Scorer, columns: rows.Columns
) -> tuple[list[Item], list[dict[str, Any]]]:
    """(pairs, lines set aside) of some specs; see `read_rated`."""
    items, aside = [], []
    for row, where in _rows("pairs", pairs):
        record = _record(row, where, columns, aside)
        if record is None:
            continue
        if not isinstance(record, rows.PairRow):
            raise ValueError(
                f"{where}: expected prompt, chosen and rejected, got "
                f"{', '.join(map(repr, row))}"
            )
        if record.chosen == record.rejected:
            aside.append(_aside(where, "identical", "chosen == rejected", row))
            continue
        encoded = [
            scorer.encode(record.prompt, text, tools=record.tools)
            for text in (record.chosen, record.rejected)
        ]
        refused = [e for e in encoded if isinstance(e, Refusal)]
        taken = [e for e in encoded if not isinstance(e, Refusal)]
        if refused:
            aside.append(_aside(where, refused[0].reason, refused[0].detail, row))
        else:
            alone = EncodedCompletion(taken[0].prompt, [])
            items.append(Item(_key(record.prompt), (alone, *taken), {}))
    return _some("pairs", items, aside), aside


def held_out(items: Sequence[Item], share: float, seed: int) -> np.ndarray:
    """Which items are held out, bool [N]: about a share of the prompts, by their text,
    so that a prompt is on the same side in every set of rows."""
    return np.array([_fraction(item.prompt, seed) < share for item in items], bool)


def targets(items: Sequence[Item], names: Sequence[str]) -> np.ndarray:
    """The attributes as [N A] float64; nan = no value."""
    found = [[item.values.get(name, math.nan) for name in names] for item in items]
    return np.array(found, np.float64).reshape(len(items), len(names))


def _fraction(prompt: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{prompt}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def _rows(what: str, texts: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for text in texts:
        spec = specs.parse(text)
        if spec.weight is not None:
            raise ValueError(
                f"{what} {text!r}: expected a SPEC without a weight; all rows count "
                "alike, so leave out the part before the *"
            )
        source = sources.open_source(spec)
        for n in range(len(source)):
            yield source[n]


def _record(
    row: dict[str, Any], where: str, columns: rows.Columns, aside: list[dict[str, Any]]
) -> rows.Record | None:
    try:
        return rows.normalise(row, columns)
    except rows.RowError as error:
        if error.kind != "empty":
            raise ValueError(f"{where}: {error}") from None
        aside.append(_aside(where, "empty", str(error), row))
        return None


def _values(row: dict[str, Any], where: str, column: str) -> dict[str, float]:
    given = row.get(column)
    if not isinstance(given, dict) or not given:
        raise ValueError(
            f"{where}: {column}: expected an object {{name: number or null}}, got "
            f"{json.dumps(given, default=str)[:80]}"
        )
    values = {}
    for name, value in given.items():
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e30:
            raise ValueError(
                f"{where}: {column}.{name}: expected a finite number or null, got "
                f"{value!r}"
            )
        values[name] = float(value)
    return values


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _aside(where: str, reason: str, detail: str, row: dict[str, Any]) -> dict[str, Any]:
    return scored_rows.set_aside(where, reason, detail, row)


def _some(what: str, items: list[Item], aside: list[dict[str, Any]]) -> list[Item]:
    if not items:
        first = f": {aside[0]['where']}: {aside[0]['detail']}" if aside else ""
        raise ValueError(f"{what}: none of {len(aside)} rows can be used{first}")
    return items
