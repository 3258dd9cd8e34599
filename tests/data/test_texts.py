"""Texts on their way to models: encoded once by each way of encoding."""

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.texts import Texts
from tests.data.conftest import GENERATION, byte_tokenizer

TOOLS = [{"name": "add"}]


def texts():
    rows = [{"tools": TOOLS}, {"tools": []}, {}]
    return Texts(["p", "q", "\ud800"], ["a", "b", "c"], rows)


def test_readers_share_ids_if_tokenizer_and_template_are_equal():
    every = texts()
    first = every.encoded(Encoder(byte_tokenizer()))
    assert every.encoded(Encoder(byte_tokenizer())) is first
    other = Encoder(byte_tokenizer(template=GENERATION))
    assert every.encoded(other)[:2] == [other.encode("p", "a"), other.encode("q", "b")]


def test_some_texts_keep_their_ids_and_columns():
    every, encoder = texts(), Encoder(byte_tokenizer())
    found = every.encoded(encoder)
    some = every.take([2, 0])
    assert some.completions == ["c", "a"] and some.tools == [None, TOOLS]
    for mine, before in zip(some.encoded(encoder), (found[2], found[0]), strict=True):
        assert mine is before
