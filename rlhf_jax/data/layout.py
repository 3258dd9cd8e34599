"""Rows of fixed shape: encoded pairs, completions or conversations as NumPy batches.

    padded   one sequence [prompt completion] a row; the row length is a bucket
    packed   several sequences [prompt completion] a row
    shared   several blocks [prompt | chosen | rejected] a row: the prompt is computed
             once, and both completions read it through `prefix`

A *block* is what stays together in a row, made of *parts* (one segment each, `parts`).
Blocks are placed by best-fit decreasing (`plan`), so a batch holds exactly the asked
pairs; the number of rows, the row length and the score slots are rounded up to buckets,
so that few shapes compile. A block that does not fit a row is an error.

Several processes: the plan is made from the lengths of the whole global batch, which
every process knows, and each fills its slice of the rows and of the pair arrays. The
slices of P processes, put together, are the batch of one process; indices are global.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.data.encoded import EncodedCompletion, EncodedConversation, EncodedPair
from rlhf_jax.data.parts import Parts
from rlhf_jax.data.plan import Layout, Plan, best_fit, plan_blocks, plan_pairs
from rlhf_jax.types import PAIR_COLUMNS, PreferenceBatch, Sequences

MIN_SHARED = 8
"""Tokens of a prompt that are worth a block of several completions."""


def padding_fraction(sequences: Sequences) -> float:
    """The share of the cells of a batch that hold no token."""
    return float(np.mean(np.asarray(sequences.segment) == 0))


def pack_pairs(
    pairs: Sequence[EncodedPair],
    *,
    layout: Layout = "shared",
    row_length: int | None = None,
    rows: int | None = None,
    rows_multiple_of: int = 1,
    num_pairs: int | None = None,
    pad_id: int = 0,
    side: Literal["right", "left"] = "right",
    plan: Plan | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> PreferenceBatch:
    """A PreferenceBatch of exactly these pairs.

    Args:
        pairs: the pairs of the global batch; a process of several reads only those in
            its rows, so this may be lazy.
        layout: "shared", "packed" or "padded".
        row_length: T; None = a bucket of the longest block.
        rows: B; None = a bucket of those needed.
        rows_multiple_of: slices that the rows and the pair arrays are cut into; must be
            a multiple of process_count.
        num_pairs: length of the pair arrays; filler pairs have weight 0.
        pad_id: token on padding; nothing reads it.
        side: where a padded row has its padding.
        plan: made by `plan_pairs` from the lengths, which saves reading the pairs
            twice.
        process_index: see `process_count`.
        process_count: the slice to build.

    Raises:
        ValueError: a block does not fit its row, or all do not fit `rows`; margins on
            some pairs only.
    """
    if rows_multiple_of % process_count:
        raise ValueError(
            f"rows_multiple_of {rows_multiple_of}: expected a multiple of the "
            f"{process_count} processes"
        )
    if plan is None:
        lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
        plan = plan_pairs(
            np.asarray(lengths, np.int64).reshape(-1, 3),
            layout=layout,
            row_length=row_length,
            rows=rows,
            rows_multiple_of=rows_multiple_of,
            where=lambda n: pairs[n].where or f"pair {n}",
        )
    if side == "left" and layout != "padded":
        raise ValueError(f"side 'left' needs layout 'padded', got {layout!r}")
    here = plan.rows // process_count
    start = process_index * here
    parts = Parts()
    score_at: Any = np.zeros((here, plan.slots), np.int32)
    for n in _in_rows(plan, layout, start, start + here):
        if layout == "shared":
            _add_shared(parts, score_at, pairs[n], plan, n, start)
        else:
            _add_separate(parts, score_at, pairs[n], plan, n, start, side)
    sequences = parts.sequences(
        here, plan.row_length, pad_id=pad_id, shared=layout == "shared"
    )
    return PreferenceBatch(
        sequences=sequences,
        score_at=score_at,
        **_pair_arrays(
            pairs,
            plan,
            layout,
            rows_multiple_of,
            num_pairs,
            process_index,
            process_count,
        ),
    )


def _in_rows(plan: Plan, layout: Layout, start: int, stop: int) -> list[int]:
    """Numbers of the pairs with a block in the rows [start, stop)."""
    inside = np.flatnonzero((plan.row >= start) & (plan.row < stop))
    return np.unique(inside if layout == "shared" else inside // 2).tolist()


def _add_shared(
    parts: Parts,
    score_at: np.ndarray,
    pair: EncodedPair,
    plan: Plan,
    n: int,
    start: int,
) -> None:
    row, number = int(plan.row[n]) - start, int(plan.first[n])
    ends = parts.add_block(
        pair.prompt,
        (pair.chosen, pair.rejected),
        row=row,
        column=int(plan.column[n]),
        segment=3 * number + 1,
        shared=True,
    )
    score_at[row, 2 * number : 2 * number + 2] = np.array(ends) - 1


def _add_separate(
    parts: Parts,
    score_at: np.ndarray,
    pair: EncodedPair,
    plan: Plan,
    n: int,
    start: int,
    side: str,
) -> None:
    for which, tokens in enumerate((pair.chosen, pair.rejected)):
        block = 2 * n + which
        row = int(plan.row[block]) - start
        if 0 <= row < len(score_at):
            _add_sequence(parts, score_at, pair.prompt, tokens, plan, block, row, side)


def _add_sequence(
    parts: Parts,
    score_at: np.ndarray,
    prompt: Any,
    completion: Any,
    plan: Plan,
    block: int,
    row: int,
    side: str = "right",
) -> None:
    column, number = int(plan.column[block]), int(plan.first[block])
    if side == "left":
        column = plan.row_length - len(prompt) - len(completion)
    (end,) = parts.add_block(
        prompt, (completion,), row=row, column=column, segment=number + 1, shared=False
    )
    score_at[row, number] = end - 1


def _pair_arrays(
    pairs: Sequence[EncodedPair],
    plan: Plan,
    layout: Layout,
    multiple: int,
    num_pairs: int | None,
    process_index: int,
    process_count: int,
) -> dict[str, Any]:
    """chosen, rejected, weight and PAIR_COLUMNS: one process's slice of pairs."""
    count = len(pairs)
    total = count if num_pairs is None else num_pairs
    if total < count:
        raise ValueError(f"num_pairs {total}: {count} pairs were given")
    total = -(-max(total, 1) // multiple) * multiple
    size = total // process_count
    mine = range(process_index * size, min((process_index + 1) * size, count))
    index = np.asarray(mine, np.int64)
    chosen, rejected = (np.zeros(size, np.int32) for _ in range(2))
    if layout == "shared":
        slot = plan.row * plan.slots + 2 * plan.first
        chosen[: len(index)] = slot[index]
        rejected[: len(index)] = slot[index] + 1
    else:
        slot = plan.row * plan.slots + plan.first
        chosen[: len(index)] = slot[2 * index]
        rejected[: len(index)] = slot[2 * index + 1]
    weight = np.zeros(size, np.float32)
    weight[: len(index)] = [pairs[n].weight for n in mine]
    return {
        "chosen": chosen,
        "rejected": rejected,
        "weight": weight,
        **{name: _column(pairs, name, mine, size) for name in PAIR_COLUMNS},
    }


def _column(
    pairs: Sequence[EncodedPair], name: str, mine: range, size: int
) -> np.ndarray | None:
    """A column of all pairs or of none."""
    values = [getattr(pairs[n], name) for n in (mine or range(min(len(pairs), 1)))]
    absent = [value is None for value in values]
    if all(absent):
        return None
    if any(absent):
        raise ValueError(
            f"{name}: {sum(absent)} of {len(values)} pairs have none; a column is used "
            "for all pairs or for none"
        )
    column = np.ones(size, np.float32)  # filler pairs: any number
    column[: len(mine)] = values[: len(mine)]
    return column


def pack_completions(
    completions: Sequence[EncodedCompletion],
    *,
    layout: Layout = "packed",
    blocks: Sequence[Sequence[int]] | None = None,
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    rows: int | None = None,
    slots: int | None = None,
    pad_id: int = 0,
    side: Literal["right", "left"] = "right",
) -> tuple[Sequences, np.ndarray, np.ndarray]:
    """(sequences, score_at [B S], order [N]) of completions to be scored.

    `rewards.reshape(-1)[order]`, with rewards [B S], is in the order of `completions`.

    Args:
        completions: what to score.
        layout: several to a row, those of a block reading one prompt or each its own;
            or one.
        blocks: of the layout "shared", which completions have one prompt and stay in
            one row; see `shared_blocks`.
        row_length: see `slots`.
        rows_multiple_of: see `slots`.
        rows: see `slots`.
        slots: see `plan_blocks`.
        pad_id: see `side`.
        side: see `pack_pairs`.

    Raises:
        ValueError: a block does not fit a row.
    """
    if (layout == "shared") != (blocks is not None):
        raise ValueError("blocks: expected with the layout shared, and with no other")
    if side == "left" and layout != "padded":
        raise ValueError(f"side 'left' needs layout 'padded', got {layout!r}")
    if blocks is None:
        blocks = [[n] for n in range(len(completions))]
    plan = plan_blocks(
        block_lengths(completions, blocks),
        members=[len(block) for block in blocks] if layout == "shared" else None,
        row_length=row_length,
        rows_multiple_of=rows_multiple_of,
        rows=rows,
        slots=1 if layout == "padded" else slots,
        pack=layout != "padded",
        where=lambda n: f"completion {blocks[n][0]}",
    )
    parts, score_at = Parts(), np.zeros((plan.rows, plan.slots), np.int32)
    order = np.zeros(len(completions), np.int32)
    for n, block in enumerate(blocks):
        items = [completions[member] for member in block]
        row, first = int(plan.row[n]), int(plan.first[n])
        column = int(plan.column[n])
        if side == "left":
            column = plan.row_length - len(items[0].prompt) - len(items[0].completion)
        ends = parts.add_block(
            items[0].prompt,
            [item.completion for item in items],
            row=row,
            column=column,
            # Every block before it took two segments a completion, or fewer.
            segment=2 * first + 1,
            shared=len(block) > 1,
        )
        score_at[row, first : first + len(block)] = np.array(ends) - 1
        order[block] = row * plan.slots + first + np.arange(len(block))
    sequences = parts.sequences(
        plan.rows, plan.row_length, pad_id=pad_id, shared=layout == "shared"
    )
    return sequences, score_at, order


def block_lengths(
    completions: Sequence[EncodedCompletion], blocks: Sequence[Sequence[int]]
) -> list[int]:
    """Tokens of each block: one prompt, and its completions."""
    return [
        len(completions[block[0]].prompt)
        + sum(len(completions[member].completion) for member in block)
        for block in blocks
    ]


def shared_blocks(
    completions: Sequence[EncodedCompletion], *, row_length: int, slots: int
) -> list[list[int]]:
    """The completions of each prompt, in blocks that fit a row; prompts too short to be
    worth sharing are not shared.

    Args:
        completions: what to score.
        row_length: most tokens of a block with more than one completion.
        slots: most completions of a block.
    """
    groups: dict[bytes, list[int]] = {}
    blocks: list[list[int]] = []
    for n, item in enumerate(completions):
        if len(item.prompt) < MIN_SHARED or not len(item.completion):
            blocks.append([n])  # without a token of its own, it is read on the prompt
        else:
            ids = np.asarray(item.prompt, np.int32).tobytes()
            groups.setdefault(ids, []).append(n)
    for numbers in groups.values():
        prompt = completions[numbers[0]].prompt
        lengths = np.array([len(completions[n].completion) for n in numbers], np.int64)
        which, *_ = best_fit(lengths, row_length - len(prompt), slots)
        made: list[list[int]] = [[] for _ in range(int(which.max()) + 1)]
        for n, block in zip(numbers, which.tolist(), strict=True):
            made[block].append(n)
        blocks += made
    return blocks


def pack_conversations(
    conversations: Sequence[EncodedConversation],
    *,
    layout: Literal["packed", "padded"] = "packed",
    row_length: int | None = None,
    rows_multiple_of: int = 1,
    pad_id: int = 0,
    plan: Plan | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Sequences:
    """Sequences of exactly these conversations; for the arguments see `pack_pairs`."""
    if plan is None:
        plan = plan_blocks(
            [len(item.tokens) for item in conversations],
            row_length=row_length,
            rows_multiple_of=rows_multiple_of,
            pack=layout != "padded",
            where=lambda n: conversations[n].where or f"conversation {n}",
        )
    here = plan.rows // process_count
    start = process_index * here
    parts = Parts()
    inside = np.flatnonzero((plan.row >= start) & (plan.row < start + here))
    for n in inside.tolist():
        item = conversations[n]
        parts.add(
            item.tokens,
            row=int(plan.row[n]) - start,
            column=int(plan.column[n]),
            segment=int(plan.first[n]) + 1,
            completion=np.asarray(item.completion_mask, bool),
        )
    return parts.sequences(here, plan.row_length, pad_id=pad_id)
