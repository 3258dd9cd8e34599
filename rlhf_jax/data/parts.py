"""`Parts`: the segments of a batch, collected one by one and written all at once.

The modules that pack (`layout`, `groups`, `kwise`) say where each part goes; here the
arrays are made of them.
"""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.types import Sequences


@dataclasses.dataclass
class Parts:
    """Segments to be written, as parallel lists."""

    tokens: list[Any] = dataclasses.field(default_factory=list)
    row: list[int] = dataclasses.field(default_factory=list)
    column: list[int] = dataclasses.field(default_factory=list)
    segment: list[int] = dataclasses.field(default_factory=list)
    prefix: list[int] = dataclasses.field(default_factory=list)
    position: list[int] = dataclasses.field(default_factory=list)
    completion: list[Any] = dataclasses.field(default_factory=list)
    """True, False, or a mask over the tokens."""

    def add(
        self,
        tokens: Any,
        *,
        row: int,
        column: int,
        segment: int,
        completion: Any,
        prefix: int = 0,
        position: int = 0,
    ) -> None:
        self.tokens.append(tokens)
        self.row.append(row)
        self.column.append(column)
        self.segment.append(segment)
        self.prefix.append(prefix)
        self.position.append(position)
        self.completion.append(completion)

    def sequences(self, rows: int, row_length: int, *, pad_id: int) -> Sequences:
        """All parts in [rows, row_length] arrays, without a loop over tokens."""
        shape = (rows, row_length)
        tokens: Any = np.full(shape, pad_id, np.int32)
        positions: Any = np.zeros(shape, np.int32)
        segment: Any = np.zeros(shape, np.int32)
        prefix: Any = np.zeros(shape, np.int32)
        completion: Any = np.zeros(shape, bool)
        if self.tokens:
            sizes = np.array([len(part) for part in self.tokens], np.int64)
            starts = np.cumsum(sizes) - sizes
            inside = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
            corner = np.asarray(self.row, np.int64) * row_length + self.column
            cells = np.repeat(corner, sizes) + inside
            tokens.reshape(-1)[cells] = np.concatenate(
                [np.asarray(part, np.int32) for part in self.tokens]
            )
            positions.reshape(-1)[cells] = inside + np.repeat(self.position, sizes)
            segment.reshape(-1)[cells] = np.repeat(self.segment, sizes)
            prefix.reshape(-1)[cells] = np.repeat(self.prefix, sizes)
            completion.reshape(-1)[cells] = self._masks(sizes)
        return Sequences(
            tokens=tokens,
            positions=positions,
            segment=segment,
            completion_mask=completion,
            prefix=prefix if any(self.prefix) else None,
        )

    def _masks(self, sizes: np.ndarray) -> np.ndarray:
        if all(isinstance(mask, bool) for mask in self.completion):
            return np.repeat(np.asarray(self.completion, bool), sizes)
        return np.concatenate(
            [
                np.full(size, mask)
                if isinstance(mask, bool)
                else np.asarray(mask, bool)
                for mask, size in zip(self.completion, sizes.tolist())
            ]
        )
