"""A point for each of several things that are compared, in two measures, with the
intervals of both."""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np

from rlhf_jax.io import plot_style as style

MARKERS = "osD^v<>P"


@dataclasses.dataclass(frozen=True)
class Point:
    """One of them."""

    name: str
    x: float
    y: float
    x_half: float
    """Half width of the interval; nan = none."""
    y_half: float
    """The same."""


def scatter(
    points: Sequence[Point],
    path: str | pathlib.Path,
    *,
    title: str,
    x: str,
    y: str,
    reference: tuple[float, str],
) -> pathlib.Path:
    """The points, their names beside the panel.

    Args:
        points: at most 48: each has a colour and a mark of its own.
        path: of the PNG.
        title: of the panel.
        x: name of the horizontal axis.
        y: name of the vertical axis, which begins at 0.
        reference: a place on the horizontal axis, and what it is.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(7.2, 3.6)
        axes = figure.add_subplot()
        axes.axvline(reference[0], color=style.GREY, lw=1.2, ls="--", zorder=1)
        for n, point in enumerate(points):
            axes.errorbar(
                point.x,
                point.y,
                # Without an interval none is drawn.
                xerr=np.nan_to_num(point.x_half),
                yerr=np.nan_to_num(point.y_half),
                color=style.COLOURS[n % len(style.COLOURS)],
                marker=MARKERS[n % len(MARKERS)],
                markersize=6.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                elinewidth=1.3,
                ls="none",
                label=point.name,
            )
        axes.set_ylim(bottom=0)
        axes.annotate(
            reference[1],
            (reference[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color=style.GREY,
            fontsize=8,
        )
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.legend(loc="outside right center")
        return style.save(figure, path)
