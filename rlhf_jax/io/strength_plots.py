"""Plots of preference strength: its distribution, and the spread between models."""

import pathlib

import matplotlib
import numpy as np

from rlhf_jax.curation.strength import Strength, u_curve
from rlhf_jax.io import plot_style as style

_ACTION_COLOURS = {
    "keep": style.BLUE,
    "soft": style.ORANGE,
    "flip": style.VERMILION,
    "drop": style.GREY,
}


def histogram(
    found: Strength, actions: np.ndarray, path: str | pathlib.Path, *, bins: int = 50
) -> pathlib.Path:
    """Pairs by mean strength, coloured by what is done with them.

    Args:
        found: strengths of Q pairs.
        actions: [Q].
        path: of the PNG.
        bins: of the histogram.
    """
    edges = np.histogram_bin_edges(found.mean, bins=bins)
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(6.4, 3.4)
        axes = figure.add_subplot()
        shown = [name for name in _ACTION_COLOURS if (actions == name).any()]
        axes.hist(
            [found.mean[actions == name] for name in shown],
            bins=edges.tolist(),
            stacked=True,
            color=[_ACTION_COLOURS[name] for name in shown],
        )
        axes.axvline(0, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set_title("Preference strength")
        axes.set_xlabel("mean over models of reward(chosen) - reward(rejected)")
        axes.set_ylabel("pairs")
        style.colour_key(figure, {name: _ACTION_COLOURS[name] for name in shown})
        return style.save(figure, path)


def u_shape(found: Strength, path: str | pathlib.Path) -> pathlib.Path:
    """The standard deviation between models against the mean strength.

    Source: Wang et al. 2024, arXiv:2401.06080, figure 2.
    """
    means, stds = u_curve(found)
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(5.2, 3.4)
        axes = figure.add_subplot()
        axes.scatter(
            found.mean, found.std, s=5, color=style.SKY, alpha=0.4, linewidths=0
        )
        axes.plot(means, stds, color=style.VERMILION, marker="o", markersize=3)
        axes.axvline(0, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set_title("Disagreement between models")
        axes.set_xlabel("mean strength of the pair")
        axes.set_ylabel("standard deviation over models")
        return style.save(figure, path)
