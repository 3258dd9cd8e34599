"""What should make the person who watches a run look up, as lines of text.

`watch` is for RL, `watch_supervised` for the other training programs. Both look at the
metrics of the steps so far and are silent while there is nothing to say. They compare
the last `WINDOW` steps with `WINDOW` earlier ones, by means and their standard errors,
so that noise alone rarely speaks; each kind of line comes at most once in `WINDOW`
steps.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

WINDOW = 20
"""Steps in a window."""
_SURE = 3.0
"""Standard errors that a difference must exceed."""
_SMALL_KL = 0.1
"""Nats of a completion below which a jump is no concern."""


def watch(history: Sequence[dict[str, float]]) -> list[str]:
    """Warnings after the newest step.

    Args:
        history: metrics of every step so far, oldest first.
    """
    if len(history) < 2 * WINDOW or len(history) % WINDOW:
        return []
    lines = []
    windows = [history[t : t + WINDOW] for t in range(0, len(history), WINDOW)]
    golds = [_last(window, "reward/gold") for window in windows[:-1]]
    # Over-optimisation takes hundreds of steps: measured from where gold was best. The
    # best of many is better than it is, hence one standard error more.
    best = windows[int(np.argmax(golds))]
    if (
        _change(best, windows[-1], "reward/proxy") > _SURE
        and _change(best, windows[-1], "reward/gold") < -_SURE - 1
    ):
        lines.append(
            "the proxy reward rises while the gold reward falls: the reward model is "
            "being over-optimised"
        )
    proxy, entropy = (
        _change(windows[-2], windows[-1], name)
        for name in ("reward/proxy", "policy/entropy")
    )
    if proxy > _SURE and entropy < -_SURE and _last(history, "policy/entropy") < 0.1:
        lines.append(
            "the proxy reward rises while entropy has collapsed below 0.1 nats a token"
        )
    jumps = _jumps(_values(history, "policy/kl"))
    if jumps:
        lines.append(
            f"the KL to the reference jumped to {max(jumps):.3g} nats, more than five "
            f"times its median of the {WINDOW} steps before"
        )
    # The surrogate's mean is near zero whatever is learnt; its size is not.
    size = _last(history, "policy/surrogate_size")
    auxiliary = abs(_last(history, "train/loss") - _last(history, "policy/surrogate"))
    if auxiliary > 10 * max(size, 1e-3):
        lines.append(
            "auxiliary losses (KL, entropy, PTX) are ten times the policy loss"
        )
    return lines


def watch_supervised(
    history: Sequence[dict[str, float]], held_out: Mapping[str, Sequence[float]]
) -> list[str]:
    """Warnings after the newest step of a reward or SFT run.

    Args:
        history: metrics of the latest steps, oldest first, those of `train/`.
        held_out: losses of the evaluation sets, one an evaluation.
    """
    if len(history) < 2 * WINDOW or len(history) % WINDOW:
        return []
    lines = []
    share = _last(history, "train/contrastive/share")
    if share > 0.5:
        lines.append(
            f"the contrastive term is {share:.0%} of the loss: it, not the "
            "preferences, decides what is learnt"
        )
    if jumps := _jumps(_values(history, "train/meta/grad_norm"), least=0.0):
        lines.append(
            f"the meta-gradient's norm jumped to {max(jumps):.3g}, more than five "
            f"times its median of the {WINDOW} steps before"
        )
    if abs(_last(history, "train/loss")) < 1e-3 and any(
        len(values) > 1 and values[-1] >= values[-2] for values in held_out.values()
    ):
        lines.append("the training loss is near zero while validation stands still")
    return lines


def _values(history: Sequence[dict[str, float]], name: str) -> np.ndarray:
    found = [values[name] for values in history if name in values]
    return np.array([v for v in found if math.isfinite(v)])


def _last(history: Sequence[dict[str, float]], name: str) -> float:
    """Mean of the last window; nan without the metric."""
    values = _values(history[-WINDOW:], name)
    return float(values.mean()) if len(values) else math.nan


def _jumps(values: np.ndarray, *, least: float = _SMALL_KL) -> list[float]:
    """Those of the last window that stand out from the window before each."""
    found = []
    for at in range(max(len(values) - WINDOW, WINDOW), len(values)):
        before = values[at - WINDOW : at]
        usual = float(np.median(before))
        spread = 2 * _SURE * float(before.std(ddof=1))
        if values[at] > max(5 * usual, usual + spread, least):
            found.append(float(values[at]))
    return found


def _change(
    before: Sequence[dict[str, float]], now: Sequence[dict[str, float]], name: str
) -> float:
    """One window less another, in standard errors; nan where unknown."""
    old, new = _values(before, name), _values(now, name)
    if len(new) < 2 or len(old) < 2:
        return math.nan
    error = math.sqrt(new.var(ddof=1) / len(new) + old.var(ddof=1) / len(old))
    return float((new.mean() - old.mean()) / max(error, 1e-12))
