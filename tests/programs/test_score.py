"""`score`: every row comes out once, with a reward or with a reason, in order."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.rows import Columns
from rlhf_jax.programs import score, scored_rows, scorer
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.testing import tiny_tokenizer
from tests.rows import read_at

MAX_LENGTH = 60


def token_sums(sequences, score_at):
    """A stand-in for a model: the sum of the ids of the scored sequence, over 1000."""
    rewards = np.zeros(score_at.shape, np.float32)
    for row in range(len(score_at)):
        for slot, at in enumerate(score_at[row]):
            mine = read_at(sequences, row, at)
            rewards[row, slot] = sequences.tokens[row][mine].sum() / 1000
    return rewards


@pytest.fixture
def fake(monkeypatch):
    """A Scorer with a real encode path and `token_sums` for a model."""
    one = scorer.Scorer(
        encoder=Encoder(tiny_tokenizer()),
        score_fn=token_sums,
        max_length=MAX_LENGTH,
        tokens_per_batch=256,
        rows_multiple_of=1,
        mesh=make_mesh(MeshConfig(), devices=jax.devices()[:1]),
    )
    monkeypatch.setattr(score, "open_scorer", lambda *args, **kwargs: one)
    return one


def expected(fake, prompt, text):
    item = fake.encoder.encode(prompt, text)
    return (sum(item.prompt) + sum(item.completion)) / 1000


def write(path, rows):
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows)
    )
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(tmp_path, rows, **changes):
    data = write(tmp_path / "in.jsonl", rows)
    values = {"model": "m", "data": str(data), "out": str(tmp_path / "out.jsonl")}
    return score.ScoreConfig(**values | changes)


ROWS = [
    {"prompt": "Sort 3 1 2.", "completion": "1 2 3", "id": 7},
    {"prompt": "Sort 3 1 2.", "chosen": "1 2 3", "rejected": "3 2 1"},
    {
        "prompt": "Sort 3 1.",
        "responses": [{"text": "1 3", "score": 1}, {"text": "3", "gold": 0}],
    },
    {
        "messages": [
            {"role": "user", "content": "Sort 2 1."},
            {"role": "assistant", "content": "1 2"},
        ]
    },
]


def test_each_shape_gets_its_reward_columns_and_keeps_its_own(tmp_path, fake):
    counts = score.run(config(tmp_path, ROWS))
    rows = read(tmp_path / "out.jsonl")
    assert counts == {"scored": 4}
    for row, before in zip(rows, ROWS, strict=True):
        assert {key: row[key] for key in before} == before
        assert row["schema"] == 1
    prompt = "Sort 3 1 2."
    assert rows[0]["reward"] == pytest.approx(expected(fake, prompt, "1 2 3"))
    assert rows[1]["chosen_reward"] == pytest.approx(rows[0]["reward"])
    assert rows[1]["rejected_reward"] == pytest.approx(expected(fake, prompt, "3 2 1"))
    assert rows[2]["rewards"] == pytest.approx(
        [expected(fake, "Sort 3 1.", text) for text in ("1 3", "3")]
    )
    assert rows[3]["reward"] == pytest.approx(expected(fake, "Sort 2 1.", "1 2"))


def test_every_shape_is_encoded_with_the_tools_of_its_row(fake):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}"
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with_template = dataclasses.replace(fake, encoder=Encoder(tokenizer))
    encode = with_template.encoder.encode
    tools, prompt = [{"name": "calculator"}], "Sort 3 1."
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "1 3"},
    ]
    answers = [{"text": "1 3", "score": 1}, {"text": "3", "score": 0}]
    rows = [
        {"prompt": prompt, "completion": "1 3"},
        {"prompt": prompt, "chosen": "1 3", "rejected": "3"},
        {"prompt": prompt, "responses": answers},
        {"messages": turns},
    ]
    for row in rows:
        job = scored_rows.job_of(row | {"tools": tools}, "f:1")
        [found] = scored_rows.encode_jobs([job], with_template)
        assert found == [encode(prompt, text, tools=tools) for text in job.texts]
        assert found[0] != encode(prompt, "1 3")


def test_every_row_is_accounted_for_with_file_line_and_reason(tmp_path, fake):
    rows = [
        ROWS[0],
        "{broken\n",
        "\n",
        {"prompt": "p", "completion": ""},
        {"prompt": "p", "completion": "1 2 3 " * 60},
        {"prompt": "only"},
        ["a list"],
        {"prompt": "p", "completion": 5},
        ROWS[1],
    ]
    counts = score.run(config(tmp_path, rows))
    aside = read(tmp_path / "out.jsonl.errors.jsonl")
    assert counts["scored"] == len(read(tmp_path / "out.jsonl")) == 2
    assert sum(counts.values()) == 8
    file = tmp_path / "in.jsonl"
    assert [line["where"] for line in aside] == [
        f"{file}:{n}" for n in (2, 4, 5, 6, 7, 8)
    ]
    assert [line["reason"] for line in aside] == [
        "cannot be read",
        "empty",
        f"longer than max_length {MAX_LENGTH}",
        "malformed",
        "cannot be read",
        "malformed",
    ]
    assert all(line["schema"] == 1 and line["detail"] for line in aside)
    assert aside[1]["row"] == rows[3]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_change_the_output(tmp_path, fake, chunk):
    rows = [{"prompt": f"Sort {n} 1.", "completion": f"1 {n}"} for n in range(8)]
    rows[4] = {"prompt": "x"}
    score.run(config(tmp_path, rows, chunk=chunk))
    found = read(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == [
        r["prompt"] for n, r in enumerate(rows) if n != 4
    ]
    for row in found:
        reward = expected(fake, row["prompt"], row["completion"])
        assert row["reward"] == pytest.approx(reward)


@pytest.mark.parametrize(
    "row",
    [
        {**ROWS[0], "reward": 1.0},
        {**ROWS[1], "chosen_reward": None},
        {**ROWS[2], "rewards": []},
        {**ROWS[0], "schema": 2},
    ],
)
def test_an_input_column_is_never_overwritten(tmp_path, fake, row):
    score.run(config(tmp_path, [ROWS[0], row]))
    (aside,) = read(tmp_path / "out.jsonl.errors.jsonl")
    assert aside["row"] == row
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_rows_that_were_scored_once_can_be_read_again_under_another_name(
    tmp_path, fake
):
    score.run(config(tmp_path, ROWS[:1]))
    rows = read(tmp_path / "out.jsonl")
    rows[0]["old_reward"] = rows[0].pop("reward")
    again = config(tmp_path, rows, out=str(tmp_path / "again.jsonl"))
    assert score.run(again) == {"scored": 1}


def test_stdin_to_stdout(monkeypatch, capsys, fake):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[:2]) + "nonsense\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    score.run(score.ScoreConfig(model="m"))
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert "reward" in rows[0]
    assert "chosen_reward" in rows[1]
    assert '"where": "stdin:3"' in captured.err
    assert "2 rows scored; set aside in stderr: 1 cannot be read" in captured.err


def test_stdin_is_not_read_to_its_end_before_the_first_output(
    monkeypatch, capsys, fake
):
    class Endless:
        def __init__(self):
            self.given = 0

        def __iter__(self):
            for row in ROWS[:1] * 4:
                self.given += 1
                yield json.dumps(row).encode() + b"\n"
            assert capsys.readouterr().out.count("\n") == 4

    stdin = type("Stdin", (), {"buffer": Endless()})()
    monkeypatch.setattr(sys, "stdin", stdin)
    score.run(score.ScoreConfig(model="m", chunk=2))
    assert stdin.buffer.given == 4


def test_an_existing_output_is_not_replaced_without_saying_so(tmp_path, fake):
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match=r"out .*out.jsonl: exists"):
        score.run(config(tmp_path, ROWS))
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    assert score.run(config(tmp_path, ROWS, overwrite=True)) == {"scored": 4}


def test_the_input_is_never_the_output(tmp_path, fake):
    with pytest.raises(ValueError, match="is the input itself"):
        score.run(
            config(tmp_path, ROWS, out=str(tmp_path / "in.jsonl"), overwrite=True)
        )
    assert read(tmp_path / "in.jsonl") == ROWS


def test_rewards_and_errors_never_share_a_file(tmp_path, fake):
    with pytest.raises(ValueError, match="is `out` too"):
        score.run(config(tmp_path, ROWS, errors=str(tmp_path / "out.jsonl")))


def test_no_scored_row_is_an_error_that_counts_the_reasons(tmp_path, fake):
    with pytest.raises(ValueError, match="no row scored: 2 malformed; 1 empty"):
        rows = [{"a": 1}, {"prompt": "p"}, {"prompt": "p", "completion": " "}]
        score.run(config(tmp_path, rows))


def test_a_reward_that_is_not_finite_is_set_aside(tmp_path, fake, monkeypatch):
    def broken(sequences, score_at):
        return np.full(score_at.shape, np.nan, np.float32)

    object.__setattr__(fake, "score_fn", broken)
    with pytest.raises(ValueError, match="1 reward is not finite"):
        score.run(config(tmp_path, ROWS[:1]))


def test_lone_surrogates_and_other_alphabets_survive_the_writer():
    for text in ("é漢🙂", "\ud800"):
        line = scored_rows.dump({"a": text})
        assert json.loads(line.encode("utf-8")) == {"a": text}


def test_named_columns_are_used(tmp_path, fake):
    row = {"question": "Sort 2 1.", "answer": "1 2"}
    columns = Columns(prompt="question", completion="answer")
    score.run(config(tmp_path, [row], columns=columns))
    assert "reward" in read(tmp_path / "out.jsonl")[0]


def test_a_model_without_a_head_is_refused_unless_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"model tiny: it has no reward head"):
        score.run(config(tmp_path, ROWS, model="tiny"))
    assert (
        not (tmp_path / "out.jsonl").exists()
        or not (tmp_path / "out.jsonl").read_text()
    )


def test_a_real_model_scores_the_same_alone_and_in_company(tmp_path):
    options = scorer.ScoringConfig(untrained_head=True, tokens_per_batch=512)
    one = scorer.open_scorer("tiny", options)
    assert one.random_head
    texts = [("Sort 3 1 2.", "1 2 3"), ("Sort 9 4.", "4 9"), ("Count 1 1.", "2")]
    encoded = [one.encode(*text) for text in texts]
    together = one.rewards(encoded)
    alone = np.concatenate([one.rewards([item]) for item in encoded])
    np.testing.assert_allclose(together, alone, atol=1e-4)
