"""Groups in rows: every layout holds the same sequences, and cells lead there and back.

`sequence_at` reads a completion out of a row by the visibility rule alone.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.groups import (
    Group,
    group_row_length,
    pack_groups,
    to_completions,
    to_rows,
)
from rlhf_jax.data.layout import padding_fraction
from rlhf_jax.data.plan import LAYOUTS, bucket
from rlhf_jax.models.heads import predecessors

ROW = 24


def random_groups(seed, count=5, samples=4):
    """(groups, tokens [M C], mask [M C]); some groups are ragged, ids are all new."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, samples + 1, count)
    members = np.split(rng.permutation(sizes.sum()), np.cumsum(sizes)[:-1])
    groups = [
        Group(rng.integers(1000, 2000, rng.integers(1, 12)), part.tolist())
        for part in members
    ]
    lengths = rng.integers(1, 13, sizes.sum())
    mask = np.arange(12) < lengths[:, None]
    tokens = np.where(mask, np.arange(mask.size).reshape(mask.shape), 999)
    return groups, tokens, mask


def sequence_at(sequences, cell):
    """(ids, positions, completion mask) of what the token in a cell reads."""
    row, column = divmod(int(cell), sequences.tokens.shape[1])
    segment = sequences.segment[row]
    visible = segment == segment[column]
    if sequences.prefix is not None and sequences.prefix[row, column]:
        visible |= segment == sequences.prefix[row, column]
    read = np.flatnonzero(visible)
    read = read[read <= column]
    return (
        sequences.tokens[row, read].tolist(),
        sequences.positions[row, read].tolist(),
        sequences.completion_mask[row, read].tolist(),
    )


def test_two_completions_share_a_prompt_by_hand():
    tokens = np.array([[4, 5, 0], [6, 0, 0], [7, 8, 9]])
    groups = [Group(np.array([1, 2]), [0, 2]), Group(np.array([3]), [1])]
    packed = pack_groups(groups, tokens, tokens > 0, row_length=10, pad_id=77)
    rows = packed.sequences
    assert rows.tokens.tolist() == [[1, 2, 4, 5, 7, 8, 9, 3, 6, 77]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 0]]
    assert rows.segment.tolist() == [[1, 1, 2, 2, 3, 3, 3, 4, 5, 0]]
    assert rows.prefix.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 4, 0]]
    assert rows.completion_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 1, 0]]
    assert packed.sample.tolist() == [[0, 0, 0, 0, 2, 2, 2, 0, 1, 0]]
    assert packed.cells.tolist() == [[2, 3, -1], [8, -1, -1], [4, 5, 6]]
    values = np.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [4.0, 5.0, 6.0]])
    there = to_rows(packed, values)
    assert there.tolist() == [[0, 0, 1, 2, 4, 5, 6, 0, 3, 0]]
    assert to_completions(packed, there).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), samples=st.integers(1, 9))
def test_every_completion_reads_its_prompt_and_itself(layout, seed, count, samples):
    groups, tokens, mask = random_groups(seed, count, samples)
    packed = pack_groups(groups, tokens, mask, layout=layout, row_length=ROW)
    rows = packed.sequences
    assert rows.completion_mask.sum() == mask.sum()
    np.testing.assert_array_equal(packed.cells >= 0, mask)
    flat = packed.sample.reshape(-1), rows.completion_mask.reshape(-1)
    assert (flat[0][~flat[1]] == 0).all()
    for group in groups:
        prompt = group.prompt.tolist()
        for m in group.members:
            cells = packed.cells[m][mask[m]]
            assert flat[1][cells].all() and (flat[0][cells] == m).all()
            ids, positions, sampled = sequence_at(rows, cells[-1])
            assert ids == prompt + tokens[m][mask[m]].tolist()
            assert positions == list(range(len(ids)))
            assert sampled == [False] * len(prompt) + [True] * len(cells)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_completion_token_follows_the_one_before_it(layout, seed):
    groups, tokens, mask = random_groups(seed, count=20, samples=6)
    packed = pack_groups(groups, tokens, mask, layout=layout, row_length=ROW)
    before = np.asarray(predecessors(packed.sequences)).reshape(-1)
    ids = packed.sequences.tokens.reshape(-1)
    for group in groups:
        for m in group.members:
            cells = packed.cells[m][mask[m]]
            start = cells // ROW * ROW
            assert (before[cells] >= 0).all()
            previous = ids[start + before[cells]].tolist()
            assert previous == [group.prompt[-1], *tokens[m][mask[m]][:-1].tolist()]


def test_segments_are_never_more_than_the_tokens_of_a_row():
    """`predecessors` has room for T of them: a large group must not spread others."""
    tokens = np.arange(20)[:, None] + 100
    groups = [Group(np.array([1]), range(10))]
    groups += [Group(np.array([2]), [m]) for m in range(10, 20)]
    packed = pack_groups(groups, tokens, tokens > 0, row_length=20)
    assert packed.sequences.segment.max() <= 20
    before = np.asarray(predecessors(packed.sequences)).reshape(-1)
    assert (before[packed.cells] >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_go_to_rows_and_back(layout):
    groups, tokens, mask = random_groups(3)
    packed = pack_groups(groups, tokens, mask, layout=layout, row_length=ROW)
    values = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    rows = to_rows(packed, values)
    assert rows.dtype == np.float32 and rows.shape == packed.sequences.tokens.shape
    assert (rows[~packed.sequences.completion_mask] == 0).all()
    back = to_completions(packed, rows)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.where(mask, values, 0))


def test_sharing_encodes_a_prompt_once_where_its_completions_fit():
    prompt = np.arange(1, 9)
    tokens, mask = np.full((6, 4), 50), np.ones((6, 4), bool)
    groups = [Group(prompt, range(6))]
    whole = pack_groups(groups, tokens, mask, row_length=8 + 24)
    assert (whole.sequences.segment > 0).sum() == 8 + 24
    cut = pack_groups(groups, tokens, mask, row_length=8 + 12)
    assert (cut.sequences.segment > 0).sum() == 2 * 8 + 24
    packed = pack_groups(groups, tokens, mask, layout="packed", row_length=24)
    assert (packed.sequences.segment > 0).sum() == 6 * 12
    assert packed.sequences.prefix is None
    assert padding_fraction(packed.sequences) == 0


def test_an_empty_completion_leaves_the_others_as_they_are():
    groups, tokens, mask = random_groups(1)
    mask[groups[2].members[0]] = False
    for layout in LAYOUTS:
        packed = pack_groups(groups, tokens, mask, layout=layout, row_length=ROW)
        np.testing.assert_array_equal(packed.cells >= 0, mask)
        for group in groups:
            for m in group.members:
                if mask[m].any():
                    cell = packed.cells[m][mask[m]][-1]
                    ids, _, _ = sequence_at(packed.sequences, cell)
                    assert ids == [*group.prompt, *tokens[m][mask[m]]]


def test_row_counts_are_those_asked_for_or_buckets():
    groups, tokens, mask = random_groups(0, count=12)

    def rows(**options):
        packed = pack_groups(groups, tokens, mask, row_length=ROW, **options)
        return packed.sequences.tokens.shape

    needed = rows()[0]
    assert needed == bucket(needed, steps=2)
    assert rows(rows_multiple_of=7)[0] % 7 == 0
    assert rows(rows=30) == (30, ROW)
    padded = rows(layout="padded")[0]
    assert padded == bucket(len(tokens), steps=2)
    with pytest.raises(ValueError, match=r"rows 2: these blocks need \d+"):
        rows(rows=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_completion_that_does_not_fit_is_named(layout):
    groups, tokens, mask = random_groups(0)
    longest = max(groups, key=lambda g: len(g.prompt))
    mask[longest.members[-1]] = True
    need = len(longest.prompt) + 12
    message = f"completion {longest.members[-1]} with its prompt needs {need} tokens"
    with pytest.raises(ValueError, match=message):
        pack_groups(groups, tokens, mask, layout=layout, row_length=need - 1)


def test_the_order_of_the_groups_changes_nothing_for_a_completion():
    groups, tokens, mask = random_groups(5)
    turned = [dataclasses.replace(g, members=g.members[::-1]) for g in groups[::-1]]
    for some in (groups, turned):
        packed = pack_groups(some, tokens, mask, row_length=ROW)
        found = [
            sequence_at(packed.sequences, packed.cells[m][mask[m]][-1])
            for m in range(len(tokens))
        ]
        first = found if some is groups else first
        assert found == first


@given(
    prompt=st.integers(1, 300),
    completion=st.integers(1, 300),
    samples=st.integers(1, 16),
    longest=st.integers(1, 700),
)
def test_a_row_holds_whole_groups_up_to_its_limit(prompt, completion, samples, longest):
    length = group_row_length(prompt, completion, samples, longest=longest)
    one, group = prompt + completion, prompt + samples * completion
    assert one <= length <= max(bucket(group, steps=4), one)
    if group <= longest:
        assert length >= group
    assert length <= max(longest, one)
    # as many completions as the limit has room for
    assert (length - prompt) // completion >= min(
        samples, (longest - prompt) // completion
    )
