"""The tables that `evaluate` prints: sets, benchmarks, hidden states, and what to know
of them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_jax.io.diagnostics_report import contrast_rows, states_line
from rlhf_jax.io.evaluation_report import evaluation_notes
from rlhf_jax.io.html import number


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints every table of an evaluate.json, then the notes."""
    for table in tables(result):
        console.print(table)
    for note in evaluation_notes(result):
        console.print(f"note: {note}", markup=False)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of the sets and benchmarks that the result holds."""
    pairs = [e for e in result["sets"] if e["kind"] == "pairs"]
    kwise = [e for e in result["sets"] if e["kind"] == "kwise"]
    made = []
    if pairs:
        made.append(_pairs(pairs))
    if kwise:
        made.append(_kwise(kwise))
    if result.get("rmbench"):
        made.append(_rmbench(result["rmbench"]["table"]))
    if result.get("rewardbench"):
        made.append(_rewardbench(result["rewardbench"]["table"]))
    if result.get("contrast_instructions"):
        made.append(_contrast(result["contrast_instructions"]))
    if result.get("states"):
        made.append(_states(result["states"], result["sets"]))
    return made


def _table(title: str, caption: str, columns: list[str]) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", show_edge=False)
    table.caption_justify = "left"
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", overflow="fold")
    return table


def _share(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(values: Mapping[str, Any], key: str) -> str:
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return _share(values.get(key)) + spread.replace("[", "\\[")


def _pairs(entries: list[Mapping[str, Any]]) -> Table:
    methods = "; ".join(sorted({entry["interval"] for entry in entries}))
    table = _table(
        "Pairs",
        f"Ties count half. Intervals: {methods}. longer: the longer one is chosen. "
        "matched: word ratio in 0.8 to 1.25.",
        ["set", "n", "accuracy", "longer", "matched (n)", "margin", "ECE"],
    )
    for entry in entries:
        m = entry["metrics"]
        table.add_row(
            entry["name"],
            number(m["n"]),
            _with_interval(m, "accuracy"),
            _share(m.get("longer_is_chosen")),
            f"{_share(m.get('length_matched_accuracy'))} ({m['length_matched_n']:,})",
            _share(m["margin"]),
            _share(m["ece"]),
        )
    return table


def _kwise(entries: list[Mapping[str, Any]]) -> Table:
    table = _table(
        "K-wise rows",
        "tau-b per prompt, then the mean; rewards that all tie count 0; gold scores "
        "that all tie are left out. Intervals: bootstrap over prompts. mismatch: pairs "
        "that the rewards order otherwise than gold; margin, ECE: of the pairs that "
        "gold orders.",
        [
            "set",
            "prompts",
            "Kendall tau",
            "of length",
            "pair acc.",
            "mismatch",
            "margin",
            "ECE",
            "tied",
            "gold tied",
        ],
    )
    for entry in entries:
        m = entry["metrics"]
        table.add_row(
            entry["name"],
            number(m["n_prompts"]),
            _with_interval(m, "kendall_tau"),
            _share(m.get("kendall_tau_of_length")),
            _share(m.get("accuracy")),
            _share(m.get("mismatch_rate")),
            _share(m.get("margin")),
            _share(m.get("ece")),
            number(m["reward_tied"]),
            number(m["gold_tied"]),
        )
    return table


def _rmbench(table: Mapping[str, Any]) -> Table:
    missing = ", ".join(table["missing"]) or "none"
    made = _table(
        "RM-Bench",
        f"{table['n']:,} prompts of {table['full_size']:,}; without a prompt: "
        f"{missing}. "
        "A tie is wrong.",
        ["domain", "n", "hard", "normal", "easy", "average"],
    )
    for name, figures in {**table["domains"], "overall": table["overall"]}.items():
        parts = ("hard", "normal", "easy", "average")
        made.add_row(
            name, number(figures["n"]), *(_share(figures[part]) for part in parts)
        )
    return made


def _rewardbench(table: Mapping[str, Any]) -> Table:
    unmapped = escape(", ".join(table["unmapped"])) or "none"
    made = _table(
        "RewardBench-style",
        f"Sections weigh subsets by published size. In no section: {unmapped}.",
        ["subset", "section", "n", "accuracy"],
    )
    for name, row in table["subsets"].items():
        made.add_row(
            escape(name),
            row["section"] or "–",
            number(row["n"]),
            _share(row["accuracy"]),
        )
    made.add_section()
    for name, section in table["sections"].items():
        made.add_row(name, "", number(section["n"]), _share(section["accuracy"]))
    made.add_row("mean of sections", "", number(table["n"]), _share(table.get("score")))
    return made


def _contrast(entries: list[Mapping[str, Any]]) -> Table:
    table = _table(
        "Contrast Instructions",
        "response: R(I, r) > R(I, r'). instruction: R(I, r) > R(I', r). query: as "
        "published; retrieval: I and I' exchanged. A tie is inconsistent. Intervals: "
        "Wilson 95 %.",
        ["set", "side", "consistency", "n", "share", "ties", "identical"],
    )
    for entry in entries:
        for side, kind, figures in contrast_rows(entry["table"]):
            table.add_row(
                entry["name"],
                side,
                kind,
                number(figures["n"]),
                _with_interval(
                    {
                        **figures,
                        "value_low": figures["low"],
                        "value_high": figures["high"],
                    },
                    "value",
                ),
                number(figures["ties"]),
                number(figures["identical"]),
            )
    return table


def _states(states: Mapping[str, Any], entries: list[Mapping[str, Any]]) -> Table:
    table = _table(
        "Hidden states",
        f"{states_line(states)} Norms: mean (std), at most "
        f"{states['max_completions']:,} completions a set. before: before the final "
        "norm. Compare effective ranks at one number of completions.",
        [
            "set",
            "completions",
            "|h|",
            "|h| before",
            "|h diff|",
            "|h diff| before",
            "eff. rank",
            "before",
        ],
    )
    keys = ("state_norm", "state_norm_before")
    keys += ("difference_norm", "difference_norm_before")
    for entry in entries:
        m = entry["metrics"]
        if "states_n" in m:
            table.add_row(
                entry["name"],
                number(m["states_n"]),
                *(_mean_and_std(m, key) for key in keys),
                number(m["effective_rank"]),
                number(m["effective_rank_before"]),
            )
    return table


def _mean_and_std(metrics: Mapping[str, Any], key: str) -> str:
    if metrics.get(f"{key}_mean") is None:
        return number(None)
    return f"{metrics[f'{key}_mean']:.4g} ({metrics[f'{key}_std']:.3g})"
