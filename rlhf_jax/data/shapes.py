"""The few shapes that the packed batches of a dataset take, chosen once from lengths.

A batch of n blocks needs now more, now fewer rows; each row count is a compilation. So
the row length and a few row counts are chosen for the least work over a
sample of batches. It is a pure function of lengths, so a resumed run gets the same
shapes.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.plan import MIN_ROW_LENGTH, bucket, plan_blocks

_LENGTHS = (1.0, 1.25, 1.5, 2.0)
"""Row lengths tried, in units of the longest block."""
_ATTENTION = 8192
"""Row length at which dense attention costs as much as the rest: between 3,000 (135M
parameters) and 27,000 (8B)."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Row length, score slots of a row, and row counts, ascending; None and () = each
    batch has its own."""

    row_length: int | None = None
    slots: int | None = None
    rows: tuple[int, ...] = ()

    def rows_for(self, needed: int) -> int:
        """The smallest chosen row count that is enough, or else a bucket."""
        return next((rows for rows in self.rows if rows >= needed), bucket(needed))


def choose_shapes(
    batches: Sequence[np.ndarray],
    *,
    longest: int,
    mean: float,
    per_block: int,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    num_shapes: int = 3,
) -> Shapes:
    """The shapes that make the least work of these batches.

    Args:
        batches: lengths of the blocks of some batches.
        longest: see `mean`.
        mean: lengths of all blocks.
        per_block: score slots a block takes.
        row_length: fixed by the user; None = chosen.
        rows_multiple_of: row counts become multiples of it.
        num_shapes: row counts, at most; a rarer, larger batch takes a bucket of its
            own.
    """
    lengths = [row_length] if row_length else _candidates(longest)
    best: tuple[float, Shapes] | None = None
    for length in lengths:
        slots = 1 << int(np.ceil(np.log2(max(1.5 * length / mean * per_block, 2))))
        needed = collections.Counter(
            -(
                -plan_blocks(
                    blocks,
                    row_length=length,
                    slots=slots,
                    per_block=per_block,
                    rows_exact=True,
                ).rows
                // rows_multiple_of
            )
            * rows_multiple_of
            for blocks in batches
        )
        # Other batches may need a little more than the largest of these.
        room = bucket(max(needed))
        needed[-(-room // rows_multiple_of) * rows_multiple_of] += 0
        rows, total = _fewest_rows(needed, num_shapes)
        work = total * length * (1 + length / _ATTENTION)
        if best is None or work < best[0]:
            best = work, Shapes(length, slots, rows)
    assert best is not None
    return best[1]


def _candidates(longest: int) -> list[int]:
    """Row lengths >= the longest block, in steps that hardware likes."""
    step = 128 if longest > 512 else 32 if longest > 64 else 16
    lengths = [-int(-longest * factor // step) * step for factor in _LENGTHS]
    return sorted({max(length, MIN_ROW_LENGTH) for length in lengths})


def _fewest_rows(
    needed: "collections.Counter[int]", num_shapes: int
) -> tuple[tuple[int, ...], int]:
    """(row counts, rows of all batches): the best few counts, the largest included."""
    values = sorted(needed)
    most, others = values[-1], values[:-1][-12:]
    best: tuple[tuple[int, ...], int] | None = None
    for few in itertools.combinations(others, min(num_shapes - 1, len(others))):
        rows = (*few, most)
        total = sum(
            count * next(size for size in rows if size >= value)
            for value, count in needed.items()
        )
        if best is None or total < best[1]:
            best = rows, total
    assert best is not None
    return best
