"""Row shapes: from the dict of one source row to one of four records.

    pair          prompt + chosen + rejected, text or messages; or chosen and
                  rejected as whole conversations that differ in the last turn alone
                  (implicit prompt; lists of messages, or HH text)
    conversation  messages; or prompt + completion (or response)
    kwise         prompt + responses: [{text, score or gold}, ...]
    prompt        prompt alone

Column names come from `Columns`. Margins, soft labels, bounds and weights are used only
where the config names their column: a data set's own `strength` may be the gold label.
A row that does not fit raises `RowError` with its kind (malformed or empty); the reader
knows file and line.
"""

import dataclasses
import math
import numbers
from typing import Any

from rlhf_jax.data.messages import Message, as_messages, check_text, describe, is_hh
from rlhf_jax.data.turns import Prompt


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns; null = not used."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    """Answer of an SFT row; `response` is taken too when this one is absent."""
    messages: str = "messages"
    """Conversation of an SFT row; `conversations` is taken too."""
    responses: str = "responses"
    """Scored answers of a K-wise row."""
    tools: str = "tools"
    """Tool descriptions for the chat template, if a row has them."""
    margin: str | None = None
    """Number subtracted from the reward difference of a pair."""
    soft_label: str | None = None
    """Probability in [0, 1] that chosen is the better one."""
    gap_bound: str | None = None
    """Upper bound of the reward difference of a pair, for the bounded_gap
    regularizer."""
    weight: str | None = None
    """Weight >= 0 of a pair in the mean."""


class RowError(ValueError):
    """A row that cannot be used; `kind` is "malformed" or "empty"."""

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class PairRow:
    """A prompt and two answers."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    soft_label: float | None = None
    gap_bound: float | None = None
    weight: float = 1.0
    tools: list | None = None


@dataclasses.dataclass(frozen=True)
class ConversationRow:
    """A conversation that ends with the assistant, or a text prompt and its answer."""

    prompt: Prompt | None
    completion: str | None
    messages: list[Message] | None
    tools: list | None = None


@dataclasses.dataclass(frozen=True)
class Response:
    """One scored answer."""

    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class KwiseRow:
    """A prompt and several scored answers."""

    prompt: Prompt
    responses: list[Response]
    tools: list | None = None


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A prompt alone."""

    prompt: Prompt
    tools: list | None = None


Record = PairRow | ConversationRow | KwiseRow | PromptRow


def normalise(
    row: dict[str, Any], columns: Columns = Columns(), *, scored: bool = True
) -> Record:
    """The record that the columns of a row make it: pair, K-wise, conversation, prompt.

    Args:
        row: of any shape.
        columns: their names.
        scored: see `kwise_row`.

    Raises:
        RowError: no shape fits, or the one that fits has wrong values.
    """
    if columns.chosen in row or columns.rejected in row:
        return pair_row(row, columns)
    if columns.responses in row:
        return kwise_row(row, columns, scored=scored)
    if any(name in row for name in _conversation_columns(columns)):
        return conversation_row(row, columns)
    return prompt_row(row, columns)


def pair_row(row: dict[str, Any], columns: Columns = Columns()) -> PairRow:
    """The pair of a row, in any of the shapes of the module's docstring.

    Raises:
        RowError: a column is missing, of a wrong type, empty, or not a finite number.
    """
    chosen = _required(row, columns.chosen, "chosen")
    rejected = _required(row, columns.rejected, "rejected")
    prompt = row.get(columns.prompt)
    if _is_whole(chosen, prompt) and _is_whole(rejected, prompt):
        prompt, chosen, rejected = _from_conversations(prompt, chosen, rejected)
    elif isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            f"chosen is {describe(chosen)} and rejected is {describe(rejected)}; "
            "expected both as text or both as messages"
        )
    else:
        prompt = _prompt(_required(row, columns.prompt, "prompt"))
    return PairRow(
        prompt=prompt,
        chosen=_answer(chosen, columns.chosen),
        rejected=_answer(rejected, columns.rejected),
        margin=_number(row, columns.margin),
        soft_label=_number(row, columns.soft_label, low=0.0, high=1.0),
        gap_bound=_number(row, columns.gap_bound),
        weight=_weight(row, columns.weight),
        tools=_tools(row, columns),
    )


def conversation_row(
    row: dict[str, Any], columns: Columns = Columns()
) -> ConversationRow:
    """The conversation of a row; see the module's docstring.

    Raises:
        RowError: see `pair_row`.
    """
    name = next((n for n in (columns.messages, "conversations") if n in row), None)
    if name is not None:
        messages = _checked(as_messages, row[name], what=name)
        if not messages or not any(m["role"] == "assistant" for m in messages):
            raise RowError(f"{name}: the assistant says nothing", "empty")
        if (
            not str(messages[-1]["content"]).strip()
            and "tool_calls" not in messages[-1]
        ):
            raise RowError(f"{name}: the last turn is empty", "empty")
        return ConversationRow(None, None, messages, _tools(row, columns))
    names = [n for n in (columns.completion, "response") if n in row]
    completion = _required(row, names[0] if names else columns.completion, "completion")
    prompt = _prompt(_required(row, columns.prompt, "prompt"))
    if not isinstance(completion, str):
        turns = _checked(as_messages, completion, what=names[0])
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return ConversationRow(None, None, [*prompt, *turns], _tools(row, columns))
    answer = _answer(completion, names[0])
    return ConversationRow(prompt, answer, None, _tools(row, columns))


def kwise_row(
    row: dict[str, Any], columns: Columns = Columns(), *, scored: bool = True
) -> KwiseRow:
    """The prompt of a row and at least two answers with a score.

    Each answer has `text` and a finite `score` (or `gold`). Where `scored` is False it
    may be the bare text, and a score is not read (0).

    Raises:
        RowError: see `pair_row`.
    """
    name = columns.responses
    items = _required(row, name, "responses")
    if not isinstance(items, (list, tuple)) or len(items) < 2:
        raise RowError(f"{name}: expected two answers or more, got {describe(items)}")
    responses = []
    for n, item in enumerate(items):
        if not scored and isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict):
            raise RowError(f"{name} {n + 1}: expected an object, got {describe(item)}")
        score = "score" if "score" in item else "gold"
        text = _answer(
            _required(item, "text", f"{name} {n + 1}, text"), f"{name} {n + 1}"
        )
        value = _finite(item.get(score), f"{name} {n + 1}, score") if scored else 0.0
        responses.append(Response(text, value))
    prompt = _prompt(_required(row, columns.prompt, "prompt"))
    return KwiseRow(prompt, responses, _tools(row, columns))


def prompt_row(row: dict[str, Any], columns: Columns = Columns()) -> PromptRow:
    """The prompt of a row.

    Raises:
        RowError: see `pair_row`.
    """
    prompt = _prompt(_required(row, columns.prompt, "prompt"))
    return PromptRow(prompt, _tools(row, columns))


def _conversation_columns(columns: Columns) -> tuple[str, ...]:
    return (columns.messages, "conversations", columns.completion, "response")


def _required(row: dict[str, Any], name: str, what: str) -> Any:
    if name not in row:
        raise RowError(
            f"no column {name!r} for {what}; the row has "
            f"{', '.join(map(repr, list(row)[:12])) or 'none'}: name the right one "
            f"with columns.{what.split(',')[0].split()[0]}"
        )
    if row[name] is None:
        raise RowError(f"{name}: the value is null", "empty")
    return row[name]


def _checked(read: Any, value: Any, **kwargs: Any) -> Any:
    try:
        return read(value, **kwargs)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(str(error)) from None


def _is_whole(answer: Any, prompt: Any) -> bool:
    """Whether chosen (or rejected) is messages or HH text of a whole conversation."""
    if not isinstance(answer, str):
        return True
    begins = prompt is None or (isinstance(prompt, str) and answer.startswith(prompt))
    return is_hh(answer) and begins


def _prompt(value: Any) -> Prompt:
    """Bare text as it is, HH text and lists as messages; never an empty last turn."""
    if isinstance(value, str) and not is_hh(value):
        _checked(check_text, value, what="prompt")
        if not value.strip():
            raise RowError("prompt: the text is empty", "empty")
        return value
    messages = _checked(as_messages, value, what="prompt")
    if not messages or messages[-1]["role"] == "assistant":
        raise RowError(
            "prompt: expected a conversation that awaits the assistant's answer, got "
            + ("no turn" if not messages else "one that ends with the assistant")
        )
    if not str(messages[-1]["content"]).strip():
        raise RowError("prompt: the last turn is empty", "empty")
    return messages


def _answer(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name}: expected text, got {describe(value)}")
    _checked(check_text, value, what=name)
    if not value.strip():
        raise RowError(f"{name}: the text is empty", "empty")
    return value


def _from_conversations(
    prompt: Any, chosen: Any, rejected: Any
) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) from answers given as conversations."""
    turns = {
        name: _checked(as_messages, value, what=name)
        for name, value in (("chosen", chosen), ("rejected", rejected))
    }
    for name, messages in turns.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError(f"{name}: expected the assistant's turn at the end")
        if messages[-1].get("tool_calls"):
            raise RowError(f"{name}: the last turn calls a tool instead of answering")
    shared = turns["chosen"][:-1]
    if shared != turns["rejected"][:-1]:
        raise RowError(
            "chosen and rejected differ before the last turn; expected conversations "
            "that share all but the assistant's last answer"
        )
    answers = turns["chosen"][-1]["content"], turns["rejected"][-1]["content"]
    alone = not shared or shared[0]["role"] in ("assistant", "tool")
    if alone and prompt is None:
        raise RowError("no prompt: neither a column nor turns before the answers")
    if not alone and (prompt is None or _agrees(prompt, shared)):
        return _prompt(shared), *answers
    if not alone:
        raise RowError("prompt differs from the turns before the last in chosen")
    history = _prompt(prompt)
    if not shared:
        return history, *answers
    if isinstance(history, str):
        history = [{"role": "user", "content": history}]
    return _prompt([*history, *shared]), *answers


def _agrees(prompt: Any, shared: list[Message]) -> bool:
    """Whether a prompt column says the same as the turns before the answers."""
    messages = _checked(as_messages, prompt, what="prompt")
    users = [message for message in shared if message["role"] != "system"]
    given = [message for message in messages if message["role"] != "system"]
    texts = [str(message["content"]).strip() for message in given]
    if texts == [str(message["content"]).strip() for message in users]:
        return True
    # UltraFeedback's form: the text of the first or the last question.
    ends = (users[0], users[-1]) if users else ()
    return len(texts) == 1 and any(texts[0] == m["content"].strip() for m in ends)


def _number(
    row: dict[str, Any],
    name: str | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> float | None:
    if name is None:
        return None
    if name not in row:
        raise RowError(
            f"no column {name!r}, which the config names; the row has "
            f"{', '.join(map(repr, list(row)[:12]))}"
        )
    value = _finite(row[name], name)
    if not low <= value <= high:
        raise RowError(f"{name}: expected a number in [{low}, {high}], got {value}")
    return value


def _weight(row: dict[str, Any], name: str | None) -> float:
    value = _number(row, name, low=0.0)
    return 1.0 if value is None else value


def _finite(value: Any, name: str) -> float:
    """A finite float32, or an error: NaN would destroy the weights without a word."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RowError(f"{name}: expected a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) < 3.4e38:
        raise RowError(f"{name}: expected a finite float32, got {number}")
    return number


def _tools(row: dict[str, Any], columns: Columns) -> list | None:
    tools = row.get(columns.tools)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RowError(
            f"{columns.tools}: expected a list of objects, got {describe(tools)}"
        )
    return tools or None
