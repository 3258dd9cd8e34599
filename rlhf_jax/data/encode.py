"""THE encode path: from (prompt, completion) to token ids, for training, evaluation,
scoring, serving and RL alike. Nothing else in the package turns text into ids; `turns`
makes the text and `pieces` the ids for it.

    encoder = Encoder(tokenizer)
    encoder.prompt(prompt)              ids up to and with the assistant's header
    encoder.completion(prompt, text)    ids of the answer, its end token included
    encoder.encode_all(prompts, texts, tools)   both, of many answers at a time
    encoder.pair(prompt, chosen, rejected), encoder.conversation(messages)

A prompt is text (one user turn), HH text, or a list of messages (see `messages`).

**With a chat template** the conversation is rendered (date-stamps off, see `templates`)
and cut in pieces at the borders of the assistant turns; each piece is encoded apart, so
chosen and rejected share exactly the prompt's ids, the mask of a multi-turn
conversation is exact without {% generation %} in the template, and the ids before each
assistant turn of a conversation are those of `prompt` on its history. A piece after the
first is encoded as the tokenizer would inside a text (no prefix space). The ids equal
`apply_chat_template`'s unless a token would span a border (an answer that starts with a
line break). **Without a template** a text prompt is BOS + text, then completion + end
token; a conversation is written as HH text ("\\n\\nHuman: ...\\n\\nAssistant: ...").

A sequence ends at its end token, `eos_id`: the template's own end-of-turn token if it
writes one, else the tokenizer's EOS, appended. Template text after it is cut, and so is
whatever a completion holds after an end token. BOS stands once: where the template (or
the text) writes it, else in front if the tokenizer adds one by itself (plain encoding:
if it has one).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.data import templates
from rlhf_jax.data.encoded import (
    EncodedCompletion,
    EncodedConversation,
    EncodedPair,
    Ids,
)
from rlhf_jax.data.messages import as_messages, check_text, is_hh
from rlhf_jax.data.pieces import Pieces, PieceTokenizer
from rlhf_jax.data.turns import Chat, Plain, Prompt

VERSION = 1
"""Part of every cache key: raise it when the ids of some row change."""
_CHUNK = 1024
"""Answers that `encode_all` holds as text and pieces at a time."""


class _Asked(NamedTuple):
    """A prompt as its answers need it."""

    conversation: Prompt
    rendered: str
    pieces: Pieces


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Text to ids with one tokenizer and one template."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    template: str = templates.FROM_TOKENIZER
    """"tokenizer" (its own; plain if it has none), "plain", or the path of a jinja
    file."""

    def __post_init__(self) -> None:
        _ = self._style  # a broken template is an error here, not at the first row

    def prompt(self, prompt: Any, *, tools: list | None = None) -> list[int]:
        """Ids of the conversation so far and the header of the assistant's turn.

        Raises:
            ValueError: not a prompt, or the template refuses it.
        """
        return self.ids([self.prompt_pieces(prompt, tools=tools)])[0]

    def completion(
        self, prompt: Any, text: str, *, tools: list | None = None
    ) -> list[int]:
        """Ids of an answer to the prompt, the end token last.

        Raises:
            ValueError: not a prompt or not text, or the template refuses it.
        """
        return self.ids([self.completion_pieces(prompt, text, tools=tools)])[0]

    def encode(
        self, prompt: Any, text: str, *, tools: list | None = None
    ) -> EncodedCompletion:
        """Prompt and answer; see `completion` for errors."""
        pieces = self.answer_pieces(prompt, [text], tools=tools)
        return EncodedCompletion(*self.ids(pieces))

    def encode_all(
        self,
        prompts: Sequence[Any],
        texts: Sequence[str],
        tools: Sequence[list | None],
    ) -> list[EncodedCompletion | ValueError]:
        """What `encode` gives for each answer, or the error that it raises.

        A prompt is rendered and encoded once for all its answers: those that have an
        equal text for a prompt, or the very same list of messages.

        Args:
            prompts: text or messages, one for each answer.
            texts: the answers.
            tools: one entry for each answer.
        """
        found: list[EncodedCompletion | ValueError] = []
        for start in range(0, len(texts), _CHUNK):
            part = slice(start, start + _CHUNK)
            found += self._encode_part(prompts[part], texts[part], tools[part])
        return found

    def _encode_part(
        self,
        prompts: Sequence[Any],
        texts: Sequence[str],
        tools: Sequence[list | None],
    ) -> list[EncodedCompletion | ValueError]:
        asked: dict[Any, _Asked] = {}
        answers: list[tuple[Any, Pieces] | ValueError] = []
        for prompt, text, each in zip(prompts, texts, tools, strict=True):
            key = (prompt if isinstance(prompt, str) else id(prompt), id(each))
            try:
                if key not in asked:
                    asked[key] = self._asked(prompt, each)
                answers.append((key, self._answer(asked[key], text, each)))
            except ValueError as error:
                # Without its frames, which hold all the texts.
                answers.append(error.with_traceback(None))
        sequences = [one.pieces for one in asked.values()]
        sequences += [answer[1] for answer in answers if isinstance(answer, tuple)]
        ids = iter(self.ids(sequences))
        shared = {key: next(ids) for key in asked}
        return [
            EncodedCompletion(shared[answer[0]], next(ids))
            if isinstance(answer, tuple)
            else answer
            for answer in answers
        ]

    def pair(
        self,
        prompt: Any,
        chosen: str,
        rejected: str,
        *,
        margin: float | None = None,
        soft_label: float | None = None,
        gap_bound: float | None = None,
        weight: float = 1.0,
        where: str = "",
        tools: list | None = None,
    ) -> EncodedPair:
        """Prompt and two answers; see `completion` for errors."""
        pieces = self.answer_pieces(prompt, [chosen, rejected], tools=tools)
        return EncodedPair(
            *self.ids(pieces),
            margin=margin,
            soft_label=soft_label,
            gap_bound=gap_bound,
            weight=weight,
            where=where,
        )

    def conversation(
        self,
        messages: Any,
        *,
        turns: Literal["all", "last"] = "all",
        tools: list | None = None,
        where: str = "",
    ) -> EncodedConversation:
        """A whole conversation with the mask of what the assistant wrote.

        A greeting of the assistant before any other turn is context, not trained on.

        Args:
            messages: a conversation that ends with the assistant.
            turns: train on all assistant turns or on the last.

        Raises:
            ValueError: it does not end with the assistant, or the template rewrites
                earlier turns (then only `turns="last"` is exact).
        """
        pieces = self.conversation_pieces(messages, turns=turns, tools=tools)
        tokens, mask = self.masked_ids([pieces])[0]
        return EncodedConversation(tokens, mask, where)

    # Pieces: text, before any token. They may raise; what follows them does not.

    def prompt_pieces(self, prompt: Any, *, tools: list | None = None) -> Pieces:
        """The pieces of `prompt`."""
        return self._asked(prompt, tools).pieces

    def completion_pieces(
        self, prompt: Any, text: str, *, tools: list | None = None
    ) -> Pieces:
        """The one piece of `completion`."""
        return self.answer_pieces(prompt, [text], tools=tools)[1]

    def answer_pieces(
        self, prompt: Any, texts: Sequence[str], *, tools: list | None = None
    ) -> list[Pieces]:
        """The pieces of a prompt, and of each of its answers."""
        asked = self._asked(prompt, tools)
        return [asked.pieces, *(self._answer(asked, text, tools) for text in texts)]

    def conversation_pieces(
        self,
        messages: Any,
        *,
        turns: Literal["all", "last"] = "all",
        tools: list | None = None,
    ) -> Pieces:
        """The pieces of `conversation`."""
        if turns not in ("all", "last"):
            raise ValueError(f"turns: expected 'all' or 'last', got {turns!r}")
        conversation = as_messages(messages, what="messages")
        if conversation[-1]["role"] != "assistant":
            raise ValueError(
                "messages: expected the assistant's turn at the end, got "
                f"{conversation[-1]['role']!r}"
            )
        history, last = conversation[:-1], conversation[-1]
        if not history:
            raise ValueError("messages: expected a turn before the assistant's")
        texts, written, rendered = self._style.prompt(history, tools)
        answered = any(message["role"] == "assistant" for message in history[1:])
        if turns == "last":
            written = [False] * len(texts)
        elif answered and not any(written):
            raise ValueError(
                f"{self._style.name} writes earlier turns differently once the "
                "conversation goes on, so they cannot be trained on exactly; "
                "set turns to 'last'"
            )
        answer = self._style.completion(rendered, history, last, tools)
        return Pieces((*texts, answer), (*written, True), ends=True)

    def as_prompt(self, prompt: Any) -> Prompt:
        """Text as it is, HH text and lists as messages that await an answer."""
        if isinstance(prompt, str) and not is_hh(prompt):
            check_text(prompt, "prompt")
            return prompt
        messages = as_messages(prompt, what="prompt")
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(
                "prompt: expected a conversation that awaits the assistant's answer, "
                f"got {'one that ends with the assistant' if messages else 'no turn'}"
            )
        return messages

    def _asked(self, prompt: Any, tools: list | None) -> _Asked:
        conversation = self.as_prompt(prompt)
        texts, written, rendered = self._style.prompt(conversation, tools)
        pieces = Pieces(tuple(texts), tuple(written))
        return _Asked(conversation, rendered, pieces)

    def _answer(self, asked: _Asked, text: str, tools: list | None) -> Pieces:
        if not isinstance(text, str):
            raise ValueError(f"completion: expected text, got {type(text).__name__}")
        check_text(text, "completion")
        last = {"role": "assistant", "content": text}
        piece = self._style.completion(asked.rendered, asked.conversation, last, tools)
        return Pieces((piece,), (True,), ends=True, first=False)

    # Ids, of many sequences at a time.

    def ids(self, sequences: Sequence[Pieces]) -> list[list[int]]:
        """Ids of each sequence."""
        return [ids for ids, _ in self.masked_ids(sequences)]

    def masked_ids(
        self, sequences: Sequence[Pieces]
    ) -> list[tuple[list[int], list[bool]]]:
        """(ids, mask of what the assistant wrote) of each sequence."""
        return self._pieces.masked_ids(sequences)

    # What others need to know.

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a completion: where sampling stops."""
        return self._pieces.eos_id

    @property
    def pad_id(self) -> int:
        """A valid id to fill rows with; nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def decode(self, ids: Ids) -> str:
        """The text of ids, special tokens included."""
        return self.tokenizer.decode(
            [int(n) for n in ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def completion_text(self, prompt: Ids, ids: Ids) -> str:
        """The text of sampled ids as `completion` would take it, without its end token.

        A completion decoded alone would lose a leading space with some tokenizers: it
        is decoded behind the prompt's last token.
        """
        ids = [int(n) for n in ids]
        if ids and ids[-1] == self.eos_id:
            ids.pop()
        last = [int(prompt[-1])]
        return self.decode([*last, *ids])[len(self.decode(last)) :]

    def describe(self) -> str:
        """One line on the template, for people."""
        return f"{self._style.name}; sequences end with {self._style.end!r}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides the ids: tokenizer, template, these rules."""
        digest = hashlib.sha256(f"{VERSION}".encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab()))
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(repr(sorted(self.tokenizer.special_tokens_map.items())).encode())
        digest.update(self._style.key.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    @functools.cached_property
    def _pieces(self) -> PieceTokenizer:
        plain = isinstance(self._style, Plain)
        return PieceTokenizer(self.tokenizer, self._style.end, always_bos=plain)

    @functools.cached_property
    def _style(self) -> Chat | Plain:
        text, name = templates.template_text(self.tokenizer, self.template)
        eos = self.tokenizer.eos_token
        if text is None:
            if eos is None:
                raise ValueError(
                    "the tokenizer has no EOS token, which ends every sequence; "
                    "set its eos_token"
                )
            return Plain(eos)
        special = {
            name: str(token)
            for name, token in self.tokenizer.special_tokens_map.items()
        }
        template = templates.Template(text, name, tuple(sorted(special.items())))
        return Chat(template, eos, tuple(_special_tokens(self.tokenizer)))


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = [token for token in added if getattr(token, "special", False)]
    return [str(getattr(token, "content", token)) for token in named]
