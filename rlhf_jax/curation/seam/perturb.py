"""Random perturbations of a gold completion: worse by construction, mostly.

    characters   letters swapped, dropped, doubled, replaced
    words        words dropped, doubled, replaced by or joined with other words
    names        capitalised words, the first of a sentence too, replaced by others
    numbers      numbers replaced by numbers near them

Each perturbation changes `share` of the words that it can change, at least one; a text
that a kind cannot change (no number, no name) gives none of it. Results are distinct
and differ from the original.

Source: the transformations of the SEAM code's augmenter (arXiv:2406.07971), which uses
TextAttack: characters, word insertion, swaps of names and places, at 30 % of the words;
back-translation and masked language models are left to that package.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_COMMON = (
    "a an and are as at be but by for from has have i if in is it its of on or that "
    "the their they this to was were which will with you"
)
STOP_WORDS = frozenset(_COMMON.split())
"""Words that are left alone, as the original's constraint does."""
_ATTEMPTS = 4
"""Draws for each text that is wanted: some repeat an earlier one."""


def perturb(
    text: str,
    kind: str,
    count: int,
    rng: np.random.Generator,
    *,
    others: Sequence[str] = (),
    share: float = 0.3,
) -> list[str]:
    """Up to `count` distinct perturbed texts.

    Args:
        text: the gold completion.
        kind: one of KINDS.
        count: how many are wanted; fewer come where the text allows no more.
        rng: decides everything.
        others: words of other completions that the kind can change, for replacements;
            see `changeable`.
        share: of the words that can be changed.

    Raises:
        ValueError: unknown kind, or share outside (0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    can_change, change = KINDS[kind]
    text = text.strip()
    parts = re.split(r"(\s+)", text)
    places = [n for n, part in enumerate(parts) if can_change(part)]
    number = max(1, round(share * len(places)))
    found: dict[str, None] = {}
    for _ in range(_ATTEMPTS * count if places else 0):
        changed = list(parts)
        for place in rng.permutation(places)[:number].tolist():
            changed[place] = change(parts[place], rng, others)
        result = _joined(changed)
        if result and result != text:
            found.setdefault(result)
        if len(found) == count:
            break
    return list(found)


def changeable(words: Sequence[str]) -> dict[str, list[str]]:
    """The different words that each kind can change."""
    different = dict.fromkeys(words)
    return {
        name: [word for word in different if kind.can_change(word)]
        for name, kind in KINDS.items()
    }


def _joined(parts: list[str]) -> str:
    """The text; a dropped word takes the white space before it along."""
    kept = list(parts)
    for n, part in enumerate(parts):
        if not part and n:
            kept[n - 1] = ""
    return "".join(kept).strip()


def _letters(word: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    at = int(rng.integers(len(word) - 1))
    letter = chr(ord("a") + int(rng.integers(26)))
    changes = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + letter + word[at + 1 :],
    )
    return changes[rng.integers(len(changes))]


def _words(word: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    changes = ["", f"{word} {word}"]
    if others:
        other = others[int(rng.integers(len(others)))]
        changes += [other, f"{other} {word}"]
    return changes[rng.integers(len(changes))]


def _another(word: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    for _ in range(_ATTEMPTS if others else 0):
        other = others[int(rng.integers(len(others)))]
        if other != word:
            return other
    return word


def _numbers(word: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    def near(match: re.Match) -> str:
        whole, point, digits = match.group().partition(".")
        step = int(rng.integers(1, 10)) * (1 if rng.random() < 0.5 else -1)
        moved = str(abs(int(whole + digits) + step))
        if not point:
            return moved
        moved = moved.zfill(len(digits) + 1)
        return f"{moved[: -len(digits)]}.{moved[-len(digits) :]}"

    return _NUMBER.sub(near, word)


def _is_word(word: str) -> bool:
    plain = word.strip(".,;:!?\"'()").lower()
    return any(c.isalpha() for c in word) and plain not in STOP_WORDS


class Kind(NamedTuple):
    """A way to perturb."""

    can_change: Callable[[str], bool]
    """Whether it can change this word."""
    change: Callable[[str, np.random.Generator, Sequence[str]], str]
    """(word, rng, other words that it can change) -> what stands instead."""


KINDS: dict[str, Kind] = {
    "characters": Kind(lambda word: len(word) > 2 and _is_word(word), _letters),
    "words": Kind(_is_word, _words),
    "names": Kind(lambda word: word[:1].isupper() and _is_word(word), _another),
    "numbers": Kind(lambda word: bool(_NUMBER.search(word)), _numbers),
}
