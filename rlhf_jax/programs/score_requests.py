"""What a scoring request says: from a body of JSON to token ids.

    items = read_request(body)           checked texts, or an error for the sender
    encoded = encode_items(items, scorer)

A request is OpenRLHF's, `{"query": [text, ...]}` with prompt and completion as one
text, or structured, `{"prompts": [...], "completions": [...]}`, which is preferred: the
scorer's template then applies as in training. See `http_scorer` for the other side.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.messages import as_messages, check_text, describe, is_hh, parse_hh
from rlhf_jax.data.pieces import Pieces
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs.scorer import Refusal, Scorer


class Item(NamedTuple):
    """One text to score."""

    where: str
    """Field and index, for errors."""
    prompt: Any
    """Text or messages; None = `text` is prompt and completion in one."""
    text: str
    tools: list | None = None


class Refused(ValueError):
    """A well-formed text that this model cannot score."""


def read_request(body: bytes) -> list[Item]:
    """The texts of a request.

    With `completions`, they and `prompts` (and `tools`) are read and `query` only
    counted; without, `query` alone. Other fields are not read (OpenRLHF's clients send
    templated `prompts` and `labels` beside `query`).

    Raises:
        ValueError: not JSON, or a field is missing, empty, of a wrong type or count;
            names field and index.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {describe(fields)}")
    if "completions" not in fields:
        if "query" not in fields:
            raise ValueError(
                "expected query, or prompts and completions; got "
                f"{', '.join(map(repr, list(fields)[:12])) or 'no field'}"
            )
        texts = _texts(fields, "query")
        for n, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"query[{n}]: the text is empty")
        return [Item(f"query[{n}]", None, text) for n, text in enumerate(texts)]
    return _structured(fields)


def encode_items(items: Sequence[Item], scorer: Scorer) -> list[EncodedCompletion]:
    """Ids of all items of a request.

    Raises:
        Refused: the model cannot score one of them; names field and index.
    """
    structured = [item for item in items if item.prompt is not None]
    texts = Texts(
        [item.prompt for item in structured],
        [item.text for item in structured],
        [{"tools": item.tools} for item in structured],
    )
    answers = iter(scorer.encode_all(texts))
    encoded = []
    for item in items:
        query = item.prompt is None
        found = encode_query(item.text, scorer) if query else next(answers)
        if isinstance(found, Refusal):
            raise Refused(f"{item.where}: {found.reason}: {found.detail}")
        encoded.append(found)
    return encoded


def encode_query(text: str, scorer: Scorer) -> EncodedCompletion | Refusal:
    """Ids of prompt and completion that came as one text.

    HH text is a conversation, and its last turn the completion. Anything else is taken
    as already written in the template: it is encoded as it is, BOS once, the end token
    once. Padding in front and end tokens (and padding) behind are cut first.
    """
    encoder = scorer.encoder
    text = _unpadded(text, encoder)
    bare = text.removeprefix(encoder.tokenizer.bos_token or "")
    if is_hh(bare):
        *history, answer = parse_hh(bare)
        if answer["role"] != "assistant" or not history:
            return Refusal("cannot be encoded", "expected the assistant's turn last")
        return scorer.encode(history, answer["content"])
    if not bare:
        return Refusal("cannot be encoded", "nothing but special tokens")
    [ids] = encoder.ids([Pieces((text,), (True,), ends=True)])
    if len(ids) > scorer.max_length:
        return Refusal(
            f"longer than max_length {scorer.max_length}", f"{len(ids)} tokens"
        )
    return EncodedCompletion([], ids)


def _structured(fields: dict[str, Any]) -> list[Item]:
    """Items of prompts, completions and tools."""
    texts = _texts(fields, "completions")
    prompts = _list(fields, "prompts", len(texts))
    for n, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)):
            raise ValueError(
                f"prompts[{n}]: expected text or messages, got {describe(prompt)}"
            )
        as_messages(prompt, what=f"prompts[{n}]")
    tools: list[Any] = [None] * len(texts)
    if "tools" in fields:
        tools = _list(fields, "tools", len(texts))
    for n, tool in enumerate(tools):
        objects = isinstance(tool, list) and all(isinstance(t, dict) for t in tool)
        if tool is not None and not objects:
            raise ValueError(
                f"tools[{n}]: expected a list of objects or null, got {describe(tool)}"
            )
    if "query" in fields:
        _list(fields, "query", len(texts))
    return [
        Item(f"completions[{n}]", *item)
        for n, item in enumerate(zip(prompts, texts, tools))
    ]


def _list(fields: dict[str, Any], name: str, count: int | None = None) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {describe(value)}")
    if not value:
        raise ValueError(f"{name}: the list is empty")
    if count is not None and len(value) != count:
        raise ValueError(
            f"{name}: expected {count} entries, one for each completion, got "
            f"{len(value)}"
        )
    return value


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    texts = _list(fields, name)
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{n}]: expected text, got {describe(text)}")
        check_text(text, f"{name}[{n}]")
    return texts


def _unpadded(text: str, encoder: Encoder) -> str:
    """The text without padding in front, and without what follows the last answer."""
    tokenizer = encoder.tokenizer
    pad, end = tokenizer.pad_token, encoder.decode([encoder.eos_id])
    start, stop, cut = 0, len(text), len(text)
    while pad and pad != tokenizer.bos_token and text.startswith(pad, start):
        start += len(pad)
    marks = [mark for mark in (end, tokenizer.eos_token, pad) if mark]
    while True:
        while stop > start and text[stop - 1].isspace():
            stop -= 1
        mark = next((m for m in marks if text.endswith(m, start, stop)), None)
        if mark is None:
            return text[start:cut]
        stop = cut = stop - len(mark)
