"""`Parts`: the segments of a batch, collected one by one and written all at once.

The modules that pack (`layout`, `groups`, `kwise`) say where each part goes; here the
arrays are made of them.
"""

import dataclasses
from collections.abc import Sequence
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

    def add_block(
        self,
        prompt: Any,
        completions: Sequence[Any],
        *,
        row: int,
        column: int,
        segment: int,
        shared: bool,
    ) -> list[int]:
        """Adds [prompt | completion | completion ...]; returns the column after each
        completion.

        Args:
            prompt: token ids.
            completions: of each, its token ids.
            row: where.
            column: of the first token.
            segment: of the prompt. A completion that shares it has a segment of its
                own, counted from there; one that does not, this one.
            shared: whether the completions read the prompt through `prefix`.
        """
        self.add(prompt, row=row, column=column, segment=segment, completion=False)
        ends, end = [], column + len(prompt)
        for number, tokens in enumerate(completions, start=1):
            self.add(
                tokens,
                row=row,
                column=end,
                segment=segment + number if shared else segment,
                prefix=segment if shared else 0,
                position=len(prompt),
                completion=True,
            )
            end += len(tokens)
            ends.append(end)
        return ends

    def sequences(
        self, rows: int, row_length: int, *, pad_id: int, shared: bool = False
    ) -> Sequences:
        """All parts in [rows, row_length] arrays, without a loop over tokens.

        Args:
            rows: B.
            row_length: T.
            pad_id: token on padding; nothing reads it.
            shared: have a `prefix`, even if no part reads one: all batches of a layout
                have one structure, so they compile once.
        """
        if any(self.prefix) and not shared:
            raise ValueError("shared: expected True, some parts read a prefix")
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
            prefix=prefix if shared else None,
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
