"""From specs to a tokenised dataset and an account of every row.

    dataset, report = prepare_pairs(["0.7*a.jsonl", "0.3*hf:me/b"], encoder, config)

Every row is kept or set aside for one reason, and kept + set aside == read:
    malformed   cannot be read, or has wrong types, NaN, lone surrogates, missing
                columns, or a conversation that the chat template refuses
    empty       a prompt or an answer without text
    identical   chosen == rejected, as text or as the tokens that would be trained on
    over_long   prompt + answer above max_length, or prompt above max_prompt_length
For each reason a policy: "drop" counts the row and writes it to the side file (place,
reason, detail, the row); "error" stops, naming file and line. Nothing is truncated
unless over_long is "truncate_prompt", which cuts the prompt's oldest tokens (never the
first one, which may be BOS, and never an answer) and counts that. No row left is an
error that says why.

The tokenised rows of each spec are cached (`cache_dir`) by content of the data,
tokenizer, template and these settings. A damaged cache file is noticed, rebuilt and
reported.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import sources, specs
from rlhf_jax.data.cache import Cache
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.kinds import (
    CONVERSATIONS,
    KWISE,
    PAIRS,
    PROMPTS,
    RESPONSES,
    D,
    DataConfig,
    Kind,
)
from rlhf_jax.data.kwise import KwiseDataset
from rlhf_jax.data.pieces import Pieces
from rlhf_jax.data.rows import RowError
from rlhf_jax.data.store import ConversationDataset, Group, PairDataset, PromptDataset

REASONS = ("malformed", "empty", "identical", "over_long")
_CHUNK = 256
"""Rows tokenised at a time."""


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row set aside."""

    where: str
    reason: str
    detail: str
    row: str | None = None
    """The row as JSON; None if it could not be read."""


@dataclasses.dataclass
class PrepareReport:
    """What became of every row."""

    total: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    side_file: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Rows set aside, by reason."""
        reasons = [row.reason for row in self.dropped]
        return {reason: reasons.count(reason) for reason in REASONS}

    def summary(self) -> str:
        """One line for people."""
        text = f"{self.kept} of {self.total} rows kept"
        parts = [f"{n} {reason}" for reason, n in self.counts.items() if n]
        if parts:
            text += f"; set aside: {', '.join(parts)}"
            text += f" (see {self.side_file})" if self.side_file else ""
        if self.truncated:
            text += f"; {self.truncated} prompts cut"
        return "; ".join([text, *self.notes])

    def add(self, other: "PrepareReport") -> None:
        """Adds the rows of another spec."""
        self.total += other.total
        self.kept += other.kept
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.notes += other.notes


def make_encoder(tokenizer: Any, config: DataConfig = DataConfig()) -> Encoder:
    """The Encoder of a config."""
    return Encoder(tokenizer, config.template)


def prepare_pairs(
    texts: Sequence[str],
    encoder: Encoder,
    config: DataConfig = DataConfig(),
    *,
    side_file: str | os.PathLike[str] | None = None,
    training: bool = True,
) -> tuple[PairDataset, PrepareReport]:
    """The pairs of some specs, and what became of every row.

    Args:
        texts: specs, with weights for a mixture; without, the rows of all in equal
            measure.
        encoder: the one encode path.
        config: columns, limits, policies, cache.
        side_file: where rows set aside are written; None = nowhere (they are still
            counted).
        training: False allows streams, which cannot be shuffled.

    Raises:
        ValueError: a row whose policy is "error" (file and line), a spec that cannot be
            opened, or no row left.
    """
    return _prepare(PAIRS, texts, encoder, config, side_file, training)


def prepare_conversations(
    texts: Sequence[str],
    encoder: Encoder,
    config: DataConfig = DataConfig(),
    *,
    side_file: str | os.PathLike[str] | None = None,
    training: bool = True,
) -> tuple[ConversationDataset, PrepareReport]:
    """The SFT conversations of some specs; for the rest see `prepare_pairs`."""
    if config.over_long == "truncate_prompt":
        raise ValueError(
            "rows.over_long: truncate_prompt is for pairs; for SFT set drop or error"
        )
    return _prepare(CONVERSATIONS, texts, encoder, config, side_file, training)


def prepare_prompts(
    texts: Sequence[str],
    encoder: Encoder,
    config: DataConfig = DataConfig(),
    *,
    side_file: str | os.PathLike[str] | None = None,
    training: bool = True,
) -> tuple[PromptDataset, PrepareReport]:
    """The prompts of some specs; for the rest see `prepare_pairs`.

    A prompt is over-long above max_prompt_length (max_length where that is null).
    """
    return _prepare(PROMPTS, texts, encoder, config, side_file, training)


def prepare_kwise(
    texts: Sequence[str],
    encoder: Encoder,
    config: DataConfig = DataConfig(),
    *,
    side_file: str | os.PathLike[str] | None = None,
    training: bool = True,
    scored: bool = True,
) -> tuple[KwiseDataset, PrepareReport]:
    """The K-wise rows of some specs; for the rest see `prepare_pairs`.

    Args:
        texts: see `prepare_pairs`.
        encoder: see `prepare_pairs`.
        config: see `prepare_pairs`.
        side_file: see `prepare_pairs`.
        training: see `prepare_pairs`.
        scored: False takes completions without scores, as policies sample them.
    """
    kind = KWISE if scored else RESPONSES
    if config.over_long == "truncate_prompt":
        raise ValueError(
            "rows.over_long: truncate_prompt is for pairs; for K-wise rows set drop or "
            "error"
        )
    return _prepare(kind, texts, encoder, config, side_file, training)


def _prepare(
    kind: Kind[D],
    texts: Sequence[str],
    encoder: Encoder,
    config: DataConfig,
    side_file: str | os.PathLike[str] | None,
    training: bool,
) -> tuple[D, PrepareReport]:
    if isinstance(texts, str) or not texts:
        raise ValueError(f"data: expected a list of specs, got {texts!r}")
    parsed = [specs.parse(text) for text in texts]
    weighted = [spec.weight is not None for spec in parsed]
    if any(weighted) and not all(weighted):
        raise ValueError(
            "data: some specs have a weight and some have none: "
            f"{', '.join(texts)}; write WEIGHT*SPEC for all or for none"
        )
    report, parts = PrepareReport(), []
    groups: list[Group] = []
    for spec in parsed:
        arrays, where, part = _prepare_spec(kind, spec, encoder, config, training)
        if not part.kept and any(weighted):
            raise ValueError(_nothing_left(part, spec.text))
        start = report.kept
        report.add(part)
        parts.append((arrays, where))
        groups.append((start, report.kept, spec.weight or 1.0))
    if side_file is not None:
        _write_side_file(pathlib.Path(side_file), report)
    if not report.kept:
        raise ValueError(_nothing_left(report, ", ".join(texts)))
    return (
        kind.dataset(
            **_concatenate([arrays for arrays, _ in parts]),
            where=[place for _, places in parts for place in places],
            groups=tuple(groups) if any(weighted) else (),
            pad_id=encoder.pad_id,
        ),
        report,
    )


def _prepare_spec(
    kind: Kind[Any],
    spec: specs.Spec,
    encoder: Encoder,
    config: DataConfig,
    training: bool,
) -> tuple[dict[str, np.ndarray], list[str], PrepareReport]:
    """(arrays, where, report) of one spec, from the cache if it is there."""
    cache = _cache(kind.name, spec, encoder, config)
    note = None
    if cache is not None:
        stored, note = cache.load()
        if stored is not None:
            arrays, extra = stored
            report = PrepareReport(
                total=extra["total"],
                kept=len(extra["where"]),
                truncated=extra["truncated"],
                dropped=[Dropped(**row) for row in extra["dropped"]],
            )
            return arrays, extra["where"], report
    source = sources.open_source(spec, streams=not training)
    report = PrepareReport(total=len(source))
    kept = list(_encode_rows(kind, source, encoder, config, report))
    where = [place for place, *_ in kept]
    report.kept = len(kept)
    arrays = kind.arrays([(encoded, record) for _, _, encoded, record in kept])
    arrays["source_row"] = np.array([n for _, n, *_ in kept], np.int64)
    if note:
        report.notes.append(note)
    if cache is not None:
        extra = {
            "total": report.total,
            "truncated": report.truncated,
            "where": where,
            "dropped": [dataclasses.asdict(row) for row in report.dropped],
        }
        cache.save(arrays, extra)
    return arrays, where, report


def _cache(
    kind: str, spec: specs.Spec, encoder: Encoder, config: DataConfig
) -> Cache | None:
    if config.cache_dir is None:
        return None
    content = sources.fingerprint(spec)
    if content is None:
        return None  # hub, TFDS, testbed: only reading them would tell what is in them
    settings = dataclasses.asdict(
        dataclasses.replace(
            config, cache_dir=None, layout="shared", row_length=None, num_shapes=1
        )
    )
    selection = dataclasses.asdict(dataclasses.replace(spec, weight=None, text=""))
    key = [kind, content, encoder.fingerprint, settings, selection]
    return Cache(pathlib.Path(config.cache_dir).expanduser(), key)


def _encode_rows(
    kind: Kind[Any],
    source: sources.Source,
    encoder: Encoder,
    config: DataConfig,
    report: PrepareReport,
) -> Iterator[tuple[str, int, list[Any], Any]]:
    """(where, number in the source, encoded, record) of each kept row, in order."""
    for start in range(0, len(source), _CHUNK):
        waiting: list[tuple[int, dict[str, Any], list[Pieces], Any]] = []
        problems: dict[int, Dropped] = {}
        for n in range(start, min(start + _CHUNK, len(source))):
            row: dict[str, Any] | None = None
            try:
                row, _ = source[n]
                waiting.append((n, row, *kind.pieces(row, encoder, config)))
            except ValueError as error:
                problems[n] = _problem(source.where(n), error, row)
        encoded = iter(encoder.masked_ids([p for w in waiting for p in w[2]]))
        done = []
        for n, row, pieces, record in waiting:
            ids = [next(encoded) for _ in pieces]
            kept, problem = kind.check(ids, config)
            if problem is None:
                done.append((source.where(n), n, kept, record))
                report.truncated += len(kept[0][0]) < len(ids[0][0])
            else:
                problems[n] = Dropped(source.where(n), *problem, _as_json(row))
        for n in sorted(problems):
            _set_aside(problems[n], config, report)
        yield from done


def _problem(where: str, error: ValueError, row: dict[str, Any] | None) -> Dropped:
    if isinstance(error, sources.SourceError):
        text = None if error.text is None else error.text.rstrip("\r\n")
        return Dropped(where, "malformed", error.reason, text)
    kind = error.kind if isinstance(error, RowError) else "malformed"
    return Dropped(where, kind, str(error), _as_json(row))


def _set_aside(problem: Dropped, config: DataConfig, report: PrepareReport) -> None:
    if config.policy(problem.reason) == "error":
        raise ValueError(
            f"{problem.where}: {problem.reason.replace('_', '-')} row: "
            f"{problem.detail}; correct it, or set rows.{problem.reason} to drop, "
            "which sets such rows aside"
        )
    report.dropped.append(problem)


def _as_json(row: Any) -> str:
    return json.dumps(row, default=str)


def _concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part)
    full = [part for part in parts if len(part["lengths"])]
    return {
        name: np.concatenate([part[name] for part in full if name in part])
        for name in names
    }


def _nothing_left(report: PrepareReport, what: str) -> str:
    firsts = []
    for reason, count in report.counts.items():
        if count:
            first = next(row for row in report.dropped if row.reason == reason)
            firsts.append(f"{count} {reason} (first: {first.where}: {first.detail})")
    return f"data {what}: none of {report.total} rows is left: {'; '.join(firsts)}"


def _write_side_file(path: pathlib.Path, report: PrepareReport) -> None:
    """All rows set aside, as JSON lines; no file if there are none."""
    if not report.dropped:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in report.dropped:
            file.write(json.dumps({"schema": 1, **dataclasses.asdict(row)}) + "\n")
    temporary.replace(path)
    report.side_file = str(path)
