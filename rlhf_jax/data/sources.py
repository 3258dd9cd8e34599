"""Sources: where rows come from, with the place of each for errors.

`open_source(SPEC)` has len() and [i] -> (row, where); `where` is file:line (or the
like). A row that cannot be read (malformed JSON, a key twice, not UTF-8) is still a
row: asking for it raises `SourceError` with its place, so that the caller counts it.
Only what leaves the rest unreadable fails at once: a missing file, a broken gzip or
JSON array. The grammar of specs is in `specs`. Files and folders are read here, other
places in `places`; blank lines are no rows. Selecting rows is deterministic.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import places, specs
from rlhf_jax.data.reader import Reader, Row, SourceError
from rlhf_jax.data.specs import Spec

_HASHED = 1 << 28
"""Files up to this size are known by their content, larger ones by size and mtime."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The selected rows of a spec."""

    spec: Spec
    reader: Reader
    index: Sequence[int]
    """Which rows of the reader they are."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, n: int) -> tuple[Row, str]:
        """(row, where); raises SourceError for a row that cannot be read."""
        if not 0 <= n < len(self.index):
            raise IndexError(n)
        return self.reader.get(self.index[n]), self.where(n)

    def where(self, n: int) -> str:
        """File and line of a row."""
        return self.reader.where(self.index[n])


def open_source(spec: str | Spec, *, streams: bool = False) -> Source:
    """The rows a spec names.

    Args:
        spec: see `specs`.
        streams: whether `stream=true` is allowed: a stream has neither a length nor a
            place to go back to, so it serves unshuffled evaluation only.

    Raises:
        ValueError: the place cannot be opened, or no row is selected.
    """
    parsed = specs.parse(spec) if isinstance(spec, str) else spec
    if parsed.option("stream") == "true":
        if not streams:
            raise ValueError(
                f"data {parsed.text!r}: a stream cannot be shuffled or resumed, so it "
                "serves evaluation only; leave stream=true out"
            )
        if parsed.limit is None or parsed.sample or parsed.rows != (0, None):
            raise ValueError(
                f"data {parsed.text!r}: a stream is read in its order up to a limit; "
                "give limit=N, and neither rows nor sample"
            )
    reader = _open_reader(parsed)
    return Source(parsed, reader, _select(parsed, reader))


def fingerprint(spec: str | Spec) -> str | None:
    """Digest of the content a spec names, or None where only reading it would tell."""
    parsed = specs.parse(spec) if isinstance(spec, str) else spec
    if parsed.kind not in ("file", "folder"):
        return None
    digest = hashlib.sha256()
    for path in _files(parsed):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size}".encode())
        if stat.st_size > _HASHED:
            digest.update(f"{path} {stat.st_mtime_ns}".encode())
            continue
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(spec: Spec) -> list[pathlib.Path]:
    if spec.kind == "file":
        return [pathlib.Path(spec.location)]
    folder = pathlib.Path(spec.location)
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _open_reader(spec: Spec) -> Reader:
    if spec.kind == "file":
        return read_file(pathlib.Path(spec.location))
    if spec.kind == "folder":
        return _read_folder(spec)
    return places.open_place(spec)


def _read_folder(spec: Spec) -> Reader:
    folder = pathlib.Path(spec.location)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return places.open_saved(spec)
    files = [p for p in _files(spec) if p.name.endswith(specs.SUFFIXES)]
    if not files:
        raise ValueError(
            f"data {spec.text!r}: expected a folder saved by datasets or one with "
            f"files ending in {', '.join(specs.SUFFIXES)}"
        )
    return _chain([read_file(path) for path in files])


def _chain(readers: list[Reader]) -> Reader:
    """Readers one after another."""
    ends = np.cumsum([reader.size for reader in readers])

    def find(n: int) -> tuple[Reader, int]:
        which = int(np.searchsorted(ends, n, side="right"))
        return readers[which], n - int(ends[which - 1] if which else 0)

    def get(n: int) -> Row:
        reader, here = find(n)
        return reader.get(here)

    def where(n: int) -> str:
        reader, here = find(n)
        return reader.where(here)

    return Reader(int(ends[-1]), get, where)


def read_file(path: pathlib.Path) -> Reader:
    """The rows of a jsonl, json or parquet file.

    Raises:
        ValueError: the file cannot be read at all.
    """
    if path.name.endswith(".parquet"):
        return places.read_parquet(path)
    if path.name.endswith((".json", ".json.gz")):
        content = b"".join(_raw_lines(path))
        if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return _read_array(path, content)
    return _read_lines(path)


def _raw_lines(path: pathlib.Path) -> Iterator[bytes]:
    count = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                count += 1
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: broken gzip file after line {count}: {error}"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _read_lines(path: pathlib.Path) -> Reader:
    lines, numbers = [], []
    for number, line in enumerate(_raw_lines(path), 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in line:
                raise ValueError(f"{path}: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            lines.append(line.strip())
            numbers.append(number)
    return Reader(
        len(lines),
        lambda n: parse_json(lines[n], f"{path}:{numbers[n]}"),
        lambda n: f"{path}:{numbers[n]}",
    )


def parse_json(line: bytes | str, where: str) -> Row:
    """The object of one JSON text.

    Raises:
        SourceError: not UTF-8, not JSON, not an object, or a key twice.
    """
    text = ""
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        row = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise SourceError(
            where, f"not UTF-8: {error.reason} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise SourceError(
            where, f"not JSON: {error.msg} at character {error.pos}", text
        ) from None
    except RecursionError:
        raise SourceError(where, "not JSON: nested too deeply", text) from None
    except ValueError as error:
        raise SourceError(where, f"not JSON: {error}", text) from None
    if not isinstance(row, dict):
        raise SourceError(
            where, f"expected a JSON object, got {type(row).__name__}", text
        )
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_array(path: pathlib.Path, content: bytes) -> Reader:
    """The elements of a JSON array, each with the line it starts in."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from None
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    lines: list[int] = []
    at, line = _skip(text, text.index("[") + 1), 1
    counted = 0
    closed = text[at : at + 1] == "]"
    while not closed:
        try:
            _, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            position = getattr(error, "pos", at)
            raise ValueError(
                f"{path}:{text.count(chr(10), 0, position) + 1}: broken JSON array: "
                f"{error}"
            ) from None
        line += text.count("\n", counted, at)
        counted = at
        spans.append((at, end))
        lines.append(line)
        at = _skip(text, end)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            line += text.count("\n", counted, at)
            raise ValueError(f"{path}:{line}: broken JSON array: expected , or ]")
        closed, at = mark == "]", _skip(text, at + 1)
    end = at if spans else _skip(text, at + 1)
    if end < len(text):
        line = text.count("\n", 0, end) + 1
        raise ValueError(
            f"{path}:{line}: text after the end of the JSON array; expected one array, "
            "or one object a line"
        )
    return Reader(
        len(spans),
        lambda n: parse_json(text[slice(*spans[n])], f"{path}:{lines[n]}"),
        lambda n: f"{path}:{lines[n]}",
    )


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t") and at < len(text):
        at += 1
    return at


def _select(spec: Spec, reader: Reader) -> Sequence[int]:
    """The rows of the reader that the spec selects."""
    kept: Sequence[int] = range(reader.size)
    if not reader.size:
        raise ValueError(f"data {spec.text!r}: no rows at all")
    if spec.filters:
        kept = _filter(spec, reader)
    kept = kept[slice(*spec.rows)]
    if spec.sample is not None and spec.sample < len(kept):
        generator = np.random.default_rng(spec.sample_seed)
        drawn = generator.choice(len(kept), spec.sample, replace=False)
        kept = [kept[n] for n in sorted(drawn.tolist())]
    elif spec.sample is not None and spec.sample > len(kept):
        raise ValueError(
            f"data {spec.text!r}: sample={spec.sample} of {len(kept)} rows"
        )
    kept = kept[: spec.limit]
    if not kept:
        raise ValueError(f"data {spec.text!r}: rows={spec.rows} selects no row")
    return kept


def _filter(spec: Spec, reader: Reader) -> list[int]:
    """Rows that pass every filter, and those that cannot be read: they get reported."""
    kept, unreadable = [], 0
    seen = {column: collections.Counter[str]() for column, _ in spec.filters}
    for n in range(reader.size):
        try:
            row = reader.get(n)
        except SourceError:
            unreadable += 1
            kept.append(n)
            continue
        passes = True
        for column, accepted in spec.filters:
            if column in row:
                value = _as_text(row[column])
                seen[column][value[:60]] += 1
                passes &= value in accepted
            else:
                passes = False
        if passes:
            kept.append(n)
    if len(kept) == unreadable:
        raise ValueError(f"data {spec.text!r}: {_nothing(spec, reader, seen)}")
    return kept


def _nothing(
    spec: Spec, reader: Reader, seen: dict[str, collections.Counter[str]]
) -> str:
    """Why no row passes the filters."""
    reasons = []
    for column, accepted in spec.filters:
        values = seen[column]
        if not values:
            reasons.append(f"no row of {reader.size} has a column {column!r}")
        elif not any(value in values for value in accepted):
            known = ", ".join(value for value, _ in values.most_common(12))
            reasons.append(
                f"no row has {column}={'|'.join(accepted)}; there are {known}"
            )
    return "; ".join(reasons) or "no row passes all filters at once"


def _as_text(value: Any) -> str:
    """A value as a spec writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)
