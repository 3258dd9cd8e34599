"""Tokenised datasets in memory: flat int32 arrays and offsets, rows as views.

`PairDataset`, `ConversationDataset` and `PromptDataset` have len(), [i] and `lengths`,
which is all that packing plans from; [i] costs no copy of the ids. `groups` are the
parts of a mixture.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.encoded import EncodedConversation, EncodedPair, EncodedPrompt
from rlhf_jax.types import PAIR_COLUMNS

Group = tuple[int, int, float]
"""(first row, row after the last, weight) of one part of a mixture."""


@dataclasses.dataclass(frozen=True, eq=False)
class PairDataset:
    """Encoded pairs; build one with `of` or `data.prepare.prepare_pairs`."""

    tokens: np.ndarray
    """All ids: prompt, chosen, rejected of row 0, of row 1, ..."""
    lengths: np.ndarray
    """[N 3] tokens of prompt, chosen, rejected."""
    where: Sequence[str]
    """File and line of each row."""
    source_row: np.ndarray
    """Number of each row in its source, before rows were set aside; -1 if unknown."""
    margin: np.ndarray | None = None
    soft_label: np.ndarray | None = None
    gap_bound: np.ndarray | None = None
    weight: np.ndarray | None = None
    groups: tuple[Group, ...] = ()
    """Parts with weights; () = one part, rows in equal measure."""
    pad_id: int = 0

    def __post_init__(self) -> None:
        ends = np.cumsum(self.lengths.reshape(-1)).reshape(-1, 3)
        object.__setattr__(self, "_ends", ends)

    @classmethod
    def of(cls, pairs: Iterable[EncodedPair], *, pad_id: int = 0) -> "PairDataset":
        """A dataset of these pairs."""
        pairs = list(pairs)
        columns: Any = {
            name: _column([getattr(pair, name) for pair in pairs], name)
            for name in PAIR_COLUMNS
        }
        parts = [part for p in pairs for part in (p.prompt, p.chosen, p.rejected)]
        return cls(
            tokens=flatten(parts),
            lengths=np.array([len(part) for part in parts], np.int64).reshape(-1, 3),
            where=[pair.where for pair in pairs],
            source_row=np.full(len(pairs), -1, np.int64),
            **columns,
            weight=np.array([pair.weight for pair in pairs], np.float32),
            pad_id=pad_id,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> EncodedPair:
        if not 0 <= row < len(self.lengths):
            raise IndexError(row)
        a, b, c = self._ends[row].tolist()  # type: ignore[attr-defined]
        start = a - int(self.lengths[row, 0])
        return EncodedPair(
            prompt=self.tokens[start:a],
            chosen=self.tokens[a:b],
            rejected=self.tokens[b:c],
            **{
                name: None if column is None else float(column[row])
                for name in PAIR_COLUMNS
                for column in [getattr(self, name)]
            },
            weight=1.0 if self.weight is None else float(self.weight[row]),
            where=self.where[row],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationDataset:
    """Encoded conversations with the mask of what the assistant wrote."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    lengths: np.ndarray
    """[N] tokens of each conversation."""
    where: Sequence[str]
    source_row: np.ndarray
    groups: tuple[Group, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.lengths))

    @classmethod
    def of(
        cls, conversations: Iterable[EncodedConversation], *, pad_id: int = 0
    ) -> "ConversationDataset":
        """A dataset of these conversations."""
        items = list(conversations)
        masks = [np.asarray(item.completion_mask, bool) for item in items]
        return cls(
            tokens=flatten([item.tokens for item in items]),
            completion_mask=np.concatenate(masks) if masks else np.zeros(0, bool),
            lengths=np.array([len(item.tokens) for item in items], np.int64),
            where=[item.where for item in items],
            source_row=np.full(len(items), -1, np.int64),
            pad_id=pad_id,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> EncodedConversation:
        if not 0 <= row < len(self.lengths):
            raise IndexError(row)
        end = int(self._ends[row])  # type: ignore[attr-defined]
        start = end - int(self.lengths[row])
        return EncodedConversation(
            self.tokens[start:end], self.completion_mask[start:end], self.where[row]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PromptDataset:
    """Encoded prompts, each with the row it came from: rewards read its columns."""

    tokens: np.ndarray
    lengths: np.ndarray
    """[N] tokens of each prompt."""
    rows: np.ndarray
    """uint8, the JSON of {"prompt", "row"} of row 0, of row 1, ..."""
    row_sizes: np.ndarray
    """[N] bytes of each."""
    where: Sequence[str]
    source_row: np.ndarray
    groups: tuple[Group, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.lengths))
        object.__setattr__(self, "_row_ends", np.cumsum(self.row_sizes))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> EncodedPrompt:
        if not 0 <= row < len(self.lengths):
            raise IndexError(row)
        end = int(self._ends[row])  # type: ignore[attr-defined]
        stop = int(self._row_ends[row])  # type: ignore[attr-defined]
        text = self.rows[stop - int(self.row_sizes[row]) : stop].tobytes()
        return EncodedPrompt(
            tokens=self.tokens[end - int(self.lengths[row]) : end],
            where=self.where[row],
            **json.loads(text),
        )


def json_bytes(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(all values as JSON, one after the other, uint8; bytes of each)."""
    texts = [json.dumps(value, default=str).encode() for value in values]
    sizes = np.array([len(text) for text in texts], np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), sizes


def flatten(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """One int32 array of all parts."""
    if not parts:
        return np.zeros(0, np.int32)
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _column(values: list[float | None], name: str) -> np.ndarray | None:
    """A float32 column of all rows, or None if no row has it."""
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise ValueError(f"{name}: some rows have one and some have none")
    return np.array(values, np.float32)
