"""Shapes: few, enough for every batch, and of little padding."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.plan import plan_blocks
from rlhf_jax.data.shapes import _fewest_rows, choose_shapes


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 4),
)
def test_every_sampled_batch_fits_one_of_few_shapes(seed, size, multiple, few):
    rng = np.random.default_rng(seed)
    batches = [rng.integers(1, 400, size) for _ in range(20)]
    every = np.concatenate(batches)
    shapes = choose_shapes(
        batches,
        longest=int(every.max()),
        mean=float(every.mean()),
        per_block=2,
        rows_multiple_of=multiple,
        num_shapes=few,
    )
    assert 1 <= len(shapes.rows) <= few
    assert shapes.row_length >= every.max()
    for blocks in batches:
        plan = plan_blocks(
            blocks,
            row_length=shapes.row_length,
            slots=shapes.slots,
            per_block=2,
            rows_exact=True,
        )
        rows = shapes.rows_for(plan.rows)
        assert rows >= plan.rows and rows in shapes.rows and rows % multiple == 0
    assert shapes.rows_for(max(shapes.rows) + 100) >= max(shapes.rows) + 100


def test_a_row_length_of_the_users_own_is_kept():
    shapes = choose_shapes(
        [np.array([10, 20])], longest=20, mean=15.0, per_block=1, row_length=77
    )
    assert shapes.row_length == 77


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.integers(1, 9), st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_row_counts_are_the_best_of_all_choices(needed, few):
    def total(rows):
        return sum(n * min(r for r in rows if r >= v) for v, n in needed.items())

    choices = itertools.combinations(range(1, max(needed) + 1), few)
    choices = [rows for rows in choices if max(rows) >= max(needed)] or [tuple(needed)]
    rows, found = _fewest_rows(needed, few)
    assert total(rows) == found == min(map(total, choices))
