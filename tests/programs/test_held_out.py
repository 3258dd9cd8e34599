"""Evaluation in training: a set's figures are of all of it, however it is cut."""

import numpy as np
import pytest

from rlhf_jax.evals import hidden_states
from rlhf_jax.programs import held_out
from rlhf_jax.types import Mean, PairStates

RNG = np.random.default_rng(0)
WIDTH = 5


def pairs(size):
    """Rewards and states of a set of pairs, their spread growing along the set."""
    grow = np.linspace(1, 3, size, dtype=np.float32)[:, None]
    before = RNG.normal(0, 1, (size, 2, WIDTH)).astype(np.float32) * grow[:, None]
    return PairStates(
        rewards=RNG.normal(0, 1, (size, 2)).astype(np.float32) * grow,
        before=before,
        after=before / np.linalg.norm(before, axis=-1, keepdims=True),
        weight=np.ones(size, np.float32),
    )


def cut(found, batch_size, filler=3):
    """Batches of the set, each with filler of weight 0 and of absurd values."""
    batches = []
    for start in range(0, len(found.weight), batch_size):
        part = [v[start : start + batch_size] for v in vars(found).values()]
        padded = [
            np.concatenate([v, np.full((filler, *v.shape[1:]), 1e9, v.dtype)])
            for v in part
        ]
        padded[-1][-filler:] = 0
        batches.append(PairStates(**dict(zip(vars(found), padded))))
    return batches


def evaluate(state, batch):
    """A stand-in for the jitted evaluation: the batch is what it would find."""
    count = (batch.weight > 0).sum()
    right = (batch.rewards[:, 0] > batch.rewards[:, 1]) & (batch.weight > 0)
    return {"accuracy": Mean(float(right.sum()), float(count))}, batch


def figures(sets, batch_size=4):
    return held_out.pair_figures(
        None,
        evaluate=evaluate,
        eval_sets={name: cut(found, batch_size) for name, found in sets.items()},
        sizes={name: len(found.weight) for name, found in sets.items()},
        put=lambda batch: batch,
    )


@pytest.mark.parametrize("batch_size", [4, 13, 50])
def test_figures_are_of_the_whole_set_however_it_is_cut(batch_size):
    sets = {"a": pairs(13), "b": pairs(6)}
    found = figures(sets, batch_size)
    for name, made in sets.items():
        rewards = made.rewards.astype(np.float64)
        expected = {
            "accuracy": np.mean(rewards[:, 0] > rewards[:, 1]),
            "reward_mean": rewards.mean(),
            "reward_std": rewards.std(),
            "reward_min": rewards.min(),
            "reward_max": rewards.max(),
            **hidden_states.state_figures(
                made.before.reshape(-1, WIDTH),
                made.after.reshape(-1, WIDTH),
                hidden_states.alternating(2 * len(rewards)),
            ).metrics,
        }
        own = {k.removeprefix(f"eval/{name}/"): v for k, v in found.items()}
        got = {key: own[key] for key in expected}
        assert got == pytest.approx(expected, rel=1e-5), name
    assert len(found) == 2 * len(expected)


def test_of_a_large_set_the_states_are_those_that_evaluate_holds(monkeypatch):
    kept = hidden_states.kept_completions([2] * 13, limit=10)
    monkeypatch.setattr(hidden_states, "kept_completions", lambda sizes: kept)
    made = pairs(13)
    found = figures({"a": made})
    assert found["eval/a/states_n"] == 10
    norms = np.linalg.norm(made.before.reshape(-1, WIDTH)[kept], axis=1)
    assert found["eval/a/state_norm_before_mean"] == pytest.approx(norms.mean())
    # The rewards are all there, and a second evaluation sees the same pairs.
    assert found["eval/a/reward_max"] == pytest.approx(made.rewards.max())
    assert figures({"a": made}) == found


def test_means_over_batches_are_divided_once():
    batches = [(3.0, 1.0), (1.0, 4.0)]
    found = held_out.mean_figures(
        None,
        evaluate=lambda state, batch: {"loss": Mean(*batch)},
        eval_sets={"a": batches},
        put=lambda batch: batch,
    )
    assert found == {"eval/a/loss": pytest.approx(4 / 5)}
