"""metrics.jsonl: one line a step, and a resumed run writes no step twice."""

import json

from rlhf_jax.io.metrics import metrics_writer, series


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_carry_schema_step_and_values(tmp_path):
    with metrics_writer(tmp_path) as write:
        write(1, {"train/loss": 0.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"schema": 1, "step": 1, "train/loss": 0.5}
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_value_that_is_not_finite_is_null_so_that_every_line_is_json(tmp_path):
    with metrics_writer(tmp_path) as write:
        write(1, {"train/loss": float("nan"), "train/margin": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["train/loss"] is None


def test_resume_takes_later_steps_and_a_torn_line_out(tmp_path):
    with metrics_writer(tmp_path) as write:
        for step in range(1, 6):
            write(step, {"x": 0.0})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"schema": 1, "st')
    with metrics_writer(tmp_path, resume_step=3) as write:
        write(4, {"x": 1.0})
    assert steps_in(path) == [1, 2, 3, 4]


def test_a_step_written_twice_keeps_its_last_value():
    rows = [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}, {"step": 1, "x": 3.0}]
    steps, values = series(rows, "x")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [3.0, 2.0]
