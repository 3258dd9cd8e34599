"""Layouts: the same pairs in any of them, and the same scores."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.encoded import EncodedCompletion, EncodedConversation, EncodedPair
from rlhf_jax.data.layout import (
    pack_completions,
    pack_conversations,
    pack_pairs,
    padding_fraction,
)
from rlhf_jax.data.plan import LAYOUTS, bucket, plan_blocks, plan_pairs, row_bucket


def some_pairs(count, *, seed=0, longest=30, **columns):
    rng = np.random.default_rng(seed)

    def ids(low):
        return rng.integers(3, 60, rng.integers(low, longest)).tolist()

    return [
        EncodedPair(ids(0), ids(1), ids(1), where=f"f:{n}", **columns)
        for n in range(count)
    ]


def read_back(sequences, row, column):
    """(prompt, completion) of the sequence whose last token is at (row, column)."""
    segment = sequences.segment[row, column]
    own = sequences.segment[row] == segment
    if sequences.prefix is not None:
        prefix = sequences.prefix[row, column]
        shared = (sequences.segment[row] == prefix) & (prefix != 0)
    else:
        shared = np.zeros_like(own)
    cells = np.flatnonzero(shared | own)
    assert cells[-1] == column
    positions = sequences.positions[row, cells]
    np.testing.assert_array_equal(positions, np.arange(len(cells)))
    completion = sequences.completion_mask[row, cells]
    tokens = sequences.tokens[row, cells]
    return tokens[~completion].tolist(), tokens[completion].tolist()


def pairs_of(batch):
    """What a batch says, whatever its layout: (prompt, chosen, rejected, weight)."""
    slots = batch.score_at.shape[1]

    def sequence(flat):
        row, slot = divmod(int(flat), slots)
        return read_back(batch.sequences, row, batch.score_at[row, slot])

    found = []
    for n in np.flatnonzero(batch.weight):
        prompt, chosen = sequence(batch.chosen[n])
        again, rejected = sequence(batch.rejected[n])
        assert prompt == again
        found.append((prompt, chosen, rejected, float(batch.weight[n])))
    return found


def as_tuples(pairs):
    return [(p.prompt, p.chosen, p.rejected, p.weight) for p in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows_multiple_of", [1, 8])
@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 25), seed=st.integers(0, 99), extra=st.integers(0, 3))
def test_every_layout_describes_the_same_pairs(
    layout, rows_multiple_of, count, seed, extra
):
    pairs = some_pairs(count, seed=seed)
    batch = pack_pairs(
        pairs,
        layout=layout,
        rows_multiple_of=rows_multiple_of,
        num_pairs=count + extra,
    )
    assert pairs_of(batch) == as_tuples(pairs)
    assert len(batch.sequences.tokens) % rows_multiple_of == 0
    assert len(batch.weight) % rows_multiple_of == 0 and len(batch.weight) >= count
    real = batch.sequences.segment != 0
    shared = layout == "shared"
    total = sum(
        (1 if shared else 2) * len(p.prompt) + len(p.chosen) + len(p.rejected)
        for p in pairs
    )
    assert real.sum() == total
    assert padding_fraction(batch.sequences) == pytest.approx(1 - total / real.size)
    assert (batch.sequences.prefix is not None) == shared


def test_left_padding_describes_the_same_pairs():
    pairs = some_pairs(5)
    batch = pack_pairs(pairs, layout="padded", side="left")
    assert pairs_of(batch) == as_tuples(pairs)
    assert (batch.score_at[:10] == batch.sequences.tokens.shape[1] - 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", [2, 4])
def test_slices_of_processes_are_the_batch_of_one(layout, processes):
    pairs = some_pairs(19, margin=0.5, soft_label=0.9)
    options = {"layout": layout, "rows_multiple_of": 8, "num_pairs": 22}
    whole = pack_pairs(pairs, **options)
    slices = [
        pack_pairs(pairs, **options, process_index=n, process_count=processes)
        for n in range(processes)
    ]
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices)
    jax.tree.map(np.testing.assert_array_equal, whole, together)


def test_a_process_reads_only_the_pairs_in_its_rows():
    pairs = some_pairs(40)
    read = set()

    class Lazy:
        def __len__(self):
            return len(pairs)

        def __getitem__(self, n):
            read.add(n)
            return pairs[n]

    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    plan = plan_pairs(lengths, rows_multiple_of=4, row_length=96)
    pack_pairs(Lazy(), plan=plan, rows_multiple_of=4, process_index=3, process_count=4)
    assert len(read) < 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_that_does_not_fit_a_row_is_named(layout):
    pairs = [*some_pairs(3), EncodedPair([1] * 40, [2] * 30, [2] * 30, where="f:9")]
    with pytest.raises(ValueError, match=r"row_length 64: f:9 needs (70|100) tokens"):
        pack_pairs(pairs, layout=layout, row_length=64)


def test_columns_are_all_or_none():
    pairs = some_pairs(2, margin=1.0)
    pairs[1].margin = None
    with pytest.raises(ValueError, match="margin: 1 of 2 pairs have none"):
        pack_pairs(pairs)
    assert pack_pairs(some_pairs(2)).margin is None
    batch = pack_pairs(some_pairs(2, margin=1.5, soft_label=0.8), num_pairs=3)
    assert batch.margin.tolist() == [1.5, 1.5, 1.0]  # filler: any finite number
    np.testing.assert_allclose(batch.soft_label, [0.8, 0.8, 1.0])
    assert batch.margin.shape == batch.chosen.shape  # [Q], never [Q 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 5))
def test_plans_place_every_block_once_and_inside(lengths, slots):
    plan = plan_blocks(lengths, row_length=50, slots=slots)
    used = np.zeros((plan.rows, 50), int)
    for row, column, length in zip(plan.row, plan.column, lengths):
        assert column + length <= 50
        used[row, column : column + length] += 1
    assert used.max() == 1
    assert plan.first.max() < slots
    places = set(zip(plan.row.tolist(), plan.first.tolist()))
    assert len(places) == len(lengths)


def test_buckets_are_few_and_waste_little():
    assert all(n <= bucket(n) <= n * 1.125 + 1 for n in range(1, 3000))
    assert len({bucket(n) for n in range(1, 1025)}) <= 8 * 8
    assert all(n <= row_bucket(n) for n in range(1, 3000))
    assert len({row_bucket(n) for n in range(1, 4097)}) <= 15


def test_packing_removes_the_padding():
    pairs = some_pairs(64, longest=100)
    fractions = {
        layout: padding_fraction(pack_pairs(pairs, layout=layout).sequences)
        for layout in LAYOUTS
    }
    assert fractions["shared"] < 0.2 and fractions["packed"] < 0.2
    assert fractions["padded"] > 0.4


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_completions_come_back_in_order(layout):
    items = [EncodedCompletion(p.prompt, p.chosen) for p in some_pairs(30)]
    sequences, score_at, order = pack_completions(items, layout=layout)
    for item, flat in zip(items, order.tolist()):
        row, slot = divmod(flat, score_at.shape[1])
        prompt, completion = read_back(sequences, row, score_at[row, slot])
        assert (prompt, completion) == (item.prompt, item.completion)
    assert len(set(order.tolist())) == len(items)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("processes", [1, 2])
def test_conversations_keep_their_masks(layout, processes):
    rng = np.random.default_rng(0)
    items = [
        EncodedConversation(
            rng.integers(3, 60, n).tolist(), rng.integers(0, 2, n).astype(bool).tolist()
        )
        for n in rng.integers(1, 40, 20)
    ]
    slices = [
        pack_conversations(
            items,
            layout=layout,
            rows_multiple_of=4,
            process_index=n,
            process_count=processes,
        )
        for n in range(processes)
    ]
    sequences = jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices)
    found = []
    for row in range(len(sequences.tokens)):
        for segment in range(1, sequences.segment[row].max() + 1):
            cells = sequences.segment[row] == segment
            found.append(
                (
                    sequences.tokens[row, cells].tolist(),
                    sequences.completion_mask[row, cells].tolist(),
                )
            )
    expected = [(item.tokens, item.completion_mask) for item in items]
    assert sorted(found) == sorted(expected)


def test_every_layout_and_side_gives_the_same_score():
    from rlhf_jax import testing
    from rlhf_jax.models.heads import RewardModel, init_head_model

    model = RewardModel(testing.tiny_config())
    shapes = jax.eval_shape(lambda key: init_head_model(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)  # saves the compilation of the initialiser
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
    )
    pairs = some_pairs(4, longest=12)
    apply = jax.jit(model.apply)

    def scores(**options):
        batch = pack_pairs(pairs, **options)
        rewards = apply({"params": params}, batch.sequences, batch.score_at)
        flat = np.asarray(rewards).reshape(-1)
        return np.stack([flat[batch.chosen], flat[batch.rejected]])[:, : len(pairs)]

    expected = scores(layout="padded")
    for options in (
        {"layout": "padded", "side": "left"},
        {"layout": "padded", "pad_id": 7},
        {"layout": "packed"},
        {"layout": "shared", "rows_multiple_of": 8},
    ):
        np.testing.assert_allclose(scores(**options), expected, atol=1e-4)


def test_a_number_of_rows_of_the_users_own_is_kept():
    batch = pack_pairs(some_pairs(3), row_length=128, rows=7)
    assert batch.sequences.tokens.shape == (7, 128)
    with pytest.raises(ValueError, match="rows 1: these blocks need"):
        pack_pairs(some_pairs(9), layout="packed", row_length=64, rows=1)
