"""Groups, a prompt and some of its completions each, as rows of fixed shape.

    shared   [prompt | completion | completion ...] blocks: a prompt is encoded once for
             as many of its completions as fit in a row
    packed   several [prompt completion] sequences a row
    padded   one a row

`cells` says where each completion token went, so that arrays over completions [M C]
and arrays over rows [B T] turn into each other by indexing (`to_rows`,
`to_completions`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.parts import Parts
from rlhf_jax.data.plan import Layout, bucket, plan_blocks
from rlhf_jax.types import Sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A prompt and the completions of it that a batch holds."""

    prompt: np.ndarray
    members: Sequence[int]
    """Numbers of the completions."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedGroups:
    """Rows, and where the completions are in them."""

    sequences: Sequences
    sample: np.ndarray
    """[B T] number of the completion of each sampled token; 0 elsewhere."""
    cells: np.ndarray
    """[M C] cell of each completion token in the flattened rows; -1 = no token."""


def pack_groups(
    groups: Sequence[Group],
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    layout: Layout = "shared",
    row_length: int,
    rows_multiple_of: int = 1,
    rows: int | None = None,
    pad_id: int = 0,
) -> PackedGroups:
    """The groups in rows of one length.

    Args:
        groups: what to lay out; together their members are the completions 0 .. M-1 of
            `tokens`, each at most once.
        tokens: [M C] completion ids.
        mask: [M C], True on completion tokens, from column 0 on.
        layout: see the module's docstring.
        row_length: T.
        rows_multiple_of: the number of rows becomes a multiple of it.
        rows: number of rows; None = a bucket, two an octave, of those needed.
        pad_id: token on padding; nothing reads it.

    Raises:
        ValueError: a prompt and its completion do not fit a row.
    """
    lengths = mask.sum(axis=1)
    blocks = _blocks(groups, lengths, layout, row_length)
    plan = plan_blocks(
        [len(b.prompt) + int(lengths[list(b.members)].sum()) for b in blocks],
        row_length=row_length,
        rows_multiple_of=rows_multiple_of,
        rows=rows,
        rows_exact=True,
        pack=layout != "padded",
        where=lambda n: f"completion {blocks[n].members[0]} with its prompt",
    )
    count = plan.rows
    if rows is None:
        count = -(-bucket(count, steps=2) // rows_multiple_of) * rows_multiple_of
    parts, cells = Parts(), np.full(mask.shape, -1, np.int64)
    sample = np.zeros((count, row_length), np.int32)
    segments = np.zeros(count, np.int64)  # used in each row
    for n in np.lexsort((plan.first, plan.row)).tolist():
        block = blocks[n]
        row, column = int(plan.row[n]), int(plan.column[n])
        segment = 1 + int(segments[row])
        segments[row] += 1 + len(block.members) if layout == "shared" else 1
        ends = parts.add_block(
            block.prompt,
            [tokens[member, : lengths[member]] for member in block.members],
            row=row,
            column=column,
            segment=segment,
            shared=layout == "shared",
        )
        for member, end in zip(block.members, ends, strict=True):
            start = end - int(lengths[member])
            sample[row, start:end] = member
            cells[member, : end - start] = row * row_length + np.arange(start, end)
    sequences = parts.sequences(
        count, row_length, pad_id=pad_id, shared=layout == "shared"
    )
    return PackedGroups(sequences, sample, cells)


def _blocks(
    groups: Sequence[Group], lengths: np.ndarray, layout: Layout, row_length: int
) -> list[Group]:
    """What stays together in a row: a group, or as much of it as fits."""
    blocks: list[Group] = []
    for group in groups:
        room = -1  # not even an empty completion joins the group before
        for member in group.members:
            room -= int(lengths[member])
            if layout != "shared" or room < 0:
                room = row_length - len(group.prompt) - int(lengths[member])
                blocks.append(Group(group.prompt, [member]))
            else:
                blocks[-1] = Group(group.prompt, [*blocks[-1].members, member])
    return blocks


def to_rows(packed: PackedGroups, values: np.ndarray) -> np.ndarray:
    """[M C] over completions -> [B T] over rows, 0 off the completions."""
    rows = np.zeros(packed.sample.shape, values.dtype)
    real = packed.cells >= 0
    rows.reshape(-1)[packed.cells[real]] = values[real]
    return rows


def to_completions(packed: PackedGroups, rows: np.ndarray) -> np.ndarray:
    """[B T] over rows -> [M C] over completions, 0 outside them."""
    flat = np.asarray(rows).reshape(-1)
    return np.where(packed.cells >= 0, flat[packed.cells], 0).astype(flat.dtype)


def group_row_length(
    prompt_length: int, completion_length: int, num_samples: int, *, longest: int = 1024
) -> int:
    """A row that holds a whole group of the longest lengths, or as much as `longest`.

    Args:
        prompt_length: of the longest prompt.
        completion_length: of the longest completion.
        num_samples: completions of a prompt.
        longest: rows are no longer than this unless one completion needs it: attention
            costs the square.
    """
    fits = max(1, min(num_samples, (longest - prompt_length) // completion_length))
    needed = prompt_length + fits * completion_length
    return min(bucket(needed, steps=4), max(needed, longest))
