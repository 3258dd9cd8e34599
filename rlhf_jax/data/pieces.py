"""Texts to ids: the pieces that a sequence is cut in, each encoded apart.

A piece after the first is encoded as the tokenizer would inside a text: behind an
anchor whose ids are cut off again. BOS stands once in front of the first; the end token
last where a sequence ends.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Texts of one sequence in order, and which of them the assistant wrote."""

    texts: tuple[str, ...]
    written: tuple[bool, ...]
    ends: bool = False
    """Whether the last piece must end with the end token."""
    first: bool = True
    """Whether the first text opens the sequence (BOS, prefix space)."""


@dataclasses.dataclass(frozen=True, eq=False)
class PieceTokenizer:
    """Pieces to ids, many sequences at a time: the tokenizer works in parallel."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    end: str
    """The token that sequences end with."""
    always_bos: bool
    """Whether BOS goes in front (if there is one) even where the tokenizer by itself
    would add none."""

    @functools.cached_property
    def eos_id(self) -> int:
        """Id of `end`."""
        return self.tokenizer.convert_tokens_to_ids(self.end)

    def masked_ids(
        self, sequences: Sequence[Pieces]
    ) -> list[tuple[list[int], list[bool]]]:
        """(ids, mask of what the assistant wrote) of each sequence."""
        texts = [
            (text, pieces.first and here == 0)
            for pieces in sequences
            for here, text in enumerate(pieces.texts)
        ]
        encoded = iter(self._encode(texts))
        results = []
        for pieces in sequences:
            ids: list[int] = []
            mask: list[bool] = []
            for written in pieces.written:
                piece = next(encoded)
                ids += piece
                mask += [written] * len(piece)
            if pieces.ends and (not ids or ids[-1] != self.eos_id):
                ids.append(self.eos_id)
                mask.append(True)
            results.append((ids, mask))
        return results

    def _encode(self, texts: Iterable[tuple[str, bool]]) -> list[list[int]]:
        """Ids of texts; the flag says that a text opens its sequence."""
        texts = list(texts)
        anchor, before = self._anchor
        encoded = self._raw([text if first else anchor + text for text, first in texts])
        results = []
        for ids, (text, first) in zip(encoded, texts):
            if first:
                results.append(self._with_bos(ids))
            elif ids[: len(before)] == before:
                results.append(ids[len(before) :])
            else:  # the text's first characters join the anchor's line break
                results.append(self._raw([text])[0])
        return results

    def _raw(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer makes of texts, without special tokens of its own."""
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = 0
        while ids[start : start + 2] == [bos, bos]:
            start += 1
        if self._adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids[start:]

    @functools.cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """Text whose ids are cut off again, so that what follows gets no prefix space.

        A special token never joins what follows. Some tokenizers put a prefix space
        after it all the same; then a line break stands between.
        """
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        for token in (bos, eos, self.end):
            if token is None:
                continue
            ids, alone, line, inside = self._raw(
                [token, f"{token}a", f"{token}\n", f"{token}\na"]
            )
            if len(ids) == 1:
                prefixed = alone[1:] != inside[len(line) :]
                return (f"{token}\n", line) if prefixed else (token, ids)
        return "", []

    @functools.cached_property
    def _adds_bos(self) -> bool:
        if self.tokenizer.bos_token_id is None:
            return False
        if self.always_bos:
            return True
        return self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
