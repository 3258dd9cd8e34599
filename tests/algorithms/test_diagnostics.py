"""The evaluation objective with state statistics, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.diagnostics import diagnosed_objective
from rlhf_jax.algorithms.reward_model import (
    reward_apply,
    reward_objective,
    reward_states_apply,
)
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
    np.testing.assert_allclose(found["reward/mean"], flat.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["reward/std"], flat.std(), rtol=1e-4)
    for name, states in (("states_before", before), ("states", after)):
        norms = np.linalg.norm(np.concatenate(states), axis=1)
        apart = np.linalg.norm(states[0] - states[1], axis=1)
        got = found[f"{name}/state_norm_mean"], found[f"{name}/difference_norm_std"]
        np.testing.assert_allclose(got, (norms.mean(), apart.std()), rtol=1e-3)
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(
        found["states/head_norm"], np.linalg.norm(kernel), rtol=1e-5
    )


def test_filler_pairs_are_not_measured():
    assert len(random_pairs()) == 4
    *_, found, (rewards, _, after), _ = measured([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(
        found["reward/std"], np.concatenate(rewards).std(), rtol=1e-4
    )
    norms = np.linalg.norm(np.concatenate(after), axis=1)
    np.testing.assert_allclose(found["states/state_norm_mean"], norms.mean(), rtol=1e-4)
