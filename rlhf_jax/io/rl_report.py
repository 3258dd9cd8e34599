"""The sections of report.html that an RL run, or scored samples, have.

`rl_sections` reads metrics rows and samples.jsonl of `rloo` and `ppo`;
`best_of_n_sections` reads best_of_n.json of `generate`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.io import metrics, rl_plots
from rlhf_jax.io.html import Plot, Section, Table, Tile

_SHOWN_TEXT = 600
"""Characters of a prompt or completion in a table; the file has all."""


def is_rl(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are the metrics of an RL run."""
    return any("policy/kl" in row for row in rows)


def rl_sections(
    rows: Sequence[Mapping[str, Any]], run_dir: pathlib.Path
) -> list[Section]:
    """Over-optimisation, curves and samples."""
    folder = run_dir / "plots"
    sections = []
    names = {"kl": "policy/kl", "proxy": "reward/proxy", "gold": "reward/gold"}
    if not any(names["gold"] in row for row in rows):
        names.pop("gold")
    # Steps of which a number is missing (it was not finite) are left out of all curves.
    whole = [r for r in rows if all(r.get(key) is not None for key in names.values())]
    if whole:
        curve: dict[str, Any] = {
            n: metrics.series(whole, k)[1] for n, k in names.items()
        }
        plot = rl_plots.over_optimisation(
            {"training": curve}, folder / "over_optimisation.png"
        )
        caption = "Reward of the sampled completions against √KL, a dot a step."
        text = [] if "gold" in curve else ["No gold reward was given (--gold)."]
        sections.append(
            Section("Reward against KL", text=text, plots=[Plot(plot, caption)])
        )
    curves = rl_plots.rl_curves(rows, folder / "rl.png")
    if curves:
        caption = "Means of each step; smoothed over a twentieth of the run."
        sections.append(Section("Steps", plots=[Plot(curves, caption)]))
    table = sample_table(run_dir / "samples.jsonl")
    if table is not None:
        sections.append(Section("Samples", tables=[table]))
    return sections


def rl_tiles(rows: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """Headline numbers: the first and the last tenth of the run."""
    tiles = []
    for key, label in (
        ("reward/proxy", "proxy reward"),
        ("reward/gold", "gold reward"),
    ):
        _, values = metrics.series(rows, key)
        if len(values):
            tenth = max(1, len(values) // 10)
            first, last = values[:tenth].mean(), values[-tenth:].mean()
            tiles.append(Tile(label, float(last), f"from {first:.3f}"))
    _, kl = metrics.series(rows, "policy/kl")
    if len(kl):
        tiles.append(Tile("KL to the reference", float(kl[-1]), "nats a completion"))
    return tiles


def sample_table(path: pathlib.Path) -> Table | None:
    """The samples of the first and the last table written; None without any."""
    if not path.exists():
        return None
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.rstrip("\n").split("\n"):  # completions may hold U+2028
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    if not rows:
        return None
    ends = {rows[0]["step"], rows[-1]["step"]}
    shown = [row for row in rows if row["step"] in ends]
    golds = any("gold" in row for row in shown)
    columns = ["step", "prompt", "completion", "reward", *(["gold"] if golds else [])]
    return Table(
        columns=[*columns, "KL", "tokens"],
        rows=[
            [
                row["step"],
                _text(row.get("prompt")),
                _text(row.get("completion")),
                row.get("reward"),
                *([row.get("gold")] if golds else []),
                row.get("kl"),
                row.get("tokens"),
            ]
            for row in shown
        ],
        caption="Completions of the first and of the last table in samples.jsonl.",
    )


def best_of_n_sections(
    found: Mapping[str, Any] | None, folder: pathlib.Path
) -> list[Section]:
    """The curves of best_of_n.json; none without it."""
    if found is None:
        return []
    curve = found["curve"]
    plot = rl_plots.best_of_n_curve(curve, folder / "best_of_n.png")
    columns = ("n", "KL", "proxy", "±", "gold", "±")
    rows = zip(
        curve["n"],
        curve["kl"],
        curve["proxy"],
        [1.96 * e for e in curve["proxy_error"]],
        curve["gold"],
        [1.96 * e for e in curve["gold_error"]],
    )
    caption = (
        f"The best of n by the proxy, {found['prompts']} prompts, {found['samples']} "
        "samples each; 95 % intervals over prompts."
    )
    table = Table(columns, [list(row) for row in rows], caption)
    return [Section("Best of n", plots=[Plot(plot, caption)], tables=[table])]


def _text(value: Any) -> str:
    """A prompt or completion for a table cell; messages as role: text."""
    if isinstance(value, list):
        value = "\n".join(f"{m.get('role')}: {m.get('content')}" for m in value)
    text = str(value)
    return text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 1] + "…"
