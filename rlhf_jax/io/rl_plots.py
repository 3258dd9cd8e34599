"""Plots of RL runs: curves over steps, over-optimisation, best-of-n."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from rlhf_jax.io import metrics
from rlhf_jax.io import plot_style as style

_BINS = 12
"""Means of as many steps each along the KL, where there are more than twice as many
points."""
_PANELS = {
    "Reward": {"reward/proxy": "proxy", "reward/gold": "gold"},
    "KL to the reference (nats)": {"policy/kl": "k1", "policy/kl_k3": "k3"},
    "Entropy (nats a token)": {"policy/entropy": "entropy"},
    "Completion length (tokens)": {"completion/length": "length"},
    "Share of completions": {
        "completion/eos_rate": "stopped",
        "completion/repetition": "repetition",
        "policy/clip_fraction": "clipped",
    },
    "Critic": {"value/explained_variance": "explained variance"},
}


def rl_curves(
    rows: Sequence[Mapping[str, Any]], path: str | pathlib.Path
) -> pathlib.Path | None:
    """Rewards, KL, entropy, length ... against the step; None without any.

    Args:
        rows: lines of metrics.jsonl.
        path: of the PNG.
    """
    panels = {}
    for title, names in _PANELS.items():
        lines = [(label, *metrics.series(rows, key)) for key, label in names.items()]
        lines = [line for line in lines if len(line[1])]
        if lines:
            panels[title] = lines
    if not panels:
        return None
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.panel_grid(len(panels), width=3.9)
        for place, (title, lines) in zip(axes, panels.items(), strict=True):
            ends = []
            for number, (label, steps, values) in enumerate(lines):
                colour = style.COLOURS[number]
                place.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
                smooth = style.smooth(values)
                place.plot(steps, smooth, color=colour)
                ends.append((steps[-1], smooth[-1], label, colour))
            place.set_title(title)
            place.set_xlabel("step")
            place.margins(x=0.02)
            if len(ends) > 1:
                style.label_ends(place, ends)
        return style.save(figure, path)


def over_optimisation(
    curves: Mapping[str, Mapping[str, Sequence[float]]], path: str | pathlib.Path
) -> pathlib.Path:
    """Proxy and gold reward against the square root of the KL, a panel a curve.

    Args:
        curves: by name, "kl" in nats, "proxy" and "gold"; with "proxy_error" and
            "gold_error" (half widths) shaded.
        path: of the PNG.

    Source: Gao et al. 2023, arXiv:2210.10760, figure 1.
    """
    names = style.shown(curves)
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.panel_grid(len(names), width=3.9, height=2.9)
        for place, name in zip(axes, names, strict=True):
            curve = {key: np.asarray(values) for key, values in curves[name].items()}
            _against_root_kl(place, curve)
            place.set_title(name)
            place.set_xlabel("square root of the KL to the reference (√nats)")
            place.set_ylabel("reward")
        return style.save(figure, path)


def _against_root_kl(axes: Axes, curve: Mapping[str, np.ndarray]) -> None:
    root = np.sqrt(np.maximum(curve["kl"], 0))
    order = np.argsort(root, kind="stable")
    ends = []
    for key, colour in (("proxy", style.BLUE), ("gold", style.VERMILION)):
        if key not in curve:
            continue
        x, y = root[order], curve[key][order]
        if len(x) > 2 * _BINS:  # single steps: dots, and a line through means
            axes.plot(x, y, "o", color=colour, markersize=3, alpha=0.25, mew=0)
            bins = np.array_split(np.arange(len(x)), _BINS)
            x, y = (np.array([values[b].mean() for b in bins]) for values in (x, y))
        axes.plot(x, y, "o-", color=colour, markersize=3.5, alpha=0.8)
        if f"{key}_error" in curve:
            half = curve[f"{key}_error"][order]
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.15, lw=0)
        ends.append((x[-1], y[-1], key, colour))
    axes.margins(x=0.06)
    style.label_ends(axes, ends)


def best_of_n_curve(
    curve: Mapping[str, Sequence[float]], path: str | pathlib.Path
) -> pathlib.Path:
    """Proxy and gold reward of the best of n against the square root of its KL.

    Args:
        curve: "n", "kl", "proxy", "gold", "proxy_error", "gold_error" (standard
            errors).
        path: of the PNG.
    """
    values = {key: np.asarray(x, float) for key, x in curve.items()}
    for key in ("proxy_error", "gold_error"):
        values[key] = 1.96 * values[key]
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(5.4, 3.4)
        axes = figure.add_subplot()
        _against_root_kl(axes, values)
        top = axes.secondary_xaxis("top")
        top.set_xticks(np.sqrt(values["kl"]), [f"{n:g}" for n in values["n"]])
        top.set_xlabel("n")
        axes.set_xlabel("square root of log n − (n − 1)/n (√nats)")
        axes.set_ylabel("reward of the best of n")
        return style.save(figure, path)
