"""The RL loop on a policy that is a table: exact resume wherever it was stopped."""

import dataclasses
import functools
import json
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.io import checkpoint
from rlhf_jax.io.metrics import metrics_writer
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import runs
from rlhf_jax.programs.ppo_targets import PpoLossConfig, make_targets
from rlhf_jax.programs.reinforcement import (
    Learner,
    RLCursor,
    RLLoopConfig,
    reinforce,
)
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.supervised import Interrupted
from tests.ragged import packing, ragged, table, table_apply

STEPS, EPOCHS, MINIBATCHES = 3, 2, 2
PROMPTS = 2
"""In a step; each has two completions."""
LOSS = PpoLossConfig(kl_target=1.0, kl_horizon=100)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved any more."""


def noisy(params, sequences, key):
    """As with dropout: the noise must be the same after a resume."""
    logprobs, entropy = table_apply(params, sequences, key)
    noise = 0.01 * jax.random.normal(key, logprobs.shape)
    return jnp.where(sequences.completion_mask, logprobs + noise, 0.0), entropy


TX = optax.adam(0.05)


@functools.cache
def updates():
    """Compiled once; like the real ones they take the old state's memory."""
    policy = make_update(ppo.ppo_objective(noisy), TX)
    critic = make_update(ppo.critic_objective(lambda *a: noisy(*a)[0]), TX)
    return jax.jit(policy, donate_argnums=0), jax.jit(critic, donate_argnums=0)


def learn(learner, batch, key, cursor):
    policy, critic = updates()
    batch = jax.tree.map(jnp.asarray, batch)
    critic_state, found = critic(learner.critic, batch, key)
    values = {f"value/{name.replace('/', '_')}": v for name, v in found.items()}
    policy_state, found = policy(learner.policy, batch, key)
    values |= {name if "/" in name else f"train/{name}": v for name, v in found.items()}
    return Learner(policy_state, critic_state), values


def gather(learner, cursor):
    """Completions that depend on the place in the data and on both models."""
    completions = ragged(PROMPTS, 2, seed=cursor.next_row)
    w = np.asarray(learner.policy.params["w"])
    v = np.asarray(learner.critic.params["w"])
    tokens, mask = completions.tokens, completions.mask
    completions.old_logprobs = np.where(mask, -np.logaddexp(0, -w[tokens]), 0.0)
    completions.ref_logprobs = np.where(mask, -0.7, 0.0)
    completions.values = np.where(mask, v[tokens], 0.0)
    for name in ("old_logprobs", "ref_logprobs", "values"):
        setattr(completions, name, getattr(completions, name).astype(np.float32))
    completions.scores = completions.scores + w[tokens[:, 0]]
    cursor.next_row += PROMPTS
    proxy = float(completions.scores.mean())
    lines = [{"completion": f"{m} ö", "reward": proxy} for m in range(3)]
    return completions, {"reward/proxy": proxy}, lines


def evaluate(learner):
    return {"eval/held/proxy": float(learner.policy.params["w"].sum())}


@dataclasses.dataclass
class Hooks:
    """Functions that a test puts in front of the loop's."""

    gather: object = None
    learn: object = None
    evaluate: object = None


def run(
    run_dir, *, steps=STEPS, epochs=EPOCHS, hooks=Hooks(), digest="prompts", **loop
):
    """The loop with everything a program puts around it; (learner, cursor)."""
    run_dir.mkdir(exist_ok=True)
    cursor = RLCursor(kl_coef=0.1, data_digest=digest)

    def before(hook, function):
        def call(*arguments):
            if hook is not None:
                hook(*arguments)
            return function(*arguments)

        return call

    with metrics_writer(
        run_dir, resume_step=runs.latest_step(run_dir, epochs)
    ) as write:
        learner = reinforce(
            RLLoopConfig(**{"eval_every": 2, "save_every": 1, **loop}),
            run_dir=run_dir,
            learner=Learner(init_state(table(1), TX), init_state(table(2), TX)),
            cursor=cursor,
            gather=before(hooks.gather, gather),
            targets=functools.partial(make_targets, LOSS),
            epoch_batches=lambda completions, rng: xp.minibatches(
                completions,
                packing("padded"),
                count=MINIBATCHES,
                accum_steps=1,
                rng=rng,
            ),
            learn=before(hooks.learn, learn),
            evaluate=before(hooks.evaluate, evaluate),
            steps=steps,
            epochs=epochs,
            seed=0,
            write=write,
            learning_rate=lambda step: 0.05,
            title="toy",
        )
    return learner


def at_call(number, action):
    """A hook that acts on the nth call of the function it is put before."""
    calls = iter(range(1, 10_000))

    def hook(*arguments):
        if next(calls) == number:
            action()

    return hook


def interrupt(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


def fail(error):
    def action():
        raise error

    return action


def numbers(run_dir):
    return sorted(
        int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()
    )


def saved_cursor(run_dir, number=None):
    number = numbers(run_dir)[-1] if number is None else number
    path = run_dir / "checkpoints" / str(number) / "cursor" / "metadata"
    return json.loads(path.read_text())


def metrics(run_dir):
    """metrics.jsonl without what a clock says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        for line in lines
    ]


def same_states(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def states(learner):
    return [learner.policy, learner.critic]


def check_same_run(learner, run_dir, whole):
    expected, whole_dir = whole
    same_states(states(learner), states(expected))
    assert saved_cursor(run_dir) == saved_cursor(whole_dir)
    assert metrics(run_dir) == metrics(whole_dir)
    texts = [(d / "samples.jsonl").read_text() for d in (run_dir, whole_dir)]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run(run_dir), run_dir


def test_the_run_itself(whole):
    learner, run_dir = whole
    assert int(learner.policy.step) == STEPS * EPOCHS * MINIBATCHES
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [("eval/held/proxy" in line) for line in lines] == [1, 0, 1, 1]
    assert all(np.isfinite(v) for line in lines for v in line.values())
    assert lines[1]["policy/kl_coef"] == 0.1 != lines[2]["policy/kl_coef"]
    assert numbers(run_dir) == [(STEPS - 1) * EPOCHS, STEPS * EPOCHS]
    assert runs.latest_step(run_dir, EPOCHS) == STEPS
    cursor = saved_cursor(run_dir)
    assert cursor["next_row"] == STEPS * PROMPTS
    assert cursor["moments"][0] == STEPS * PROMPTS * 2
    assert (cursor["step"], cursor["epoch"]) == (STEPS, 0)


# Updates are numbered through the run: four a step, two an epoch.
@pytest.mark.parametrize(
    ("update", "number", "left"),
    [
        (1, signal.SIGTERM, (0, 1)),  # in the first epoch of the first step
        (4, signal.SIGINT, (1, 0)),  # in the last epoch: the step is finished first
        (10, signal.SIGTERM, (2, 1)),
        (12, signal.SIGTERM, (3, 0)),  # in the last update of the run
    ],
)
def test_interrupted_at_any_update_it_resumes_bit_for_bit(
    tmp_path, whole, update, number, left
):
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted) as stopped:
        run(run_dir, hooks=Hooks(learn=at_call(update, interrupt(number))))
    assert stopped.value.code == 128 + number
    cursor = saved_cursor(run_dir)
    assert (cursor["step"], cursor["epoch"]) == left
    between = left[1] > 0
    newest = run_dir / "checkpoints" / str(numbers(run_dir)[-1])
    assert (newest / "experience").exists() == between
    assert len(cursor["updates"]) == (MINIBATCHES if between else 0)
    gathered = []
    hooks = Hooks(gather=lambda learner, cursor: gathered.append(cursor.step))
    learner = run(run_dir, hooks=hooks)
    assert gathered == list(range(left[0] + between, STEPS))  # no step sampled twice
    check_same_run(learner, run_dir, whole)


def test_interrupted_in_every_epoch_it_still_ends_the_same(tmp_path, whole):
    run_dir, starts = tmp_path / "run", 0
    while True:
        starts += 1
        try:
            learner = run(run_dir, hooks=Hooks(learn=at_call(1, interrupt())))
        except Interrupted:
            assert starts < 20
        else:
            break
    # The seventh has nothing to do.
    assert starts == STEPS * EPOCHS + 1
    check_same_run(learner, run_dir, whole)


def test_interrupted_while_it_samples_it_finishes_an_epoch_first(tmp_path, whole):
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(run_dir, hooks=Hooks(gather=at_call(2, interrupt())))
    assert saved_cursor(run_dir)["epoch"] == 1
    check_same_run(run(run_dir), run_dir, whole)


@pytest.mark.parametrize("update", [3, 11])
def test_killed_it_goes_back_to_its_checkpoint_and_ends_the_same(
    tmp_path, whole, update
):
    """Lines of metrics and samples that a killed run left behind are written once."""
    run_dir = tmp_path / "run"
    with pytest.raises(Killed):
        run(run_dir, save_every=2, hooks=Hooks(learn=at_call(update, fail(Killed()))))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"schema": 1, "step": 1, "torn')
    learner = run(run_dir)
    check_same_run(learner, run_dir, whole)


def test_killed_after_an_interruption_between_epochs(tmp_path, whole):
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(run_dir, hooks=Hooks(learn=at_call(5, interrupt())))
    with pytest.raises(Killed):
        run(run_dir, hooks=Hooks(learn=at_call(2, fail(Killed()))))
    assert saved_cursor(run_dir)["epoch"] == 1
    check_same_run(run(run_dir), run_dir, whole)


def test_finished_run_does_nothing_more(tmp_path, whole):
    learner, run_dir = whole
    nothing = at_call(1, fail(AssertionError("called")))
    before = (run_dir / "metrics.jsonl").read_text()
    again = run(run_dir, hooks=Hooks(nothing, nothing, nothing))
    same_states(states(again), states(learner))
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_experience_survives_a_checkpoint_with_its_types(tmp_path):
    """One advantage a completion or a token; NumPy in, NumPy out."""
    for number, advantages in enumerate((ragged().values[:, 0], ragged().values)):
        kept = dataclasses.replace(ragged(), advantages=advantages)
        run_dir = tmp_path / str(number)
        with checkpoint.open_checkpoints(run_dir) as manager:
            state = init_state(table(), TX)
            checkpoint.save(manager, state, {}, step=3, experience=kept.arrays())
        with checkpoint.open_checkpoints(run_dir) as manager:
            found = checkpoint.restore_experience(manager)
        for name, value in kept.arrays().items():
            assert isinstance(found[name], np.ndarray), name
            assert found[name].dtype == value.dtype, name
            np.testing.assert_array_equal(found[name], value, err_msg=name)


# Rewards that fail.


@pytest.mark.parametrize(("call", "moved"), [(1, False), (3, True)])
def test_failed_reward_leaves_the_state_from_before_the_step(
    tmp_path, whole, call, moved
):
    run_dir = tmp_path / "run"
    calls = iter(range(1, 100))

    def broken(learner, cursor):
        if next(calls) == call:
            cursor.next_row += 7 * moved  # whatever gather had done by then
            raise ValueError("the reward raised")

    with pytest.raises(ValueError, match="the reward raised"):
        run(run_dir, save_every=100, hooks=Hooks(gather=broken))
    assert numbers(run_dir) == [(call - 1) * EPOCHS]
    cursor = saved_cursor(run_dir)
    assert (cursor["step"], cursor["epoch"]) == (call - 1, 0)
    assert cursor["next_row"] == (call - 1) * PROMPTS
    with pytest.raises(ValueError, match="the reward raised"):  # still broken
        calls = iter([call])
        run(run_dir, hooks=Hooks(gather=broken))
    check_same_run(run(run_dir), run_dir, whole)


MODULE = """
import time

now = "works"

def judge(completions):
    if now == "raises":
        raise KeyError("no such key")
    if now == "hangs":
        time.sleep(60)
    if now == "counts":
        return [0.0]
    return [float("nan") if now == "nan" else 0.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "reward faulty:judge: raised KeyError: 'no such key'"),
        ("nan", "reward faulty:judge: 4 of 4 rewards are not finite"),
        ("counts", "reward faulty:judge: expected 4 numbers"),
        ("hangs", "reward faulty:judge: did not return within 0.2 s"),
        ("http", "reward http://127.0.0.1:9/get_reward: no answer in 3 tries"),
    ],
)
def test_whatever_fails_in_a_reward_a_repaired_one_goes_on(
    tmp_path, monkeypatch, whole, fault, message
):
    """The real sources of rewards, in the second step of a run."""
    (tmp_path / "faulty.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    import faulty  # pyright: ignore[reportMissingImports]

    judge = open_rewards(["faulty:judge"], timeout_s=0.2)
    http = open_rewards(["http://127.0.0.1:9/get_reward"], timeout_s=0.2)

    def score(learner, cursor):
        broken = cursor.step == 1 and fault != "repaired"
        faulty.now = fault if broken else "works"
        source = http if broken and fault == "http" else judge
        result = source(["p"] * 4, ["a", "b", "c", "d"], [{}] * 4)
        assert not result.total.any()

    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(run_dir, save_every=100, hooks=Hooks(gather=score))
    assert numbers(run_dir) == [EPOCHS]
    fault = "repaired"
    learner = run(run_dir, save_every=1, hooks=Hooks(gather=score))
    check_same_run(learner, run_dir, whole)
    sys.modules.pop("faulty")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_evaluation_loses_no_step(tmp_path, whole, call):
    """It is made again; its step is reported once, with its evaluation."""
    run_dir = tmp_path / "run"
    broken = Hooks(evaluate=at_call(call, fail(ValueError("no scorer"))))
    with pytest.raises(ValueError, match="no scorer"):
        run(run_dir, save_every=100, hooks=broken)
    steps_done = {1: 0, 2: 2, 3: 3}[call]
    if steps_done:
        assert numbers(run_dir) == [steps_done * EPOCHS]
        assert [line["step"] for line in metrics(run_dir)][-1] == steps_done - 1
    with pytest.raises(ValueError, match="no scorer"):
        run(run_dir, hooks=Hooks(evaluate=at_call(1, fail(ValueError("no scorer")))))
    gathered = []
    hooks = Hooks(gather=lambda learner, cursor: gathered.append(cursor.step))
    learner = run(run_dir, hooks=hooks)
    assert gathered == list(range(steps_done, STEPS))
    same_states(states(learner), states(whole[0]))
    assert metrics(run_dir) == metrics(whole[1])
    again = run(run_dir)
    same_states(states(again), states(whole[0]))
    assert metrics(run_dir) == metrics(whole[1])


# The rest of the loop.


def test_other_prompts_than_the_run_began_with_are_refused(tmp_path):
    run(tmp_path, steps=1, epochs=1)
    with pytest.raises(ValueError, match="the prompts are not those this run began"):
        run(tmp_path, steps=2, epochs=1, digest="other prompts")


def test_nonfinite_update_stops_with_its_step_or_is_dropped(tmp_path):
    def poison(learner, batch, key, cursor):
        if cursor.step == 1:
            batch.advantages[:] = np.nan

    hooks = Hooks(learn=poison)
    with pytest.raises(FloatingPointError, match="step 2: update/finite: a loss or"):
        run(tmp_path / "stop", hooks=hooks)
    learner = run(tmp_path / "skip", hooks=hooks, nonfinite="skip")
    assert int(learner.policy.step) == STEPS * EPOCHS * MINIBATCHES
    for leaf in jax.tree.leaves(states(learner)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert metrics(tmp_path / "skip")[2]["update/finite"] == 0
    assert metrics(tmp_path / "skip")[3]["update/finite"] == 1


def test_checkpoints_are_kept_as_asked(tmp_path):
    run(tmp_path, steps=4, epochs=1, keep=1)
    assert numbers(tmp_path) == [4]


def test_samples_come_when_asked_and_as_many(tmp_path):
    run(tmp_path, steps=5, epochs=1, samples_every=2, samples=2, save_every=5)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 4, 4, 5, 5]
    assert {row["completion"] for row in rows} == {"0 ö", "1 ö"}
    assert all(row["schema"] == 1 for row in rows)


def test_latest_step_counts_steps_that_are_wholly_done(tmp_path):
    assert runs.latest_step(tmp_path, 2) == -1
    for name in ("3", "4"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert runs.latest_step(tmp_path, 2) == 2
    (tmp_path / "checkpoints" / "5").mkdir()
    assert runs.latest_step(tmp_path, 2) == 2


def test_loop_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="loop.keep: expected at least 1, got 0"):
        RLLoopConfig(keep=0)
    with pytest.raises(ValueError, match="loop.samples_every: expected at least 0"):
        RLLoopConfig(samples_every=-1)
