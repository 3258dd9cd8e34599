"""Detectors of wrong labels: a suspicion for each pair, higher = more likely wrong.

All read the gaps d = r_chosen - r_rejected of one or of M reward models. The rules of
SER and SSRM decide instead: keep, swap, or hold back.
"""

from collections.abc import Callable

import numpy as np
import scipy.special
import scipy.stats

from rlhf_jax.curation.strength import Strength


def single_margin(found: Strength) -> np.ndarray:
    """-d of the first model alone, [Q]."""
    return -found.gaps[:, 0]


def mean_strength(found: Strength) -> np.ndarray:
    """-mu, [Q]: the paper's detector (arXiv:2401.06080)."""
    return -found.mean


def signal_to_noise(found: Strength) -> np.ndarray:
    """-mu / sigma, [Q]: disagreement takes a pair towards the middle."""
    return -found.mean / (found.std + 1e-12)


def vote(found: Strength) -> np.ndarray:
    """The share of the models that prefer the rejected completion, [Q]."""
    return (found.gaps < 0).mean(axis=1) + 0.5 * (found.gaps == 0).mean(axis=1)


def entropy(found: Strength) -> np.ndarray:
    """The entropy of the mean probability of the label, [Q] in nats.

    It finds pairs that are ambiguous, which is not the same as wrong: a label that all
    models are sure is wrong has entropy 0.
    """
    p = _sigmoid(found.gaps).mean(axis=1)
    return scipy.special.entr(p) + scipy.special.entr(1 - p)


DETECTORS: dict[str, Callable[[Strength], np.ndarray]] = {
    f.__name__: f
    for f in (mean_strength, single_margin, signal_to_noise, vote, entropy)
}


def ser_rule(chosen_rewards: np.ndarray, rejected_rewards: np.ndarray) -> np.ndarray:
    """Actions [Q] of SER: "keep" a pair the model is sure of, "flip" one it is sure is
    the other way round, "drop" (hold back) the rest.

    sure = (s_a > 0.55 and s_b < 0.45) or s_a - s_b > 0.3,  s = sigmoid(reward)

    Args:
        chosen_rewards: [Q] of one model.
        rejected_rewards: [Q].

    Source: arXiv:2411.00418 and its code.
    """
    a, b = _sigmoid(chosen_rewards), _sigmoid(rejected_rewards)
    keep = ((a > 0.55) & (b < 0.45)) | (a - b > 0.3)
    flip = ((b > 0.55) & (a < 0.45)) | (b - a > 0.3)
    return np.where(keep, "keep", np.where(flip, "flip", "drop"))


def ssrm_rule(gaps: np.ndarray, *, confidence: float = 0.8) -> np.ndarray:
    """Actions [Q] of SSRM: the model's own label where it is confident, else "drop".

    p = sigmoid(d);  kept if max(p, 1 - p) > confidence, flipped where p < 1/2

    Args:
        gaps: d, [Q], of one model.
        confidence: in [0.5, 1).

    Raises:
        ValueError: a confidence that no probability, or every one, reaches.

    Source: arXiv:2409.06903, with 0.8. Differs from its code, which keeps the data's
    own label, and so leaks what the method claims not to know.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence: expected a number in [0.5, 1), got {confidence}")
    p = _sigmoid(gaps)
    label = np.where(p < 0.5, "flip", "keep")
    return np.where(np.maximum(p, 1 - p) > confidence, label, "drop")


def auc(suspicion: np.ndarray, wrong: np.ndarray) -> float:
    """The area under the ROC curve: P(a wrong label is more suspicious than a right
    one), ties one half.

    Args:
        suspicion: [Q], higher = more likely wrong.
        wrong: [Q], whether the label is.

    Raises:
        ValueError: all labels are right, or all are wrong; shapes differ; a suspicion
            is nan.
    """
    suspicion, wrong = np.asarray(suspicion), np.asarray(wrong, bool)
    if suspicion.shape != wrong.shape or suspicion.ndim != 1:
        raise ValueError(
            f"auc: expected one suspicion for each label, got shapes {suspicion.shape} "
            f"and {wrong.shape}"
        )
    if np.isnan(suspicion).any():
        raise ValueError(f"auc: suspicion {np.isnan(suspicion).argmax()} is nan")
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        raise ValueError(
            f"auc: expected right and wrong labels, got {negatives} and {positives}"
        )
    ranks = scipy.stats.rankdata(suspicion)
    above = ranks[wrong].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return scipy.special.expit(np.asarray(x, np.float64))
