"""The prompts of `seam`: rows with a prompt and a gold completion, each accounted for.

A prompt may come more than once, with the same or another gold completion: every row is
an item of its own, and no duplicate counts as a neighbour of the other.
"""

import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
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
    occurrence: int
    """How many rows with a prompt before it have this prompt_id."""
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
    seen: Counter[str] = Counter()
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
                prompt, tools, gold = _parts(row, columns, gold_column)
            except ValueError as error:
                reason = getattr(error, "kind", "malformed")
                left_out.append(scored_rows.set_aside(where, reason, str(error), row))
                continue
            index, prompt_id = len(rows), _prompt_id(row, prompt)
            occurrence, seen[prompt_id] = seen[prompt_id], seen[prompt_id] + 1
            rows.append(row)
            if isinstance(gold, str) and gold.strip():
                found.append(
                    SeamPrompt(
                        index, where, prompt_id, occurrence, prompt, gold, row, tools
                    )
                )
            else:
                why = _no_gold(row, gold_column)
                left_out.append(scored_rows.set_aside(where, NO_GOLD, why, row))
    if not found:
        first = left_out[0] if left_out else {"where": "", "detail": "no row"}
        raise ValueError(
            f"data: none of {len(left_out)} rows has a prompt and a gold completion; "
            f"the first: {first['where']}: {first['detail']}"
        )
    return SeamData(found, rows, left_out)


def _parts(
    row: dict[str, Any], columns: Columns, gold_column: str
) -> tuple[Any, list | None, Any]:
    """(prompt, tools, what the gold column holds)."""
    if gold_column == columns.chosen and gold_column in row:
        pair = row_shapes.pair_row(row, columns)
        return pair.prompt, pair.tools, pair.chosen
    record = row_shapes.prompt_row(row, columns)
    return record.prompt, record.tools, row.get(gold_column)


def _prompt_id(row: dict[str, Any], prompt: Any) -> str:
    """The row's own, or a digest of the prompt."""
    digest = hashlib.sha1(normal(prompt).encode("utf-8", "replace")).hexdigest()[:12]
    return str(row.get("prompt_id") or digest)


def _no_gold(row: dict[str, Any], gold_column: str) -> str:
    have = ", ".join(map(repr, list(row)[:12]))
    return (
        f"no gold completion, a text, in column {gold_column!r}; the row has {have}: "
        "name the right one with gold_column"
    )


def normal(prompt: Any) -> str:
    """A prompt's text with white space, case and Unicode forms made alike."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def as_text(prompt: Any) -> str:
    """A prompt for a reader that takes one text: turns of a conversation by name."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
