"""Rows that need an optional library: parquet, Hugging Face datasets, TFDS; the
testbed.

Each library is imported inside the function that needs it; its absence names the extra.
Streams (hf with stream=true) are read in their order up to a limit.
"""

import functools
import importlib
import itertools
import pathlib
from typing import Any

from rlhf_jax.data.reader import Reader, Row
from rlhf_jax.data.specs import Spec

_CHUNK = 512
"""Rows decoded at a time from columnar data."""


def open_place(spec: Spec) -> Reader:
    """The rows of a hub data set, a TFDS builder or a testbed set.

    Raises:
        ValueError: no such place or split, or a library is missing.
    """
    return {"hf": _open_hub, "tfds": _open_tfds, "testbed": _open_testbed}[spec.kind](
        spec
    )


def _library(name: str, spec_text: str, extra: str = "data") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"data {spec_text!r}: needs {name} ({error}); "
            f"pip install 'rlhf-jax[{extra}]'"
        ) from None


def read_parquet(path: pathlib.Path) -> Reader:
    """The rows of a parquet file."""
    parquet = _library("pyarrow.parquet", str(path))
    pyarrow = _library("pyarrow", str(path))
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None

    @functools.lru_cache(maxsize=4)
    def chunk(number: int) -> list[Row]:
        return table.slice(number * _CHUNK, _CHUNK).to_pylist()

    return Reader(
        table.num_rows,
        lambda n: dict(chunk(n // _CHUNK)[n % _CHUNK]),
        lambda n: f"{path}: row {n + 1}",
    )


def open_saved(spec: Spec) -> Reader:
    """The rows of a folder written by `datasets`' save_to_disk."""
    datasets = _library("datasets", spec.text)
    try:
        loaded = datasets.load_from_disk(spec.location)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data {spec.text!r}: cannot be loaded: {error}") from None
    filters = dict(spec.filters)
    if isinstance(loaded, dict):
        # `split` is then a split and no column; the filter below would refuse it.
        wanted = "|".join(filters["split"]) if "split" in filters else None
        loaded = _pick_split(spec, loaded, wanted)
        return _hf_reader(loaded, spec.location, add={"split": wanted})
    return _hf_reader(loaded, spec.location)


def _open_hub(spec: Spec) -> Reader:
    datasets = _library("datasets", spec.text)
    stream = spec.option("stream") == "true"
    try:
        loaded = datasets.load_dataset(
            spec.location,
            spec.option("config"),
            split=spec.option("split"),
            revision=spec.option("revision"),
            streaming=stream,
        )
        if isinstance(loaded, dict):
            loaded = _pick_split(spec, loaded, None)
        if stream:
            rows = list(itertools.islice(loaded, spec.limit))
            return Reader(
                len(rows),
                lambda n: rows[n],
                lambda n: f"hf:{spec.location}: row {n + 1}",
            )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"data {spec.text!r}: cannot be loaded from the hub: {error}"
        ) from None
    return _hf_reader(loaded, f"hf:{spec.location}")


def _pick_split(spec: Spec, loaded: dict[str, Any], wanted: str | None) -> Any:
    if wanted is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if wanted not in loaded:
        raise ValueError(
            f"data {spec.text!r}: expected split=NAME with one of {', '.join(loaded)}, "
            f"got {wanted or 'none'}"
        )
    return loaded[wanted]


def _hf_reader(loaded: Any, name: str, add: dict[str, Any] | None = None) -> Reader:
    @functools.lru_cache(maxsize=4)
    def chunk(number: int) -> list[Row]:
        start = number * _CHUNK
        return loaded.select(range(start, min(start + _CHUNK, len(loaded)))).to_list()

    return Reader(
        len(loaded),
        lambda n: {**chunk(n // _CHUNK)[n % _CHUNK], **(add or {})},
        lambda n: f"{name}: row {n + 1}",
    )


def _open_tfds(spec: Spec) -> Reader:
    """TFDS without TensorFlow: array_record files through `as_data_source`."""
    tfds = _library("tensorflow_datasets", spec.text)
    split = spec.option("split") or "train"
    try:
        if pathlib.Path(spec.location).is_dir():
            builder = tfds.builder_from_directory(spec.location)
            data = builder.as_data_source(split=split)
        else:
            data = tfds.data_source(
                spec.location, split=split, data_dir=spec.option("data_dir")
            )
    except ImportError as error:
        raise ValueError(
            f"data {spec.text!r}: {error}; preparing this builder needs TensorFlow, "
            "reading it does not: prepare it elsewhere as array_record"
        ) from None
    except (
        tfds.core.DatasetNotFoundError,
        AssertionError,
        KeyError,
        NotImplementedError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        raise ValueError(f"data {spec.text!r}: TFDS: {error}") from None
    return Reader(
        len(data),
        lambda n: _plain(data[n]),
        lambda n: f"tfds:{spec.location}[{split}]: row {n + 1}",
    )


def _plain(value: Any) -> Any:
    """NumPy and bytes as plain Python values; text that is not UTF-8 stays visible."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _open_testbed(spec: Spec) -> Reader:
    from rlhf_jax import testbed

    rows = testbed.rows(spec.location, **dict(spec.options))
    return Reader(
        len(rows),
        lambda n: dict(rows[n]),
        lambda n: f"testbed:{spec.location}: row {n + 1}",
    )
