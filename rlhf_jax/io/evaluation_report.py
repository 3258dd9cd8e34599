"""The evaluation part of a report: sections, tiles and notes from an evaluate.json.

The file holds "sets" (one entry a set of pairs or K-wise rows: name, kind, n,
available, subset, interval, metrics, reliability, histogram, points, set_aside), the
tables "rmbench" and "rewardbench", and what `diagnostics_report` shows ("states",
"contrast_instructions"). Every function here only reads it; plots go into the folder
given.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.io import evaluation_plots as plots
from rlhf_jax.io import plot_style
from rlhf_jax.io.diagnostics_report import contrast_section, states_section
from rlhf_jax.io.html import Plot, Section, Table, Tile


def evaluation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What must be said beside the numbers: subsets, rows set aside, tied prompts."""
    notes = []
    if evaluation.get("random_head"):
        notes.append("The model has no trained reward head: its scores are random.")
    entries = [(entry["name"], entry) for entry in evaluation.get("sets", [])]
    for title, key in (("RM-Bench", "rmbench"), ("RewardBench", "rewardbench")):
        if evaluation.get(key):
            entries.append((title, evaluation[key]))
    entries += [(e["name"], e) for e in evaluation.get("contrast_instructions", [])]
    for name, entry in entries:
        if entry.get("subset"):
            notes.append(
                f"{name}: a seeded subset, {entry['n']:,} of "
                f"{entry['available']:,} rows (seed {evaluation.get('seed')})."
            )
        for reason, count in (entry.get("set_aside") or {}).items():
            notes.append(f"{name}: {count:,} rows set aside: {reason}.")
    return notes


def evaluation_tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    """The headline numbers: accuracy or tau of the first eight sets."""
    tiles = []
    for entry in evaluation.get("sets", []):
        metrics = entry["metrics"]
        key = "accuracy" if entry["kind"] == "pairs" else "kendall_tau"
        if key in metrics:
            label = f"{key.replace('_', ' ')} · {entry['name']}"
            tiles.append(Tile(label, metrics[key], _interval(metrics, key)))
    return tiles[:8]


def _interval(metrics: Mapping[str, Any], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return "" if low is None or high is None else f"95 % {low:.3f} to {high:.3f}"


def evaluation_sections(
    evaluation: Mapping[str, Any], folder: pathlib.Path
) -> list[Section]:
    """Sections of an evaluate.json; draws its plots into `folder`."""
    sets = evaluation.get("sets", [])
    pairs = [e for e in sets if e["kind"] == "pairs" and e["metrics"].get("n")]
    kwise = [e for e in sets if e["kind"] == "kwise" and "kendall_tau" in e["metrics"]]
    sections = []
    if pairs:
        sections += [_pairs_section(pairs, folder), _length_section(pairs, folder)]
        sections += [_calibration_section(pairs, folder)]
    if kwise:
        sections.append(_kwise_section(kwise, folder))
    if evaluation.get("rmbench"):
        sections.append(_rmbench_section(evaluation["rmbench"], folder))
    if evaluation.get("rewardbench"):
        sections.append(_rewardbench_section(evaluation["rewardbench"], folder))
    if evaluation.get("contrast_instructions"):
        sections.append(contrast_section(evaluation["contrast_instructions"], folder))
    if evaluation.get("states"):
        sections.append(states_section(evaluation, folder))
    return sections


def _rows(
    entries: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> list[tuple]:
    return [
        (e["name"], *(e["metrics"].get(key) for key in columns.values()))
        for e in entries
    ]


def _caption(text: str, drawn: Iterable[str]) -> str:
    rest = plot_style.left_out(drawn)
    return f"{text}; {rest}." if rest else f"{text}."


def _dots(entries: Sequence[Mapping[str, Any]], key: str, baseline: str, name: str):
    return [
        {
            "name": e["name"],
            "value": e["metrics"][key],
            "low": e["metrics"].get(f"{key}_low", e["metrics"][key]),
            "high": e["metrics"].get(f"{key}_high", e["metrics"][key]),
            "baseline": e["metrics"].get(baseline),
            "baseline_name": name,
            "note": f"n = {e['metrics'].get('n', e['metrics'].get('n_prompts')):,}",
        }
        for e in entries
    ]


def _pairs_section(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Section:
    dots = _dots(entries, "accuracy", "longer_is_chosen", "longer is chosen")
    png = plots.interval_dots(
        dots, folder / "accuracy.png", title="Accuracy by set", xlabel="accuracy"
    )
    columns = {
        "pairs": "n",
        "prompts": "n_prompts",
        "accuracy": "accuracy",
        "95 % from": "accuracy_low",
        "to": "accuracy_high",
        "ties": "ties",
        "margin": "margin",
        "loss (nats)": "loss",
        "chosen mean": "chosen_reward_mean",
        "rejected mean": "rejected_reward_mean",
        "reward std": "reward_std",
        "reward min": "reward_min",
        "reward max": "reward_max",
    }
    methods = sorted({e["interval"] for e in entries})
    return Section(
        "Accuracy on pairs",
        text=[
            "Share of pairs whose chosen completion gets the higher reward; a tie "
            f"counts half. Intervals: {'; '.join(methods)}."
        ],
        plots=[
            Plot(png, "Accuracy with its 95 % interval; the diamond is always longer.")
        ],
        tables=[Table(("set", *columns), _rows(entries, columns))],
    )


def _length_section(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Section:
    columns = {
        "accuracy": "accuracy",
        "longer is chosen": "longer_is_chosen",
        "matched pairs": "length_matched_n",
        "matched accuracy": "length_matched_accuracy",
        "95 % from": "length_matched_accuracy_low",
        "to": "length_matched_accuracy_high",
        "r (reward, words)": "reward_length_correlation",
        "r within pairs": "margin_length_correlation",
    }
    drawn = [e for e in entries if e.get("points")]
    made = []
    if drawn:
        correlations = {
            e["name"]: e["metrics"].get("reward_length_correlation") for e in drawn
        }
        png = plots.reward_against_length(
            {e["name"]: e["points"] for e in drawn},
            folder / "reward_length.png",
            correlations=correlations,
        )
        caption = _caption("Reward against words, a seeded sample", correlations)
        made.append(Plot(png, caption))
    histograms = {e["name"]: e["histogram"] for e in entries if e.get("histogram")}
    if histograms:
        png = plots.reward_histograms(histograms, folder / "rewards.png")
        caption = _caption("Rewards of chosen and rejected completions", histograms)
        made.append(Plot(png, caption))
    return Section(
        "Length and rewards",
        text=[
            "Matched pairs have a ratio of words chosen / rejected in [0.8, 1.25]; the "
            "baseline prefers the longer completion."
        ],
        plots=made,
        tables=[Table(("set", *columns), _rows(entries, columns))],
    )


def _calibration_section(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Section:
    columns = {"ECE": "ece", "Brier": "brier", "NLL (nats)": "loss"}
    curves = {e["name"]: e["reliability"] for e in entries if e.get("reliability")}
    made = []
    if curves:
        errors = {e["name"]: e["metrics"]["ece"] for e in entries}
        png = plots.reliability_curves(
            curves, folder / "reliability.png", errors=errors
        )
        caption = _caption("Accuracy by confidence; bars: share of the pairs", curves)
        made.append(Plot(png, caption))
    return Section(
        "Calibration",
        text=[
            "Confidence is sigmoid(|reward difference|). Below the dashed line the "
            "model is surer than it should be."
        ],
        plots=made,
        tables=[Table(("set", *columns), _rows(entries, columns))],
    )


def _kwise_section(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Section:
    png = plots.interval_dots(
        _dots(entries, "kendall_tau", "kendall_tau_of_length", "tau of length"),
        folder / "kendall_tau.png",
        title="Kendall's tau by set",
        xlabel="tau-b, mean over prompts",
        chance=0.0,
    )
    columns = {
        "prompts": "n_prompts",
        "tau-b": "kendall_tau",
        "95 % from": "kendall_tau_low",
        "to": "kendall_tau_high",
        "tau of length": "kendall_tau_of_length",
        "reward tied": "reward_tied",
        "gold tied": "gold_tied",
        "best of K": "best_of_k",
        "pair accuracy": "accuracy",
        "mismatch": "mismatch_rate",
        "pairs": "n_pairs",
    }
    inside = {
        "margin": "margin",
        "margin std": "margin_std",
        "loss (nats)": "loss",
        "ECE": "ece",
        "Brier": "brier",
        "reward mean": "reward_mean",
        "reward std": "reward_std",
        "reward min": "reward_min",
        "reward max": "reward_max",
    }
    return Section(
        "Ranking of K completions",
        text=[
            "Kendall's tau-b of reward against gold score, prompt by prompt, then the "
            "mean. A prompt whose rewards all tie counts 0; one whose gold scores "
            "all tie has no order and is left out: both are counted. Intervals: "
            "bootstrap over prompts. Mismatch: the share of a prompt's pairs that the "
            "rewards order otherwise than the gold scores. Margin, loss, ECE and Brier "
            "score: of the pairs that the gold scores order."
        ],
        plots=[Plot(png, "Kendall's tau-b with its 95 % interval.")],
        tables=[
            Table(("set", *part), _rows(entries, part)) for part in (columns, inside)
        ],
    )


def _rmbench_section(entry: Mapping[str, Any], folder: pathlib.Path) -> Section:
    table = entry["table"]
    domains = {**table["domains"], "overall": table["overall"]}
    parts = ("hard", "normal", "easy")
    png = plots.grouped_bars(
        {
            name: {part: figures[part] for part in parts}
            for name, figures in domains.items()
            if name != "safety_pooled"
        },
        folder / "rmbench.png",
        title="RM-Bench",
    )
    rows = [
        (name, f["n"], *(f[part] for part in parts), f["average"], f["ties"])
        for name, f in domains.items()
    ]
    text = [
        f"{table['n']:,} prompts of the published {table['full_size']:,}. Hard: the "
        "chosen completion is in the plainer style; easy: in the more elaborate one. "
        "A tie is wrong. Overall: mean of the domains present; safety: mean of its "
        "halves."
    ]
    if table["missing"]:
        text.append(f"No prompt here from: {', '.join(table['missing'])}.")
    return Section(
        "RM-Bench",
        text=text,
        plots=[Plot(png, "RM-Bench accuracy by domain and difficulty.")],
        tables=[Table(("domain", "n", *parts, "average", "ties"), rows)],
    )


def _rewardbench_section(entry: Mapping[str, Any], folder: pathlib.Path) -> Section:
    table = entry["table"]
    subsets = table["subsets"]
    without = ", ".join(table["missing_sections"]) or "none"
    unmapped = ", ".join(table["unmapped"]) or "none"
    dots = [
        {
            "name": name,
            "value": row["accuracy"],
            "low": row["low"],
            "high": row["high"],
            "note": f"n = {row['n']:,}",
        }
        for name, row in sorted(subsets.items(), key=lambda item: -item[1]["n"])[:14]
    ]
    png = plots.interval_dots(
        dots,
        folder / "rewardbench.png",
        title="RewardBench-style sets, the largest ones",
        xlabel="accuracy",
    )
    sections = [
        (name, s["n"], s["accuracy"], ", ".join(s["missing"]) or "none")
        for name, s in table["sections"].items()
    ]
    sections.append(("mean of sections", table["n"], table.get("score"), ""))
    rows = [
        (name, r["section"], r["n"], r["accuracy"], r["low"], r["high"], r["ties"])
        for name, r in sorted(
            subsets.items(), key=lambda i: (i[1]["section"] or "~", i)
        )
    ]
    columns = ("subset", "section", "n", "accuracy", "95 % from", "to", "ties")
    return Section(
        "RewardBench-style tables",
        text=[
            "A section weighs its subsets by their published sizes. A tie is wrong. "
            f"Sections without a pair here: {without}. In no section: {unmapped}."
        ],
        plots=[Plot(png, "Accuracy by subset with Wilson 95 % intervals.")],
        tables=[
            Table(("section", "n", "accuracy", "subsets without a pair"), sections),
            Table(columns, rows),
        ],
    )
