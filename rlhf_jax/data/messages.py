"""Conversations as lists of messages: the one form every prompt takes before encoding.

A message is a dict with `role` (system, user, assistant, tool, ...) and `content`, plus
whatever the chat template reads (tool_calls, tool_call_id, name). `as_messages` accepts
what users bring: a string (one user turn), HH text ("\\n\\nHuman: ...\\n\\nAssistant:
..."), a list of messages in OpenAI's form (role, content; content may be a list of text
parts) or ShareGPT's (from, value). HH text is recognised by its start, `Human:` after
optional newlines; consecutive turns of one speaker are joined, and an `Assistant:` at
the end without text is the header of the completion, not a turn.

Every function raises ValueError on a wrong shape; the reader adds file and line.
"""

import re
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_HH_START = re.compile(r"\n*Human:")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


def is_hh(text: str) -> bool:
    """Whether a string is HH text: it starts with `Human:`, newlines apart."""
    return _HH_START.match(text) is not None


def parse_hh(text: str) -> list[Message]:
    """The turns of HH text; see the module's docstring for its rules."""
    text = text.lstrip("\n")
    marks = list(_TURN.finditer(text))
    messages: list[Message] = []
    for here, mark in enumerate(marks):
        end = marks[here + 1].start() if here + 1 < len(marks) else len(text)
        content = text[mark.end() : end].strip()
        role = _HH_ROLES[mark.group(1)]
        if messages and messages[-1]["role"] == role:
            content = f"{messages[-1]['content']}\n\n{content}".strip()
            messages[-1] = {"role": role, "content": content}
        else:
            messages.append({"role": role, "content": content})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def to_hh(messages: list[Message]) -> str:
    """HH text of a conversation, as plain encoding writes it; a system text comes
    first.

    Raises:
        ValueError: a role that HH text has no name for.
    """
    names = {role: name for name, role in _HH_ROLES.items()}
    parts = []
    for here, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and here == 0:
            parts.append(content)
        elif role in names:
            parts.append(f"\n\n{names[role]}: {content}")
        else:
            raise ValueError(
                f"role {role!r} in message {here + 1} needs a chat template, and the "
                "tokenizer has none; give one with --rows.template FILE.jinja"
            )
    return "".join(parts)


def as_messages(value: Any, *, what: str = "prompt") -> list[Message]:
    """The conversation that a string, HH text or list of messages stands for.

    Args:
        value: what came.
        what: how errors call it.

    Raises:
        ValueError: another type, no message, or a message without role and content.
    """
    if isinstance(value, str):
        check_text(value, what)
        if is_hh(value):
            return parse_hh(value)
        return [{"role": "user", "content": value}]
    if isinstance(value, dict):
        value = _from_columns(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{what}: expected text or a list of messages, got {describe(value)}"
        )
    if not value:
        raise ValueError(f"{what}: expected at least one message, got an empty list")
    return [_message(item, f"{what}, message {n + 1}") for n, item in enumerate(value)]


def _from_columns(value: dict[str, Any]) -> list[Any]:
    """One message; or several, given as a dict of lists (Arrow and TFDS sequences)."""
    lists = [item for item in value.values() if isinstance(item, (list, tuple))]
    sizes = {len(item) for item in lists}
    if len(lists) < len(value) or len(sizes) != 1 or "content" not in value:
        return [value]
    return [
        {key: value[key][n] for key in value}  # one message from each column
        for n in range(sizes.pop())
    ]


def check_text(text: str, what: str) -> None:
    """Refuses text that is not Unicode: a surrogate without its other half."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what}: lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; the text is not valid Unicode"
        ) from None


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{what}: expected an object, got {describe(item)}")
    if "role" not in item and "from" in item:
        role = _SHAREGPT_ROLES.get(str(item["from"]))
        if role is None:
            raise ValueError(f"{what}: unknown speaker {item['from']!r}")
        item = {"role": role, "content": item.get("value")}
    role = item.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{what}: expected a role, got {describe(role)}")
    message = {key: value for key, value in item.items() if value is not None}
    message["content"] = _content(item.get("content"), what, "tool_calls" in message)
    _check_extras(message, what)
    return message


def _content(content: Any, what: str, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{what}: expected text content, got {describe(content)}")
    check_text(content, what)
    return content


def _check_extras(value: Any, what: str) -> None:
    """Checks every string of a message, however deep (tool calls)."""
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_extras(key, what)
            _check_extras(item, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_extras(item, what)


def describe(value: Any) -> str:
    """A short account of a wrong value for an error."""
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
