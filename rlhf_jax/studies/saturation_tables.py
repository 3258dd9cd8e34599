"""Tables and panels of the saturation study, from its study.json.

Intervals are Student's over seeds, and everything that learns is replicated: a seed is
a policy of each quality, a reward model of each quality and the RLOO runs between them.
Differences are within a seed. `verdict` says when they are called saturated.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from rlhf_jax.io.heatmap import Panel
from rlhf_jax.studies.statistics import Interval, interval

Found = dict[str, Any]
Number = Callable[[dict[str, Any]], float]
"""Of one seed of a cell."""


def after(name: str) -> Number:
    """A number of the policy after RL."""
    return lambda one: one["after"][name]


def gain(name: str) -> Number:
    """What RL adds to it."""
    return lambda one: one["after"][name] - one["before"][name]


def values(found: Found, number: Number) -> np.ndarray:
    """[SFT quality, reward model quality, seed]."""
    return np.array(
        [
            [
                [number(one) for one in found["cells"][f"{steps}-{pairs}"]]
                for pairs in found["pairs"]
            ]
            for steps in found["sft_steps"]
        ]
    )


def panels(found: Found) -> list[Panel]:
    """What the plot shows."""
    gold, gained = values(found, after("gold")), values(found, gain("gold"))
    halves = [
        np.apply_along_axis(lambda x: interval(x.tolist()).half, 2, v)
        for v in (gold, gained)
    ]
    over = f"(± 95 %, {_seeds(found)} seeds)"
    return [
        Panel(f"Gold after RLOO {over}", gold.mean(axis=2), halves[0]),
        Panel(
            f"Gain over the SFT policy {over}",
            gained.mean(axis=2),
            halves[1],
            signed=True,
        ),
    ]


def all_tables(found: Found) -> list[Table]:
    """In the order in which they are printed."""
    return [
        _grid(found, "gold reward after RLOO, held-out prompts", after("gold")),
        _grid(found, "gain in gold over the SFT policy", gain("gold"), signed=True),
        _steps(found),
        _cells(found),
        _compute(found),
    ]


def _grid(found: Found, title: str, number: Number, *, signed: bool = False) -> Table:
    """SFT qualities down, reward model qualities across."""
    table = Table(title=f"{title}; {_seeds(found)} seeds")
    table.add_column("SFT steps (gold)")
    for pairs in found["pairs"]:
        accuracy = np.mean(found["accuracy"][str(pairs)])
        table.add_column(f"{pairs:,} pairs ({accuracy:.3f})", justify="right")
    grid = values(found, number)
    sft = values(found, lambda one: one["before"]["gold"]).mean(axis=(1, 2))
    for row, steps in enumerate(found["sft_steps"]):
        intervals = [interval(cell) for cell in grid[row]]
        shown = [str(one) if signed else one.plain() for one in intervals]
        table.add_row(f"{steps:,} ({sft[row]:.3f})", *shown)
    table.caption = "means and 95 % intervals over seeds, each with its own SFT "
    table.caption += "policies, reward models and RLOO runs; prompts are shared. In "
    table.caption += "brackets: gold of the SFT policies; accuracy of the reward "
    table.caption += "models on pairs of new prompts"
    return table


def verdict(gain: Interval, least: float) -> str:
    """What an interval of a gain says of one of size `least`.

    Args:
        gain: over seeds.
        least: smallest gain that matters, above 0.

    >>> verdict(Interval(0.005, 0.01), 0.02), verdict(Interval(0.005, 0.03), 0.02)
    ('saturated', 'open')
    """
    if gain.mean + gain.half < least:
        return "saturated"
    if gain.mean - gain.half > 0:
        return "gains"
    return "open"


def _steps(found: Found) -> Table:
    """From one quality to the next: of the stage itself, and of RLOO's gold."""
    table = Table(title=f"what the next quality adds; {_seeds(found)} seeds")
    table.add_column("from, to")
    for name in (
        "SFT gold, or accuracy",
        "gold after RLOO, mean over the others",
        "verdict",
        "gold after RLOO, at the best other",
        "verdict",
    ):
        table.add_column(name, justify="right")
    gold = values(found, after("gold"))
    own = values(found, lambda one: one["before"]["gold"]).mean(axis=1)
    least = found["least_gain"]
    accuracy = np.array([found["accuracy"][str(pairs)] for pairs in found["pairs"]])
    axes = (
        ("SFT steps", found["sft_steps"], own, gold),
        ("pairs", found["pairs"], accuracy, gold.swapaxes(0, 1)),
    )
    for name, qualities, stage, grid in axes:
        for n, (low, high) in enumerate(itertools.pairwise(qualities)):
            step = grid[n + 1] - grid[n]
            gains = [interval(step.mean(axis=0)), interval(step[-1])]
            cells = [text for g in gains for text in (str(g), verdict(g, least))]
            own_gain = interval(stage[n + 1] - stage[n])
            table.add_row(f"{low:,} -> {high:,} {name}", str(own_gain), *cells)
    table.caption = "differences within a seed, 95 % intervals over seeds, no "
    table.caption += "correction for their number. Saturated: the interval lies below "
    table.caption += f"a gain of {least:g} gold; gains: above 0; open: neither"
    return table


_CELL: dict[str, tuple[Number, str]] = {
    "proxy gain, SD": (gain("proxy"), "+.2f"),
    "SD of raw reward": (lambda one: one["reward_std"], ".2f"),
    "KL": (after("kl"), ".2f"),
    "tokens": (after("length"), ".1f"),
    "eos rate": (after("eos_rate"), ".3f"),
    "mismatch, SFT": (lambda one: _or_nan(one["before"]["mismatch"]), ".3f"),
    "mismatch, after": (lambda one: _or_nan(one["after"]["mismatch"]), ".3f"),
    "retokenised": (after("retokenised"), ".3f"),
}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _cells(found: Found) -> Table:
    table = Table(title="the cells, means over seeds")
    for name in ("SFT steps", "pairs", *_CELL):
        table.add_column(name, justify="right")
    means = {k: values(found, number).mean(2) for k, (number, _) in _CELL.items()}
    for row, steps in enumerate(found["sft_steps"]):
        for column, pairs in enumerate(found["pairs"]):
            numbers = [
                f"{means[name][row, column]:{form}}"
                for name, (_, form) in _CELL.items()
            ]
            table.add_row(f"{steps:,}", f"{pairs:,}", *numbers)
    table.caption = "mismatch: pairs of completions of a prompt that the reward model "
    table.caption += "misorders; SD: standard deviation over completions of the policy "
    table.caption += "that the reward model started from"
    return table


def _compute(found: Found) -> Table:
    table = Table(title="total compute")
    for name in ("", "tokens sampled", "tokens trained", "TFLOP", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    parts = found["compute"]
    names = ("sampled", "trained", "flops", "wall_s")
    whole = {key: sum(part[key] for part in parts.values()) for key in names}
    for title, part in {**parts, "all": whole}.items():
        table.add_row(
            title,
            f"{part['sampled']:,.0f}",
            f"{part['trained']:,.0f}",
            f"{part['flops'] / 1e12:.2f}",
            f"{part['wall_s']:,.0f}",
        )
    table.caption = "FLOPs without padding, embeddings and heads; seconds of SFT and "
    table.caption += "reward models are their steps', those of RLOO whole cells'. "
    table.caption += "Not counted: completions before RLOO, sampled once a policy, and "
    table.caption += "those that standardise the rewards"
    return table


def _seeds(found: Found) -> int:
    return len(next(iter(found["cells"].values())))
