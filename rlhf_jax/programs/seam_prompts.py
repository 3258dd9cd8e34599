"""The prompts of `seam`: rows with a prompt and a gold completion, each accounted for.

A prompt may come more than once, with the same or another gold completion: every row is
an item of its own, and no duplicate counts as a neighbour of the other.
"""

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from rlhf_jax.data import rows as row_shapes
from rlhf_jax.data import sources
from rlhf_jax.data.rows import Columns
from rlhf_jax.programs import scored_rows

NO_GOLD = "no gold completion"
Worse: TypeAlias = list[list[dict[str, Any]]]
"""For each prompt its worse completions, {"text", "source"} each."""


@dataclasses.dataclass(frozen=True)
class SeamPrompt:
    """A prompt and what it should be answered with."""

    index: int
    """Its row's place among all rows with a prompt."""
    where: str
    """File and line."""
    prompt_id: str
    prompt: Any
    """Text or messages."""
    gold: str
    row: dict[str, Any]
    """As the data has it."""
    tools: list | None = None
    """Tool descriptions for the chat template."""

    @property
    def key(self) -> str:
        """What makes two prompts the same: their text, white space and case aside."""
        return normal(self.prompt)


class SeamData(NamedTuple):
    """What the specs of a run hold."""

    prompts: list[SeamPrompt]
    """Rows with a prompt and a gold completion."""
    rows: list[dict[str, Any]]
    """Rows with a prompt, as they are: what RL can train on."""
    left_out: list[dict[str, Any]]
    """A line for each row that is no prompt with a gold completion."""


def read_prompts(data: Sequence[str], columns: Columns, gold_column: str) -> SeamData:
    """The prompts of some specs.

    Args:
        data: SPECs.
        columns: names.
        gold_column: of the gold completion.

    Raises:
        ValueError: no row has a prompt and a gold completion.
    """
    found: list[SeamPrompt] = []
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for spec in data:
        source = sources.open_source(spec)
        for n in range(len(source)):
            try:
                row, where = source[n]
            except sources.SourceError as error:
                left_out.append(
                    scored_rows.set_aside(error.where, "cannot be read", error.reason)
                )
                continue
            try:
                found.append(_prompt(len(rows), row, where, columns, gold_column))
            except ValueError as error:
                reason = getattr(error, "kind", "malformed")
                left_out.append(scored_rows.set_aside(where, reason, str(error), row))
                if reason != NO_GOLD:
                    continue
            rows.append(row)
    if not found:
        first = left_out[0] if left_out else {"where": "", "detail": "no row"}
        raise ValueError(
            f"data: none of {len(left_out)} rows has a prompt and a gold completion; "
            f"the first: {first['where']}: {first['detail']}"
        )
    return SeamData(found, rows, left_out)


def _prompt(
    index: int, row: dict[str, Any], where: str, columns: Columns, gold_column: str
) -> SeamPrompt:
    if gold_column == columns.chosen and gold_column in row:
        pair = row_shapes.pair_row(row, columns)
        prompt, tools, gold = pair.prompt, pair.tools, pair.chosen
    else:
        record = row_shapes.prompt_row(row, columns)
        prompt, tools, gold = record.prompt, record.tools, row.get(gold_column)
    if not isinstance(gold, str) or not gold.strip():
        have = ", ".join(map(repr, list(row)[:12]))
        raise row_shapes.RowError(
            f"no gold completion, a text, in column {gold_column!r}; the row has "
            f"{have}: name the right one with gold_column",
            NO_GOLD,
        )
    given = row.get("prompt_id")
    digest = hashlib.sha1(normal(prompt).encode("utf-8", "replace")).hexdigest()[:12]
    return SeamPrompt(index, where, str(given or digest), prompt, gold, row, tools)


def normal(prompt: Any) -> str:
    """A prompt's text with white space, case and Unicode forms made alike."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def as_text(prompt: Any) -> str:
    """A prompt for a reader that takes one text: turns of a conversation by name."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
