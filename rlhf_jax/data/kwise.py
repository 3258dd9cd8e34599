"""K-wise data: a prompt and up to K completions, with gold scores or without.

In a batch every prompt is one block [prompt | completion 1 | ... | completion K] of a
row, so it is computed once, whatever the layout of pairs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.parts import Parts
from rlhf_jax.data.plan import Plan, plan_blocks
from rlhf_jax.types import GroupBatch


@dataclasses.dataclass
class EncodedKwise:
    """A prompt and its completions; ids are lists or int32 arrays."""

    prompt: Any
    completions: Sequence[Any]
    scores: Sequence[float] | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class KwiseDataset:
    """Encoded K-wise rows, as flat arrays."""

    tokens: np.ndarray
    """All ids: prompt, completion 1, 2, ... of row 0, of row 1, ..."""
    part_lengths: np.ndarray
    """Tokens of each of those parts."""
    counts: np.ndarray
    """[N] completions of each row."""
    where: Sequence[str]
    """File and line of each row."""
    source_row: np.ndarray
    scores: np.ndarray | None = None
    """Gold scores of all completions; None = no labels."""
    groups: tuple[tuple[int, int, float], ...] = ()
    """Parts of a mixture, see `store.Group`."""
    pad_id: int = 0

    def __post_init__(self) -> None:
        starts = np.cumsum(self.counts + 1) - (self.counts + 1)
        lengths = np.zeros((len(self.counts), self.num_completions + 1), np.int64)
        inside = np.arange(lengths.shape[1])[None, :] <= self.counts[:, None]
        lengths[inside] = self.part_lengths
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_ends", np.cumsum(self.part_lengths))
        object.__setattr__(self, "_lengths", lengths)

    @property
    def num_completions(self) -> int:
        """K, the most completions of a row."""
        return int(self.counts.max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """[N 1+K] tokens of the prompt and of each completion, 0 where there is
        none."""
        return self._lengths  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, row: int) -> EncodedKwise:
        if not 0 <= row < len(self.counts):
            raise IndexError(row)
        first = int(self._starts[row])  # type: ignore[attr-defined]
        ends = self._ends[first : first + int(self.counts[row]) + 1]  # type: ignore[attr-defined]
        start = int(ends[0] - self.part_lengths[first])
        parts = [
            self.tokens[a:b]
            for a, b in zip([start, *ends[:-1].tolist()], ends.tolist())
        ]
        # Row r has r prompts before its first completion in the flat list of parts.
        scores = None
        if self.scores is not None:
            scores = self.scores[first - row :][: int(self.counts[row])].tolist()
        return EncodedKwise(parts[0], parts[1:], scores, self.where[row])


def pack_kwise(
    items: Sequence[EncodedKwise],
    *,
    num_completions: int,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    num_prompts: int | None = None,
    pad_id: int = 0,
    plan: Plan | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> GroupBatch:
    """A GroupBatch of exactly these prompts with their completions.

    Args:
        items: of the global batch.
        num_completions: K, at least the completions of every item.
        row_length: T; None = a bucket of the longest block.
        rows_multiple_of: slices that the rows and the prompts are cut into.
        num_prompts: length of the arrays over prompts; filler has weight 0.
        pad_id: token on padding; nothing reads it.
        plan: see `layout.pack_pairs`.
        process_index: see `process_count`.
        process_count: the slice to build.

    Raises:
        ValueError: a block does not fit its row, or scores on some items only.
    """
    if plan is None:
        plan = plan_blocks(
            [len(i.prompt) + sum(map(len, i.completions)) for i in items],
            row_length=row_length,
            rows_multiple_of=rows_multiple_of,
            per_block=num_completions,
            where=lambda n: items[n].where or f"prompt {n}",
        )
    here = plan.rows // process_count
    start = process_index * here
    parts, score_at = Parts(), np.zeros((here, plan.slots), np.int32)
    for n in np.flatnonzero((plan.row >= start) & (plan.row < start + here)).tolist():
        row, first = int(plan.row[n]) - start, int(plan.first[n])
        ends = parts.add_block(
            items[n].prompt,
            items[n].completions,
            row=row,
            column=int(plan.column[n]),
            segment=(num_completions + 1) * first + 1,
            shared=True,
        )
        slot = num_completions * first
        score_at[row, slot : slot + len(ends)] = np.array(ends) - 1
    sequences = parts.sequences(here, plan.row_length, pad_id=pad_id, shared=True)
    total = len(items) if num_prompts is None else num_prompts
    total = -(-max(total, 1) // rows_multiple_of) * rows_multiple_of
    size = total // process_count
    mine = range(process_index * size, min((process_index + 1) * size, len(items)))
    return GroupBatch(
        sequences=sequences,
        score_at=score_at,  # type: ignore[arg-type]
        **_arrays(items, plan, mine, size, num_completions),
    )


def _arrays(
    items: Sequence[EncodedKwise], plan: Plan, mine: range, size: int, most: int
) -> dict[str, Any]:
    """members, mask, weight, scores of one process's slice of the prompts."""
    members, mask = np.zeros((size, most), np.int32), np.zeros((size, most), bool)
    weight, scores = np.zeros(size, np.float32), np.zeros((size, most), np.float32)
    # A process whose slice is only filler must agree with the others.
    labelled = [items[n].scores is not None for n in (mine or range(1))]
    if any(labelled) and not all(labelled):
        raise ValueError("scores: some prompts have them and some have none")
    for here, n in enumerate(mine):
        count = len(items[n].completions)
        first = int(plan.row[n]) * plan.slots + most * int(plan.first[n])
        members[here, :count] = first + np.arange(count)
        mask[here, :count], weight[here] = True, 1.0
        if labelled[0]:
            scores[here, :count] = items[n].scores
    return {
        "members": members,
        "mask": mask,
        "weight": weight,
        "scores": scores if labelled[0] else None,
    }
