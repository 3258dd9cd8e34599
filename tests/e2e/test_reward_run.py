"""`rlhf-jax reward` as a user runs it: killed, resumed, repeated, misused."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.__main__ import main
from rlhf_jax.programs import evaluate
from rlhf_jax.programs.evaluate import EvaluateConfig

STEPS = 8


def arguments(run_dir, *more):
    return [
        "reward", "--run_dir", str(run_dir), "--model", "tiny",
        "--data", "testbed:train?size=64", "--eval_data", "id=testbed:val_id?size=16",
        "--batch_size", "8", "--steps", str(STEPS), "--loop.eval_every", "2",
        "--optimizer.learning_rate", "1e-3", *more,
    ]  # fmt: skip


def train_losses(run_dir):
    lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


def start(run_dir):
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *arguments(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after_step(process, run_dir, step):
    """SIGKILL once a checkpoint of at least `step` is finished."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        done = [
            int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()
        ]
        if any(at >= step for at in done):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert start(run_dir).wait(timeout=280) == 0
    return run_dir


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(finished, tmp_path):
    run_dir = tmp_path / "killed"
    kill_after_step(start(run_dir), run_dir, step=2)
    assert start(run_dir).wait(timeout=280) == 0
    assert train_losses(run_dir) == train_losses(finished)
    assert sorted(train_losses(run_dir)) == list(range(1, STEPS + 1))
    evaluations = [
        [
            line
            for line in (d / "metrics.jsonl").read_text().splitlines()
            if "eval/" in line
        ]
        for d in (run_dir, finished)
    ]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_evaluate_finds_the_figures_of_the_runs_own_evaluation(finished, tmp_path):
    config = EvaluateConfig(
        model=str(finished),
        out=str(tmp_path),
        eval_data=["id=testbed:val_id?size=16"],
        states=True,
        bootstrap_samples=10,
    )
    after = evaluate.run(config)
    entry = after["sets"][0]["metrics"] | {"head_norm": after["states"]["head_norm"]}
    best = json.loads((finished / "best.json").read_text())["step"]
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "eval/id/loss" in row]
    (row,) = (row for row in rows if row["step"] == best)
    during = {k.removeprefix("eval/id/"): v for k, v in row.items()}
    shared = set(during) & set(entry)
    assert len([key for key in shared if "norm" in key or "rank" in key]) == 19
    assert {"reward_mean", "reward_std", "reward_min", "reward_max"} <= shared
    for key in shared:
        assert during[key] == pytest.approx(entry[key], rel=1e-3, abs=1e-3), key


def test_run_directory_holds_what_a_user_expects(finished):
    for name in (
        "config.yaml", "metrics.jsonl", "best.json", "report.html", "plots",
        "checkpoints", "tensorboard", "model/architecture.json", "model/tokenizer.json",
    ):  # fmt: skip
        assert (finished / name).exists(), name


def test_another_config_in_the_same_directory_is_refused(finished, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(finished, "--seed", "5"))
    assert stopped.value.code == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "tinny"], "model 'tinny': not found"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "testbed:trian"], "unknown testbed set: 'trian'; did you mean"),
        (["--eval_data", "testbed:val_id"], "expected NAME=SPEC"),
        (
            ["--loss", "bradley_tery"],
            "loss 'bradley_tery': unknown name; did you mean 'bradley_terry'?",
        ),
        (["--loss", "nothing:here"], "cannot import"),
        (["--loss", "math:nothing"], "math has no function 'nothing'"),
        (["--batch_size", "6", "--accum_steps", "4"], "multiple of accum_steps"),
        (["--mesh.tensor", "3"], "devices"),
        (["--steps", "0"], "steps: expected at least 1"),
        (["--rows.max_length", "3"], "none of 64 rows is left: 64 over_long"),
        (["--lora.rank", "4", "--lora.targets", "[z]"], "lora.targets 'z'"),
        (["--compute.attention", "flash"], "flash"),
    ],
)
def test_wrong_input_is_one_clear_message(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments(tmp_path / "run"), *flags])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err
    assert "Traceback" not in err
