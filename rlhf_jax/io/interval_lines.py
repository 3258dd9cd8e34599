"""Lines of means with their intervals, named at their ends."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

from rlhf_jax.io import plot_style as style


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
        for (name, points), colour in zip(lines.items(), style.COLOURS, strict=False):
            at, mean, half = zip(*points, strict=True)
            axes.errorbar(
                at, mean, yerr=half, fmt="o-", color=colour, markersize=4, elinewidth=1
            )
            ends.append((at[-1], mean[-1], name, colour))
        axes.margins(x=0.06)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        style.label_ends(axes, ends)
        return style.save(figure, path)
