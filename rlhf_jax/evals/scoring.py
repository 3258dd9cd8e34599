"""Encoded completions -> rewards in input order, in few compiled shapes.

Completions are put into at most `MAX_SHAPES` groups; a group's rows all have one
length, its batches one number of rows and of score slots, so a group compiles once. The
numbers are coarse, so that call after call finds its shapes compiled (calls with shared
prompts theirs, calls without theirs).
Inside a row several completions are packed, each seeing only its prompt and itself;
those of one prompt share it, so that it is computed once for all that fit a row. Batch
size, order, packing and padding do not change a score beyond float rounding. The model
is not known here, only a function `score_fn(sequences, score_at) -> rewards [B S]`,
jitted by the caller; `score_with_states` takes one that also gives the hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
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
MAX_WIDER, WORTH = 1024, 0.85
"""Rows are made longer for the sake of sharing up to this many tokens, if no more than
this share of the tokens is left."""
MAX_SLOTS = 256
"""Score slots of a row, at most: sums over completions take slots x tokens of cells."""
_TOKENS_PER_SLOT = {False: 16, True: 4}
"""Shorter completions than this on average would leave rows unfilled; fewer tokens
where completions share their prompts."""


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
    """Blocks whose rows have one length."""

    row_length: int
    slots: int
    blocks: list[list[int]]
    """The completions of each."""
    row: np.ndarray
    """Row of each block, from 0 without gaps."""


def _groups(
    encoded: Sequence[EncodedCompletion],
    longest: int,
    row_length: int | None,
    tokens_per_batch: int,
    share: bool,
) -> tuple[list[_Group], bool]:
    """Groups by row length: the longest's bucket T, then T / 2, then T / 4; and whether
    any completions do share a prompt.

    Everything left is planned in rows of one length; rows that hold a block longer than
    half of it stay, with the short ones that fill their gaps; the rest goes on to the
    shorter rows, whose attention costs less, if it fills a batch.
    """
    size = row_bucket(longest)
    if row_length is not None and longest <= row_length:
        size = row_length
    blocks = [[n] for n in range(len(encoded))]
    if share:
        size, blocks = _shared(encoded, size, fixed=row_length is not None)
    shares = len(blocks) < len(encoded)
    lengths = np.array(layout.block_lengths(encoded, blocks), np.int64)
    members = np.array([len(block) for block in blocks], np.int64)
    found, left = [], np.arange(len(blocks))
    for shape in range(MAX_SHAPES):
        if not len(left):
            break
        half = size // 2
        plan = plan_blocks(
            lengths[left],
            members=members[left] if shares else None,
            row_length=size,
            slots=_slots(size, shares),
        )
        keep = np.ones(len(left), bool)
        if row_length is None and shape < MAX_SHAPES - 1 and half >= MIN_ROW_LENGTH:
            stays = (lengths[left] > half) | (members[left] > _slots(half, shares))
            keep = np.bincount(plan.row, weights=stays)[plan.row] > 0
            if len(np.unique(plan.row[~keep])) * size < tokens_per_batch:
                keep[:] = True  # less than a batch is not worth compiling for
        if keep.any():
            rows = np.unique(plan.row[keep], return_inverse=True)[1]
            kept = [blocks[n] for n in left[keep]]
            found.append(_Group(size, _slots(size, shares), kept, rows))
        left, size = left[~keep], half
    return found, shares


def _shared(
    encoded: Sequence[EncodedCompletion], size: int, *, fixed: bool
) -> tuple[int, list[list[int]]]:
    """Row length and blocks that share prompts; rows twice as long where that saves
    enough of the tokens to pay for their attention."""
    blocks = layout.shared_blocks(encoded, row_length=size, slots=_slots(size, True))
    wider = 2 * size
    if fixed or wider > MAX_WIDER:
        return size, blocks
    more = layout.shared_blocks(encoded, row_length=wider, slots=_slots(wider, True))
    before, after = (sum(layout.block_lengths(encoded, b)) for b in (blocks, more))
    return (wider, more) if after < WORTH * before else (size, blocks)


def _slots(row_length: int, shares: bool) -> int:
    """Score slots of a row."""
    return min(max(row_length // _TOKENS_PER_SLOT[shares], 1), MAX_SLOTS)


def can_share(attention: str) -> bool:
    """Whether rows may share prompts under an attention backend of `ComputeConfig`:
    all know shared prefixes but splash, which is also what auto takes on a TPU."""
    auto = attention == "auto" and jax.default_backend() == "tpu"
    return attention != "splash" and not auto


def scoring_batches(
    encoded: Sequence[EncodedCompletion],
    *,
    tokens_per_batch: int = 8192,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
    share: bool = True,
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
        share: compute a prompt once for all its completions in a row; False for an
            attention backend that cannot.

    Raises:
        ValueError: a completion without tokens, or tokens_per_batch below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch {tokens_per_batch}: expected at least 1")
    lengths = np.array([len(e.prompt) + len(e.completion) for e in encoded], np.int64)
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise ValueError(f"completion {empty[0]}: no token to score")
    groups, shares = _groups(
        encoded, int(lengths.max(initial=1)), row_length, tokens_per_batch, share
    )
    for size, slots, blocks, row in groups:
        order = np.argsort(row, kind="stable")
        needed = int(row.max()) + 1
        rows = min(max(tokens_per_batch // size, 1), bucket(needed, steps=1))
        rows = -(-rows // rows_multiple_of) * rows_multiple_of
        for start in range(0, needed, rows):
            # Best fit never looks at blocks of other rows: these fit `rows` again.
            first, last = np.searchsorted(row[order], (start, start + rows))
            inside = [blocks[n] for n in np.sort(order[first:last])]
            indices = np.concatenate(inside).astype(np.int64)
            ends = np.cumsum([len(block) for block in inside]).tolist()
            packed = layout.pack_completions(
                [encoded[i] for i in indices],
                layout="shared" if shares else "packed",
                blocks=[
                    list(range(end - len(block), end))
                    for block, end in zip(inside, ends, strict=True)
                ]
                if shares
                else None,
                row_length=size,
                rows=rows,
                slots=slots,
                pad_id=pad_id,
            )
            yield ScoringBatch(*packed, indices=indices)


def score(
    score_fn: ScoreFn,
    encoded: Sequence[EncodedCompletion],
    *,
    tokens_per_batch: int = 8192,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
    share: bool = True,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Rewards of the completions, float32 [N], in input order.

    Args:
        score_fn: jitted (sequences, score_at [B S]) -> rewards [B S], closed over
            params.
        encoded: what to score.
        tokens_per_batch: see `share`.
        row_length: see `share`.
        rows_multiple_of: see `share`.
        pad_id: see `share`.
        share: see `scoring_batches`.
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
        share=share,
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
    share: bool = True,
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
        share: see `scoring_batches`.
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
        share=share,
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
