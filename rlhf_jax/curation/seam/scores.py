"""The seamlessness score of prompts, from worse completions that were judged already.

For a prompt I with a gold completion y* and worse completions y_1 .. y_n:

    m_j  = 1 if r(y_j) > r(y*) else 0           the reward model misjudges y_j
    p_j  = exp(log pi(y_j | I) / lp(|y_j|))     how likely the policy writes it
    risk = 1/n sum_j m_j p_j
    SEAM = -log risk                            high = seamless, low = remove

The paper's text gives the two factors, their direction and a length penalty, and its
released code stops before it combines them: this formula is a reconstruction. Its
choices are fields of `SeamFormula`:

    length          lp(n) = n: without a penalty the longest completions always look
                    harmless, and their likelihood is 0 in any float
    misjudgement    hard, as the code counts it; soft weighs by how far the model is off
    reduce          mean, so that prompts with fewer worse completions compare

Everything is computed in logarithms, so nothing underflows. A prompt without a single
misjudged completion has risk 0 and SEAM inf; all such prompts share the top rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

_CHOICES = {
    "length": ("mean", "gnmt", "none"),
    "misjudgement": ("hard", "soft"),
    "reduce": ("mean", "sum"),
}


@dataclasses.dataclass(frozen=True)
class SeamFormula:
    """How likelihood and misjudgement become a score."""

    length: Literal["mean", "gnmt", "none"] = "mean"
    """lp(n): n, ((5 + n) / 6)^alpha, or 1."""
    alpha: float = 0.6
    """Of gnmt."""
    misjudgement: Literal["hard", "soft"] = "hard"
    """m_j: 1[r_j > r*], or max(r_j - r*, 0)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Over the worse completions of a prompt."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"formula.{name} {getattr(self, name)!r}: expected one of "
                    f"{', '.join(choices)}"
                )
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(
                f"formula.alpha: expected a finite number of at least 0, got "
                f"{self.alpha}"
            )


def log_likelihood(
    logprobs: np.ndarray, num_tokens: np.ndarray, formula: SeamFormula = SeamFormula()
) -> np.ndarray:
    """log p_j: summed log-probabilities divided by the length penalty.

    Args:
        logprobs: log pi(y_j | I), nats, any shape.
        num_tokens: tokens of each y_j, the end token included, at least 1.
        formula: which penalty.

    Source: the penalty gnmt is Wu et al. 2016, arXiv:1609.08144, eq. 14.
    """
    tokens = np.asarray(num_tokens, np.float64)
    if (tokens < 1).any():
        raise ValueError("num_tokens: expected at least 1 token in every completion")
    penalty = {
        "mean": tokens,
        "gnmt": ((5 + tokens) / 6) ** formula.alpha,
        "none": np.ones_like(tokens),
    }[formula.length]
    return np.asarray(logprobs, np.float64) / penalty


def misjudged(rewards: np.ndarray, gold_reward: float) -> np.ndarray:
    """Whether each worse completion gets more than the gold one, [n] bool; a tie is no
    misjudgement."""
    return np.asarray(rewards, np.float64) > gold_reward


def log_risk(
    logprobs: np.ndarray,
    num_tokens: np.ndarray,
    rewards: np.ndarray,
    gold_reward: float,
    formula: SeamFormula = SeamFormula(),
) -> float:
    """log of a prompt's risk; -inf where nothing is misjudged, so SEAM = -log_risk.

    Args:
        logprobs: [n], see `log_likelihood`.
        num_tokens: [n].
        rewards: [n] of the worse completions.
        gold_reward: of the gold completion.
        formula: see the module's docstring.

    Raises:
        ValueError: no completion, other lengths, or a number that is not finite.

    >>> logprobs, tokens = np.log([0.5, 0.25]), np.array([1, 2])
    >>> risk = np.exp(log_risk(logprobs, tokens, np.array([1.0, 3.0]), 2.0))
    >>> round(float(risk), 6)  # .25 ** (1 / 2) / 2
    0.25
    """
    logprobs, rewards = (np.asarray(x, np.float64) for x in (logprobs, rewards))
    if not len(logprobs) == len(num_tokens) == len(rewards) > 0:
        raise ValueError(
            f"worse completions: {len(logprobs)} log-probabilities, {len(num_tokens)} "
            f"lengths, {len(rewards)} rewards; expected one of each, at least one"
        )
    if not np.isfinite([*logprobs, *rewards, gold_reward]).all():
        raise ValueError(
            "worse completions: a log-probability or a reward is not finite"
        )
    above = rewards - gold_reward
    hard = formula.misjudgement == "hard"
    with np.errstate(divide="ignore"):
        log_m = np.log(np.where(above > 0, 1.0 if hard else above, 0.0))
    total = scipy.special.logsumexp(
        log_likelihood(logprobs, num_tokens, formula) + log_m
    )
    return float(total - (np.log(len(rewards)) if formula.reduce == "mean" else 0.0))


def ranks(seam: np.ndarray) -> np.ndarray:
    """Rank of each prompt, 1 = lowest SEAM; equal scores share their mean rank.

    Scores compare only within one policy, reward model and estimator.
    """
    return scipy.stats.rankdata(np.asarray(seam, np.float64), method="average")


def of_line(line: Mapping[str, Any]) -> float:
    """SEAM of a line of seam.jsonl, where null is infinity: nothing misjudged."""
    return math.inf if line["seam"] is None else float(line["seam"])


def lowest(seam: np.ndarray, fraction: float, *, seed: int = 0) -> np.ndarray:
    """Indices of the lowest `fraction` of the prompts, in the order of the prompts.

    Equal scores at the cut are drawn at random, so that their order in the data does
    not decide.

    Args:
        seam: [P].
        fraction: in [0, 1].
        seed: of the draw.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    scores = np.asarray(seam, np.float64)
    tie_break = np.random.default_rng(seed).permutation(len(scores))
    count = round(fraction * len(scores))
    return np.sort(np.lexsort((tie_break, scores))[:count])


def jaccard(first: np.ndarray, second: np.ndarray, total: int) -> tuple[float, float]:
    """(|A and B| / |A or B| of two sets of indices, what random sets of these sizes
    would have).

    Args:
        first: indices, each once.
        second: the same.
        total: prompts that both were drawn from.

    The second number is the expectation under independent uniform draws, computed from
    the hypergeometric distribution of the overlap.
    """
    a, b = set(np.asarray(first).tolist()), set(np.asarray(second).tolist())
    if not a or not b:
        return 0.0, 0.0
    overlap = np.arange(min(len(a), len(b)) + 1)
    drawn: Any = scipy.stats.hypergeom(total, len(a), len(b))
    expected = (overlap / (len(a) + len(b) - overlap) * drawn.pmf(overlap)).sum()
    return len(a & b) / len(a | b), float(expected)


_TIE_BREAKS = 20


class Overlap(NamedTuple):
    """How alike two scores of the same prompts are."""

    prompts: int
    jaccard: float
    """Of the prompts with the lowest scores; the mean over random orders of ties."""
    chance: float
    """What random sets of these sizes would have."""
    spearman: float
    """Rank correlation; nan where one score is constant."""


def overlap(first: np.ndarray, second: np.ndarray, fraction: float = 0.2) -> Overlap:
    """Whether two scores of the same prompts find the same ones lowest.

    Args:
        first: [P], inf where nothing is misjudged.
        second: [P].
        fraction: of the prompts that count as lowest.
    """
    # Ties are broken independently in both: a common order of the many prompts without
    # a misjudgement would make their overlap out of nothing.
    draws = [
        jaccard(
            lowest(first, fraction, seed=2 * n),
            lowest(second, fraction, seed=2 * n + 1),
            total=len(first),
        )
        for n in range(_TIE_BREAKS)
    ]
    found, chance = np.mean(draws, axis=0).tolist()
    ranked = [ranks(score) for score in (first, second)]
    constant = any(len(set(each.tolist())) < 2 for each in ranked)
    result: Any = None if constant else scipy.stats.pearsonr(*ranked)
    spearman = float("nan") if constant else float(result.statistic)
    return Overlap(len(first), found, chance, spearman)
