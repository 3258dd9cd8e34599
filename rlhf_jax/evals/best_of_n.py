"""Best-of-n: what picking the best of n samples by the proxy is worth in gold.

From N scored samples a prompt, `best_of_n` estimates both rewards of the sample that
the proxy would pick out of n, for every n up to N, without drawing again: it averages
over all subsets of size n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class BestOfN(NamedTuple):
    """Curves over n; arrays have one entry for each n."""

    n: np.ndarray
    kl: np.ndarray
    """Nats between best-of-n and the policy: log n - (n - 1) / n."""
    proxy: np.ndarray
    gold: np.ndarray
    proxy_error: np.ndarray
    """Standard errors over prompts."""
    gold_error: np.ndarray


def best_of_n(
    proxy: np.ndarray, gold: np.ndarray, *, sizes: Sequence[int] | None = None
) -> BestOfN:
    """Expected proxy and gold reward of the best of n by proxy.

    With the samples of a prompt sorted by proxy, number i (from 0) is the best of a
    random subset of n with probability C(i, n-1) / C(N, n): unbiased for every n <= N.
    Samples with equal proxy share their probabilities.

    Args:
        proxy: [B N] rewards that pick.
        gold: [B N] rewards that judge.
        sizes: the n; None = 1, 2, 4, ... and N.

    Raises:
        ValueError: shapes differ, or an n is not in 1 .. N.

    Source: the estimator: Nakano et al. 2021, arXiv:2112.09332, appendix I; the KL:
    Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; the curves: Gao et al. 2023,
    arXiv:2210.10760.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if proxy.ndim != 2 or proxy.shape != gold.shape:
        raise ValueError(
            f"expected proxy and gold of one shape [B N], got {proxy.shape} and "
            f"{gold.shape}"
        )
    most = proxy.shape[1]
    if sizes is None:
        powers = [1 << p for p in range(most.bit_length()) if 1 << p <= most]
        sizes = sorted({*powers, most})
    if not all(1 <= n <= most for n in sizes):
        raise ValueError(f"sizes {list(sizes)}: expected numbers in 1 .. {most}")
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked = np.take_along_axis(proxy, order, axis=1)
    judged = _tied_means(ranked, np.take_along_axis(gold, order, axis=1))
    picks = np.stack([_chances(most, n) for n in sizes])
    curves = {"proxy": ranked @ picks.T, "gold": judged @ picks.T}
    n = np.array(sizes)
    root = math.sqrt(len(proxy))
    ddof = min(1, len(proxy) - 1)
    return BestOfN(
        n=n,
        kl=best_of_n_kl(n),
        proxy=curves["proxy"].mean(axis=0),
        gold=curves["gold"].mean(axis=0),
        proxy_error=curves["proxy"].std(axis=0, ddof=ddof) / root,
        gold_error=curves["gold"].std(axis=0, ddof=ddof) / root,
    )


def best_of_n_kl(n: np.ndarray) -> np.ndarray:
    """log n - (n - 1) / n, in nats.

    >>> best_of_n_kl(np.array([1, 2])).round(4).tolist()
    [0.0, 0.1931]
    """
    return np.log(n) - (n - 1) / n


def _chances(most: int, n: int) -> np.ndarray:
    """[N] chance of each rank to be the best of a random n."""
    total = math.comb(most, n)
    return np.array([math.comb(i, n - 1) / total for i in range(most)])


def _tied_means(ranked: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values with those of equal rank replaced by their mean."""
    out = values.copy()
    for row, (keys, old) in enumerate(zip(ranked, values)):
        _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
        out[row] = (np.bincount(places, weights=old) / counts)[places]
    return out
