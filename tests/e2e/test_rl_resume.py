"""`rlhf-jax ppo` as a user runs it: killed, interrupted, resumed, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax.data.tokenizers import save_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.programs.models import load_policy
from rlhf_jax.testing import tiny_config, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow

STEPS, EPOCHS = 4, 2
CONFIG = tiny_config(num_layers=1)
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A policy, and a cache of compiled programs that all processes share."""
    folder = tmp_path_factory.mktemp("setting")
    hf.export_hf(folder / "policy", CONFIG, tiny_llama(CONFIG)[1])
    save_tokenizer(tiny_tokenizer(), folder / "policy")
    return folder


def start(setting, run_dir, steps=STEPS):
    argv = [
        "ppo", "--model", str(setting / "policy"), "--run_dir", str(run_dir),
        "--data", "testbed:rl?size=32", "--reward", "rlhf_jax.testbed:gold_rewards",
        "--ptx_data", "testbed:sft?size=16", "--loss.ptx_coef", "0.5",
        "--batch_size", "4", "--steps", str(steps), "--epochs", str(EPOCHS),
        "--minibatches", "2", "--sampling.max_new_tokens", "8",
        "--loss.critic_warmup", "1", "--loss.kl_target", "1",
        "--optimizer.learning_rate", "0.01", "--critic_optimizer.learning_rate", "0.01",
        "--rows.layout", "padded", "--rows.row_length", "96",
        "--loop.save_every", "1", "--loop.keep", "20", "--loop.samples_every", "1",
    ]  # fmt: skip
    environment = os.environ | {
        "XLA_FLAGS": "",  # one device
        "XDG_CACHE_HOME": str(setting / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *argv],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err


def numbers(run_dir):
    """Finished checkpoints; they count epochs."""
    folder = run_dir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def stop_at(process, run_dir, *, newer, delay_s, number):
    """Sends a signal some time after a checkpoint that is `newer` epochs further; False
    = it had ended. (Their count says nothing: old ones are pruned.)"""
    target = max(numbers(run_dir), default=0) + newer
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if max(numbers(run_dir), default=0) >= target:
            break
        time.sleep(0.02)
    time.sleep(delay_s)
    alive = process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    return alive


def final_state(run_dir):
    """Every array of the newest checkpoint, and its cursor."""
    newest = run_dir / "checkpoints" / str(numbers(run_dir)[-1])
    with ocp.StandardCheckpointer() as reader:
        arrays = {
            name: reader.restore(newest / name)
            for name in ("params", "opt_state", "critic")
        }
    return arrays, json.loads((newest / "cursor" / "metadata").read_text())


def without_clocks(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        for line in lines
    ]


def check_same_run(run_dir, whole):
    (arrays, cursor), (expected, cursor_expected) = map(final_state, (run_dir, whole))
    assert len(jax.tree.leaves(arrays)) > 30
    for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert cursor == cursor_expected
    assert without_clocks(run_dir) == without_clocks(whole)
    samples = [(d / "samples.jsonl").read_text() for d in (run_dir, whole)]
    assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(setting, run_dir))
    return run_dir


def test_killed_run_resumes_bit_for_bit(setting, whole, tmp_path):
    run_dir, chance = tmp_path / "run", random.Random()
    newer, delay_s = chance.randint(0, 2), chance.uniform(0, 0.3)
    killed = stop_at(
        start(setting, run_dir),
        run_dir,
        newer=newer,
        delay_s=delay_s,
        number=signal.SIGKILL,
    )
    assert killed, f"it ended before it was killed: {newer} checkpoints, {delay_s} s"
    finish(start(setting, run_dir))
    check_same_run(run_dir, whole)


def test_critic_warmup_leaves_the_policy_bit_identical(setting, whole):
    """Checkpoint 2 is that of step 1, in which the critic alone learnt."""
    initial = load_policy(str(setting / "policy")).params
    reader = ocp.StandardCheckpointer()
    folder = whole / "checkpoints"
    warm, last = (reader.restore(folder / str(n) / "params") for n in (2, 2 * STEPS))
    for start, after, end in zip(
        *map(jax.tree.leaves, (initial, warm, last)), strict=True
    ):
        np.testing.assert_array_equal(start, after)
        assert not np.array_equal(start, end)
    for leaf in jax.tree.leaves(reader.restore(folder / "2" / "opt_state")):
        assert not np.asarray(leaf).any()
    critic = reader.restore(folder / "2" / "critic")
    assert int(critic["step"]) == 2 * EPOCHS
    assert all(np.asarray(m).any() for m in jax.tree.leaves(critic["params"]))
    warmup, *others = without_clocks(whole)
    assert "train/loss" not in warmup and "value/loss" in warmup
    for line in others:
        assert line["policy/ptx_loss"] > 0 and line["train/update/finite"] == 1
        assert line["value/update/finite"] == 1
    assert max(line["policy/clip_fraction"] for line in others) > 0
    assert others[0]["policy/kl_coef"] < warmup["policy/kl_coef"] == 0.02


def test_samples_hold_each_step_once(whole):
    rows = [json.loads(s) for s in (whole / "samples.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == [step for step in range(1, STEPS + 1) for _ in range(4)]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name
)
def test_stopped_twenty_times_it_ends_bit_for_bit_the_same(setting, tmp_path, number):
    """SIGTERM saves between epochs too; SIGKILL goes back to the last whole step."""
    # After a SIGTERM the run is further each time, so it needs more steps to be stopped
    # twenty times.
    steps = 90 if number == signal.SIGTERM else 30
    chance, stopped = random.Random(int(number)), 0
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    finish(start(setting, whole, steps))
    while stopped < 20:
        alive = stop_at(
            start(setting, run_dir, steps),
            run_dir,
            newer=chance.choice((0, 1, 1, 1, 2)),
            delay_s=chance.uniform(0, 0.5),
            number=number,
        )
        stopped += alive
        assert alive, f"it ended after {stopped} stops"
    finish(start(setting, run_dir, steps))
    check_same_run(run_dir, whole)
