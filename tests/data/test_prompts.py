"""Prompts: each row kept or set aside, its columns at hand, and completions as text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.prepare import DataConfig, make_encoder, prepare_prompts
from tests.data.conftest import CHATML, LLAMA3, byte_tokenizer

GOOD = {"prompt": "sort: fig pear", "answer": [1, {"é": None}], "gold": 0.25}
CHAT = {
    "prompt": [
        {"role": "user", "content": "sort: fig"},
        {"role": "assistant", "content": "fig"},
        {"role": "user", "content": "sort: 🍐 pear"},
    ]
}
LONG = {"prompt": "sort: " + "fig " * 60}
EMPTY = {"prompt": "  "}
BROKEN = '{"prompt": '
DROP = DataConfig(max_prompt_length=40, malformed="drop")


@pytest.fixture
def encoder(tokenizer):
    return make_encoder(tokenizer)


def test_every_row_is_kept_or_set_aside_with_its_reason(write_rows, encoder, tmp_path):
    rows = [GOOD, LONG, EMPTY, BROKEN, {"question": "q"}, {"prompt": 3}, GOOD]
    path, side = write_rows(rows), tmp_path / "aside.jsonl"
    dataset, report = prepare_prompts([path], encoder, DROP, side_file=side)
    assert (report.total, report.kept, len(dataset)) == (7, 2, 2)
    counts = {"malformed": 3, "empty": 1, "identical": 0, "over_long": 1}
    assert report.counts == counts
    assert dataset.source_row.tolist() == [0, 6]
    assert dataset.where == [f"{path}:1", f"{path}:7"]
    aside = [json.loads(line) for line in side.read_text().splitlines()]
    assert [row["where"] for row in aside] == [f"{path}:{n}" for n in range(2, 7)]
    assert json.loads(aside[0]["row"]) == LONG and aside[2]["row"] == BROKEN.strip()


def test_a_prompt_comes_with_its_ids_its_text_and_its_row(write_rows, chatml):
    path = write_rows([GOOD, CHAT, {"prompt": "q", "answer": float("nan")}])
    encoder = make_encoder(chatml)
    dataset, _ = prepare_prompts([path], encoder)
    text, chat, other = (dataset[n] for n in range(3))
    assert (text.prompt, text.row, text.where) == (GOOD["prompt"], GOOD, f"{path}:1")
    assert (chat.prompt, chat.row) == (CHAT["prompt"], CHAT)
    assert np.isnan(other.row["answer"]) and other.where == f"{path}:3"
    for item, row in ((text, GOOD), (chat, CHAT)):
        np.testing.assert_array_equal(item.tokens, encoder.prompt(row["prompt"]))
        assert item.tokens.dtype == np.int32
    np.testing.assert_array_equal(
        dataset.lengths, [len(dataset[n].tokens) for n in range(3)]
    )
    for row in (-1, 3):
        with pytest.raises(IndexError):
            dataset[row]


def test_the_limit_is_that_of_the_prompt_alone(write_rows, encoder):
    path = write_rows([GOOD, LONG])
    size = len(encoder.prompt(LONG["prompt"]))
    for config in (
        DataConfig(max_prompt_length=size, max_length=2),
        DataConfig(max_length=size),
    ):
        assert len(prepare_prompts([path], encoder, config)[0]) == 2
    for config in (
        DataConfig(max_prompt_length=size - 1),
        DataConfig(max_length=size - 1),
    ):
        dataset, report = prepare_prompts([path], encoder, config)
        assert len(dataset) == 1
        assert report.dropped[0].detail == f"prompt of {size} tokens > {size - 1}"


def test_a_cut_prompt_keeps_its_first_and_its_last_tokens(write_rows, encoder):
    path = write_rows([GOOD, LONG])
    config = DataConfig(max_prompt_length=10, over_long="truncate_prompt")
    dataset, report = prepare_prompts([path], encoder, config)
    whole = encoder.prompt(LONG["prompt"])
    assert report.truncated == 1 and report.kept == 2
    np.testing.assert_array_equal(dataset[1].tokens, [whole[0], *whole[-9:]])
    assert dataset[1].prompt == LONG["prompt"]  # rewards read it whole
    np.testing.assert_array_equal(dataset[0].tokens, encoder.prompt(GOOD["prompt"]))


@pytest.mark.parametrize(
    ("row", "reason"), [(LONG, "over_long"), (EMPTY, "empty"), (BROKEN, "malformed")]
)
def test_error_policy_names_file_and_line(write_rows, encoder, row, reason):
    config = DataConfig(max_prompt_length=40, **{reason: "error"})
    message = f"rows.jsonl:2: {reason.replace('_', '-')} row"
    with pytest.raises(ValueError, match=message):
        prepare_prompts([write_rows([GOOD, row])], encoder, config)


def test_no_prompt_left_says_why(write_rows, encoder):
    message = (
        r"none of 2 rows is left: 1 empty \(first: .*:2.*1 over_long \(first: .*:1"
    )
    with pytest.raises(ValueError, match=message):
        prepare_prompts([write_rows([LONG, EMPTY])], encoder, DROP)


def test_mixtures_keep_their_parts_and_rows_apart(write_rows, encoder):
    first = write_rows([GOOD, EMPTY, {"prompt": "a", "n": 1}], "first.jsonl")
    second = write_rows([{"prompt": "count fig", "n": 2}], "second.jsonl")
    dataset, report = prepare_prompts([f"0.7*{first}", f"0.3*{second}"], encoder, DROP)
    assert dataset.groups == ((0, 2, 0.7), (2, 3, 0.3))
    assert [dataset[n].row.get("n") for n in range(3)] == [None, 1, 2]
    assert dataset[2].where == f"{second}:1" and report.kept == 3
    np.testing.assert_array_equal(dataset[2].tokens, encoder.prompt("count fig"))


def test_cache_gives_the_same_prompts_and_the_same_account(
    write_rows, encoder, tmp_path
):
    path = write_rows([GOOD, EMPTY, BROKEN, CHAT])
    config = DataConfig(malformed="drop", cache_dir=str(tmp_path / "cache"))
    first, report = prepare_prompts([path], encoder, config)
    again, cached = prepare_prompts([path], encoder, config)
    assert cached.dropped == report.dropped and cached.summary() == report.summary()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for n in range(len(first)):
        assert first[n].row == again[n].row and first[n].prompt == again[n].prompt
        np.testing.assert_array_equal(first[n].tokens, again[n].tokens)
    write_rows([GOOD | {"gold": 0.5}, EMPTY, BROKEN, CHAT])
    changed, _ = prepare_prompts([path], encoder, config)
    assert changed[0].row["gold"] == 0.5


ENCODERS = {
    "bytes, chat": Encoder(byte_tokenizer(template=CHATML)),
    "bytes, chat with BOS": Encoder(byte_tokenizer(template=LLAMA3, adds_bos=True)),
    "prefix space": Encoder(byte_tokenizer(template=None, prefix_space=True)),
    "pad is another token": Encoder(byte_tokenizer(template=CHATML, pad="<pad>")),
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
)
def test_sampled_ids_are_the_text_that_encodes_to_them(name, prompt, text):
    encoder = ENCODERS[name]
    text = f"x{text}x"  # one template trims its turns
    asked, answer = encoder.prompt(prompt), encoder.completion(prompt, text)
    assert answer[-1] == encoder.eos_id
    assert encoder.completion_text(asked, answer) == text
    assert encoder.completion_text(asked, answer[:-1]) == text  # cut, not ended
    assert encoder.completion_text(np.array(asked), np.array(answer)) == text


@pytest.mark.parametrize("name", ["bytes, chat", "prefix space"])
def test_a_leading_space_of_a_completion_stays(name):
    encoder = ENCODERS[name]
    asked = encoder.prompt("sort: fig")
    for text in (" fig", "fig", "\nfig", "  fig pear "):
        answer = encoder.completion("sort: fig", text)
        assert encoder.completion_text(asked, answer) == text


def test_a_completion_of_the_end_token_alone_is_empty_text(encoder):
    asked = encoder.prompt("sort: fig")
    assert encoder.completion_text(asked, [encoder.eos_id]) == ""
    assert encoder.completion_text(asked, []) == ""


def test_the_testbeds_answers_survive_the_way_there_and_back(encoder):
    for text in ("fig pear", " fig pear", "fig", "fig fig fig"):
        asked, answer = (
            encoder.prompt("sort: fig"),
            encoder.completion("sort: fig", text),
        )
        found = encoder.completion_text(asked, answer)
        assert encoder.completion("sort: fig", found) == answer
