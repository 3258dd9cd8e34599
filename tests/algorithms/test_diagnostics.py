"""Figures of a batch's rewards and states, against NumPy; and the arrays themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms.diagnostics import (
    diagnosed_objective,
    make_diagnosed_evaluate,
)
from rlhf_jax.algorithms.reward_model import (
    reward_apply,
    reward_objective,
    reward_states_apply,
)
from rlhf_jax.algorithms.update import init_state
from rlhf_jax.testing import preference_batch, random_pairs, tiny_reward_model

KEY = jax.random.key(0)


def measured(weight):
    model, params = tiny_reward_model()
    batch = preference_batch("shared", weight=np.array(weight, np.float32))
    batch = jax.tree.map(jnp.asarray, batch)
    apply = reward_states_apply(model, deterministic=True)
    loss, metrics = diagnosed_objective(apply)(params, batch, KEY)
    plain, _ = reward_objective(reward_apply(model, deterministic=True))(
        params, batch, KEY
    )
    rewards, before, after = apply(params, batch.sequences, batch.score_at, KEY)
    kept = np.flatnonzero(weight)
    index = [np.asarray(i)[kept] for i in (batch.chosen, batch.rejected)]

    def both(values):
        flat = np.asarray(values, np.float64).reshape(-1, *values.shape[2:])
        return [flat[i] for i in index]

    found = {name: float(mean.value()) for name, mean in metrics.items()}
    return loss, plain, found, [both(v) for v in (rewards, before, after)], params


def test_it_is_the_reward_objective_with_statistics_of_rewards_and_states():
    loss, plain, found, (rewards, before, after), params = measured([1.0] * 4)
    np.testing.assert_allclose(loss.value(), plain.value(), rtol=1e-6)
    flat = np.concatenate(rewards)
    expected = (flat.mean(), flat.std(), flat.min(), flat.max())
    got = [found[f"batch/reward_{name}"] for name in ("mean", "std", "min", "max")]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    for name, states in (("norm_before", before), ("norm", after)):
        norms = np.linalg.norm(np.concatenate(states), axis=1)
        apart = np.linalg.norm(states[0] - states[1], axis=1)
        got = [
            found[f"batch/{kind}_{name}_{figure}"]
            for kind, figure in (("state", "mean"), ("difference", "std"))
        ]
        np.testing.assert_allclose(got, (norms.mean(), apart.std()), rtol=1e-3)
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(found["head_norm"], np.linalg.norm(kernel), rtol=1e-5)


def test_filler_pairs_are_not_measured():
    assert len(random_pairs()) == 4
    *_, found, (rewards, _, after), _ = measured([1.0, 1.0, 0.0, 1.0])
    flat = np.concatenate(rewards)
    got = found["batch/reward_std"], found["batch/reward_max"]
    np.testing.assert_allclose(got, (flat.std(), flat.max()), rtol=1e-4)
    norms = np.linalg.norm(np.concatenate(after), axis=1)
    np.testing.assert_allclose(found["batch/state_norm_mean"], norms.mean(), rtol=1e-4)


def test_an_evaluation_gives_rewards_and_states_pair_by_pair():
    weight = [1.0, 1.0, 0.0, 1.0]
    loss, _, found, measured_values, params = measured(weight)
    model, _ = tiny_reward_model()
    batch = preference_batch("shared", weight=np.array(weight, np.float32))
    evaluate = make_diagnosed_evaluate(reward_states_apply(model, deterministic=True))
    means, pairs = evaluate(
        init_state(params, optax.sgd(1.0)), jax.tree.map(jnp.asarray, batch)
    )
    np.testing.assert_allclose(means["loss"].value(), loss.value(), rtol=1e-6)
    for name in ("accuracy", "margin", "head_norm"):
        np.testing.assert_allclose(means[name].value(), found[name], rtol=1e-5)
    real = np.flatnonzero(np.asarray(pairs.weight))
    assert real.tolist() == [0, 1, 3]
    given = (pairs.rewards, pairs.before, pairs.after)
    for values, sides in zip(given, measured_values, strict=True):
        np.testing.assert_allclose(
            np.asarray(values)[real], np.stack(sides, axis=1), rtol=1e-5, atol=1e-6
        )
