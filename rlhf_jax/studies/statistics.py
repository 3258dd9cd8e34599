"""Means and paired differences over seeds, with Student's intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"

    def plain(self) -> str:
        """Without a plus sign: of a value that is no difference."""
        return f"{self.mean:.3f} ± {self.half:.3f}"


class Paired(NamedTuple):
    """A mean difference over seeds, its interval, and the two-sided paired t test."""

    mean: float
    half: float
    p: float
    """nan where there is nothing to test: one seed, or no difference at all."""

    def __str__(self) -> str:
        found = f"{self.mean:+.3f} ± {self.half:.3f}"
        return found if np.isnan(self.p) else f"{found} (p {self.p:.2g})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width (Student, n - 1 degrees of freedom); nan for n = 1."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Interval(float(x.mean()), float("nan"))
    error = x.std(ddof=1) / len(x) ** 0.5
    return Interval(
        float(x.mean()), float(scipy.stats.t.ppf(0.975, len(x) - 1) * error)
    )


def paired(values: Sequence[float], base: Sequence[float]) -> Paired:
    """values - base, seed by seed."""
    difference = np.asarray(values, np.float64) - np.asarray(base, np.float64)
    mean, half = interval(difference.tolist())
    if len(difference) < 2 or not difference.std():
        return Paired(mean, half, float("nan"))
    test: Any = scipy.stats.ttest_1samp(difference, 0.0)
    return Paired(mean, half, float(test.pvalue))
