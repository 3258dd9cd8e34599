"""Order and position: which rows form the next batch, and how to go on after a crash.

The training stream is endless: row r of it belongs to epoch r // N, and inside an epoch
the rows come in a seeded global shuffle, another one in each epoch. A mixture draws its
parts by weight in a fixed interleaving, each part with its own epochs. So the order is
a pure function of (dataset, seed) and **the whole state is one integer, the next global
row**; it depends neither on the batch size nor on the number of processes.

`Batches` yields (batch, next_row): save next_row with the state the batch led to, and
pass it back as start_row. grain reads the batches, a random-access source, in order and
ahead of time in a background thread. Streams cannot be shuffled or resumed like this,
so they serve evaluation alone (`sources`).
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any, Literal

import grain
import jax
import numpy as np

from rlhf_jax.data import layout as layouts
from rlhf_jax.data.kwise import KwiseDataset, pack_kwise
from rlhf_jax.data.plan import Layout, Plan, pair_blocks, plan_blocks, row_bucket
from rlhf_jax.data.shapes import Shapes, choose_shapes
from rlhf_jax.data.store import ConversationDataset, Group, PairDataset

_BLOCK = 1000
"""Rows after which the interleaving of a mixture repeats; weights are met to 1/1000."""
_SAMPLED = 48
"""Batches looked at to choose the shapes."""


class Order:
    """The row of the dataset at each place of the endless stream."""

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        groups: tuple[Group, ...] = (),
    ) -> None:
        """
        Args:
            size: N, rows of the dataset.
            seed: decides the shuffle.
            shuffle: False keeps the order of the dataset.
            groups: parts of a mixture; () or without weights = one part.
        """
        if size < 1:
            raise ValueError("the dataset has no rows")
        self.seed, self.shuffle = seed, shuffle
        self.groups = groups if len(groups) > 1 else ((0, size, 1.0),)
        self._part, self._rank, self._count = _interleave([g[2] for g in self.groups])

    def __call__(self, start: int, count: int) -> list[int]:
        """Rows at the places start, ..., start + count - 1."""
        block, inside = np.divmod(np.arange(start, start + count), len(self._part))
        part = self._part[inside]
        place = block * self._count[part] + self._rank[inside]
        rows = np.empty(count, np.int64)
        for number in np.unique(part).tolist():
            first, stop, _ = self.groups[number]
            mine = part == number
            rows[mine] = first + self._shuffled(number, stop - first, place[mine])
        return rows.tolist()

    def _shuffled(self, part: int, size: int, places: np.ndarray) -> np.ndarray:
        epochs, inside = np.divmod(places, size)
        if not self.shuffle:
            return inside
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            inside[now] = _permutation(size, self.seed, part, epoch)[inside[now]]
        return inside


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, part: int, epoch: int) -> np.ndarray:
    """A permutation of range(size): the order of hashes of the numbers.

    Whole-array arithmetic on fixed constants (SplitMix64), so it is the same with every
    version of every library. grain's index shuffle would need no memory, but takes
    milliseconds a row below 2**16 rows.
    """
    numbers = np.arange(size, dtype=np.uint64)
    for word in (seed, part, epoch):
        numbers = _mix(numbers ^ _mix(np.full(1, word % 2**64, np.uint64)))
    return np.argsort(numbers, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function; wraps around on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _interleave(weights: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(part at each place of a block, how many of it came before, rows of it)."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    share = np.asarray(weights, np.float64)
    if not (np.isfinite(share).all() and (share > 0).all()):
        raise ValueError(f"mixture weights: expected numbers above 0, got {weights}")
    share = share / share.sum() * _BLOCK
    count = np.maximum(np.floor(share), 1).astype(np.int64)
    for part in np.argsort(count - share)[: max(_BLOCK - int(count.sum()), 0)]:
        count[part] += 1
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in count])
    owner = np.repeat(np.arange(len(count)), count)
    rank = np.concatenate([np.arange(n) for n in count])
    order = np.lexsort((owner, places))
    return owner[order], rank[order], count


class Batches:
    """Iterator of (batch, next_row) over a dataset, from start_row on."""

    def __init__(
        self,
        dataset: PairDataset | ConversationDataset | KwiseDataset,
        batch_size: int,
        *,
        seed: int = 0,
        start_row: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        accum_steps: int = 1,
        layout: Layout = "shared",
        row_length: int | None = None,
        rows_multiple_of: int = 1,
        num_shapes: int = 3,
        shapes: Shapes | None = None,
        side: Literal["right", "left"] = "right",
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ) -> None:
        """
        Args:
            dataset: pairs (batches are PreferenceBatch), conversations (Sequences) or
                K-wise rows (GroupBatch, always of shared rows).
            batch_size: rows of the dataset in a global batch, over all micro-batches.
            seed: see `shuffle`.
            shuffle: the order, see `Order`.
            start_row: place in the stream to start at.
            epochs: None = endless. A number stops after that many passes; the last
                batch is short, and pair arrays are filled with pairs of weight 0.
            accum_steps: A; above 1 every leaf has a leading axis A, and indices are
                local to the micro-batch.
            layout: see `row_length`.
            row_length: see `layout`; None or 0 = fit for the dataset.
            rows_multiple_of: slices the devices cut the batch into.
            num_shapes: row counts that packed batches take, at most.
            shapes: of the batches, chosen elsewhere (`batches.shapes` of a dataset that
                looks alike); None = chosen for this dataset.
            process_index: see `process_count`.
            process_count: the slice of rows and pairs to build.
            prefetch: batches built ahead; 0 = none, in the caller's thread.

        Raises:
            ValueError: sizes that do not divide, or a row length that is too short.
        """
        if batch_size < 1 or accum_steps < 1 or batch_size % accum_steps:
            raise ValueError(
                f"batch_size {batch_size}: expected a positive multiple of accum_steps "
                f"{accum_steps}"
            )
        if isinstance(dataset, ConversationDataset) and layout == "shared":
            layout = "packed"
        if isinstance(dataset, KwiseDataset):
            layout = "shared"
        self.dataset = dataset
        self.batch_size, self.accum_steps = batch_size, accum_steps
        self.layout: Any = layout
        self.rows_multiple_of = rows_multiple_of
        self.side: Literal["right", "left"] = side
        self.process_index, self.process_count = process_index, process_count
        self.order = Order(
            len(dataset), seed=seed, shuffle=shuffle, groups=dataset.groups
        )
        self.end = None if epochs is None else epochs * len(dataset)
        self.start_row, self.prefetch = start_row, prefetch
        self.shapes = shapes or self._choose_shapes(row_length or None, num_shapes)
        self._iterator: Any = None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if self._iterator is None:
            self._iterator = self._start()
        return self

    def __next__(self) -> tuple[Any, int]:
        if self._iterator is None:
            self._iterator = self._start()
        return next(self._iterator)

    def __len__(self) -> int:
        """Batches that remain from start_row; an endless stream has no length."""
        if self.end is None:
            raise TypeError("an endless stream of batches has no length")
        return max(-(-(self.end - self.start_row) // self.batch_size), 0)

    def close(self) -> None:
        """Stops the background thread."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def _start(self) -> Iterator[tuple[Any, int]]:
        batches: Any = _Source(self)
        source = grain.MapDataset.source(batches)
        options = grain.ReadOptions(
            num_threads=1 if self.prefetch else 0,
            prefetch_buffer_size=self.prefetch,
        )
        return iter(source.to_iter_dataset(options))

    def build(self, start: int) -> tuple[Any, int]:
        """(batch, next_row) at any place of the stream: pure, whatever came before."""
        stop = start + self.batch_size
        if self.end is not None:
            stop = min(stop, self.end)
        rows = self.order(start, stop - start)
        micro = self.batch_size // self.accum_steps
        groups = [rows[n * micro : (n + 1) * micro] for n in range(self.accum_steps)]
        plans = self._plans(groups)
        batches = [self._fill(group, plan) for group, plan in zip(groups, plans)]
        if self.accum_steps == 1:
            return batches[0], stop
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches), stop

    def _plans(self, groups: list[list[int]]) -> list[Plan]:
        """A plan for each micro-batch, all of one shape."""
        shapes = self.shapes
        row_length = shapes.row_length
        if row_length is None:  # padded rows: the bucket of the longest
            longest = [self._blocks(group).max(initial=1) for group in groups]
            row_length = row_bucket(int(max(longest)))
        plans = [self._plan(group, row_length, shapes.slots) for group in groups]
        if self.layout == "padded":
            per_row = 2 if isinstance(self.dataset, PairDataset) else 1
            rows = per_row * (self.batch_size // self.accum_steps)
        else:
            rows = shapes.rows_for(max(plan.rows for plan in plans))
        rows = -(-rows // self.rows_multiple_of) * self.rows_multiple_of
        return [dataclasses.replace(plan, rows=rows) for plan in plans]

    def _plan(self, rows: list[int], row_length: int | None, slots: int | None) -> Plan:
        """The plan of one micro-batch with just the rows it needs."""
        blocks, step = self._blocks(rows), self._per_row
        return plan_blocks(
            blocks,
            row_length=row_length,
            rows_exact=True,
            per_block=self._per_block,
            slots=1 if self.layout == "padded" else slots,
            pack=self.layout != "padded",
            where=lambda n: (
                self.dataset.where[rows[n // step]] or f"row {rows[n // step]}"
            ),
        )

    def _blocks(self, rows: list[int]) -> np.ndarray:
        lengths = self.dataset.lengths[np.asarray(rows, np.int64)]
        if isinstance(self.dataset, PairDataset):
            return pair_blocks(lengths, self.layout)
        return (
            lengths.sum(axis=1) if isinstance(self.dataset, KwiseDataset) else lengths
        )

    def _fill(self, rows: list[int], plan: Plan) -> Any:
        where = {
            "plan": plan,
            "rows_multiple_of": self.rows_multiple_of,
            "pad_id": self.dataset.pad_id,
            "process_index": self.process_index,
            "process_count": self.process_count,
        }
        items: Any = _Lazy(self.dataset, rows)
        if isinstance(self.dataset, ConversationDataset):
            return layouts.pack_conversations(items, layout=self.layout, **where)
        if isinstance(self.dataset, KwiseDataset):
            return pack_kwise(
                items,
                num_completions=self.dataset.num_completions,
                num_prompts=self.batch_size // self.accum_steps,
                **where,
            )
        return layouts.pack_pairs(
            items,
            layout=self.layout,
            num_pairs=self.batch_size // self.accum_steps,
            side=self.side,
            **where,
        )

    def _choose_shapes(self, row_length: int | None, num_shapes: int) -> Shapes:
        """Row length, slots, row counts: from lengths alone, so the same on resume."""
        everything = list(range(len(self.dataset)))
        blocks = self._blocks(everything)
        if self.layout == "padded":
            self._plan(everything, row_length, None)  # refuses rows that do not fit
            return Shapes(row_length, 1)
        if row_length:
            self._plan([int(blocks.argmax()) // self._per_row], row_length, None)
        micro = self.batch_size // self.accum_steps
        sampled = [self.order(n * micro, micro) for n in range(_SAMPLED)]
        return choose_shapes(
            [self._blocks(rows) for rows in sampled],
            longest=int(blocks.max()),
            mean=float(blocks.mean()),
            per_block=self._per_block,
            row_length=row_length,
            rows_multiple_of=self.rows_multiple_of,
            num_shapes=num_shapes,
        )

    @property
    def _per_block(self) -> int:
        """Completions that are scored in a block."""
        if isinstance(self.dataset, KwiseDataset):
            return self.dataset.num_completions
        return 2 if self.layout == "shared" else 1

    @property
    def _per_row(self) -> int:
        """Blocks of a row of the dataset."""
        pairs = isinstance(self.dataset, PairDataset)
        return 2 if pairs and self.layout != "shared" else 1


class _Lazy:
    """Some rows of a dataset, fetched once, when they are asked for."""

    def __init__(self, dataset: Any, rows: list[int]) -> None:
        self.dataset, self.rows = dataset, rows
        self.fetched: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Any:
        if n not in self.fetched:
            self.fetched[n] = self.dataset[self.rows[n]]
        return self.fetched[n]


class _Source:
    """The batches as a random-access source for grain."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return sys.maxsize if self.batches.end is None else len(self.batches)

    def __getitem__(self, n: int) -> tuple[Any, int]:
        return self.batches.build(self.batches.start_row + n * self.batches.batch_size)
