"""Experience: shaping, and arrays over completions that survive rows of any layout."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.data.encode import Encoder
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.experience import ShapingConfig
from rlhf_jax.testing import tiny_tokenizer
from rlhf_jax.types import Rollout
from tests.ragged import GARBAGE, LAYOUTS, batch_of, packing, ragged

RAW = np.array([1.5, -2.25, 0.0, 3.0])
STOPPED = np.array([True, False, True, False])
MASK = np.arange(5) < np.array([[2], [5], [1], [5]])


# Scores.


@pytest.mark.parametrize(
    ("config", "scores", "counts"),
    [
        ({}, [1.5, -2.25, 0.0, 3.0], [1, 1, 1, 1]),
        ({"truncated": "mask"}, [1.5, -2.25, 0.0, 3.0], [1, 0, 1, 0]),
        (
            {"truncated": "penalise", "missing_eos_penalty": 0.5},
            [1.5, -2.75, 0.0, 2.5],
            [1, 1, 1, 1],
        ),
        (
            {"length_penalty": 0.25, "free_length": 2},
            [1.5, -3.0, 0.0, 2.25],
            [1, 1, 1, 1],
        ),
        (
            {"truncated": "penalise", "length_penalty": 0.25},
            [1.0, -4.5, -0.25, 0.75],
            [1, 1, 1, 1],
        ),
    ],
)
def test_truncated_and_long_completions(config, scores, counts):
    found, counted = xp.shape_scores(RAW, STOPPED, MASK, ShapingConfig(**config))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32(scores))
    np.testing.assert_array_equal(counted, np.array(counts, bool))


@pytest.mark.parametrize("name", ["missing_eos_penalty", "length_penalty", "timeout_s"])
def test_a_negative_penalty_is_refused(name):
    with pytest.raises(ValueError, match=f"shaping.{name}: expected"):
        ShapingConfig(**{name: -1.0})


# From a rollout.


class Prompt:
    """What gather knows of a prompt."""

    def __init__(self, encoder, text, **row):
        self.tokens = encoder.encode(text, "x").prompt
        self.prompt, self.row = text, {"prompt": text, **row}


def rollout_of(encoder, prompts, texts, *, room=12):
    """Sampled completions with these texts; None = cut at the maximum length."""
    tokens = np.zeros((len(texts), room), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for m, (prompt, text) in enumerate(zip(prompts, texts)):
        ids = list(encoder.encode(prompt.prompt, text).completion)[:room]
        tokens[m, : len(ids)], mask[m, : len(ids)] = ids, True
    ends = np.take_along_axis(tokens, mask.sum(axis=1)[:, None] - 1, axis=1)[:, 0]
    numbers = np.where(mask, -1.25, 0.0).astype(np.float32)
    return Rollout(
        tokens=tokens,
        mask=mask,
        stopped=ends == encoder.eos_id,
        logprobs=numbers,
        policy_logprobs=numbers,
        sampling_logprobs=numbers,
    )  # type: ignore[arg-type]


def test_texts_scores_and_arrays_of_a_rollout():
    encoder = Encoder(tiny_tokenizer())
    prompts = [Prompt(encoder, "Sort 3 1.", id=7), Prompt(encoder, "Reverse cat dog.")]
    long = "cat dog fox cat dog fox cat dog fox cat dog fox cat dog fox"
    said = ["1 3", "", long, "dog cat."]
    rollout = rollout_of(encoder, [p for p in prompts for _ in range(2)], said)
    assert rollout.stopped.tolist() == [True, True, False, True]
    texts = xp.as_texts(prompts, rollout, encoder)
    assert texts.prompts == ["Sort 3 1."] * 2 + ["Reverse cat dog."] * 2
    assert texts.completions[:2] == ["1 3", ""]
    assert texts.completions[3] == "dog cat."
    assert texts.completions[2] and long.startswith(texts.completions[2].strip())
    assert [row.get("id") for row in texts.rows] == [7, 7, None, None]
    completions = xp.collect(prompts, rollout, RAW, ShapingConfig(truncated="mask"))
    assert completions.num_samples == 2
    np.testing.assert_array_equal(completions.prompt(0), prompts[0].tokens)
    np.testing.assert_array_equal(completions.prompt(1), prompts[1].tokens)
    np.testing.assert_array_equal(completions.counts, rollout.stopped)
    np.testing.assert_array_equal(completions.scores, RAW)
    np.testing.assert_array_equal(completions.old_logprobs, rollout.logprobs)


def test_prompts_are_padded_on_the_right():
    encoder = Encoder(tiny_tokenizer())
    prompts = [Prompt(encoder, "Sort 3 1."), Prompt(encoder, "Reverse cat dog fox.")]
    batch = xp.prompt_batch(prompts, pad_id=9)
    for row, prompt in enumerate(prompts):
        size = len(prompt.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :size], prompt.tokens)
        assert batch.mask[row, :size].all() and not batch.mask[row, size:].any()
        assert (batch.tokens[row, size:] == 9).all()
    prompts[1].tokens = []
    with pytest.raises(ValueError, match="prompt 1: expected at least one token"):
        xp.prompt_batch(prompts, pad_id=9)


def test_kl_is_zero_where_no_token_is_whatever_stands_there():
    completions = ragged()
    completions.old_logprobs[~completions.mask] = np.nan
    assert not completions.kl[~completions.mask].any()
    assert np.isfinite(completions.kl).all()


# Rows and back.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_reaches_the_row_of_its_token(layout):
    completions = ragged(returns=ragged(seed=1).values)
    completions.advantages = np.arange(12, dtype=np.float32) + 0.5
    members = np.array([3, 4, 5, 9, 10, 11])
    batch = batch_of(completions, layout, members)
    rows, columns = np.nonzero(batch.sequences.completion_mask)
    seen = set()
    for row, column in zip(rows, columns):
        m = members[batch.sample[row, column]]
        prompt = completions.prompt_lengths[m // 3]
        t = int(batch.sequences.positions[row, column]) - prompt
        seen.add((m, t))
        assert batch.sequences.tokens[row, column] == completions.tokens[m, t]
        for name, there in (
            ("old_logprobs", "old_logprobs"),
            ("ref_logprobs", "ref_logprobs"),
            ("old_values", "values"),
            ("returns", "returns"),
        ):
            value = getattr(completions, there)[m, t]
            assert getattr(batch, name)[row, column] == value
    assert seen == {(m, t) for m in members for t in range(6) if completions.mask[m, t]}
    np.testing.assert_array_equal(batch.advantages, members + 0.5)
    off = ~np.asarray(batch.sequences.completion_mask)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "returns"):
        assert not np.asarray(getattr(batch, name))[off].any(), name
    assert np.abs(np.asarray(batch.old_logprobs)).max() < GARBAGE


def test_advantages_of_tokens_travel_as_tokens():
    completions = ragged()
    completions.advantages = completions.values
    batch = batch_of(completions)
    np.testing.assert_array_equal(batch.advantages, batch.old_values)


def epoch(completions, *, count, accum_steps=1, layout="shared", number=0):
    return list(
        xp.minibatches(
            completions,
            packing(layout),
            count=count,
            accum_steps=accum_steps,
            rng=xp.epoch_rng(3, 5, number),
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_an_epoch_holds_every_completion_once_and_prompts_whole(layout, accum_steps):
    completions = ragged(8, 3)
    completions.advantages = np.arange(24, dtype=np.float32)
    batches = epoch(completions, count=2, accum_steps=accum_steps, layout=layout)
    assert len(batches) == 2
    found = []
    for batch in batches:
        leading = (accum_steps,) if accum_steps > 1 else ()
        assert batch.advantages.shape == (*leading, 12 // accum_steps)
        assert {x.shape[0] for x in jax.tree.leaves(batch)} == {
            accum_steps if leading else x for x in {len(batch.sample), 12}
        }
        found += batch.advantages.reshape(-1, 3).astype(int).tolist()
        tokens = int(batch.sequences.completion_mask.sum())
        numbers = batch.advantages.ravel().astype(int)
        assert tokens == completions.mask[numbers].sum()
    assert sorted(found) == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(8)]
    other = epoch(completions, count=2, layout=layout, number=1)
    assert other[0].advantages.tolist() != batches[0].advantages.ravel().tolist()
    again = epoch(completions, count=2, accum_steps=accum_steps, layout=layout)
    for a, b in zip(jax.tree.leaves(batches), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def table_of(sequences):
    """A number for every cell that depends on token and position alone."""
    return sequences.tokens + 100.0 * sequences.positions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [3, 6, 100])
def test_forward_reads_every_completion_token(layout, chunk):
    completions = ragged(5, 3)
    found = xp.forward(table_of, completions, packing(layout), chunk=chunk)
    owner = completions.prompt_lengths.repeat(3)[:, None]
    expected = completions.tokens + 100.0 * (owner + np.arange(6))
    np.testing.assert_array_equal(found, np.where(completions.mask, expected, 0))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_forward_can_see_the_very_rows_of_an_epoch(accum_steps):
    completions, seen = ragged(8, 3), []

    def remember(sequences):
        seen.append(sequences)
        return table_of(sequences)

    parts = xp.epoch_parts(
        completions, count=2, accum_steps=accum_steps, rng=xp.epoch_rng(3, 5, 0)
    )
    found = xp.forward(
        remember, completions, packing(), chunk=3 * 8 // 2 // accum_steps, parts=parts
    )
    trained = [
        jax.tree.map(lambda x, n=n: x[n], batch.sequences)
        if accum_steps > 1
        else batch.sequences
        for batch in epoch(completions, count=2, accum_steps=accum_steps)
        for n in range(accum_steps)
    ]
    assert len(seen) == len(trained) == 2 * accum_steps
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = xp.forward(table_of, completions, packing(), chunk=24)
    np.testing.assert_array_equal(found, plain)


def test_a_row_too_short_for_a_completion_is_an_error():
    short = dataclasses.replace(packing(), row_length=4)
    with pytest.raises(ValueError, match="row_length 4: completion .* with its prompt"):
        xp.forward(table_of, ragged(), short, chunk=12)
