"""The diagnostics in a report: hidden states by set, and Contrast Instructions.

Both read an evaluate.json alone. `states_section` needs its "states" and the state
figures in the metrics of its "sets"; `contrast_section` its "contrast_instructions".
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from rlhf_jax.io import evaluation_plots as plots
from rlhf_jax.io import plot_style as style
from rlhf_jax.io.html import Plot, Section, Table, number

NORM_COLUMNS = ("mean", "std", "skewness", "p99")
_NORMS = {
    "state_norm_before": "|h| before the final norm",
    "state_norm": "|h| after the final norm",
    "difference_norm_before": "|h chosen - h rejected| before the final norm",
    "difference_norm": "|h chosen - h rejected| after the final norm",
}


def states_section(evaluation: Mapping[str, Any], folder: pathlib.Path) -> Section:
    """Norms, effective rank and head norm; draws the histograms of |h| by set."""
    states = evaluation["states"]
    entries = [e for e in evaluation.get("sets", []) if "states_n" in e["metrics"]]
    histograms = states["histograms"]
    png = state_norms(histograms, folder / "state_norms.png")
    rest = list(histograms["after"]["counts"])[len(style.COLOURS) :]
    caption = "Norms of the hidden states at the scored tokens, by set"
    caption += f"; not drawn: {', '.join(rest)}." if rest else "."
    rows = [
        (e["name"], title, *(e["metrics"].get(f"{key}_{c}") for c in NORM_COLUMNS))
        for key, title in _NORMS.items()
        for e in entries
        if f"{key}_mean" in e["metrics"]
    ]
    ranks = [
        (
            e["name"],
            e["metrics"]["states_n"],
            e["metrics"].get("effective_rank"),
            e["metrics"].get("effective_rank_before"),
        )
        for e in entries
    ]
    return Section(
        "Hidden states",
        text=[
            f"Of at most {states['max_completions']:,} completions a set, a seeded "
            "subset of its rows. The head reads the state after the final norm, which "
            "bounds |h|; before it the norm is free.",
            states_line(states),
            "Effective rank: exp of the entropy of the singular values' shares, states "
            "not centred. It grows with the number of completions: compare sets of "
            "one size.",
        ],
        plots=[Plot(png, caption)],
        tables=[
            Table(("set", "norm", *NORM_COLUMNS), rows),
            Table(
                ("set", "completions", "effective rank", "before the final norm"), ranks
            ),
        ],
    )


def states_line(states: Mapping[str, Any]) -> str:
    """The numbers of the model and of all sets together, as one line."""
    parts = []
    if states.get("head_norm") is not None:
        parts.append(f"Norm of the head: {number(states['head_norm'])}.")
    if states.get("norm_dispersion") is not None:
        parts.append(
            "Standard deviation across the sets of their mean |h|: "
            f"{number(states['norm_dispersion'])} after the final norm, "
            f"{number(states.get('norm_dispersion_before'))} before it."
        )
    return " ".join(parts)


def state_norms(
    histograms: Mapping[str, Mapping[str, Any]], path: str | pathlib.Path
) -> pathlib.Path:
    """Histograms of |h| before and after the final norm, an outline a set.

    Args:
        histograms: {"before", "after": {"edges": [n + 1], "counts": {set: [n]}}}; the
            first six sets are drawn, each as shares of its own completions.
        path: of the PNG.
    """
    titles = {"before": "before the final norm", "after": "after it"}
    names = list(histograms["after"]["counts"])[: len(style.COLOURS)]
    colours = dict(zip(names, style.COLOURS, strict=False))
    with matplotlib.rc_context(style.STYLE):
        figure, panels = style.panel_grid(len(titles), width=3.8, height=2.9)
        for axes, (part, title) in zip(panels, titles.items(), strict=True):
            found = histograms[part]
            for name, colour in colours.items():
                counts = found["counts"][name]
                shares = [count / max(sum(counts), 1) for count in counts]
                axes.stairs(shares, found["edges"], fill=True, color=colour, alpha=0.12)
                axes.stairs(shares, found["edges"], color=colour, linewidth=1.4)
            axes.set_title(title)
            axes.set_xlabel("|h|")
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel("share of completions")
        style.colour_key(figure, colours)
        return style.save(figure, path)


def contrast_section(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Section:
    """Both consistencies of every set of Contrast Instructions, with a plot."""
    rows, dots = [], []
    for entry in entries:
        for side, kind, figures in contrast_rows(entry["table"]):
            rows.append(
                (
                    entry["name"],
                    side,
                    kind,
                    *(figures[k] for k in ("n", "value", "low", "high", "ties")),
                    figures["identical"],
                )
            )
            if side == "query" and figures["n"]:
                name = f"{entry['name']}, {kind}"
                note = f"n = {figures['n']:,}"
                parts = {key: figures[key] for key in ("value", "low", "high")}
                dots.append({"name": name, "note": note, **parts})
    drawn = []
    if dots:
        png = plots.interval_dots(
            dots,
            folder / "contrast_instructions.png",
            title="Contrast Instructions",
            xlabel="consistency, the query's side",
        )
        drawn = [Plot(png, "Consistency with Wilson 95 % intervals.")]
    columns = ("set", "side", "consistency", "n", "share", "95 % from", "to", "ties")
    return Section(
        "Contrast Instructions",
        text=[
            "Two similar instructions I and I', each with its response r and r'. "
            "Response consistency: R(I, r) > R(I, r'). Instruction consistency: "
            "R(I, r) > R(I', r). Published is the query's side; the retrieval's side "
            "exchanges I and I'. A tie is inconsistent; examples with identical texts "
            "are left out. Intervals: Wilson 95 %."
        ],
        plots=drawn,
        tables=[Table((*columns, "identical"), rows)],
    )


def contrast_rows(
    table: Mapping[str, Any],
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(side, consistency, figures) in the order in which they are shown."""
    return [
        (side, kind, table[side][kind])
        for side in ("query", "retrieval")
        for kind in ("response", "instruction")
    ]
