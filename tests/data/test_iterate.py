"""Order and position: permutations, exact resume, independence of the process count."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.encoded import EncodedConversation
from rlhf_jax.data.iterate import Batches, Order
from rlhf_jax.data.plan import LAYOUTS
from rlhf_jax.data.store import ConversationDataset, PairDataset
from tests.data.test_layout import as_tuples, pairs_of, some_pairs


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    rows = Order(size, seed=seed)(epoch * size, size)
    assert sorted(rows) == list(range(size))


def test_epochs_and_seeds_shuffle_differently():
    orders = [
        tuple(Order(50, seed=seed)(epoch * 50, 50))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert Order(50, shuffle=False)(45, 10) == [*range(45, 50), *range(5)]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**9), st.integers(1, 40), st.integers(0, 40))
def test_order_does_not_depend_on_where_one_starts(start, count, skip):
    order = Order(77, seed=3, groups=((0, 30, 0.3), (30, 77, 0.7)))
    assert order(start, skip + count)[skip:] == order(start + skip, count)


def test_mixtures_meet_their_weights_and_pass_over_each_part_evenly():
    order = Order(100, seed=0, groups=((0, 10, 1.0), (10, 100, 3.0)))
    rows = np.array(order(0, 4000))
    assert (rows < 10).sum() == 1000
    for start in range(0, 4000, 100):
        assert 20 <= (rows[start : start + 100] < 10).sum() <= 30
    counts = np.bincount(rows)
    assert set(counts[:10]) == {100} and set(counts[10:]) <= {33, 34}
    with pytest.raises(ValueError, match="mixture weights"):
        Order(2, groups=((0, 1, 0.0), (1, 2, 1.0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_hold_exactly_the_asked_pairs(layout):
    pairs = some_pairs(23)
    batches = Batches(PairDataset.of(pairs), 8, layout=layout, seed=5)
    order = Order(23, seed=5)
    for n, (batch, next_row) in enumerate(itertools.islice(batches, 6)):
        rows = order(8 * n, 8)
        assert pairs_of(batch) == as_tuples(pairs[row] for row in rows)
        assert next_row == 8 * (n + 1)
    batches.close()


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_resume_from_any_position_equals_uninterrupted(accum_steps):
    dataset = PairDataset.of(some_pairs(23))
    options = {"seed": 2, "accum_steps": accum_steps}
    whole = list(itertools.islice(Batches(dataset, 8, **options), 6))
    for n in range(5):
        _, position = whole[n]
        resumed = Batches(dataset, 8, start_row=position, **options)
        for left, right in zip(whole[n + 1 :], resumed):
            assert left[1] == right[1] and equal(left[0], right[0])


def test_position_survives_another_batch_size():
    pairs = some_pairs(40)
    dataset = PairDataset.of(pairs)
    (first, position), *_ = itertools.islice(Batches(dataset, 8, seed=1), 1)
    rest = next(Batches(dataset, 16, seed=1, start_row=position))[0]
    seen = pairs_of(first) + pairs_of(rest)
    assert seen == as_tuples(pairs[row] for row in Order(40, seed=1)(0, 24))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_the_process_count_changes_nothing(layout, accum_steps):
    dataset = PairDataset.of(some_pairs(30, margin=1.0))

    def first(index, count):
        batches = Batches(
            dataset,
            16,
            layout=layout,
            accum_steps=accum_steps,
            rows_multiple_of=4,
            process_index=index,
            process_count=count,
            prefetch=0,
        )
        return batches.build(16)

    whole, position = first(0, 1)
    for count in (2, 4):
        slices = [first(index, count) for index in range(count)]
        axis = 0 if accum_steps == 1 else 1
        together = jax.tree.map(
            lambda *leaves, axis=axis: np.concatenate(leaves, axis),
            *[batch for batch, _ in slices],
        )
        assert equal(whole, together)
        assert {next_row for _, next_row in slices} == {position}


def test_micro_batches_share_one_shape_and_hold_the_batch():
    pairs = some_pairs(30)
    batch, _ = Batches(PairDataset.of(pairs), 12, accum_steps=3, seed=0).build(0)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {3}
    micro = [jax.tree.map(lambda leaf, n=n: leaf[n], batch) for n in range(3)]
    found = list(itertools.chain.from_iterable(map(pairs_of, micro)))
    assert found == as_tuples(pairs[row] for row in Order(30)(0, 12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_sees_every_row_once_in_order(layout):
    pairs = some_pairs(21)
    batches = Batches(
        PairDataset.of(pairs),
        8,
        shuffle=False,
        epochs=1,
        layout=layout,
        rows_multiple_of=2,
    )
    assert len(batches) == 3
    found = list(batches)
    assert {len(batch.weight) for batch, _ in found} == {8}
    seen = itertools.chain.from_iterable(pairs_of(batch) for batch, _ in found)
    assert list(seen) == as_tuples(pairs)
    assert found[-1][1] == 21


def test_conversations_are_batched_with_their_masks():
    rng = np.random.default_rng(0)
    items = [
        EncodedConversation(rng.integers(3, 9, n).tolist(), [False] + [True] * (n - 1))
        for n in rng.integers(2, 30, 17)
    ]
    dataset = ConversationDataset.of(items)
    batches = list(Batches(dataset, 4, epochs=1, rows_multiple_of=2))
    assert len(batches) == 5
    tokens = sum(int((batch.segment != 0).sum()) for batch, _ in batches)
    trained = sum(int(batch.completion_mask.sum()) for batch, _ in batches)
    assert tokens == sum(len(item.tokens) for item in items)
    assert trained == tokens - 17


def test_few_shapes_are_compiled():
    dataset = PairDataset.of(some_pairs(300, longest=80))
    for layout in ("shared", "packed"):
        batches = Batches(dataset, 16, layout=layout, prefetch=0)
        shapes = {
            (batch.sequences.tokens.shape, batch.score_at.shape)
            for batch, _ in (batches.build(16 * n) for n in range(40))
        }
        assert len(shapes) <= 4


def test_errors_reach_the_caller_of_a_prefetching_iterator():
    dataset = PairDataset.of(some_pairs(9))
    with pytest.raises(ValueError, match="row_length 16: f:"):
        Batches(dataset, 4, row_length=16)
    with pytest.raises(ValueError, match="multiple of accum_steps"):
        Batches(dataset, 4, accum_steps=3)
    with pytest.raises(ValueError, match="no rows"):
        Batches(PairDataset.of([]), 4)
    with pytest.raises(TypeError, match="no length"):
        len(Batches(dataset, 4))
