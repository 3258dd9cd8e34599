"""Sources: every format, every place, every broken file by name and line."""

import gzip
import json

import numpy as np
import pytest

from rlhf_jax.data import sources, specs
from rlhf_jax.data.reader import SourceError
from rlhf_jax.data.sources import open_source

ROWS = [
    {
        "prompt": f"q{n}",
        "chosen": f"x{n}",
        "rejected": "y",
        "split": "ab"[n % 2],
        "n": n,
    }
    for n in range(10)
]


def rows_of(spec):
    return [row for row, _ in open_source(spec)]


def numbers(spec):
    return [row["n"] for row in rows_of(spec)]


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines()),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("crlf.jsonl", lines(end="\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines()),
        ("blank.jsonl", b"\n" + lines(end="\n\n") + b"   \n"),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("lines.json", lines()),
    ],
)
def test_files_of_every_format_hold_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert rows_of(str(tmp_path / name)) == ROWS
    assert rows_of(str(tmp_path)) == ROWS  # the folder of that file


def test_parquet_and_saved_datasets_hold_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"one": data, "two": data.select([3])}).save_to_disk(
        tmp_path / "splits"
    )
    assert rows_of(f"{tmp_path}/a.parquet") == ROWS
    assert rows_of(f"{tmp_path}/saved") == ROWS
    assert numbers(f"{tmp_path}/splits?split=two") == [3]
    with pytest.raises(ValueError, match="one of one, two, got none"):
        open_source(f"{tmp_path}/splits")
    with pytest.raises(ValueError, match="one of one, two, got three"):
        open_source(f"{tmp_path}/splits?split=three")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="bad.parquet: not a readable parquet"):
        open_source(f"{tmp_path}/bad.parquet")


def test_a_dataset_of_the_hub_that_is_not_there_is_an_error_of_ours():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="cannot be loaded from the hub"):
        open_source("hf:nobody-here/no-such-dataset?split=train")


def write_builder(folder, rows):
    """A TFDS builder in array_record files, written without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Preferences(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            names = ("prompt", "chosen", "rejected")
            features = {name: tfds.features.Text() for name in names}
            features |= {"n": np.int64}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for row in rows:
                yield row["n"], {key: row[key] for key in self.info.features}

    builder = Preferences(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_a_tfds_builder_is_read_shuffled_and_resumed(tmp_path, tokenizer):
    import itertools

    from rlhf_jax.data.iterate import Batches
    from rlhf_jax.data.prepare import make_encoder, prepare_pairs
    from tests.data.test_iterate import equal

    place = write_builder(tmp_path, ROWS)
    found = sorted(rows_of(f"tfds:{place}?split=train"), key=lambda row: row["n"])
    expected = [{k: v for k, v in row.items() if k != "split"} for row in ROWS]
    assert found == expected
    with pytest.raises(ValueError, match="tfds"):
        open_source(f"tfds:{place}?split=test")
    with pytest.raises(ValueError, match="TFDS"):
        open_source(f"tfds:no_such_builder_here?data_dir={tmp_path}")
    dataset, report = prepare_pairs([f"tfds:{place}"], make_encoder(tokenizer))
    assert report.kept == 10
    whole = list(itertools.islice(Batches(dataset, 4, seed=1), 5))
    order = [tuple(batch.sequences.tokens.ravel()) for batch, _ in whole]
    assert len(set(order)) > 1
    resumed = Batches(dataset, 4, seed=1, start_row=whole[1][1])
    for left, right in zip(whole[2:], resumed):
        assert left[1] == right[1] and equal(left[0], right[0])


def test_testbed_sets_take_their_options():
    assert len(open_source("testbed:train?size=7")) == 7
    with pytest.raises(ValueError, match="sise"):
        open_source("testbed:train?sise=7")


def test_rows_are_selected_in_the_order_that_the_grammar_gives(write_rows):
    path = write_rows(ROWS)
    assert numbers(f"{path}?split=a") == [0, 2, 4, 6, 8]
    assert numbers(f"{path}?split=a|b&n=3|4") == [3, 4]
    assert numbers(f"{path}?split=b&rows=1:4") == [3, 5, 7]
    assert numbers(f"{path}?rows=8:") == [8, 9]
    assert numbers(f"{path}?limit=2&rows=3:9") == [3, 4]
    sample = numbers(f"{path}?split=a&sample=3")
    assert sample == numbers(f"{path}?split=a&sample=3") == sorted(sample)
    assert len(sample) == 3 and set(sample) <= {0, 2, 4, 6, 8}
    seeds = {tuple(numbers(f"{path}?sample=5&sample_seed={s}")) for s in range(5)}
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("split=c", "no row has split=c; there are a, b"),
        ("splt=a", "no row of 10 has a column 'splt'"),
        ("split=a&n=1", "no row passes all filters at once"),
        ("rows=4:4", "START < STOP"),
        ("rows=a", "START:STOP"),
        ("rows=50:60", "selects no row"),
        ("limit=0", "limit: expected a whole number >= 1"),
        ("limit=x", "whole number"),
        ("sample=11", "sample=11 of 10 rows"),
        ("split", "expected KEY=VALUE"),
        ("split=a&split=b", "given twice"),
    ],
)
def test_bad_selections_are_explained(write_rows, query, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"{write_rows(ROWS)}?{query}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.jsonl", "no such file"),
        ("", "expected LOCATION"),
        ("0*testbed:train", "weight above 0"),
        ("testbed:", "expected a name"),
        ("testbed:train?", "expected LOCATION or"),
    ],
)
def test_bad_specs_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        specs.parse(spec)


def test_a_spec_takes_a_weight():
    assert specs.parse("0.25*testbed:train?size=3").weight == 0.25
    assert specs.parse("testbed:train").weight is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', "not JSON: .* at character 7"),
        ("nonsense", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("3", "expected a JSON object, got int"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_row_with_an_error(write_rows, line, message):
    source = open_source(write_rows([ROWS[0], line, ROWS[1]]))
    assert len(source) == 3 and source[2][0] == ROWS[1]
    with pytest.raises(SourceError, match=rf"rows.jsonl:2: .*({message})"):
        source[1]


def test_a_line_that_cannot_be_read_passes_every_filter(write_rows):
    assert len(open_source(write_rows([*ROWS, "{"]) + "?split=a")) == 6


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:1]) + b'{"a": "\xff"}\n')
    with pytest.raises(SourceError, match="a.jsonl:2: not UTF-8"):
        open_source(str(tmp_path / "a.jsonl"))[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows at all"),
        ("a.jsonl", lines()[:9].decode().encode("utf-16"), "UTF-16"),
        (
            "a.jsonl.gz",
            gzip.compress(lines() * 99)[:-20],
            "broken gzip file after line",
        ),
        ("a.jsonl.gz", b"no gzip", "broken gzip file after line 0"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json:2: broken JSON array"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2: broken JSON array: expected ,"),
        ("a.json", b'[{"a": 1}', "broken JSON array"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "a.json:2: text after the end"),
        ("a.json", b'[] [{"a": 2}]', "a.json:1: text after the end"),
        ("a.json", b"[]", "no rows at all"),
        ("a.txt", b"x", "expected a file ending in"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / name))


def test_an_array_gives_the_line_of_each_row(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n\n{"a": 2,\n"b": 3}, 7]')
    source = open_source(str(tmp_path / "a.json"))
    assert [source.where(n).rsplit(":", 1)[1] for n in range(3)] == ["2", "4", "5"]
    with pytest.raises(SourceError, match="a.json:5: expected a JSON object"):
        source[2]


def test_streams_serve_evaluation_only(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: iter(ROWS * 1000)
    )
    spec = "hf:me/it?split=train&stream=true&limit=4"
    with pytest.raises(ValueError, match="evaluation only"):
        open_source(spec)
    assert [row["n"] for row, _ in open_source(spec, streams=True)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="give limit=N"):
        open_source("hf:me/it?stream=true", streams=True)


def test_fingerprint_follows_the_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[1:]))
    one, two = (sources.fingerprint(f"{tmp_path}/{name}.jsonl") for name in "ab")
    assert one != two
    assert sources.fingerprint(f"{tmp_path}/a.jsonl?limit=3") == one
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[1:]))
    assert sources.fingerprint(f"{tmp_path}/a.jsonl") != one
    assert sources.fingerprint("testbed:train") is None
