"""Everything about one split of pairs or K-wise rows, as one flat dict of numbers.

The `evaluate` program tabulates `pair_figures` and `evaluate_kwise`; `evaluate_pairs`
is the former's numbers alone, for a notebook. Training logs the metrics of its
objective instead. Keys are stable; a key that cannot be computed (no texts, no matched
pair) is left out rather than given as nan.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evals import accuracy, calibration, distribution, length, ranking

_METHODS = {
    "wilson": "Wilson 95 %",
    "wilson on prompts": "Wilson 95 % on the number of prompts",
    "prompt bootstrap": "95 % bootstrap over prompts",
}


class PairFigures(NamedTuple):
    """Numbers of a split of pairs, and how the interval of its accuracy was made."""

    metrics: dict[str, float]
    """As `evaluate_pairs` returns."""
    interval: str
    """In words."""


def text_of(value: Any) -> str:
    """Plain text of a text, of a message, or of a list of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return text_of(value.get("content") or "")
    if isinstance(value, Sequence):
        return "\n".join(text_of(part) for part in value)
    return "" if value is None else str(value)


def prompt_key(prompt: Any) -> Hashable:
    """What two pairs must share to count as pairs of one prompt."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _field(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)


def evaluate_pairs(
    chosen_rewards: np.ndarray,
    rejected_rewards: np.ndarray,
    rows: Sequence[Any] | None = None,
    *,
    num_bins: int = 10,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Flat numbers for one split of pairs.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        rows: the pairs, mappings or objects with prompt, chosen, rejected (texts or
            lists of messages); None = no length figures, and every pair counts as its
            own prompt.
        num_bins: bins of the calibration error.
        samples: bootstrap resamples, over prompts where pairs share them.
        seed: of the bootstrap.

    Returns:
        n, n_prompts, accuracy with _low and _high, ties, margin (mean reward
        difference), margin_std, loss (Bradley-Terry, nats), brier, ece,
        chosen_/rejected_reward_mean, reward_std, and from texts: longer_is_chosen
        (baseline), length_matched_n, length_matched_accuracy with _low and _high,
        reward_length_correlation (Pearson over completions), reward_length_spearman,
        margin_length_correlation (within pairs).
    """
    return pair_figures(
        chosen_rewards,
        rejected_rewards,
        rows,
        num_bins=num_bins,
        samples=samples,
        seed=seed,
    ).metrics


def pair_figures(
    chosen_rewards: np.ndarray,
    rejected_rewards: np.ndarray,
    rows: Sequence[Any] | None = None,
    *,
    num_bins: int = 10,
    samples: int = 2000,
    seed: int = 0,
) -> PairFigures:
    """`evaluate_pairs` and the method of `accuracy_low` and `accuracy_high`."""
    outcome = accuracy.outcomes(chosen_rewards, rejected_rewards)
    if rows is not None and len(rows) != len(outcome):
        raise ValueError(f"{len(rows)} rows for {len(outcome)} pairs of rewards")
    if not len(outcome):
        return PairFigures({"n": 0}, "none: no pair")
    chosen = np.asarray(chosen_rewards, np.float64)
    rejected = np.asarray(rejected_rewards, np.float64)
    difference = chosen - rejected
    prompts = None if rows is None else [prompt_key(_field(r, "prompt")) for r in rows]
    right = accuracy.mean_with_interval(outcome, prompts, samples=samples, seed=seed)
    rewards = distribution.reward_statistics(np.concatenate([chosen, rejected]))
    result: dict[str, float] = {
        "n": len(outcome),
        "n_prompts": len(outcome) if prompts is None else len(set(prompts)),
        "accuracy": right.value,
        "accuracy_low": right.low,
        "accuracy_high": right.high,
        "ties": int(np.sum(difference == 0)),
        **_margin_figures(difference, num_bins),
        "chosen_reward_mean": float(chosen.mean()),
        "rejected_reward_mean": float(rejected.mean()),
        "reward_mean": rewards["mean"],
        "reward_std": rewards["std"],
        "reward_min": rewards["min"],
        "reward_max": rewards["max"],
    }
    interval = _METHODS[right.method]
    if rows is None or prompts is None:
        return PairFigures(result, interval)
    words = [
        np.array([length.num_words(text_of(_field(row, name))) for row in rows])
        for name in ("chosen", "rejected")
    ]
    lengths = _length_figures(
        chosen, rejected, words[0], words[1], prompts, samples=samples, seed=seed
    )
    return PairFigures(result | lengths, interval)


def _margin_figures(difference: np.ndarray, num_bins: int) -> dict[str, float]:
    return {
        "margin": float(difference.mean()),
        "margin_std": float(difference.std()),
        "loss": calibration.negative_log_likelihood(difference),
        "brier": calibration.brier_score(difference),
        "ece": calibration.expected_calibration_error(difference, num_bins=num_bins),
    }


def _length_figures(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_words: np.ndarray,
    rejected_words: np.ndarray,
    prompts: Sequence[Hashable],
    *,
    samples: int,
    seed: int,
) -> dict[str, float]:
    matched = length.length_matched(chosen_words, rejected_words)
    result: dict[str, float] = {
        "longer_is_chosen": length.longer_is_chosen(chosen_words, rejected_words),
        "length_matched_n": int(matched.sum()),
    }
    if matched.any():
        inside = [p for p, m in zip(prompts, matched, strict=True) if m]
        right = accuracy.pair_accuracy(
            chosen[matched], rejected[matched], inside, samples=samples, seed=seed
        )
        result["length_matched_accuracy"] = right.value
        result["length_matched_accuracy_low"] = right.low
        result["length_matched_accuracy_high"] = right.high
    over_texts = length.correlation(
        np.concatenate([chosen, rejected]),
        np.concatenate([chosen_words, rejected_words]),
    )
    within = length.correlation(chosen - rejected, chosen_words - rejected_words)[0]
    figures = {
        "reward_length_correlation": over_texts[0],
        "reward_length_spearman": over_texts[1],
        "margin_length_correlation": within,
    }
    return result | {k: v for k, v in figures.items() if np.isfinite(v)}


def evaluate_kwise(
    rewards: Sequence[np.ndarray],
    rows: Sequence[Any],
    *,
    num_bins: int = 10,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Flat numbers for one split of K-wise rows: ranking, calibration and length.

    Args:
        rewards: one array [K] a row, in the order of its responses.
        rows: mappings or objects with responses, each {"text", "score"}.
        num_bins: bins of the calibration error.
        samples: bootstrap resamples over prompts.
        seed: of the bootstrap.

    Returns:
        The figures of `evaluate_ranking`; kendall_tau_of_length (the tau of the number
        of words: the length baseline); reward_length_correlation; reward_mean, _std,
        _min, _max; and over the n_pairs pairs inside the rows that gold orders:
        margin, margin_std, loss, brier and ece, as of `evaluate_pairs`,
        length_matched_n and length_matched_accuracy with _low and _high.
    """
    responses = [_field(row, "responses") for row in rows]
    gold = [np.array([float(_field(r, "score")) for r in rs]) for rs in responses]
    result = ranking.evaluate_ranking(rewards, gold, samples=samples, seed=seed)
    words = [
        np.array([float(length.num_words(text_of(_field(r, "text")))) for r in rs])
        for rs in responses
    ]
    by_length = ranking.evaluate_ranking(words, gold, samples=2, seed=seed)
    flat = np.concatenate([np.asarray(r, np.float64) for r in rewards])
    spread = distribution.reward_statistics(flat)
    result |= _inner_pairs(
        rewards, gold, words, rows, num_bins=num_bins, samples=samples, seed=seed
    )
    figures = {
        "kendall_tau_of_length": by_length.get("kendall_tau", np.nan),
        "reward_length_correlation": length.correlation(flat, np.concatenate(words))[0],
        **{f"reward_{name}": spread[name] for name in ("mean", "std", "min", "max")},
    }
    return result | {k: float(v) for k, v in figures.items() if np.isfinite(v)}


def _inner_pairs(
    rewards: Sequence[np.ndarray],
    gold: Sequence[np.ndarray],
    words: Sequence[np.ndarray],
    rows: Sequence[Any],
    *,
    num_bins: int,
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Of the pairs inside the rows that gold orders: margins, calibration, and accuracy
    where the two answers are about equally long."""
    pairs = [
        (row, *pair)
        for row, scores in enumerate(gold)
        for pair in ranking.gold_pairs(scores)
    ]
    if not pairs:
        return {"length_matched_n": 0}

    def of(values: Sequence[np.ndarray], side: int) -> np.ndarray:
        return np.array([values[pair[0]][pair[side]] for pair in pairs], np.float64)

    chosen, rejected = of(rewards, 1), of(rewards, 2)
    matched = length.length_matched(of(words, 1), of(words, 2))
    result = _margin_figures(chosen - rejected, num_bins)
    result["length_matched_n"] = int(matched.sum())
    if matched.any():
        inside = [rows[pairs[n][0]] for n in np.flatnonzero(matched)]
        right = accuracy.pair_accuracy(
            chosen[matched],
            rejected[matched],
            [prompt_key(_field(row, "prompt")) for row in inside],
            samples=samples,
            seed=seed,
        )
        result["length_matched_accuracy"] = right.value
        result["length_matched_accuracy_low"] = right.low
        result["length_matched_accuracy_high"] = right.high
    return result
