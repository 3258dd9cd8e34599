"""Attacks: small edits of a completion that a reward model likes better.

A beam search over substitutions of tokens. What to try comes from `propose`, so that
the search knows no model; `programs.adversary` proposes by HotFlip. Every sequence that
was scored is a candidate; the best ones are the result, and those that raise the reward
stand apart from those that do not.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

Tokens: TypeAlias = tuple[int, ...]


class Flip(NamedTuple):
    """One scored substitution in a completion."""

    position: int
    token: int
    reward: float


class Found(NamedTuple):
    """An edited completion."""

    tokens: Tokens
    reward: float
    edits: int
    """Tokens that differ from the start."""


class Attack(NamedTuple):
    """What a search found, each list with the highest reward first."""

    raised: list[Found]
    """Rewards above the start's."""
    failed: list[Found]
    """The best of the rest: edits that were tried and raised nothing."""


Propose: TypeAlias = Callable[[Sequence[tuple[int, Tokens]]], list[list[Flip]]]
"""(index of the prompt, completion) of several -> the flips of each."""


def attack(
    starts: Sequence[Tokens],
    rewards: Sequence[float],
    propose: Propose,
    *,
    budgets: Sequence[int],
    count: int = 1,
    beam: int = 1,
    accept: Callable[[int, Tokens], bool] = lambda index, tokens: True,
) -> list[Attack]:
    """Up to `count` edited completions for each start, those of the highest reward.

    Args:
        starts: completions as token ids.
        rewards: of the starts.
        propose: what to try next.
        budgets: most tokens of each completion that may differ from its start.
        count: completions wanted of each, `raised` and `failed` together.
        beam: edited completions from which a search goes on; 1 is greedy.
        accept: (index of the start, completion) -> whether it may be a result, and may
            be searched from.

    Returns:
        For each start its completions; what has `raised` the reward never is below the
        start's. A search ends when its budget is spent or no
        substitution raises a reward of its beam.
    """
    searches = [
        _Search(index, start, reward, budget, beam, accept)
        for index, (start, reward, budget) in enumerate(
            zip(starts, rewards, budgets, strict=True)
        )
    ]
    active = [search for search in searches if search.budget > 0]
    while active:
        asked = [(s.index, found.tokens) for s in active for found in s.frontier]
        answers = iter(propose(asked))
        for search in active:
            search.advance([next(answers) for _ in search.frontier])
        active = [search for search in active if search.frontier]
    return [search.best(count) for search in searches]


class _Search:
    """The search of one completion."""

    def __init__(
        self,
        index: int,
        start: Tokens,
        reward: float,
        budget: int,
        beam: int,
        accept: Callable[[int, Tokens], bool],
    ) -> None:
        self.index, self.start, self.budget, self.beam = index, start, budget, beam
        self.rounds = 0
        self.seen = {start: Found(start, reward, 0)}
        self.tops = self.frontier = [self.seen[start]]
        self.accepted: dict[Tokens, bool] = {start: True}
        self.accept = accept

    def advance(self, flips: Sequence[Sequence[Flip]]) -> None:
        """Takes in what was proposed for the frontier and moves it on."""
        for origin, answers in zip(self.frontier, flips, strict=True):
            for flip in answers:
                tokens = list(origin.tokens)
                tokens[flip.position] = flip.token
                edited = tuple(tokens)
                edits = sum(a != b for a, b in zip(edited, self.start, strict=True))
                if edits <= self.budget and edited not in self.seen:
                    self.seen[edited] = Found(edited, flip.reward, edits)
        self.rounds += 1
        before = self.tops
        self.tops = self._top(self.beam, with_start=True)
        # Only what is new has not been asked about.
        fresh = [found for found in self.tops if found not in before]
        self.frontier = fresh if self.rounds < self.budget else []

    def best(self, count: int) -> Attack:
        """The highest rewards, without the start."""
        top, start = self._top(count, with_start=False), self.seen[self.start].reward
        return Attack(
            [found for found in top if found.reward > start],
            [found for found in top if not found.reward > start],
        )

    def _top(self, count: int, *, with_start: bool) -> list[Found]:
        top: list[Found] = []
        # sorted is stable: of equal rewards the first seen stays.
        for found in sorted(self.seen.values(), key=lambda found: -found.reward):
            if found.edits == 0 and not with_start:
                continue
            if found.tokens not in self.accepted:
                self.accepted[found.tokens] = self.accept(self.index, found.tokens)
            if self.accepted[found.tokens]:
                top.append(found)
            if len(top) == count:
                break
        return top
