"""The tables and the plot of `rlhf-jax study seam-filter`."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from rlhf_jax.curation.seam.scores import of_line, overlap
from rlhf_jax.io.interval_lines import interval_lines
from rlhf_jax.studies.statistics import Interval, interval, paired

Arms = Sequence[Mapping[str, Mapping[str, float]]]
"""For each seed, arm -> number -> value."""
Lines = Sequence[Mapping[str, Any]]
"""Of a seam.jsonl."""

_RL = {
    "gold": "gold, held-out prompts",
    "gold_gain": "gain over the start",
    "proxy_gain": "proxy gain, in its own deviations",
    "kl": "KL to the start",
}
_ESTIMATORS = {
    "gain": "Spearman with gain in gold",
    "before": "with gold before RL",
    "misjudged": "misjudged",
    "logprob": "log p a token",
}
_JUDGED = {
    "held-out": "held-out completions of others, new prompts",
    "before": "completions of the policy before RL",
    "after": "completions after RLOO on all prompts",
}


def rl_table(found: Arms) -> Table:
    """Means over seeds, a row an arm, and their differences from all prompts."""
    table = Table(
        title=f"RLOO on selected prompts, {len(found)} seeds", show_lines=True
    )
    table.add_column("prompts")
    for title in _RL.values():
        table.add_column(title, justify="right")
    table.caption = "below: difference from all prompts; 95 % intervals over seeds"
    for name in found[0]:
        cells = []
        for key in _RL:
            values, base = ([each[of][key] for each in found] for of in (name, "all"))
            cells.append(interval(values).plain())
            if name != "all":
                cells[-1] += f"\n{_interval_of_difference(values, base)}"
        table.add_row(name, *cells)
    return table


def control_table(found: Arms, shares: Sequence[float]) -> Table:
    """Prompts dropped by SEAM against as many random ones; the gold reward at the first
    share is the one comparison that is tested."""
    table = Table(title=f"dropped by SEAM - at random, {len(found)} seeds")
    table.add_column("share dropped")
    for title in _RL.values():
        table.add_column(title, justify="right")
    for share in shares:
        cells = []
        for key in _RL:
            kinds = ([each[f"{kind}-{share:g}"][key] for each in found]
                     for kind in ("seam", "random"))  # fmt: skip
            values, base = kinds
            primary = share == shares[0] and key == "gold"
            tested = str(paired(values, base))
            cells.append(tested if primary else _interval_of_difference(values, base))
        table.add_row(f"{share:g}", *cells)
    table.caption = "95 % intervals over seeds. p: the primary comparison; the others "
    table.caption += "are not tested"
    return table


def _interval_of_difference(values: list[float], base: list[float]) -> str:
    mean, half, _ = paired(values, base)
    return str(Interval(mean, half))


def estimator_table(found: Arms) -> Table:
    """What each estimator finds, and how it ranks prompts."""
    table = Table(title="estimators")
    table.add_column("estimator")
    for title in _ESTIMATORS.values():
        table.add_column(title, justify="right")
    for name in found[0]:
        values = ([result[name][key] for result in found] for key in _ESTIMATORS)
        table.add_row(name, *(interval(each).plain() for each in values))
    return table


def mismatch_table(found: Sequence[Mapping[str, float]]) -> Table:
    """Pairs of completions that the reward model orders otherwise than gold does."""
    table = Table(title="pairs that the reward model misorders")
    for name in ("of", "rate", "above held-out"):
        table.add_column(name, justify="left" if name == "of" else "right")
    base = [result["held-out"] for result in found]
    for name, title in _JUDGED.items():
        values = [result[name] for result in found]
        against = ""
        if name != "held-out":
            against = _interval_of_difference(values, base)
        table.add_row(title, interval(values).plain(), against)
    return table


def overlaps(lines: Lines) -> dict[str, dict[str, float]]:
    """Overlap of the lowest fifths of each two estimators, on the prompts of both.

    Args:
        lines: of one (policy, reward model) pair.
    """
    of = _by_estimator(lines)
    return {
        f"{a} / {b}": _overlap(of[a], of[b]) for a, b in itertools.combinations(of, 2)
    }


def model_overlaps(first: Lines, second: Lines) -> dict[str, dict[str, float]]:
    """The same of two reward models, estimator by estimator."""
    a, b = _by_estimator(first), _by_estimator(second)
    return {name: _overlap(a[name], b[name]) for name in a if name in b}


def _by_estimator(lines: Lines) -> dict[str, dict[int, float]]:
    of: dict[str, dict[int, float]] = {}
    for line in lines:
        of.setdefault(line["estimator"], {})[line["index"]] = of_line(dict(line))
    return of


def _overlap(first: dict[int, float], second: dict[int, float]) -> dict[str, float]:
    both = [index for index in first if index in second]
    a, b = (np.array([one[n] for n in both]) for one in (first, second))
    found = overlap(a, b)
    return {"jaccard": found.jaccard, "above_chance": found.jaccard - found.chance}


def overlap_table(
    estimators: Sequence[Mapping[str, Mapping[str, float]]],
    models: Sequence[Mapping[str, Mapping[str, float]]],
) -> Table:
    """Jaccard of the lowest fifths: of two estimators, over seeds; of two reward
    models, over their pairs.

    Args:
        estimators: `overlaps` of each seed.
        models: `model_overlaps` of each two seeds.
    """
    table = Table(title="overlap of the lowest fifths, on the same prompts")
    for name in ("of", "Jaccard", "above chance"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for name in estimators[0]:
        values = ([each[name][key] for each in estimators]
                  for key in ("jaccard", "above_chance"))  # fmt: skip
        jaccard, above = map(interval, values)
        table.add_row(name, jaccard.plain(), str(above))
    table.add_section()
    for name in models[0] if models else ():
        jaccard, above = ([each[name][key] for each in models]
                          for key in ("jaccard", "above_chance"))  # fmt: skip
        table.add_row(
            f"two reward models, {name}",
            f"{np.mean(jaccard):.3f} ({min(jaccard):.3f} .. {max(jaccard):.3f})",
            f"{np.mean(above):+.3f} ({min(above):+.3f} .. {max(above):+.3f})",
        )
    table.caption = (
        "estimators: 95 % intervals over seeds; reward models: mean, lowest "
    )
    table.caption += "and highest of all pairs of seeds, which are not independent"
    return table


def plot_curve(
    found: Arms, path: pathlib.Path, *, drop: Sequence[float], random: Sequence[float]
) -> pathlib.Path:
    """Gain in gold against the share of the prompts that was dropped."""

    def at(share: float, arm: str) -> tuple[float, float, float]:
        mean, half = interval([result[arm]["gold_gain"] for result in found])
        return share, mean, half

    lines = {
        kind: [at(0.0, "all"), *(at(n, f"{kind}-{n:g}") for n in sorted(shares))]
        for kind, shares in (("seam", drop), ("random", random))
    }
    return interval_lines(
        lines, path, x="share of prompts dropped", y="gain in gold reward"
    )
