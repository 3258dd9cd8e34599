"""Plots of an evaluation: accuracy with its intervals, calibration, rewards.

Each function takes plain numbers and a path, writes one figure and returns the path.
The look is `plot_style`'s.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf_jax.io import plot_style as style

_MEDIAN_FROM = 80
"""Points below which a running median would be noise."""


def interval_dots(
    entries: Sequence[Mapping[str, Any]],
    path: str | pathlib.Path,
    *,
    title: str,
    xlabel: str,
    chance: float | None = 0.5,
    limits: tuple[float, float] | None = None,
) -> pathlib.Path:
    """One dot a line with its 95 % interval, a hollow diamond for its baseline.

    Args:
        entries: {"name", "value"} and optionally "low", "high", "baseline", "note"
            (small text after the name, such as n = 100) and "baseline_name", from top
            to bottom.
        path: of the PNG.
        title: over the plot.
        xlabel: under it.
        chance: a dashed line, None = none.
        limits: of the x axis, from the numbers by default.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(7.2, 1.15 + 0.42 * len(entries))
        axes = figure.add_subplot()
        for y, entry in enumerate(reversed(entries)):
            _interval_dot(axes, y, entry)
        _name_rows(axes, entries)
        if chance is not None:
            axes.axvline(
                chance, color=style.GREY, linewidth=1, linestyle="--", zorder=0
            )
        if limits:
            axes.set_xlim(*limits)
        else:
            axes.margins(x=0.12)
        axes.set_ylim(-0.6, len(entries) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel)
        axes.set_title(title)
        _dot_legend(figure, entries)
        return style.save(figure, path)


def _interval_dot(axes: Axes, y: int, entry: Mapping[str, Any]) -> None:
    value = entry["value"]
    low, high = entry.get("low", value), entry.get("high", value)
    axes.plot([low, high], [y, y], color=style.BLUE, linewidth=3, alpha=0.35)
    axes.plot(value, y, "o", color=style.BLUE, markersize=7)
    axes.annotate(
        f"{value:.3f}",
        (max(high, value), y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=style.INK,
    )
    if entry.get("baseline") is not None:
        axes.plot(
            entry["baseline"], y, "D", mfc="white", mec=style.VERMILION, ms=5.5, mew=1.4
        )


def _name_rows(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    names = [
        f"{e['name']}\n{e['note']}" if e.get("note") else str(e["name"])
        for e in reversed(entries)
    ]
    axes.set_yticks(range(len(entries)), names, color=style.INK, linespacing=1.15)


def _dot_legend(figure: Figure, entries: Sequence[Mapping[str, Any]]) -> None:
    marks = [
        Line2D([], [], color=style.BLUE, marker="o", ms=6, lw=3, label="95 % interval")
    ]
    names = {e.get("baseline_name", "baseline") for e in entries if e.get("baseline")}
    marks += [
        Line2D(
            [],
            [],
            color=style.VERMILION,
            marker="D",
            mfc="white",
            lw=0,
            ms=5,
            label=name,
        )
        for name in sorted(names)
    ]
    if any("low" in e for e in entries) or names:
        figure.legend(handles=marks, loc="outside lower right", ncols=len(marks))


def reliability_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | pathlib.Path,
    *,
    errors: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Accuracy against confidence sigmoid(|reward difference|), a panel a set.

    Args:
        curves: by name, bins with low, high, count, confidence, accuracy.
        path: of the PNG.
        errors: expected calibration error by name, for the titles.
    """
    names = style.shown(curves)
    with matplotlib.rc_context(style.STYLE):
        figure, panels = style.panel_grid(len(names), height=2.9)
        for axes, name in zip(panels, names, strict=True):
            _reliability_panel(axes, [b for b in curves[name] if b["count"]])
            ece = f"  ECE {errors[name]:.3f}" if errors and name in errors else ""
            axes.set_title(f"{name}{ece}")
            axes.set_xlabel("confidence")
        panels[0].set_ylabel("accuracy")
        panels[0].text(
            0.6,
            0.61,
            "calibrated",
            rotation=45,
            rotation_mode="anchor",
            transform_rotates_text=True,
            color=style.GREY,
            fontsize=8,
        )
        return style.save(figure, path)


def _reliability_panel(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    total = sum(b["count"] for b in bins)
    # The share of the pairs in each bin, along the bottom.
    axes.bar(
        [(b["low"] + b["high"]) / 2 for b in bins],
        [0.2 * b["count"] / total for b in bins],
        width=[0.92 * (b["high"] - b["low"]) for b in bins],
        transform=axes.get_xaxis_transform(),
        color=style.SKY,
        alpha=0.4,
        linewidth=0,
    )
    axes.plot([0.5, 1], [0.5, 1], color=style.GREY, linewidth=1, linestyle="--")
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    axes.plot(*zip(*points, strict=True), color=style.BLUE, marker="o", markersize=4)
    lowest = min(0.5, *(accuracy for _, accuracy in points))
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(lowest - 0.15 * (1 - lowest), 1.03)


def reward_histograms(
    groups: Mapping[str, Mapping[str, Sequence[float]]], path: str | pathlib.Path
) -> pathlib.Path:
    """Rewards of chosen and rejected completions, a panel a set.

    Args:
        groups: by name, {"edges": [n + 1], "chosen": [n], "rejected": [n]} counts.
        path: of the PNG.
    """
    names = style.shown(groups)
    with matplotlib.rc_context(style.STYLE):
        figure, panels = style.panel_grid(len(names))
        for axes, name in zip(panels, names, strict=True):
            group = groups[name]
            for part, colour in (("rejected", style.VERMILION), ("chosen", style.BLUE)):
                axes.stairs(
                    group[part], group["edges"], fill=True, color=colour, alpha=0.28
                )
                axes.stairs(group[part], group["edges"], color=colour, linewidth=1.4)
            axes.set_title(name)
            axes.set_xlabel("reward")
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel("completions")
        style.colour_key(figure, {"chosen": style.BLUE, "rejected": style.VERMILION})
        return style.save(figure, path)


def reward_against_length(
    points: Mapping[str, Mapping[str, Sequence[Any]]],
    path: str | pathlib.Path,
    *,
    correlations: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Reward against the number of words, a panel a set, with the median by length.

    Args:
        points: by name, {"words", "reward", "chosen" (bool)} of equal length.
        path: of the PNG.
        correlations: by name, for the titles.
    """
    names = style.shown(points)
    with matplotlib.rc_context(style.STYLE):
        figure, panels = style.panel_grid(len(names))
        for axes, name in zip(panels, names, strict=True):
            words = np.asarray(points[name]["words"], float)
            reward = np.asarray(points[name]["reward"], float)
            chosen = np.asarray(points[name]["chosen"], bool)
            for part, colour in ((~chosen, style.VERMILION), (chosen, style.BLUE)):
                axes.scatter(
                    words[part], reward[part], s=7, color=colour, alpha=0.35, lw=0
                )
            if len(words) >= _MEDIAN_FROM:
                axes.plot(*_running_median(words, reward), color=style.INK, lw=1.6)
            r = (correlations or {}).get(name)
            axes.set_title(name if r is None else f"{name}  r = {r:+.2f}")
            axes.set_xlabel("words")
        panels[0].set_ylabel("reward")
        style.colour_key(
            figure,
            {
                "chosen": style.BLUE,
                "rejected": style.VERMILION,
                "median by length": style.INK,
            },
        )
        return style.save(figure, path)


def _running_median(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Medians of x and y in eight groups of equal size, ordered by x."""
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, 8) if len(part)]
    return [float(np.median(x[p])) for p in parts], [
        float(np.median(y[p])) for p in parts
    ]


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]],
    path: str | pathlib.Path,
    *,
    title: str,
    chance: float | None = 0.5,
) -> pathlib.Path:
    """Bars by group and part, in [0, 1], values written on top: the RM-Bench figure.

    Args:
        groups: {group: {part: value}}, every group with the same parts.
        path: of the PNG.
        title: over the plot.
        chance: a dashed line, None = none.
    """
    parts = list(next(iter(groups.values())))
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(max(4.6, 1.5 * len(groups) + 1.2), 3.1)
        axes = figure.add_subplot()
        width = 0.8 / len(parts)
        for i, part in enumerate(parts):
            x = np.arange(len(groups)) + (i - (len(parts) - 1) / 2) * width
            values = [group[part] for group in groups.values()]
            axes.bar(
                x,
                values,
                0.9 * width,
                color=style.COLOURS[i % len(style.COLOURS)],
                lw=0,
            )
            for place, value in zip(x, values, strict=True):
                axes.text(
                    place, value + 0.012, f"{value:.2f}", ha="center", fontsize=7.5
                )
        axes.set_xticks(range(len(groups)), list(groups), color=style.INK)
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="x", visible=False)
        axes.set_title(title)
        if chance is not None:
            axes.axhline(
                chance, color=style.GREY, linewidth=1, linestyle="--", zorder=0
            )
        style.colour_key(figure, dict(zip(parts, style.COLOURS, strict=False)))
        return style.save(figure, path)
