"""Lines of means with their intervals, named at their ends."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

from rlhf_jax.io import plot_style as style

_APART = 0.015
"""Of the width: how far intervals at one place are drawn from each other."""


def interval_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | pathlib.Path,
    *,
    x: str,
    y: str,
) -> pathlib.Path:
    """One panel.

    Args:
        lines: name -> points (x, mean, half width of its interval; nan = none).
        path: of the PNG.
        x: name of the horizontal axis.
        y: name of the vertical axis.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(5.4, 3.4)
        axes = figure.add_subplot()
        ends = []
        places = [point[0] for points in lines.values() for point in points]
        apart = _APART * (max(places) - min(places))
        for n, (name, points) in enumerate(lines.items()):
            colour = style.COLOURS[n % len(style.COLOURS)]
            at, mean, half = zip(*points, strict=True)
            at = [place + apart * (n - (len(lines) - 1) / 2) for place in at]
            axes.errorbar(
                at, mean, yerr=half, fmt="o-", color=colour, markersize=4, elinewidth=1
            )
            ends.append((at[-1], mean[-1], name, colour))
        axes.margins(x=0.06)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        style.label_ends(axes, ends)
        return style.save(figure, path)
