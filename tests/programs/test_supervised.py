"""The loop on a toy objective: exact resume, best checkpoint, patience, signals."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.update import init_state, make_evaluate, make_update
from rlhf_jax.io import checkpoint
from rlhf_jax.io.checkpoint import load_params, read_best
from rlhf_jax.losses.masked import masked_mean
from rlhf_jax.programs.held_out import mean_figures
from rlhf_jax.programs.supervised import Interrupted, LoopConfig, supervise
from rlhf_jax.types import Sequences

KEY = jax.random.key(0)
ROWS = 4


def objective(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch.tokens.shape)
    error = params["w"] - batch.tokens.astype(jnp.float32) + noise
    return masked_mean(error**2, batch.completion_mask), {}


def batch_at(row):
    tokens = np.random.default_rng(row).integers(0, 5, (ROWS, 3)).astype(np.int32)
    ones = np.ones_like(tokens)
    return Sequences(
        tokens=tokens, positions=ones, segment=ones, completion_mask=ones > 0
    )


def perfect():
    """Rows on which the untrained parameter is almost right."""
    batch = batch_at(0)
    return batch.replace(tokens=np.zeros_like(batch.tokens))


def stream(start):
    row = start
    while True:
        row += ROWS
        yield batch_at(row), row


def evaluation(eval_sets):
    return functools.partial(
        mean_figures,
        evaluate=jax.jit(make_evaluate(objective)),
        eval_sets=eval_sets,
        put=lambda batch: batch,
    )


def run(
    tmp_path,
    *,
    steps=6,
    learning_rate=0.1,
    batches=stream,
    eval_sets=None,
    digest="rows",
    **loop,
):
    tx = optax.adam(learning_rate)
    lines = []
    state = supervise(
        LoopConfig(**{"eval_every": 2, **loop}),
        run_dir=tmp_path,
        state=init_state({"w": jnp.zeros(())}, tx),
        update=jax.jit(make_update(objective, tx)),
        evaluate=evaluation(eval_sets or {"id": [batch_at(0), batch_at(1)]}),
        batches=batches,
        put=lambda batch: batch,
        steps=steps,
        best="eval/id/loss",
        key=KEY,
        data_digest=digest,
        write=lambda step, values: lines.append((step, values)),
        learning_rate=lambda step: learning_rate,
        flops=lambda sequences: 1.0,
        title="toy",
    )
    return state, lines


def interrupt_at(step):
    def batches(start):
        for batch, row in stream(start):
            if row == step * ROWS:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch, row

    return batches


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole, lines = run(tmp_path / "whole")
    with pytest.raises(Interrupted) as left:
        run(tmp_path / "parts", batches=interrupt_at(3))
    assert left.value.code == 128 + signal.SIGTERM
    parts, rest = run(tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = {step: v["train/loss"] for step, v in lines if "train/loss" in v}
    resumed = {step: v["train/loss"] for step, v in rest if "train/loss" in v}
    assert sorted(resumed) == [4, 5, 6]
    assert all(losses[step] == value for step, value in resumed.items())


def test_finished_run_does_nothing_more(tmp_path):
    first, _ = run(tmp_path)
    again, lines = run(tmp_path)
    assert not lines
    np.testing.assert_array_equal(first.params["w"], again.params["w"])


def test_best_checkpoint_is_named_kept_and_loaded(tmp_path):
    # the learning rate is so large that the last step is not the best one
    _, lines = run(tmp_path, steps=12, learning_rate=1.5, keep=1)
    evaluations = {
        step: values["eval/id/loss"]
        for step, values in lines
        if "eval/id/loss" in values
    }
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best != 12
    assert read_best(tmp_path)["step"] == best
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [best, 12]
    at_best = float(load_params(tmp_path)["w"])
    assert at_best == float(load_params(tmp_path, step=best)["w"])
    assert at_best != float(load_params(tmp_path, step=12)["w"])


def test_patience_stops_the_run(tmp_path):
    state, _ = run(tmp_path, steps=40, learning_rate=0.0, patience=2)
    assert int(state.step) == 6  # best at 2, no better at 4 and 6
    again, lines = run(tmp_path, steps=40, learning_rate=0.0, patience=2)
    assert int(again.step) == 6 and not lines


def test_the_best_checkpoint_stays_until_a_better_one_is_on_disk(tmp_path, monkeypatch):
    run(tmp_path, steps=3, eval_every=1, keep=1, learning_rate=0.0)  # best at 1
    assert read_best(tmp_path)["step"] == 1

    def killed(manager, state, cursor):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):  # the better step 4 is never written
        run(tmp_path, steps=4, eval_every=1, keep=1, eval_sets={"id": [perfect()]})
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [1, 3]


def test_nonfinite_step_stops_with_its_number_and_a_finite_state(tmp_path):
    def poisoned(params, batch, key):
        loss, metrics = objective(params, batch, key)
        bad = jnp.where(batch.tokens[0, 0] < 0, jnp.nan, 0.0)
        return loss.replace(total=loss.total + bad), metrics

    def batches(start):
        for batch, row in stream(start):
            if row == 3 * ROWS:
                batch.tokens[0, 0] = -1
            yield batch, row

    tx = optax.adam(0.1)
    common = dict(
        state=init_state({"w": jnp.zeros(())}, tx),
        update=jax.jit(make_update(poisoned, tx)),
        evaluate=evaluation({}),
        batches=batches, put=lambda b: b, steps=6,
        best=None, key=KEY, data_digest="rows",
        write=lambda step, values: None, learning_rate=lambda step: 0.1,
        flops=lambda s: 1.0, title="toy",
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="step 3.*not finite"):
        supervise(LoopConfig(), run_dir=tmp_path / "stop", **common)
    state = supervise(LoopConfig(nonfinite="skip"), run_dir=tmp_path / "skip", **common)
    assert int(state.step) == 6
    assert np.isfinite(float(state.params["w"]))


def test_unknown_best_metric_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="expected one of eval/id/loss"):
        tx = optax.adam(0.1)
        supervise(
            LoopConfig(eval_every=1), run_dir=tmp_path,
            state=init_state({"w": jnp.zeros(())}, tx),
            update=jax.jit(make_update(objective, tx)),
            evaluate=evaluation({"id": [batch_at(0)]}), batches=stream,
            put=lambda b: b, steps=2,
            best="eval/id/acuracy", key=KEY, data_digest="rows",
            write=lambda step, values: None,
            learning_rate=lambda step: 0.1, flops=lambda s: 1.0, title="toy",
        )  # fmt: skip


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in it yet"):
        load_params(tmp_path)
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"no checkpoint of step 9; there are \[2\]"):
        load_params(tmp_path, step=9)
    assert json.loads((tmp_path / "best.json").read_text())["metric"] == "eval/id/loss"


def test_other_rows_than_the_run_began_with_are_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="the training rows are not those"):
        run(tmp_path, steps=4, digest="other rows")


def test_best_json_never_names_a_step_that_is_not_on_disk(tmp_path, monkeypatch):
    """A run that dies while saving its best checkpoint leaves the older name."""
    from rlhf_jax.programs import supervised

    save = supervised.checkpoint.save

    def dies(manager, state, cursor):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        save(manager, state, cursor)

    monkeypatch.setattr(supervised.checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=6)
    assert read_best(tmp_path)["step"] == 2
