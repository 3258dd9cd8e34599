"""Scores depend on the text alone: not on order, batch size, packing or padding."""

import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.layout import pack_completions
from rlhf_jax.evals import scoring
from tests.rows import read_at


@pytest.fixture(scope="module")
def score_fn():
    model, params = testing.tiny_reward_model()
    return jax.jit(
        lambda sequences, score_at: model.apply({"params": params}, sequences, score_at)
    )


def completions(count=24, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [
        EncodedCompletion(
            rng.integers(0, 512, rng.integers(1, 12)).tolist(),
            rng.integers(0, 512, rng.integers(1, longest)).tolist(),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def alone(score_fn):
    """Each completion in a batch of one, in a row of its own."""
    rewards = []
    for item in completions():
        sequences, score_at, order = pack_completions(
            [item], layout="padded", row_length=72
        )
        rewards.append(np.asarray(score_fn(sequences, score_at)).reshape(-1)[order[0]])
    return np.array(rewards)


@pytest.mark.parametrize(
    ("tokens_per_batch", "row_length"), [(1, None), (300, 128), (100_000, None)]
)
def test_batching_and_padding_do_not_change_a_score(
    score_fn, alone, tokens_per_batch, row_length
):
    found = scoring.score(
        score_fn,
        completions(),
        tokens_per_batch=tokens_per_batch,
        row_length=row_length,
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_order_of_the_input_does_not_change_a_score(score_fn, alone):
    order = np.random.default_rng(1).permutation(len(alone))
    items = completions()
    found = scoring.score(score_fn, [items[i] for i in order], tokens_per_batch=300)
    np.testing.assert_allclose(found, alone[order], atol=1e-4)


def of_few_prompts(count=60, prompts=5, seed=0, longest=40):
    """Completions of prompts worth sharing, mixed; and of one too short for it."""
    rng = np.random.default_rng(seed)
    read = [rng.integers(0, 512, 9 + 4 * n).tolist() for n in range(prompts)] + [[7]]
    return [
        EncodedCompletion(
            read[rng.integers(len(read))],
            rng.integers(0, 512, rng.integers(1, longest)).tolist(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("tokens_per_batch", "row_length"), [(1, None), (300, 96), (100_000, None)]
)
def test_sharing_a_prompt_does_not_change_a_score(
    score_fn, tokens_per_batch, row_length
):
    items = of_few_prompts()
    options = {"layout": "padded", "row_length": 72}
    sequences, score_at, order = pack_completions(items, **options)
    expected = np.asarray(score_fn(sequences, score_at)).reshape(-1)[order]
    found = scoring.score(
        score_fn, items, tokens_per_batch=tokens_per_batch, row_length=row_length
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_completion_without_tokens_is_read_at_its_own_prompt(score_fn):
    prompt = list(range(20))
    items = [EncodedCompletion(prompt, c) for c in ([5, 6, 7], [], [8, 9])]
    alone = [float(scoring.score(score_fn, [item])[0]) for item in items]
    np.testing.assert_allclose(scoring.score(score_fn, items), alone, atol=1e-4)


def test_rows_are_longer_where_pairs_then_share_their_prompt():
    rng = np.random.default_rng(0)
    items = []
    for _ in range(100):
        prompt = rng.integers(0, 512, 100).tolist()
        for length in rng.integers(80, 120, 2):
            items.append(EncodedCompletion(prompt, [1] * int(length)))
    batches = list(scoring.scoring_batches(items))
    tokens = sum(int((b.sequences.segment > 0).sum()) for b in batches)
    alone = sum(100 + len(item.completion) for item in items)
    assert tokens == alone - 100 * 100  # every pair in one row


@pytest.mark.parametrize(("longest", "most"), [(2, 0.2), (40, 0.55), (200, 0.55)])
def test_a_shared_prompt_is_computed_once_for_all_that_fit_its_row(longest, most):
    items = of_few_prompts(400, longest=longest)
    seen, tokens, shapes = [], 0, set()
    for batch in scoring.scoring_batches(items):
        seen += batch.indices.tolist()
        tokens += int((batch.sequences.segment > 0).sum())
        shapes.add((batch.sequences.tokens.shape, batch.score_at.shape))
        assert batch.sequences.prefix is not None
        at = batch.sequences.tokens, batch.score_at
        for place, index in zip(batch.order, batch.indices, strict=True):
            row, slot = divmod(int(place), at[1].shape[1])
            column = at[1][row, slot]
            assert at[0][row, column] == items[index].completion[-1]
    assert sorted(seen) == list(range(400)) and len(shapes) <= scoring.MAX_SHAPES
    of_prompts = tokens - sum(len(i.completion) for i in items)
    assert of_prompts < most * sum(len(i.prompt) for i in items)


def test_scores_differ_between_texts(alone):
    assert len(set(np.round(alone, 5).tolist())) == len(alone)


def fake(sequences, score_at):
    """The reward is the sum of the tokens of the scored segment, computed slowly."""
    rewards = np.zeros(score_at.shape, np.float32)
    for row in range(len(score_at)):
        for slot, at in enumerate(score_at[row]):
            mine = read_at(sequences, row, at)
            rewards[row, slot] = sequences.tokens[row][mine].sum()
    return rewards


@pytest.mark.parametrize("seed", range(5))
def test_every_completion_gets_its_own_score_once(seed):
    items = completions(150, seed=seed, longest=250)
    found = scoring.score(fake, items, tokens_per_batch=1000)
    expected = [sum(item.prompt) + sum(item.completion) for item in items]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_no_completion_of_middle_length_leaves_its_group_out():
    items = [EncodedCompletion([1] * 3, [2] * n) for n in (997, *[5] * 400)]
    found = scoring.score(fake, items)
    np.testing.assert_array_equal(found, [3 + 2 * len(i.completion) for i in items])


def test_few_shapes_for_many_lengths():
    shapes, cells, tokens = set(), 0, 0
    items = completions(400, longest=500)
    for batch in scoring.scoring_batches(items, tokens_per_batch=4096):
        shapes.add((batch.sequences.tokens.shape, batch.score_at.shape))
        cells += batch.sequences.tokens.size
        tokens += int((batch.sequences.segment > 0).sum())
        assert batch.sequences.tokens.size <= 4096
    assert len(shapes) <= scoring.MAX_SHAPES
    assert tokens / cells > 0.9
    assert tokens == sum(len(i.prompt) + len(i.completion) for i in items)


def test_rows_are_a_multiple_of_the_devices():
    for batch in scoring.scoring_batches(completions(), rows_multiple_of=4):
        assert len(batch.score_at) % 4 == 0


def test_progress_counts_every_completion():
    seen = []
    scoring.score(fake, completions(), tokens_per_batch=200, progress=seen.append)
    assert sum(seen) == 24
    assert len(seen) > 1


def test_no_completion_gives_no_reward():
    assert scoring.score(fake, []).shape == (0,)


def test_a_row_length_holds_for_every_call_until_a_completion_is_longer():
    def shapes(items, row_length):
        batches = scoring.scoring_batches(items, row_length=row_length)
        return {batch.sequences.tokens.shape for batch in batches}

    calls = [completions(30, seed=n, longest=60) for n in range(20)]
    lengths = {length for call in calls for _, length in shapes(call, 96)}
    assert lengths == {96}
    assert len(set().union(*(shapes(call, 96) for call in calls))) <= 2
    assert all(length > 96 for _, length in shapes(completions(longest=400), 96))


def test_an_empty_sequence_is_an_error():
    with pytest.raises(ValueError, match="completion 0: no token"):
        scoring.score(fake, [EncodedCompletion([], [])])


@pytest.fixture(scope="module")
def states_fn():
    model, params = testing.tiny_reward_model()
    return jax.jit(
        lambda sequences, score_at: model.apply(
            {"params": params}, sequences, score_at, method="rewards_and_states"
        )
    )


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_states_of_packed_rows_equal_states_of_rows_alone(
    states_fn, alone, tokens_per_batch
):
    items = completions()
    keep = np.random.default_rng(0).permutation(len(items))[:17]
    found = scoring.score_with_states(
        states_fn, items, keep, tokens_per_batch=tokens_per_batch
    )
    np.testing.assert_allclose(found.rewards, alone, atol=1e-4)
    assert found.before.shape == found.after.shape == (17, 32)
    for place, index in enumerate(keep):
        sequences, score_at, order = pack_completions(
            [items[index]], layout="padded", row_length=72
        )
        _, before, after = states_fn(sequences, score_at)
        for name, one in (("before", before), ("after", after)):
            expected = np.asarray(one).reshape(-1, 32)[order[0]]
            got = getattr(found, name)[place]
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_head_reads_the_state_after_the_norm(states_fn):
    _, params = testing.tiny_reward_model()
    items = completions()
    found = scoring.score_with_states(states_fn, items, np.arange(len(items)))
    rewards = found.after @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(rewards, found.rewards, atol=1e-4)
