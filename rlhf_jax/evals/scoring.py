"""Encoded completions -> rewards in input order, in few compiled shapes.

Completions are put into at most `MAX_SHAPES` groups; a group's rows all have one
length, its batches one number of rows and of score slots, so a group compiles once. The
numbers are coarse, so that call after call finds its shapes compiled.
Inside a row several completions are packed, each seeing only itself: batch size, order,
packing and padding do not change a score beyond float rounding. The model is not known
here, only a function `score_fn(sequences, score_at) -> rewards [B S]`, jitted by the
caller; `score_with_states` takes one that also gives the hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rlhf_jax.data import layout
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.plan import MIN_ROW_LENGTH, bucket, plan_blocks, row_bucket
from rlhf_jax.types import Sequences

ScoreFn: TypeAlias = Callable[[Sequences, np.ndarray], np.ndarray]
StatesFn: TypeAlias = Callable[[Sequences, np.ndarray], tuple[Any, Any, Any]]
"""-> (rewards [B S], states before the final norm [B S D], states after it)."""
MAX_SHAPES = 3
"""Row lengths of one call, at most."""
_TOKENS_PER_SLOT = 16
"""Shorter completions than this on average would leave rows unfilled."""


class ScoringBatch(NamedTuple):
    """One call of the score function."""

    sequences: Sequences
    score_at: np.ndarray
    """[B S]"""
    order: np.ndarray
    """Place of each completion in the flattened rewards [B*S]."""
    indices: np.ndarray
    """Which completions they are."""


class ScoredStates(NamedTuple):
    """Rewards of all completions and the states of those that were kept."""

    rewards: np.ndarray
    """[N], in input order."""
    before: np.ndarray
    """[M D], before the final norm, in the order they were asked for."""
    after: np.ndarray
    """[M D], after it: what the head reads."""


class _Group(NamedTuple):
    """Completions whose rows have one length."""

    row_length: int
    slots: int
    members: np.ndarray
    row: np.ndarray
    """Row of each member, from 0 without gaps."""


def _groups(lengths: np.ndarray, row_length: int | None) -> Iterator[_Group]:
    """Groups by row length: the longest's bucket T, then T / 2, then T / 4.

    Everything left is planned in rows of one length; rows that hold a completion longer
    than half of it stay, with the short ones that fill their gaps; the rest goes on to
    the shorter rows, whose attention costs less.
    """
    longest = int(lengths.max(initial=1))
    size = row_bucket(longest)
    if row_length is not None and longest <= row_length:
        size = row_length
    left = np.arange(len(lengths))
    for shape in range(MAX_SHAPES):
        if not len(left):
            return
        slots = max(size // _TOKENS_PER_SLOT, 1)
        plan = plan_blocks(lengths[left], row_length=size, slots=slots)
        last = shape == MAX_SHAPES - 1 or size // 2 < MIN_ROW_LENGTH
        keep = np.ones(len(left), bool)
        if row_length is None and not last:
            longest = np.zeros(int(plan.row.max()) + 1, np.int64)
            np.maximum.at(longest, plan.row, lengths[left])
            keep = longest[plan.row] > size // 2
        if keep.any():
            rows = np.unique(plan.row[keep], return_inverse=True)[1]
            yield _Group(size, slots, left[keep], rows)
        left, size = left[~keep], size // 2


def scoring_batches(
    encoded: Sequence[EncodedCompletion],
    *,
    tokens_per_batch: int = 8192,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
) -> Iterator[ScoringBatch]:
    """The calls that score all completions; those with long rows come first.

    Args:
        encoded: what to score.
        tokens_per_batch: cells of a batch, at most; one row if a row is longer.
        row_length: of all rows, unless a completion is longer; None = chosen from the
            lengths.
        rows_multiple_of: the number of rows is a multiple of it (devices of the batch
            axis).
        pad_id: token on padding.

    Raises:
        ValueError: a completion without tokens, or tokens_per_batch below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch {tokens_per_batch}: expected at least 1")
    lengths = np.array([len(e.prompt) + len(e.completion) for e in encoded], np.int64)
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise ValueError(f"completion {empty[0]}: no token to score")
    for size, slots, members, row in _groups(lengths, row_length):
        needed = int(row.max()) + 1
        rows = min(max(tokens_per_batch // size, 1), bucket(needed, steps=1))
        rows = -(-rows // rows_multiple_of) * rows_multiple_of
        for start in range(0, needed, rows):
            # Best fit never looks at blocks of other rows: these fit `rows` again.
            inside = members[(row >= start) & (row < start + rows)]
            packed = layout.pack_completions(
                [encoded[i] for i in inside],
                row_length=size,
                rows=rows,
                slots=slots,
                pad_id=pad_id,
            )
            yield ScoringBatch(*packed, indices=inside)


def score(
    score_fn: ScoreFn,
    encoded: Sequence[EncodedCompletion],
    *,
    tokens_per_batch: int = 8192,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Rewards of the completions, float32 [N], in input order.

    Args:
        score_fn: jitted (sequences, score_at [B S]) -> rewards [B S], closed over
            params.
        encoded: what to score.
        tokens_per_batch: see `pad_id`.
        row_length: see `pad_id`.
        rows_multiple_of: see `pad_id`.
        pad_id: see `scoring_batches`.
        progress: called with the number of completions of each finished batch.

    Raises:
        ValueError: see `scoring_batches`.
    """
    rewards = np.full(len(encoded), np.nan, np.float32)
    for batch, result in _results(
        score_fn,
        encoded,
        tokens_per_batch=tokens_per_batch,
        row_length=row_length,
        rows_multiple_of=rows_multiple_of,
        pad_id=pad_id,
    ):
        rewards[batch.indices] = _in_order(result, batch)
        if progress is not None:
            progress(len(batch.indices))
    return rewards


def score_with_states(
    states_fn: StatesFn,
    encoded: Sequence[EncodedCompletion],
    keep: np.ndarray,
    *,
    tokens_per_batch: int = 8192,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ScoredStates:
    """Rewards of the completions and hidden states of some of them, in one pass.

    Args:
        states_fn: jitted, like `score`'s, but returns (rewards, before, after).
        encoded: what to score.
        keep: [M] indices, each once, of the completions whose states are returned.
        tokens_per_batch: see `scoring_batches`.
        rows_multiple_of: see `scoring_batches`.
        pad_id: see `scoring_batches`.
        progress: see `score`.

    Raises:
        ValueError: see `scoring_batches`.
    """
    rewards = np.full(len(encoded), np.nan, np.float32)
    place = np.full(len(encoded), -1, np.int64)
    place[keep] = np.arange(len(keep))
    states = [np.zeros((len(keep), 0), np.float32) for _ in range(2)]
    for batch, result in _results(
        states_fn,
        encoded,
        tokens_per_batch=tokens_per_batch,
        rows_multiple_of=rows_multiple_of,
        pad_id=pad_id,
    ):
        rewards[batch.indices] = _in_order(result[0], batch)
        kept = place[batch.indices] >= 0
        for part in (0, 1):
            found = _in_order(result[1 + part], batch)[kept]
            if not states[part].size:
                states[part] = np.full((len(keep), found.shape[1]), np.nan, np.float32)
            states[part][place[batch.indices[kept]]] = found
        if progress is not None:
            progress(len(batch.indices))
    return ScoredStates(rewards, *states)


def _results(
    function: Callable[[Sequences, np.ndarray], Any],
    encoded: Sequence[EncodedCompletion],
    **options: Any,
) -> Iterator[tuple[ScoringBatch, Any]]:
    """(batch, what the function returned for it), in the order of the calls.

    A result is handed out, and so waited for, after the next call is under way.
    """
    waiting: tuple[ScoringBatch, Any] | None = None
    for batch in scoring_batches(encoded, **options):
        result = function(batch.sequences, batch.score_at)
        if waiting is not None:
            yield waiting
        waiting = (batch, result)
    if waiting is not None:
        yield waiting


def _in_order(values: Any, batch: ScoringBatch) -> np.ndarray:
    """Values [B S ...] as float32 [n ...], one for each of the batch's completions."""
    values = np.asarray(values, np.float32)
    return values.reshape(-1, *values.shape[2:])[batch.order]
