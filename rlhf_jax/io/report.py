"""report.html of a run directory, from the files that are in it.

`write_report` reads config.yaml, metrics.jsonl, samples.jsonl, best.json, evaluate.json
and best_of_n.json, whichever are there, draws plots/*.png and writes report.html. It
may be called again at any time: after training, after evaluation, on a run that was
killed.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlhf_jax.io import html, metrics, training_plots
from rlhf_jax.io.evaluation_report import (
    evaluation_notes,
    evaluation_sections,
    evaluation_tiles,
)
from rlhf_jax.io.html import Plot, Report, Section, Table, Tile
from rlhf_jax.io.rl_report import (
    best_of_n_sections,
    is_rl,
    rl_sections,
    rl_tiles,
)


def write_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes plots/*.png and report.html into a run directory; returns the page's path.

    Raises:
        ValueError: the directory holds none of the files a report is made of, or one of
            them is not what its name says.
    """
    run_dir = pathlib.Path(run_dir)
    rows, unreadable = read_metrics(run_dir / "metrics.jsonl")
    evaluation = _read_json(run_dir / "evaluate.json")
    picked = _read_json(run_dir / "best_of_n.json")
    if not rows and evaluation is None and picked is None:
        raise ValueError(
            f"{run_dir}: neither metrics.jsonl with a line nor evaluate.json nor "
            "best_of_n.json; a report needs one of them: train or evaluate into this "
            "directory first"
        )
    best = _read_json(run_dir / "best.json")
    config = _read_yaml(run_dir / "config.yaml")
    sections, tiles, notes = [], [], []
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable} lines"
        notes.append(f"metrics.jsonl: {lines} could not be read.")
    if evaluation is not None:
        sections += evaluation_sections(evaluation, run_dir / "plots")
        tiles += evaluation_tiles(evaluation)
        notes += evaluation_notes(evaluation)
    sections += best_of_n_sections(picked, run_dir / "plots")
    if is_rl(rows):
        sections += rl_sections(rows, run_dir)
        tiles += rl_tiles(rows)
    if rows:
        sections.append(_training_section(rows, best, run_dir / "plots"))
        tiles += _training_tiles(rows, best)
    report = Report(
        title=f"Run {run_dir.resolve().name}",
        subtitle=_subtitle(config, evaluation),
        tiles=tiles,
        sections=sections,
        config=config or (evaluation or {}).get("config"),
        notes=notes,
    )
    path = run_dir / "report.html"
    path.write_text(html.render(report), encoding="utf-8")
    return path


def read_metrics(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """(rows, lines that could not be read) of a metrics.jsonl; ([], 0) without one."""
    if not path.exists():
        return [], 0
    rows, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif line.strip():
            unreadable += 1
    return rows, unreadable


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_yaml(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    return value if isinstance(value, dict) else None


def _subtitle(
    config: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> str:
    model = (evaluation or {}).get("model") or (config or {}).get("model")
    return f"Model: {model}" if isinstance(model, str) else ""


def _training_section(
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    folder: pathlib.Path,
) -> Section:
    step = best.get("step") if best else None
    curves = training_plots.training_curves(
        rows, folder / "training.png", best_step=step
    )
    steps = max(row["step"] for row in rows)
    caption = (
        "Training and evaluation by step; train is smoothed over a twentieth of it."
    )
    return Section(
        "Training",
        text=[f"{steps:,} optimizer steps."],
        plots=[Plot(curves, caption)] if curves else [],
        tables=_last_values(rows),
    )


def _last_values(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    keys = dict.fromkeys(key for row in rows for key in row)
    table = []
    for key in keys:
        steps, values = metrics.series(rows, key)
        if key not in ("schema", "step") and len(steps):
            low, high = float(values.min()), float(values.max())
            table.append((key, float(values[-1]), low, high, int(steps[-1])))
    columns = ("metric", "last", "lowest", "highest", "at step")
    return [Table(columns, table, "Last value of every metric.")] if table else []


def _training_tiles(
    rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> list[Tile]:
    tiles = [Tile("steps", max(row["step"] for row in rows))]
    if best and isinstance(best.get("value"), int | float):
        note = f"{best.get('metric', '')} at step {best.get('step')}"
        tiles.append(Tile("best", best["value"], note))
    for key, label in (
        ("train/loss", "last training loss"),
        ("perf/tokens_per_s", "tokens/s"),
    ):
        values = metrics.series(rows, key)[1]
        if len(values):
            tiles.append(Tile(label, float(values[-1])))
    return tiles
