"""Heat maps of a grid of means, side by side, each cell with its number."""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb

from rlhf_jax.io import plot_style as style


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One grid."""

    title: str
    mean: np.ndarray
    """[rows, columns]; nan = an empty cell."""
    half: np.ndarray
    """Half widths of the intervals; nan = none."""
    signed: bool = False
    """Whether 0 is the middle of the colours, and a plus sign is written."""
    limits: tuple[float, float] | None = None
    """Of the colours, so that panels compare; None = the grid's own."""


def heatmaps(
    panels: Sequence[Panel],
    path: str | pathlib.Path,
    *,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
) -> pathlib.Path:
    """The panels in a row; the first row of a grid is drawn at the bottom.

    Args:
        panels: grids of one shape.
        path: of the PNG.
        rows: name of the vertical axis, and of each of its places.
        columns: the same of the horizontal axis.
    """
    with matplotlib.rc_context(style.STYLE | {"axes.grid": False}):
        width, height = 1.1 + 0.85 * len(columns[1]), 1.3 + 0.6 * len(rows[1])
        figure, all_axes = style.panel_grid(len(panels), width=width, height=height)
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel)
            axes.set_title(panel.title)
            axes.set_xticks(range(len(columns[1])), columns[1])
            axes.set_yticks(range(len(rows[1])), rows[1])
            axes.set_xlabel(columns[0])
            axes.set_ylabel(rows[0])
            axes.spines[:].set_visible(False)
        return style.save(figure, path)


def value_range(panel: Panel) -> tuple[float, float]:
    """(lowest, highest) of the colours; 0 is in the middle of a signed panel's."""
    if panel.limits is not None:
        return panel.limits
    low, high = float(np.nanmin(panel.mean)), float(np.nanmax(panel.mean))
    # Equal numbers still need a range.
    if panel.signed:
        far = max(abs(low), abs(high)) or 0.5
        return -far, far
    return low, high if high > low else low + 1.0


def _draw(axes: Axes, panel: Panel) -> None:
    low, high = value_range(panel)
    span = high - low
    losses = [style.VERMILION] if panel.signed else []
    colours = LinearSegmentedColormap.from_list("panel", [*losses, "white", style.BLUE])
    axes.imshow(
        panel.mean, origin="lower", cmap=colours, vmin=low, vmax=high, aspect=0.7
    )
    for (row, column), mean in np.ndenumerate(panel.mean):
        if np.isnan(mean):
            continue
        half = panel.half[row, column]
        text = f"{mean:+.3f}" if panel.signed else f"{mean:.3f}"
        if np.isfinite(half):
            text += f"\n±{half:.3f}"
        dark = np.dot(to_rgb(colours((mean - low) / span)), (0.3, 0.59, 0.11)) < 0.5
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else style.INK,
        )
