"""Plots of supervised training: curves over steps; the look is `plot_style`'s."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlhf_jax.io import metrics
from rlhf_jax.io import plot_style as style

_TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "margin": "Margin (chosen − rejected)",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}
_TICKS = {"learning_rate": "{x:.3g}", "tokens_per_s": "{x:,.0f}"}
_SERIES_PREFIXES = ("train/", "perf/", "optim/")


def training_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | pathlib.Path,
    *,
    best_step: int | None = None,
) -> pathlib.Path | None:
    """Loss, accuracy, margin, learning rate ... against the step; None without any.

    Args:
        rows: lines of metrics.jsonl.
        path: of the PNG.
        best_step: marked by a dotted line.
    """
    panels = {
        name: [
            (label, colour, *metrics.series(rows, key))
            for key, label, colour in _panel_keys(rows, name)
            if len(metrics.series(rows, key)[0])
        ]
        for name in _TITLES
    }
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        return None
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.panel_grid(len(panels), width=3.9)
        for place, (name, lines) in zip(axes, panels.items(), strict=True):
            _curve_panel(place, name, lines)
            if best_step is not None:
                place.axvline(best_step, color=style.GREY, linewidth=1, linestyle=":")
        if best_step is not None:
            axes[0].annotate(
                "best",
                (best_step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color=style.GREY,
            )
        return style.save(figure, path)


def _panel_keys(
    rows: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[str, str, str]]:
    """(key, label, colour) of the lines of one panel: training first, then each set."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    train = [p + name for p in _SERIES_PREFIXES if p + name in keys][:1]
    named = [
        key for key in keys if key.startswith("eval/") and key.endswith(f"/{name}")
    ]
    lines = [(key, "train", style.GREY if named else style.BLUE) for key in train]
    return lines + [
        (
            key,
            key[len("eval/") : -len(name) - 1] or "eval",
            style.COLOURS[i % len(style.COLOURS)],
        )
        for i, key in enumerate(named)
    ]


def _curve_panel(axes: Axes, name: str, lines: Sequence[tuple]) -> None:
    ends = []
    for label, colour, steps, values in lines:
        few = len(steps) <= style.LOUD_POINTS
        if label == "train" and not few and name != "learning_rate":
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            values = style.smooth(values)
        marker = "o" if len(steps) == 1 or (label != "train" and few) else None
        axes.plot(steps, values, color=colour, marker=marker, markersize=3.5)
        ends.append((steps[-1], values[-1], label, colour))
    axes.set_title(_TITLES[name])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step")
    axes.margins(x=0.02, y=0.08)
    if name in _TICKS:
        axes.yaxis.set_major_formatter(_TICKS[name])
    if len(lines) > 1:
        style.label_ends(axes, ends)
