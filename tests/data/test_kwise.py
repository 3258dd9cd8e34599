"""K-wise rows: read, laid out, batched; each completion scored as if alone."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms.reward_model import group_values
from rlhf_jax.data.encoded import EncodedPair
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.kwise import EncodedKwise, pack_kwise
from rlhf_jax.data.layout import pack_pairs
from rlhf_jax.data.prepare import make_encoder, prepare_kwise
from rlhf_jax.testing import tiny_reward_model, tiny_tokenizer

ROWS = [
    {"prompt": "a", "responses": [{"text": t, "score": s} for t, s in answers]}
    for answers in (
        [("cat", 1.0), ("dog fox", 0.5), ("sort", 0.0)],
        [("fox fox fox", -1.0), ("red", 2.0)],
        [("cat", 0.0), ("dog", 0.0), ("fox", 1.0), ("red", 4.0)],
    )
]


@pytest.fixture
def path(tmp_path):
    def write(rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(tiny_tokenizer())


def test_rows_come_back_as_they_were(path, encoder):
    dataset, report = prepare_kwise([path(ROWS)], encoder)
    assert (report.kept, dataset.num_completions) == (3, 4)
    for row, item in zip(ROWS, (dataset[n] for n in range(3))):
        texts = [r["text"] for r in row["responses"]]
        for text, ids in zip(texts, item.completions, strict=True):
            assert list(ids) == encoder.completion("a", text)
        assert item.scores == [r["score"] for r in row["responses"]]
        assert list(item.prompt) == encoder.prompt("a")
    sizes = [1 + len(row["responses"]) for row in ROWS]
    assert (dataset.lengths > 0).sum(axis=1).tolist() == sizes


def test_every_reward_is_that_of_the_completion_alone(path, encoder):
    dataset, _ = prepare_kwise([path(ROWS)], encoder)
    model, params = tiny_reward_model()
    stream = Batches(dataset, 3, shuffle=False, prefetch=0)
    batch, next_row = stream.build(0)
    assert next_row == 3
    rewards = model.apply({"params": params}, batch.sequences, batch.score_at)
    values, mask, weight = group_values(rewards, batch)
    assert weight.tolist() == [1.0] * 3
    assert mask.sum(axis=1).tolist() == [3, 2, 4]
    for n in range(3):
        item = dataset[n]
        for slot, completion in enumerate(item.completions):
            alone = pack_pairs([EncodedPair(item.prompt, completion, completion)])
            expected = model.apply({"params": params}, alone.sequences, alone.score_at)
            np.testing.assert_allclose(
                values[n, slot], expected.reshape(-1)[alone.chosen[0]], atol=1e-5
            )


def test_micro_batches_hold_the_same_prompts(path, encoder):
    dataset, _ = prepare_kwise([path(ROWS * 2)], encoder)
    whole, _ = Batches(dataset, 4, shuffle=False, prefetch=0).build(0)
    split, _ = Batches(dataset, 4, shuffle=False, accum_steps=2, prefetch=0).build(0)
    assert split.members.shape[0] == 2 and whole.weight.sum() == split.weight.sum() == 4
    np.testing.assert_array_equal(split.scores.reshape(4, -1), whole.scores)


def test_two_processes_fill_the_batch_of_one():
    rng = np.random.default_rng(0)
    items = [
        EncodedKwise(
            rng.integers(3, 9, 4).tolist(),
            [rng.integers(3, 9, int(n)).tolist() for n in rng.integers(2, 9, 3)],
        )
        for _ in range(6)
    ]
    options = {"num_completions": 3, "rows_multiple_of": 2}
    whole = pack_kwise(items, **options)
    parts = [
        pack_kwise(items, **options, process_index=i, process_count=2) for i in (0, 1)
    ]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert whole.scores is None


def test_a_process_of_only_filler_knows_that_there_are_scores():
    items = [EncodedKwise([3], [[4, 5], [6, 5]], [1.0, 0.0]) for _ in range(2)]
    options = {"num_completions": 2, "rows_multiple_of": 4, "process_count": 2}
    parts = [pack_kwise(items, **options, process_index=i) for i in (0, 1)]
    assert parts[1].weight.sum() == 0 and parts[1].scores is not None


def test_completions_without_scores_may_be_bare_texts(path, encoder):
    rows = [{"prompt": "a", "responses": ["cat", {"text": "dog"}]}]
    dataset, _ = prepare_kwise([path(rows)], encoder, scored=False)
    assert dataset[0].scores is None and len(dataset[0].completions) == 2
    with pytest.raises(ValueError, match="responses 1: expected an object"):
        prepare_kwise([path(rows)], encoder)


def test_one_completion_is_too_few(path, encoder):
    rows = [{"prompt": "a", "responses": ["cat"]}]
    with pytest.raises(ValueError, match="rows.jsonl:1.*two answers or more"):
        prepare_kwise([path(rows)], encoder, scored=False)


def test_a_score_that_is_not_a_number_names_file_and_line(path, encoder):
    rows = [*ROWS, {"prompt": "a", "responses": [{"text": "x", "score": "high"}] * 2}]
    with pytest.raises(ValueError, match=r"rows.jsonl:4.*score: expected a number"):
        prepare_kwise([path(rows)], encoder)
