"""The summary, plots and page of a `seam` run, from its lines.

`summarise` makes seam.json of the lines of each estimator; `show` prints it, `write`
draws it. Lines are those of seam.jsonl; null in `seam` is infinity: nothing misjudged.
"""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from rlhf_jax.curation.seam.scores import of_line, overlap
from rlhf_jax.io import heatmap, html
from rlhf_jax.io import plot_style as style

Line = Mapping[str, Any]
LOWEST = 0.2
"""Share of the prompts that count as lowest: what the paper removes."""
_SHOWN = 10
"""Prompts in the table of the lowest."""
_OVERLAP = {"jaccard": "Jaccard index", "chance": "by chance"}
_FIGURES = {
    "prompts": "prompts with a score",
    "worse": "worse completions",
    "misjudged": "share of them misjudged",
    "seamless": "share of prompts with none misjudged",
    "seam_low": "SEAM, 5 % quantile",
    "seam_median": "SEAM, median (both of the finite ones)",
    "gold_logprob": "log p a token: gold completions",
    "worse_logprob": "log p a token: worse completions",
    "misjudged_logprob": "log p a token: misjudged completions",
}


def summarise(
    lines: Mapping[str, Sequence[Line]], others: Mapping[str, Sequence[Line]]
) -> dict[str, Any]:
    """What seam.json holds.

    Args:
        lines: of each estimator.
        others: lines of other runs, to be compared estimator by estimator.
    """
    columns = {name: by_prompt(found) for name, found in lines.items() if found}
    for name, found in others.items():
        for estimator in dict.fromkeys(line["estimator"] for line in found):
            mine = [line for line in found if line["estimator"] == estimator]
            columns[f"{name}/{estimator}"] = by_prompt(mine)
    overlaps = []
    for first, second in itertools.combinations(columns, 2):
        if first not in lines and second not in lines:
            continue
        both = [key for key in columns[first] if key in columns[second]]
        if len(both) > 1:
            a, b = ([columns[name][key] for key in both] for name in (first, second))
            found = overlap(np.array(a), np.array(b), LOWEST)._asdict()
            found["spearman"] = _finite(found["spearman"])
            overlaps.append({"first": first, "second": second, **found})
    return {
        "schema": 1,
        "estimators": {name: _figures(found) for name, found in lines.items()},
        "overlaps": overlaps,
    }


def by_prompt(lines: Sequence[Line]) -> dict[tuple[str, int], float]:
    """SEAM by prompt id and which of the rows with this id it is, whether or not the
    others have a score: the same row in every estimator, and in runs on the same
    prompts."""
    return {(line["prompt_id"], line["occurrence"]): of_line(line) for line in lines}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _figures(lines: Sequence[Line]) -> dict[str, Any]:
    worse = [each for line in lines for each in line["worse"]]
    bad = [each for each in worse if each["misjudged"]]
    seam = np.array([of_line(line) for line in lines])
    finite = seam[np.isfinite(seam)]
    low, median = np.quantile(finite, [0.05, 0.5]) if len(finite) else (None, None)
    gold = [line["gold_logprob"] / line["gold_num_tokens"] for line in lines]
    return {
        "prompts": len(lines),
        "worse": len(worse),
        "misjudged": len(bad) / len(worse) if worse else None,
        "seamless": float(np.mean(~np.isfinite(seam))) if len(seam) else None,
        "seam_low": None if low is None else float(low),
        "seam_median": None if median is None else float(median),
        "gold_logprob": float(np.mean(gold)) if gold else None,
        "worse_logprob": _mean_logprob(worse),
        "misjudged_logprob": _mean_logprob(bad),
    }


def _per_token(completions: Sequence[Line]) -> np.ndarray:
    return np.array([each["logprob"] / each["num_tokens"] for each in completions])


def _mean_logprob(completions: Sequence[Line]) -> float | None:
    return float(_per_token(completions).mean()) if completions else None


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The summary as tables."""
    table = RichTable(title=f"seamlessness of {summary['prompts']:,} prompts")
    table.add_column("")
    for name in summary["estimators"]:
        table.add_column(name, justify="right")
    for key, title in _FIGURES.items():
        found = (figures[key] for figures in summary["estimators"].values())
        table.add_row(title, *map(html.number, found))
    console.print(table)
    if summary["overlaps"]:
        table = RichTable(title=f"the lowest {LOWEST:.0%} of both: Jaccard index")
        for name in ("first", "second", "prompts", "found", "by chance", "Spearman"):
            side = "left" if name in ("first", "second") else "right"
            table.add_column(name, justify=side)
        for row in summary["overlaps"]:
            table.add_row(*_overlap_cells(row))
        console.print(table)
    if summary.get("texts_per_s"):
        console.print(
            f"scored {summary['texts_scored']:,} texts, "
            f"{summary['texts_per_s']:,.1f} a second",
            highlight=False,
        )


def _overlap_cells(row: Mapping[str, Any]) -> list[str]:
    names = ("first", "second", "prompts", "jaccard", "chance", "spearman")
    return [html.number(row[name]) for name in names]


def write(
    root: pathlib.Path,
    summary: Mapping[str, Any],
    lines: Mapping[str, Sequence[Line]],
) -> pathlib.Path:
    """plots/*.png and report.html; returns the page's path."""
    shown = {name: found for name, found in lines.items() if found}
    sections = [
        html.Section(
            "Estimators",
            tables=[
                html.Table(
                    ["", *summary["estimators"]],
                    [
                        [title, *(f[key] for f in summary["estimators"].values())]
                        for key, title in _FIGURES.items()
                    ],
                    "Log-probabilities are means over completions, nats a token.",
                )
            ],
        )
    ]
    if shown:
        folder = root / "plots"
        sections.append(
            html.Section(
                "Scores and likelihoods",
                plots=[
                    html.Plot(
                        score_plot(shown, folder / "seam.png"),
                        "Prompts by SEAM; those without a misjudged completion, whose "
                        "SEAM is infinite, are not drawn.",
                    ),
                    html.Plot(
                        likelihood_plot(shown, folder / "likelihood.png"),
                        "Completions by log-probability a token under the policy.",
                    ),
                ],
            )
        )
    if summary["overlaps"]:
        sections.append(
            html.Section(
                "Overlap",
                plots=[
                    html.Plot(
                        overlap_plot(summary, root / "plots" / "overlap.png"),
                        f"How many prompts of the lowest {LOWEST:.0%} of two scores "
                        "are the same (Jaccard index), beside what two random sets of "
                        "these sizes would have.",
                    )
                ],
                tables=[
                    html.Table(
                        ["first", "second", "prompts", "Jaccard", "chance", "Spearman"],
                        [_overlap_cells(row) for row in summary["overlaps"]],
                        f"Of the prompts in the lowest {LOWEST:.0%} of both scores.",
                    )
                ],
            )
        )
    for name, found in shown.items():
        sections.append(_lowest_section(name, found))
    page = html.Report(
        title=f"Seamlessness · {root.resolve().name}",
        subtitle=f"{summary['prompts']:,} prompts",
        sections=sections,
    )
    path = root / "report.html"
    path.write_text(html.render(page), encoding="utf-8")
    return path


def _lowest_section(name: str, lines: Sequence[Line]) -> html.Section:
    """The prompts that fit worst, with what was misjudged in them."""
    lowest = sorted((line for line in lines if line["seam"] is not None), key=of_line)
    rows = []
    for line in lowest[:_SHOWN]:
        bad = [each for each in line["worse"] if each["misjudged"]]
        likeliest = max(bad, key=lambda each: each["logprob"] / each["num_tokens"])
        rows.append(
            [
                _short(line["prompt"]),
                line["seam"],
                f"{len(bad)} of {len(line['worse'])}",
                _short(line["gold"]),
                _short(likeliest["text"]),
            ]
        )
    columns = ["prompt", "SEAM", "misjudged", "gold", "likeliest misjudged"]
    return html.Section(f"Lowest by {name}", tables=[html.Table(columns, rows)])


def _short(value: Any, length: int = 300) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def overlap_plot(summary: Line, path: pathlib.Path) -> pathlib.Path:
    """Heat maps of the Jaccard index of two scores, and of what chance gives: this
    run's estimators against each other and against those of the runs compared with.

    Args:
        summary: of `summarise`, with overlaps.
        path: of the PNG.
    """
    pairs = {(row["first"], row["second"]): row for row in summary["overlaps"]}
    pairs |= {(second, first): row for (first, second), row in pairs.items()}
    rows = list(dict.fromkeys(first for first, _ in pairs))
    columns = [name for name in summary["estimators"] if name in rows]
    empty = dict.fromkeys(_OVERLAP, math.nan)
    grids = [
        np.array([[pairs.get((r, c), empty)[key] for c in columns] for r in rows])
        for key in _OVERLAP
    ]
    limits = (0.0, float(np.nanmax(grids)) or 1.0)
    half = np.full_like(grids[0], math.nan)
    return heatmap.heatmaps(
        [
            heatmap.Panel(title, grid, half, limits=limits)
            for title, grid in zip(_OVERLAP.values(), grids, strict=True)
        ],
        path,
        rows=("", rows),
        columns=("", columns),
    )


def score_plot(lines: Mapping[str, Sequence[Line]], path: pathlib.Path) -> pathlib.Path:
    """Histograms of SEAM, a panel an estimator."""
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.panel_grid(len(lines))
        for panel, (name, found) in zip(axes, lines.items(), strict=True):
            values = np.array([of_line(line) for line in found])
            panel.hist(values[np.isfinite(values)], bins=30, color=style.BLUE)
            infinite = int((~np.isfinite(values)).sum())
            panel.set_title(f"{name} ({infinite:,} infinite)" if infinite else name)
            panel.set_xlabel("SEAM = -log risk")
            panel.set_ylabel("prompts")
        return style.save(figure, path)


def likelihood_plot(
    lines: Mapping[str, Sequence[Line]], path: pathlib.Path
) -> pathlib.Path:
    """Densities of log p a token: gold, worse, and misjudged completions."""
    colours = {"gold": style.GREEN, "worse": style.BLUE, "misjudged": style.VERMILION}
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.panel_grid(len(lines))
        for panel, (name, found) in zip(axes, lines.items(), strict=True):
            worse = [each for line in found for each in line["worse"]]
            gold = [
                {"logprob": line["gold_logprob"], "num_tokens": line["gold_num_tokens"]}
                for line in found
            ]
            groups = {
                "gold": _per_token(gold),
                "worse": _per_token(worse),
                "misjudged": _per_token([e for e in worse if e["misjudged"]]),
            }
            edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), 40)
            for label, values in groups.items():
                if len(values):
                    panel.hist(
                        values,
                        bins=edges.tolist(),
                        density=True,
                        histtype="step",
                        color=colours[label],
                    )
            panel.set_title(name)
            panel.set_xlabel("log p a token (nats)")
            panel.set_yticks([])
        style.colour_key(figure, colours)
        return style.save(figure, path)
