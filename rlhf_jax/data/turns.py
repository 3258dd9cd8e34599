"""How a conversation becomes text with borders: by a chat template, or plainly.

Both styles have the same four: `prompt` cuts the text before an answer at the borders
of the assistant's turns, `completion` is the text of an answer up to its end token,
`end` is that token and `key` says what decides the text. `pieces` turns the pieces into
ids.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from rlhf_jax.data import templates
from rlhf_jax.data.messages import Message, to_hh

Prompt: TypeAlias = str | list[Message]
PROBE = "Sentinel7421"
"""An answer that shows what a template writes around one."""
HH_HEADER = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Plain:
    """No chat template: text as it is, conversations as HH text."""

    end: str
    name = "plain encoding (no chat template)"
    key = "plain"

    def prompt(
        self, prompt: Prompt, tools: list | None
    ) -> tuple[list[str], list[bool], str]:
        if tools:
            raise ValueError("tools need a chat template; give --rows.template FILE")
        if isinstance(prompt, str):
            return [prompt], [False], prompt
        prompt = _cut_history(prompt, [self.end])
        texts, start = [], 0
        for here, message in enumerate(prompt):
            if message["role"] == "assistant":
                header = to_hh(prompt[:here]) + HH_HEADER
                answer = to_hh(prompt[: here + 1])
                texts += [header[start:], answer[len(header) :]]
                start = len(answer)
        rendered = to_hh(prompt) + HH_HEADER
        texts.append(rendered[start:])
        return texts, [here % 2 == 1 for here in range(len(texts))], rendered

    def completion(
        self, rendered: str, prompt: Prompt, last: Message, tools: list | None
    ) -> str:
        text = _cut(last["content"], [self.end])
        return text if isinstance(prompt, str) else f" {text}"


class Chat:
    """A chat template and what a probe of it shows: header and end of a turn."""

    def __init__(
        self, template: templates.Template, eos: str | None, special: Sequence[str]
    ) -> None:
        self.template, self.name = template, template.name
        self.key = template.text
        user = [{"role": "user", "content": "question"}]
        answer = [{"role": "assistant", "content": PROBE}]
        full = template.render([*user, *answer], generation=False)
        asked = template.render(user, generation=True)
        plain = template.render(user, generation=False)
        if full.count(PROBE) != 1 or "question" not in full:
            raise ValueError(
                f"{self.name}: broken chat template: it writes the assistant's text "
                f"{full.count(PROBE)} times and the user's {full.count('question')} "
                "times; expected once each"
            )
        before, self.tail = full.split(PROBE)
        # Templates without a generation header, or with one that answers do not follow
        # (<think>), get the header that stands before the answer itself.
        self.header: str | None = None
        lead = before.removeprefix(plain)
        if (asked == plain and lead.strip()) or not full.startswith(asked):
            if not before.startswith(plain):
                raise ValueError(
                    f"{self.name}: broken chat template: the text of a conversation is "
                    "not the start of the text of a longer one"
                )
            self.header = lead
        marks = [eos] if eos and eos in self.tail else []
        marks = marks or sorted(
            (mark for mark in special if mark and mark in self.tail), key=self.tail.find
        )
        self.writes_end = bool(marks)
        if not marks and not eos:
            raise ValueError(
                f"{self.name} writes no end-of-turn token and the tokenizer has no EOS "
                "token; set its eos_token"
            )
        self.end = marks[0] if marks else str(eos)
        self.ends = [self.end, eos] if eos and eos != self.end else [self.end]

    def prompt_text(self, prompt: Prompt, tools: list | None) -> str:
        """Everything up to the assistant's answer."""
        messages = self._messages(prompt)
        if self.header is None:
            return self.template.render(messages, generation=True, tools=tools)
        return (
            self.template.render(messages, generation=False, tools=tools) + self.header
        )

    def prompt(
        self, prompt: Prompt, tools: list | None
    ) -> tuple[list[str], list[bool], str]:
        """(pieces, which the assistant wrote, the whole text)."""
        messages = self._messages(prompt)
        whole = self.prompt_text(messages, tools)
        texts: list[str] = []
        start = 0
        for here, message in enumerate(messages):
            if message["role"] != "assistant" or here == 0:
                continue
            before = self.prompt_text(messages[:here], tools)
            answer = self.completion(before, messages[:here], message, tools)
            if not whole.startswith(before + answer) or len(before) < start:
                return [whole], [False], whole  # the template rewrites its history
            texts += [before[start:], answer]
            start = len(before) + len(answer)
        texts.append(whole[start:])
        return texts, [here % 2 == 1 for here in range(len(texts))], whole

    def completion(
        self, rendered: str, prompt: Prompt, last: Message, tools: list | None
    ) -> str:
        """What the template writes for the answer, up to and with the end token."""
        last = {**last, "content": _cut(last["content"], self.ends)}
        full = self.template.render(
            [*self._messages(prompt), last], generation=False, tools=tools
        )
        if not full.startswith(rendered):
            raise ValueError(
                f"{self.name} writes this prompt differently once it is answered, so "
                "prompt and answer cannot be told apart"
            )
        piece = full[len(rendered) :]
        if self.writes_end:
            found = piece.find(self.end)
            return piece[: found + len(self.end)] if found >= 0 else piece.rstrip()
        return piece.removesuffix(self.tail)

    def _messages(self, prompt: Prompt) -> list[Message]:
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return _cut_history(prompt, self.ends)


def _cut(text: str, ends: Iterable[str]) -> str:
    """The text before the first end token in it."""
    for end in ends:
        text = text.split(end, 1)[0]
    return text


def _cut_history(messages: list[Message], ends: list[str]) -> list[Message]:
    return [
        {**message, "content": _cut(message["content"], ends)}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
