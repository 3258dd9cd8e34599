"""Where every block of a batch goes, from lengths alone.

`plan_blocks` places blocks in rows by best-fit decreasing and rounds the number of
rows, their length and the score slots up to buckets, so that few shapes compile. Every
process of several makes the same plan of the whole global batch. `layout` fills it.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

Layout: TypeAlias = Literal["shared", "packed", "padded"]
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
MIN_ROW_LENGTH = 32


def bucket(size: int, *, steps: int = 8) -> int:
    """The smallest bucket >= size: `steps` of them between a power of two and the next.

    >>> [bucket(n) for n in (5, 17, 33, 100)]
    [5, 18, 36, 104]
    """
    if size <= steps:
        return max(size, 1)
    step = 1 << ((size - 1).bit_length() - 1 - (steps.bit_length() - 1))
    return -(-size // max(step, 1)) * max(step, 1)


def row_bucket(length: int) -> int:
    """The row length for a longest block: a bucket with two steps an octave, >= 32."""
    return max(bucket(length, steps=2), MIN_ROW_LENGTH)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every block of a global batch goes."""

    rows: int
    row_length: int
    slots: int
    """Score slots of a row."""
    row: np.ndarray
    """Row of each block."""
    column: np.ndarray
    """First column of each block."""
    first: np.ndarray
    """Number of blocks, or of score slots (`members`), before it in its row."""


def plan_blocks(
    lengths: Sequence[int] | np.ndarray,
    *,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    rows: int | None = None,
    rows_exact: bool = False,
    per_block: int = 1,
    members: Sequence[int] | np.ndarray | None = None,
    slots: int | None = None,
    pack: bool = True,
    where: Callable[[int], str] = lambda n: f"number {n}",
) -> Plan:
    """A Plan for blocks of these lengths.

    Args:
        lengths: tokens of each block.
        row_length: T; None = the bucket of the longest block.
        rows_multiple_of: the number of rows becomes a multiple of it.
        rows: number of rows; None = the bucket of those needed.
        rows_exact: take the number needed instead of its bucket.
        per_block: score slots that every block takes.
        members: score slots that each block takes, where they differ; the plan's
            `first` then counts slots and not blocks.
        slots: score slots of a row, which then limits the blocks in it; None = as
            needed.
        pack: False puts one block in each row, in order.
        where: names a block in errors.

    Raises:
        ValueError: a block does not fit a row, or the blocks do not fit `rows`.
    """
    if members is not None and per_block != 1:
        raise ValueError("per_block, members: expected one of them")
    lengths = np.asarray(lengths, np.int64)
    longest = int(lengths.max(initial=1))
    if row_length is None:
        row_length = row_bucket(longest)
    if longest > row_length:
        raise ValueError(
            f"row_length {row_length}: {where(int(lengths.argmax()))} needs {longest} "
            f"tokens in one row; set row_length to at least {longest} or lower "
            "max_length"
        )
    if pack:
        limit = None if slots is None or members is not None else slots // per_block
        row, column, first = best_fit(
            _rooms(lengths, members, row_length, slots, where),
            row_length,
            None if limit is None else max(limit, 1),
        )
    else:
        row = np.arange(len(lengths))
        column = first = np.zeros(len(lengths), np.int64)
    ends = first + 1
    if members is not None:
        first = _before(row, first, np.asarray(members, np.int64))
        ends = first + members
    needed = int(row.max(initial=-1)) + 1
    if rows is None:
        rows = bucket(needed) if pack and not rows_exact else max(needed, 1)
    elif rows < needed:
        raise ValueError(f"rows {rows}: these blocks need {needed}")
    rows = -(-rows // rows_multiple_of) * rows_multiple_of
    if slots is None:
        most = int(ends.max(initial=1)) * per_block
        slots = 1 << (most - 1).bit_length()
    return Plan(rows, row_length, slots, row, column, first)


def _rooms(
    lengths: np.ndarray,
    members: Sequence[int] | np.ndarray | None,
    row_length: int,
    slots: int | None,
    where: Callable[[int], str],
) -> np.ndarray:
    """Tokens of a row that each block is given: its own, or its share of the slots if
    that is more. So blocks that fit a row fit its slots."""
    if members is None or slots is None:
        return lengths
    takes = np.asarray(members, np.int64)
    if takes.max(initial=0) > slots:
        block = int(takes.argmax())
        raise ValueError(
            f"slots {slots}: {where(block)} takes {takes[block]} of a row; set slots "
            "to at least that"
        )
    per_slot = -(-row_length // slots)
    return np.maximum(lengths, np.minimum(takes * per_slot, row_length))


def _before(row: np.ndarray, first: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Score slots before each block in its row."""
    order = np.lexsort((first, row))
    total = np.cumsum(members[order]) - members[order]
    starts = np.flatnonzero(np.diff(row[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))
    before = np.zeros(len(order), np.int64)
    before[order] = total - np.repeat(total[starts], sizes)
    return before


def best_fit(
    lengths: np.ndarray, row_length: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, number in the row) of each block by best-fit decreasing.

    Args:
        lengths: tokens of each block.
        row_length: tokens of a row, at least those of the longest block.
        limit: blocks of a row, at most; None = any number.
    """
    row = np.zeros(len(lengths), np.int64)
    column = np.zeros(len(lengths), np.int64)
    first = np.zeros(len(lengths), np.int64)
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    count: list[int] = []
    for block in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[block])
        here = bisect.bisect_left(free, (length, -1))
        if here == len(free):
            room, target = row_length, len(count)
            count.append(0)
        else:
            room, target = free.pop(here)
        row[block], column[block] = target, row_length - room
        first[block] = count[target]
        count[target] += 1
        if limit is None or count[target] < limit:
            bisect.insort(free, (room - length, target))
    return row, column, first


def pair_blocks(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens of each block of pairs with (prompt, chosen, rejected) lengths [Q 3].

    "shared" has one block a pair; the others two, chosen and rejected in turn.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 3)
    if layout == "shared":
        return lengths.sum(axis=1)
    return (lengths[:, :1] + lengths[:, 1:]).reshape(-1)


def plan_pairs(
    lengths: np.ndarray,
    *,
    layout: Layout = "shared",
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    rows: int | None = None,
    slots: int | None = None,
    where: Callable[[int], str] = lambda n: f"pair {n}",
) -> Plan:
    """A Plan for pairs with lengths [Q 3] = (prompt, chosen, rejected); see
    `plan_blocks`.

    For "padded", row_length is None or the fixed length of a row.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}"
        )
    shared = layout == "shared"
    return plan_blocks(
        pair_blocks(lengths, layout),
        row_length=row_length,
        rows_multiple_of=rows_multiple_of,
        rows=rows,
        per_block=2 if shared else 1,
        slots=1 if layout == "padded" else slots,
        pack=layout != "padded",
        where=where if shared else lambda n: where(n // 2),
    )
