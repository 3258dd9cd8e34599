"""A run directory is new, resumed, or refused with the reason."""

import dataclasses

import pytest

from rlhf_jax.io import run_dir


@dataclasses.dataclass(frozen=True)
class Settings:
    run_dir: str
    steps: int = 3
    names: tuple[str, ...] = ("a", "b")


def opened(path, **settings):
    """What open_run says, the directory given back."""
    with (run := run_dir.open_run(str(path), Settings(str(path), **settings))).lock:
        return run


def take_a_step(path):
    (path / "metrics.jsonl").write_text('{"schema": 1, "step": 1}\n')


def test_new_then_resumed(tmp_path):
    path = tmp_path / "run"
    assert not opened(path).resumed
    assert (path / "config.yaml").read_text().count("# jax ") == 1
    take_a_step(path)
    assert opened(path).resumed


def test_another_config_lists_the_keys_that_differ(tmp_path):
    opened(tmp_path)
    take_a_step(tmp_path)
    with pytest.raises(ValueError, match="steps: 3 -> 4"):
        opened(tmp_path, steps=4)


def test_a_run_that_never_took_a_step_takes_another_config(tmp_path):
    opened(tmp_path)
    assert not opened(tmp_path, steps=4).resumed
    take_a_step(tmp_path)
    assert opened(tmp_path, steps=4).resumed


def test_a_finished_run_stays_so_under_another_value_of_what_may_change(tmp_path):
    found = opened(tmp_path)
    take_a_step(tmp_path)
    run_dir.mark_finished(found.path)
    other = Settings(str(tmp_path), steps=4)
    with pytest.raises(ValueError, match="steps: "):
        run_dir.is_finished(tmp_path, other)
    assert run_dir.is_finished(tmp_path, other, may_change=("steps",))


def test_a_file_of_a_pattern_begins_a_run_once_something_is_in_it(tmp_path):
    def reopened(steps):
        config = Settings(str(tmp_path), steps=steps)
        options = {"begun_by": ("made-*.jsonl",)}
        with (run := run_dir.open_run(str(tmp_path), config, **options)).lock:
            return run.resumed

    assert not reopened(3)
    (tmp_path / "made-a.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text("{}")
    assert not reopened(4)
    (tmp_path / "made-a.jsonl").write_text("{}")
    assert reopened(4)
    with pytest.raises(ValueError, match="steps: 4 -> 3"):
        reopened(3)


def test_moved_directory_is_still_the_same_run(tmp_path):
    opened(tmp_path / "a")
    take_a_step(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert opened(tmp_path / "b").resumed


def test_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="expected an empty or new directory"):
            opened(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_directory_refuse_each_other(tmp_path):
    held = run_dir.open_run(str(tmp_path), Settings(str(tmp_path)))
    with pytest.raises(ValueError, match="another process"):
        opened(tmp_path)
    held.lock.close()
    opened(tmp_path)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/runs/x").path == tmp_path / "runs" / "x"


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "file"
    run_dir.write_atomic(path, "first")
    with pytest.raises(TypeError):
        run_dir.write_atomic(path, None)
    assert path.read_text() == "first"
