"""`rlhf-jax data`: what a run would train on, before anything is paid for.

Reads, encodes and packs as `reward` and `sft` do, with the same settings, and shows:
rows kept and set aside with reasons, decoded examples with their masks, lengths, and
the padding of every layout. Colour on a terminal; elsewhere [[double brackets]] mark
what is trained on.
"""

import collections
import dataclasses
import itertools
import sys
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_jax.data import prepare, sources
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.plan import LAYOUTS
from rlhf_jax.data.prepare import DataConfig, PrepareReport
from rlhf_jax.data.store import ConversationDataset, PairDataset

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_BATCHES = 32
"""Batches that padding is measured on."""
_BAR = 40
_SHOWN = 2000
"""Characters of one text that are printed."""


@dataclasses.dataclass(frozen=True)
class DataProgramConfig:
    """Show rows, masks, lengths, padding and what would be set aside."""

    data: list[str]
    """Rows, SPEC or WEIGHT*SPEC; repeat to mix (see docs: data)."""
    model: str = "tiny"
    """Whose tokenizer and chat template: HF directory, hub id, .gguf, run directory; a
    preset means the testbed's tokenizer."""
    kind: Literal["auto", "pairs", "conversations"] = "auto"
    """Pairs for `reward`, conversations for `sft`; auto looks at the first row."""
    show: int = 2
    """Rows shown in full."""
    batch_size: int = 64
    """Rows in a batch, for the padding of each layout."""
    seed: int = 0
    """Seed of the order in which batches are filled."""
    side_file: str | None = None
    """File for the rows set aside; null = only counted."""
    rows: DataConfig = DataConfig()
    """How rows become batches: the same key as in `reward` and `sft`."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected at least one --data SPEC")
        if self.batch_size < 1 or self.show < 0:
            raise ValueError("batch_size: expected at least 1, and show at least 0")


def run(config: DataProgramConfig, console: Console | None = None) -> dict[str, Any]:
    """Prints the account of the data; returns its numbers."""
    console = console or Console(
        file=sys.stdout, highlight=False, soft_wrap=True, emoji=False
    )
    encoder = prepare.make_encoder(_tokenizer(config.model), config.rows)
    console.print(f"[bold]template[/bold]  {escape(encoder.describe())}")
    # Every policy becomes "drop" here: the point is to see all that would go wrong.
    lenient = dataclasses.replace(
        config.rows,
        malformed="drop",
        empty="drop",
        identical="drop",
        over_long="drop" if config.rows.over_long == "error" else config.rows.over_long,
    )
    prepare_rows = (
        prepare.prepare_pairs
        if _kind(config) == "pairs"
        else prepare.prepare_conversations
    )
    dataset, report = prepare_rows(
        config.data, encoder, lenient, side_file=config.side_file
    )
    _print_counts(console, report, config.rows)
    for row in range(min(config.show, len(dataset))):
        _print_row(console, dataset, row, encoder)
    lengths = _lengths(dataset)
    _print_lengths(console, lengths)
    layouts = [_measure(dataset, layout, config) for layout in _layouts(dataset)]
    _print_layouts(console, layouts, config)
    return {
        "total": report.total,
        "kept": report.kept,
        "set_aside": report.counts,
        "lengths": {
            name: dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist()))
            for name, values in lengths.items()
        },
        "layouts": layouts,
    }


def _tokenizer(spec: str) -> Any:
    from rlhf_jax.models.presets import PRESETS

    if spec in PRESETS:
        from rlhf_jax.testbed.tokenizer import testbed_tokenizer

        return testbed_tokenizer()
    from rlhf_jax.data import tokenizers

    return tokenizers.load_tokenizer(spec)


def _kind(config: DataProgramConfig) -> str:
    if config.kind != "auto":
        return config.kind
    source = sources.open_source(config.data[0])
    columns = config.rows.columns
    for n in range(min(len(source), 100)):
        try:
            row, _ = source[n]
        except ValueError:
            continue
        pairs = columns.chosen in row or columns.rejected in row
        return "pairs" if pairs else "conversations"
    return "pairs"


def _print_counts(console: Console, report: PrepareReport, config: DataConfig) -> None:
    table = Table(title="rows", title_justify="left", box=None, pad_edge=False)
    for name in ("", "rows", "policy", "first"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    table.add_row("read", f"{report.total:,}", "", "")
    table.add_row("kept", f"{report.kept:,}", "", "")
    for reason, count in report.counts.items():
        first = next((row for row in report.dropped if row.reason == reason), None)
        policy = config.policy(reason)
        stops = count and policy == "error"
        table.add_row(
            reason,
            f"{count:,}",
            Text("error: a run would stop", style="bold red") if stops else policy,
            escape(f"{first.where}: {first.detail}") if first else "",
        )
    if report.truncated:
        table.add_row("prompts cut", f"{report.truncated:,}", config.over_long, "")
    console.print(table)
    for note in [*report.notes, *([report.side_file] if report.side_file else [])]:
        console.print(escape(note))


def _print_row(
    console: Console,
    dataset: PairDataset | ConversationDataset,
    n: int,
    encoder: Encoder,
) -> None:
    console.rule(escape(dataset.where[n]), align="left")
    if isinstance(dataset, PairDataset):
        pair = dataset[n]
        numbers = [
            f"{name} {value:g}"
            for name in ("margin", "soft_label", "gap_bound", "weight")
            if (value := getattr(pair, name)) is not None
        ]
        console.print(
            f"prompt {len(pair.prompt)}, chosen {len(pair.chosen)}, rejected "
            f"{len(pair.rejected)} tokens; {', '.join(numbers)}"
        )
        for name, ids, style in (
            ("prompt", pair.prompt, "dim"),
            ("chosen", pair.chosen, "green"),
            ("rejected", pair.rejected, "red"),
        ):
            scored = name != "prompt"
            text = _marked(console, [(encoder.decode(ids), scored)], style)
            console.print(Text.assemble((f"{name:>8} ", "bold"), text))
        return
    item = dataset[n]
    spans = [
        (encoder.decode([int(token) for token, _ in group]), trained)
        for trained, group in itertools.groupby(
            zip(item.tokens, item.completion_mask), key=lambda pair: bool(pair[1])
        )
    ]
    trained = int(np.sum(item.completion_mask))
    console.print(f"{len(item.tokens)} tokens, {trained} trained on")
    console.print(_marked(console, spans, "green"))


def _marked(console: Console, spans: list[tuple[str, bool]], style: str) -> Text:
    """Texts with what is trained on in colour, or in [[brackets]] without colour."""
    colour = console.is_terminal and not console.no_color
    result = Text()
    for text, trained in spans:
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]} ... ({len(text) - _SHOWN} more characters)"
        text = "".join(
            c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text
        )
        if not colour:
            result.append(f"[[{text}]]" if trained else text)
        else:
            result.append(text, style=style if trained or style == "dim" else "dim")
    return result


def _lengths(dataset: PairDataset | ConversationDataset) -> dict[str, np.ndarray]:
    """Tokens of the parts of every row, by name."""
    lengths = dataset.lengths
    if isinstance(dataset, PairDataset):
        return {
            "prompt": lengths[:, 0],
            "chosen": lengths[:, 1],
            "rejected": lengths[:, 2],
            "pair": lengths.sum(axis=1),
        }
    ends = np.cumsum(lengths)
    trained = np.concatenate([[0], np.cumsum(dataset.completion_mask)])
    return {
        "conversation": lengths,
        "trained on": trained[ends] - trained[ends - lengths],
    }


def _print_lengths(console: Console, lengths: dict[str, np.ndarray]) -> None:
    table = Table(title="tokens", title_justify="left", box=None, pad_edge=False)
    names = ["min", *(f"{p}%" for p in PERCENTILES[1:-1]), "max", "mean", "sum"]
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for part, values in lengths.items():
        numbers = [*np.percentile(values, PERCENTILES), values.mean(), values.sum()]
        table.add_row(part, *(f"{number:,.0f}" for number in numbers))
    console.print()
    console.print(table)
    name, values = list(lengths.items())[-1 if "pair" in lengths else 0]
    console.print(f"\ntokens of a {name}")
    for line in histogram(values):
        console.print(line, markup=False)


def histogram(values: np.ndarray, *, bins: int = 10) -> list[str]:
    """Lines of text: range, count and a bar, in equal steps from 0 to the maximum."""
    top = int(values.max(initial=0)) + 1
    edges = np.unique(np.linspace(0, top, bins + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    width = len(str(top))
    return [
        f"{low:>{width}}-{high - 1:<{width}} {count:>7,} "
        + "#" * int(np.ceil(_BAR * count / max(counts.max(), 1)))
        for low, high, count in zip(edges, edges[1:], counts)
    ]


def _layouts(dataset: PairDataset | ConversationDataset) -> tuple[str, ...]:
    return LAYOUTS if isinstance(dataset, PairDataset) else ("packed", "padded")


def _measure(dataset: Any, layout: str, config: DataProgramConfig) -> dict[str, Any]:
    """Shapes and padding of the first batches in one layout."""
    size = min(config.batch_size, len(dataset))
    try:
        batches = Batches(
            dataset,
            size,
            seed=config.seed,
            layout=layout,  # type: ignore[arg-type]
            row_length=config.rows.row_length,
            num_shapes=config.rows.num_shapes,
            prefetch=0,
        )
    except ValueError as error:  # a row_length that this layout cannot use
        return {"layout": layout, "error": str(error)}
    shapes: collections.Counter[tuple[int, int]] = collections.Counter()
    real = 0
    for n in range(min(_BATCHES, -(-len(dataset) // size))):
        batch, _ = batches.build(n * size)
        sequences = getattr(batch, "sequences", batch)
        shapes[sequences.tokens.shape] += 1
        real += int(np.count_nonzero(sequences.segment))
    cells = sum(rows * length * count for (rows, length), count in shapes.items())
    return {
        "layout": layout,
        "shapes": [list(shape) for shape, _ in shapes.most_common()],
        "padding": 1.0 - real / cells,
        "cells_per_example": cells / (size * sum(shapes.values())),
    }


def _print_layouts(
    console: Console, layouts: list[dict[str, Any]], config: DataProgramConfig
) -> None:
    table = Table(
        title=f"layouts, {config.batch_size} rows a batch",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("", "padding", "cells an example", "shapes (rows x tokens)"):
        table.add_column(name, justify="left" if name in ("", "shapes") else "right")
    for item in layouts:
        chosen = item["layout"] + (" *" if item["layout"] == config.rows.layout else "")
        if "error" in item:
            table.add_row(chosen, "-", "-", escape(item["error"]))
            continue
        shapes = ", ".join(f"{rows} x {length}" for rows, length in item["shapes"][:6])
        table.add_row(
            chosen,
            f"{item['padding']:.1%}",
            f"{item['cells_per_example']:,.0f}",
            shapes,
        )
    console.print()
    console.print(table)
