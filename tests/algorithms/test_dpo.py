"""DPO: implicit rewards in every layout, and the loss of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.dpo import completion_sums, implicit_reward_apply
from rlhf_jax.algorithms.reward_model import pair_values, reward_objective
from rlhf_jax.algorithms.sft import logprobs_apply
from rlhf_jax.testing import LAYOUTS, preference_batch, random_pairs, tiny_llama

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def models():
    model, params = tiny_llama()
    _, other = tiny_llama(seed=1)
    return logprobs_apply(model, deterministic=True), params, other


def slow_rewards(apply, params, other):
    """0.3 (log pi - log pi_ref) of every completion, each alone in a plain row."""
    batch = jax.tree.map(jnp.asarray, preference_batch("padded"))
    ratio = apply(params, batch.sequences, KEY) - apply(other, batch.sequences, KEY)
    sums = [
        sum(float(x) for x, counts in zip(row, mask) if counts)
        for row, mask in zip(ratio, batch.sequences.completion_mask)
    ]
    return 0.3 * np.array(sums).reshape(-1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_implicit_rewards_are_the_scaled_log_ratios_in_every_layout(models, layout):
    apply, params, other = models
    batch = jax.tree.map(jnp.asarray, preference_batch(layout))
    implicit = implicit_reward_apply(
        apply, lambda _, *inputs: apply(other, *inputs), beta=0.3
    )
    rewards = jax.jit(implicit)(params, batch.sequences, batch.score_at, KEY)
    got = np.stack(pair_values(rewards, batch), axis=1)
    expected = slow_rewards(jax.jit(apply), params, other)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_policy_that_is_its_reference_costs_log_two_and_can_still_learn(models):
    apply, params, _ = models
    objective = reward_objective(
        implicit_reward_apply(apply, lambda _, *i: apply(params, *i), beta=0.1)
    )
    batch = jax.tree.map(jnp.asarray, preference_batch())
    step = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, KEY)[0].value()))
    loss, grad = step(params)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) > 1e-4


def test_the_reference_gets_no_gradient(models):
    apply, params, other = models
    objective = reward_objective(
        implicit_reward_apply(
            lambda p, *i: apply(p["policy"], *i),
            lambda p, *i: apply(p["reference"], *i),
            beta=0.1,
        )
    )
    batch = jax.tree.map(jnp.asarray, preference_batch())
    both = {"policy": params, "reference": other}
    grad = jax.jit(jax.grad(lambda p: objective(p, batch, KEY)[0].value()))(both)
    assert all((g == 0).all() for g in jax.tree.leaves(grad["reference"]))


def test_completion_sums_take_each_completion_alone():
    batch = preference_batch("shared")
    ones = jnp.ones(batch.sequences.tokens.shape)
    chosen, rejected = pair_values(
        completion_sums(ones, batch.sequences, batch.score_at), batch
    )
    lengths = [(len(c), len(r)) for _, c, r in random_pairs()]
    np.testing.assert_array_equal(np.stack([chosen, rejected], 1), lengths)
