"""The one look of every plot: colours, grid, panels, labels at the ends of lines.

Okabe and Ito's colours, told apart with any colour vision; figures on matplotlib's Agg
canvas without pyplot, so that no global state is touched and no display is needed.
The modules named *_plots draw.
"""

import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
ORANGE, SKY, GREY, INK = "#E69F00", "#56B4E9", "#8A8F98", "#24292F"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
STYLE: Any = {
    "axes.edgecolor": "#C5CAD1",
    "axes.axisbelow": True,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelcolor": "#57606A",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#E9ECEF",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "text.color": INK,
    "xtick.color": "#57606A",
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.color": "#57606A",
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
}
MAX_PANELS = 9
"""Small multiples in one figure; further ones are named in a note."""
LOUD_POINTS = 60


def new_figure(width: float, height: float) -> Figure:
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(width, height), layout=spacing)
    FigureCanvasAgg(figure)
    return figure


def panel_grid(
    panels: int, *, width: float = 3.3, height: float = 2.5
) -> tuple[Figure, list[Axes]]:
    """A figure of small multiples: up to three in a row, four as two rows of two."""
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    figure = new_figure(max(width * columns, 4.2), height * rows)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    return figure, axes


def shown(names: Iterable[str]) -> list[str]:
    """The names that get a panel: the first MAX_PANELS."""
    return list(names)[:MAX_PANELS]


def left_out(names: Iterable[str]) -> str:
    """What a caption must say of the names without a panel; empty when all have one."""
    rest = list(names)[MAX_PANELS:]
    return f"not drawn: {', '.join(rest)}" if rest else ""


def save(figure: Figure, path: str | pathlib.Path) -> pathlib.Path:
    """Writes the PNG; the same numbers give the same bytes."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart to at least `gap`, in their order, about their middle."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = (sum(placed) - sum(positions)) / max(len(positions), 1)
    return [p - shift for p in placed]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right end of lines (x, y, name, colour), moved apart."""
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    places = _spread([y for _, y, _, _ in ends], 0.085 * (high - low))
    for (x, _, name, colour), y in zip(ends, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a twentieth of the run, without the start's bias."""
    decay = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    smooth = np.empty(len(values))
    for i, value in enumerate(values):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth[i] = total / weight
    return smooth


def colour_key(figure: Figure, names: Mapping[str, str]) -> None:
    marks = [
        Line2D([], [], color=colour, lw=2.4, label=name)
        for name, colour in names.items()
    ]
    figure.legend(handles=marks, loc="outside lower right", ncols=len(marks))
