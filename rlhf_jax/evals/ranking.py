"""Kendall's tau-b of rewards against gold scores, prompt by prompt, and best of K.

A prompt whose gold scores are all equal has no order to find: it is left out and
counted. A prompt whose rewards are all equal finds no order: its tau is undefined, it
counts 0 in `kendall_tau` and is left out of `kendall_tau_defined` (the papers'
nanmean); both counts are reported, so that neither number can hide a model that ties
everything.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from rlhf_jax.evals import accuracy


def kendall_tau(rewards: np.ndarray, gold: np.ndarray) -> float:
    """Kendall's tau-b, nan when either side is all ties.

    tau_b = (C - D) / sqrt((C + D + T_r) (C + D + T_g)) with C concordant and D
    discordant pairs, T_r pairs tied in the rewards alone and T_g in the gold scores
    alone.

    Source: Kendall 1945, "The treatment of ties in ranking problems".

    >>> round(kendall_tau(np.array([1., 2., 3., 4.]), np.array([1., 3., 2., 4.])), 4)
    0.6667
    """
    rewards, gold = np.asarray(rewards, np.float64), np.asarray(gold, np.float64)
    if np.ptp(rewards) == 0 or np.ptp(gold) == 0:
        return float("nan")
    return float(np.asarray(stats.kendalltau(rewards, gold, variant="b"))[0])


def gold_pairs(gold: np.ndarray) -> list[tuple[int, int]]:
    """(better, worse) indices of every pair of one row whose gold scores differ."""
    gold = np.asarray(gold, np.float64)
    return [
        (i, j) for i in range(len(gold)) for j in range(len(gold)) if gold[i] > gold[j]
    ]


def best_of_k(rewards: np.ndarray, gold: np.ndarray) -> float:
    """Chance that the top reward (ties broken at random) has the top gold score."""
    rewards, gold = np.asarray(rewards, np.float64), np.asarray(gold, np.float64)
    top = rewards == rewards.max()
    return float(np.mean(gold[top] == gold.max()))


def _check(rewards: Sequence[np.ndarray], gold: Sequence[np.ndarray]) -> None:
    if len(rewards) != len(gold):
        raise ValueError(f"rewards of {len(rewards)} rows, gold of {len(gold)} rows")
    for i, (r, g) in enumerate(zip(rewards, gold, strict=True)):
        if np.shape(r) != np.shape(g) or np.ndim(r) != 1 or len(r) < 2:
            raise ValueError(
                f"row {i}: rewards {np.shape(r)} and gold scores {np.shape(g)}; "
                "expected two lists of one length, at least 2"
            )
        if not (np.isfinite(r).all() and np.isfinite(g).all()):
            raise ValueError(f"row {i}: a reward or gold score is not finite")


def evaluate_ranking(
    rewards: Sequence[np.ndarray],
    gold: Sequence[np.ndarray],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Flat numbers for K-wise rows: tau, best of K, accuracy of the pairs inside.

    Args:
        rewards: one array [K] a prompt; K may differ between prompts, at least 2.
        gold: gold scores of the same completions, higher is better.
        samples: bootstrap resamples over prompts.
        seed: of the bootstrap.

    Returns:
        kendall_tau (all-tied rewards count 0) with _low and _high, kendall_tau_defined
        (all tied rewards left out), best_of_k, accuracy over every pair of differing
        gold with _low and _high, mismatch_rate = 1 - accuracy, n_pairs, n_prompts,
        gold_tied, reward_tied.
    """
    _check(rewards, gold)
    kept = [
        (np.asarray(r, np.float64), np.asarray(g, np.float64))
        for r, g in zip(rewards, gold, strict=True)
        if np.ptp(g) > 0
    ]
    taus = np.array([kendall_tau(r, g) for r, g in kept])
    counted = np.nan_to_num(taus, nan=0.0)
    result: dict[str, float] = {
        "n_prompts": len(rewards),
        "gold_tied": len(rewards) - len(kept),
        "reward_tied": int(np.isnan(taus).sum()),
    }
    if not kept:
        return result
    low, high = accuracy.bootstrap_interval(
        counted, np.arange(len(counted)), samples=samples, seed=seed
    )
    result |= {
        "kendall_tau": float(counted.mean()),
        "kendall_tau_low": low,
        "kendall_tau_high": high,
        "best_of_k": float(np.mean([best_of_k(r, g) for r, g in kept])),
    }
    if result["reward_tied"] < len(kept):
        result["kendall_tau_defined"] = float(np.nanmean(taus))
    chosen = np.concatenate([r[[i for i, _ in gold_pairs(g)]] for r, g in kept])
    rejected = np.concatenate([r[[j for _, j in gold_pairs(g)]] for r, g in kept])
    prompts = [p for p, (_, g) in enumerate(kept) for _ in gold_pairs(g)]
    interval = accuracy.pair_accuracy(
        chosen, rejected, prompts, samples=samples, seed=seed
    )
    return result | {
        "accuracy": interval.value,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "mismatch_rate": 1.0 - interval.value,
        "ties": int(np.sum(chosen == rejected)),
        "n_pairs": len(chosen),
    }
