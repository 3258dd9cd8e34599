"""Row shapes: everything users bring becomes the same record."""

import math

import pytest

from rlhf_jax.data.messages import parse_hh, to_hh
from rlhf_jax.data.rows import (
    Columns,
    ConversationRow,
    KwiseRow,
    PairRow,
    PromptRow,
    RowError,
    conversation_row,
    normalise,
    pair_row,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ONE = [user("q")]
TALK = [user("a"), assistant("b"), user("q")]
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "x", "rejected": "y"}, "q"),
        ({"prompt": ONE, "chosen": "x", "rejected": "y"}, ONE),
        (
            {"prompt": ONE, "chosen": [assistant("x")], "rejected": [assistant("y")]},
            ONE,
        ),
        (
            {"prompt": "q", "chosen": [assistant("x")], "rejected": [assistant("y")]},
            "q",
        ),
        (
            {"chosen": [*TALK, assistant("x")], "rejected": [*TALK, assistant("y")]},
            TALK,
        ),
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("x")],
                "rejected": [user("q"), assistant("y")],
            },
            ONE,
        ),
        ({"chosen": HH + " x", "rejected": HH + " y"}, TALK),
        ({"prompt": HH, "chosen": HH + " x", "rejected": HH + " y"}, TALK),
        ({"prompt": HH, "chosen": "x", "rejected": "y"}, TALK),
        (
            {
                "prompt": HH.removesuffix("\n\nAssistant:"),
                "chosen": "x",
                "rejected": "y",
            },
            TALK,
        ),
        (
            {
                "chosen": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "x"},
                ],
                "rejected": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "y"},
                ],
            },
            ONE,
        ),
        (
            {
                "chosen": {"role": ["user", "assistant"], "content": ["q", "x"]},
                "rejected": {"role": ["user", "assistant"], "content": ["q", "y"]},
            },
            ONE,
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]}
                ],
                "chosen": "x",
                "rejected": "y",
            },
            ONE,
        ),
    ],
)
def test_every_pair_shape_is_the_same_pair(row, prompt):
    assert normalise(row) == PairRow(prompt=prompt, chosen="x", rejected="y")


def test_numbers_are_used_only_where_the_config_names_them():
    row = {
        "prompt": "q",
        "chosen": "x",
        "rejected": "y",
        "margin": 9,
        "strength": 2.5,
        "p": 0.75,
        "w": 2,
    }
    assert pair_row(row) == PairRow("q", "x", "y")
    named = Columns(margin="strength", soft_label="p", gap_bound="margin", weight="w")
    numbers = {"margin": 2.5, "soft_label": 0.75, "gap_bound": 9.0, "weight": 2.0}
    assert pair_row(row, named) == PairRow("q", "x", "y", **numbers)


def test_columns_can_have_any_name():
    columns = Columns(prompt="question", chosen="good", rejected="bad")
    row = {"question": "q", "good": "x", "bad": "y", "extra": None}
    assert pair_row(row, columns) == PairRow("q", "x", "y")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"chosen": None}, "empty", "chosen: the value is null"),
        ({"chosen": " \n"}, "empty", "chosen: the text is empty"),
        ({"prompt": ""}, "empty", "prompt: the text is empty"),
        ({"prompt": "\n\nHuman: \n\nAssistant:"}, "empty", "last turn is empty"),
        ({"chosen": 3}, "malformed", "chosen is int 3 and rejected is str"),
        ({"rejected": [assistant("y")]}, "malformed", "expected both as text or both"),
        ({"prompt": 1.5}, "malformed", "expected text or a list of messages"),
        ({"prompt": "a\ud83d"}, "malformed", "lone surrogate U.D83D at character 1"),
        ({"chosen": "\udc00"}, "malformed", "chosen: lone surrogate"),
        ({"margin": float("nan")}, "malformed", "margin: expected a finite float32"),
        ({"margin": math.inf}, "malformed", "finite"),
        ({"margin": 1e39}, "malformed", "finite"),
        ({"margin": 10**400}, "malformed", "finite"),
        ({"margin": "0.5"}, "malformed", "margin: expected a number, got str"),
        ({"margin": True}, "malformed", "margin: expected a number, got bool"),
        ({"margin": None}, "malformed", "margin: expected a number, got nothing"),
        ({"soft": 1.1}, "malformed", r"expected a number in \[0.0, 1.0\]"),
        ({"weight": -1.0}, "malformed", r"expected a number in \[0.0, inf\]"),
        ({"tools": "x"}, "malformed", "tools: expected a list of objects"),
        (
            {"chosen": [user("z"), assistant("x")], "rejected": [*ONE, assistant("y")]},
            "malformed",
            "differ before the last turn",
        ),
        (
            {"chosen": [*ONE, assistant("x")], "rejected": [*ONE, user("y")]},
            "malformed",
            "assistant's turn at the end",
        ),
        (
            {"prompt": "other", "chosen": [*ONE, assistant("x")]}
            | {"rejected": [*ONE, assistant("y")]},
            "malformed",
            "prompt differs",
        ),
        ({"prompt": [*ONE, assistant("x")]}, "malformed", "ends with the assistant"),
    ],
)
def test_what_cannot_be_used_is_said(change, kind, message):
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    row |= {"margin": 1, "soft": 1, "weight": 1}
    columns = Columns(margin="margin", soft_label="soft", weight="weight")
    with pytest.raises(RowError, match=message) as caught:
        pair_row(row | change, columns)
    assert caught.value.kind == kind


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named_with_those_that_are_there(name):
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "question": "q"}
    del row[name]
    with pytest.raises(
        RowError, match=f"no column '{name}'.*'question'.*columns.{name}"
    ):
        pair_row(row)


def test_a_column_that_the_config_names_must_be_there():
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    with pytest.raises(RowError, match="no column 'm', which the config names"):
        pair_row(row, Columns(margin="m"))


def test_sft_rows():
    whole = [*TALK, assistant("x")]
    expected = ConversationRow(None, None, whole)
    assert normalise({"messages": whole}) == expected
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]]} for m in whole]
    for turn, message in zip(shared, whole):
        turn["value"] = message["content"]
    assert normalise({"conversations": shared}) == expected
    assert normalise({"messages": HH + " x"}) == expected
    assert normalise({"prompt": TALK, "completion": [assistant("x")]}) == expected
    assert normalise({"prompt": "q", "completion": "x"}) == ConversationRow(
        "q", "x", None
    )
    assert normalise({"prompt": "q", "response": "x"}) == ConversationRow(
        "q", "x", None
    )
    with pytest.raises(RowError, match="the assistant says nothing"):
        conversation_row({"messages": ONE})
    with pytest.raises(RowError, match="no column 'completion'"):
        conversation_row({"prompt": "q"})


def test_kwise_and_prompt_rows():
    answers = [{"text": "x", "score": 1}, {"text": "y", "gold": 0.5}]
    row = normalise({"prompt": "q", "responses": answers})
    assert isinstance(row, KwiseRow)
    assert [(r.text, r.score) for r in row.responses] == [("x", 1.0), ("y", 0.5)]
    assert normalise({"prompt": HH}) == PromptRow(TALK)
    for bad in ([], answers[:1], "x", [answers[0], {"text": "y"}], [answers[0], 3]):
        with pytest.raises(RowError):
            normalise({"prompt": "q", "responses": bad})


def test_hh_text_survives_a_round_trip():
    assert to_hh(parse_hh(HH)) + "\n\nAssistant:" == HH
    joined = parse_hh("Human: a\n\nHuman: b\n\nAssistant: c")
    assert joined == [user("a\n\nb"), assistant("c")]
