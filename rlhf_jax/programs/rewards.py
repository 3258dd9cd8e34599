"""Where the rewards of RL come from: functions, reward models, HTTP scorers, weighted.

    rewards = open_rewards(["runs/rm", "0.1*mymodule:brevity"], timeout_s=60)
    result = rewards(prompts, completions, rows)        rewards.score(Texts(...))
    result.total, result.columns["brevity"]

A source is `[WEIGHT*]SPEC`. SPEC is

    package.module:function     a Python function, see `reward_functions`
    http://HOST:PORT/PATH       a scorer, see `http_scorer`
    ensemble:DIR[?combine=...]  members of a `strength` run, see `scorer.open_scorer`
    attributes:DIR              regressions and gate of an `attributes` run
    anything else               a reward model, as in `--model` (see `models`)

A reward model reads text through its own tokenizer and template, so the policy may have
another. It is loaded once and never trained. The total is the weighted sum, in float64;
columns hold each source's own rewards, unweighted. A weight may be negative, or 0 for a
source that is only logged. The gold reward of a study is this class with one source.

No reward is ever made up: a source that fails, answers with something else than finite
numbers, or cannot take a text is an error that names it.
"""

import dataclasses
import math
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.messages import describe
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs.http_scorer import HttpScorer
from rlhf_jax.programs.reward_functions import RewardFunction, open_function, quoted
from rlhf_jax.programs.scorer import (
    MADE_OF_MODELS,
    Refusal,
    Scorer,
    ScoringConfig,
    open_scorer,
)

ScoreTexts: TypeAlias = Callable[[Texts], np.ndarray]
"""-> rewards [M]."""
Refusals: TypeAlias = Callable[[Texts], Sequence[Refusal | None]]
"""-> why each text has no reward; None = it has one."""
Kind: TypeAlias = Literal["function", "http", "model"]
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class RewardResult(NamedTuple):
    """Rewards of M completions."""

    total: np.ndarray
    """float64 [M], the weighted sum."""
    columns: dict[str, np.ndarray]
    """Name of each source -> its own rewards, float64 [M], before its weight."""


class Source(NamedTuple):
    """One reward among several."""

    name: str
    """Short, unique, for metrics: function, host:port, or last part of the path."""
    spec: str
    """SPEC without its weight."""
    kind: Kind
    weight: float
    score: ScoreTexts
    refusals: Refusals


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """The weighted sum of several sources; call it with texts."""

    sources: tuple[Source, ...]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> RewardResult:
        """The rewards of completions; see `score`.

        Args:
            prompts: as the rows hold them, text or messages; one for each completion.
            completions: M texts.
            rows: the data rows, whose columns functions ask for; M of them.
        """
        return self.score(Texts(prompts, completions, rows))

    def score(self, texts: Texts) -> RewardResult:
        """The rewards of texts, in input order.

        Raises:
            ValueError: counts differ, or a source fails; names the source.
        """
        _check_counts(texts)
        total = np.zeros(len(texts.completions))
        columns = {source.name: total.copy() for source in self.sources}
        for source in self.sources if len(total) else ():
            found = np.asarray(source.score(texts), np.float64)
            _check_finite(source.spec, found, texts.completions)
            columns[source.name] = found
            total += source.weight * found
        return RewardResult(total, columns)

    def refusals(self, texts: Texts) -> list[Refusal | None]:
        """Why the first source that cannot take a text cannot, for each: `score` with
        it would be an error. None = all take it."""
        found = zip(*(source.refusals(texts) for source in self.sources), strict=True)
        return [next(filter(None, each), None) for each in found]

    @property
    def models(self) -> list[str]:
        """SPECs of the reward models among the sources; a critic starts from [0]."""
        return [source.spec for source in self.sources if source.kind == "model"]


def open_rewards(
    specs: Sequence[str],
    *,
    scoring: ScoringConfig = ScoringConfig(),
    timeout_s: float,
    encoder: Encoder | None = None,
    row_length: int | None = None,
) -> Rewards:
    """The sources of a run, models loaded and functions imported.

    Args:
        specs: `[WEIGHT*]SPEC` each; see the module's docstring.
        scoring: how reward models score.
        timeout_s: longest time of one call of a function, and of one HTTP request.
        encoder: the policy's; HTTP scorers that are not ours get its text.
        row_length: of the rows that reward models score, unless a text is longer: with
            one length many calls share their compiled shapes.

    Raises:
        ValueError: no source, one twice, or one that cannot be opened; names it.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s {timeout_s}: expected a positive number")
    parsed = [parse_spec(spec) for spec in specs]
    plain = [spec for _, spec in parsed]
    _check_specs(plain)
    kinds: list[Kind] = [kind_of(spec) for spec in plain]
    opened: dict[str, tuple[ScoreTexts, Refusals]] = {}
    # Models last: a misspelt function is an error before gigabytes are read.
    for spec, kind in sorted(zip(plain, kinds), key=lambda pair: pair[1] == "model"):
        if kind == "function":
            opened[spec] = _function(open_function(spec, timeout_s)), _takes_all
        elif kind == "http":
            scorer = HttpScorer(spec, timeout_s, encoder=encoder)
            opened[spec] = _http(scorer), _takes_all
        else:
            scorer = open_scorer(spec, scoring)
            opened[spec] = _model(spec, scorer, row_length), _refusals_of(scorer)
    return Rewards(
        tuple(
            Source(name, spec, kind, weight, *opened[spec])
            for name, kind, (weight, spec) in zip(_names(plain, kinds), kinds, parsed)
        )
    )


def parse_spec(text: str) -> tuple[float, str]:
    """(weight, SPEC) of `[WEIGHT*]SPEC`.

    Raises:
        ValueError: the weight is not a finite number, or nothing follows it.

    >>> parse_spec("-0.5*package.module:length")
    (-0.5, 'package.module:length')
    """
    before, spec = text.split("*", 1) if "*" in text else ("1", text)
    try:
        weight = float(before)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not spec.strip():
        raise ValueError(
            f"reward {text!r}: expected SPEC or WEIGHT*SPEC with a finite number, "
            "such as 0.5*package.module:function"
        )
    return weight, spec.strip()


def _check_specs(specs: list[str]) -> None:
    if not specs:
        raise ValueError("rewards: none given; expected at least one [WEIGHT*]SPEC")
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"reward {spec}: given twice; add up the weights")


def kind_of(spec: str) -> Kind:
    """What a SPEC names; a path that exists is a model whatever its name."""
    if spec.startswith(("http://", "https://")):
        return "http"
    if spec.startswith(MADE_OF_MODELS):
        return "model"
    if _FUNCTION.fullmatch(spec) and not pathlib.Path(spec).exists():
        return "function"
    return "model"


def _names(specs: list[str], kinds: list[Kind]) -> list[str]:
    """Short names; those that would be the same are the whole SPECs."""
    short = []
    for spec, kind in zip(specs, kinds):
        if kind == "http":
            short.append(urllib.parse.urlsplit(spec).netloc)
        elif kind == "function":
            short.append(spec.rpartition(":")[2])
        else:
            short.append(pathlib.PurePath(spec).name or spec)
    return [n if short.count(n) == 1 else spec for n, spec in zip(short, specs)]


def _takes_all(texts: Texts) -> list[None]:
    """Functions and HTTP scorers refuse nothing beforehand."""
    return [None] * len(texts.completions)


def _refusals_of(scorer: Scorer) -> Refusals:
    def refusals(texts: Texts) -> list[Refusal | None]:
        encoded = scorer.encode_all(texts)
        return [found if isinstance(found, Refusal) else None for found in encoded]

    return refusals


def _function(function: RewardFunction) -> ScoreTexts:
    return lambda texts: function(texts.prompts, texts.completions, texts.rows)


def _http(scorer: HttpScorer) -> ScoreTexts:
    return lambda texts: scorer.rewards(texts.prompts, texts.completions, texts.tools)


def _model(spec: str, scorer: Scorer, row_length: int | None) -> ScoreTexts:
    def score(texts: Texts) -> np.ndarray:
        encoded: list[EncodedCompletion] = []
        refused: list[tuple[int, Refusal]] = []
        for n, found in enumerate(scorer.encode_all(texts)):
            if isinstance(found, Refusal):
                refused.append((n, found))
            else:
                encoded.append(found)
        if refused:
            n, first = refused[0]
            raise ValueError(
                f"reward {spec}: refuses {len(refused)} of {len(texts.completions)} "
                f"completions; {quoted(n, texts.completions)}: {first.reason}: "
                f"{first.detail}"
            )
        return scorer.rewards(encoded, row_length=row_length)

    return score


def _check_counts(texts: Texts) -> None:
    prompts, completions, rows = texts.prompts, texts.completions, texts.rows
    if not len(prompts) == len(completions) == len(rows):
        raise ValueError(
            f"rewards: expected as many prompts and rows as completions, got "
            f"{len(prompts)} prompts, {len(rows)} rows, {len(completions)} completions"
        )
    for n, text in enumerate(completions):
        if not isinstance(text, str):
            raise ValueError(f"completion {n}: expected text, got {describe(text)}")


def _check_finite(spec: str, found: np.ndarray, completions: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        n = int(bad[0])
        raise ValueError(
            f"reward {spec}: {bad.size} of {len(found)} rewards are not finite, the "
            f"first is {found[n]} for {quoted(n, completions)}"
        )
