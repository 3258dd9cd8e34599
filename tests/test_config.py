"""Flags and YAML: what is read, what is refused and with which words."""

import dataclasses

import pytest
import yaml

from rlhf_jax import config
from rlhf_jax.algorithms.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Example:
    """A program's settings."""

    run_dir: str
    """Where."""
    data: list[str]
    """What."""
    steps: int | None = None
    """How long."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How."""

    def __post_init__(self):
        if self.steps == 0:
            raise ValueError("steps: expected a positive number, got 0")


def parse(*argv):
    return config.parse(Example, list(argv), prog="rlhf-jax example")


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_repeated_list_flags_make_one_list():
    assert parse("--run_dir", "x", "--data", "a", "--data=b").data == ["a", "b"]


def test_a_plus_behind_a_list_flag_keeps_what_the_file_says(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x\ndata: [a]")
    file = ("--config", str(path))
    assert parse(*file, "--data+", "b", "--data+=[c]").data == ["a", "b", "c"]
    assert parse(*file, "--data+", "c", "--data", "b").data == ["b", "c"]
    assert "unknown option --run_dir+" in error_of(capsys, "--run_dir+", "x")


def test_a_list_in_brackets_takes_specs_with_options(capsys):
    specs = ["a.jsonl?size=2&split=x", "b"]
    for value in ("[a.jsonl?size=2&split=x, b]", '["a.jsonl?size=2&split=x",b]'):
        assert parse("--run_dir", "x", "--data", value).data == specs
    said = error_of(capsys, "--run_dir", "x", "--data", "['a?b, c]")
    assert "quote each item" in said and "repeat --data" in said


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "run_dir: x\ndata: [a]\noptimizer:\n  learning_rate: 0.5\n  eps: 0.1"
    )
    got = parse("--config", str(path), "--data", "b", "--optimizer.eps", "0.2")
    assert got.data == ["b"]
    assert (got.optimizer.learning_rate, got.optimizer.eps) == (0.5, 0.2)


def test_dump_and_print_config_load_back_to_an_equal_config(tmp_path, capsys):
    argv = ["--run_dir", "x", "--data", "a", "--optimizer.learning_rate", "3e-4"]
    original = parse(*argv)
    with pytest.raises(SystemExit):
        parse(*argv, "--print_config")
    for text in (config.dump(original), capsys.readouterr().out):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        assert parse("--config", str(path)) == original


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--optimizer.lr", "optimizer.learning_rate"),
        ("--lr", "optimizer.learning_rate"),
        ("--stepz", "steps"),
        ("--learning_rate", "optimizer.learning_rate"),
    ],
)
def test_misspelt_flag_names_the_nearest(capsys, flag, suggestion):
    err = error_of(capsys, "--run_dir", "x", "--data", "a", flag, "3")
    assert f"unknown option {flag}; did you mean '{suggestion}'?" in err


def test_misspelt_yaml_key_names_file_line_and_nearest(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: [a]\noptimizer:\n  learning_rat: 3\n")
    err = error_of(capsys, "--config", str(path), "--run_dir", "x")
    assert f"{path}:3: unknown key 'optimizer.learning_rat'" in err
    assert "did you mean 'optimizer.learning_rate'?" in err


def test_key_given_twice_is_refused(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x\ndata: [a]\nrun_dir: y\n")
    assert f"{path}:3: key 'run_dir' is given twice" in error_of(
        capsys, "--config", str(path)
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "a"], "run_dir"),
        (["--run_dir", "x", "--data", "a", "--steps", "many"], "--steps: expected int"),
        (
            ["--run_dir", "x", "--data", "a", "--steps", "0"],
            "steps: expected a positive",
        ),
        (["--run_dir", "x", "--data"], "--data: expected a value"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (
            ["--run_dir", "x", "--data", "a", "--optimizer.learning_rate=-1"],
            "optimizer.learning_rate: expected a number in",
        ),
    ],
)
def test_bad_values_end_in_one_line_that_names_them(capsys, argv, message):
    err = error_of(capsys, *argv)
    assert message in err
    assert "Traceback" not in err


def test_file_that_is_no_mapping_is_refused(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("- a\n- b\n")
    assert "expected a mapping" in error_of(capsys, "--config", str(path))
    path.write_text("a: [1\n")
    assert "not valid YAML" in error_of(capsys, "--config", str(path))


def test_differences_list_dotted_keys():
    first = Example("x", ["a"])
    second = dataclasses.replace(
        first, steps=3, optimizer=OptimizerConfig(learning_rate=1.0)
    )
    assert config.differences(config.to_dict(first), config.to_dict(second)) == [
        "steps: None -> 3",
        "optimizer.learning_rate: 1e-05 -> 1.0",
    ]
    assert yaml.safe_load(config.dump(second))["optimizer"]["learning_rate"] == 1.0


def test_named_specs():
    assert config.parse_named(["a=x=1", "b=y"], "--eval_data") == {"a": "x=1", "b": "y"}
    for bad in ("x", "=x", "a b=x", "a="):
        with pytest.raises(ValueError, match="expected NAME=SPEC"):
            config.parse_named([bad], "--eval_data")
    with pytest.raises(ValueError, match="given twice"):
        config.parse_named(["a=x", "a=y"], "--eval_data")
