"""MetaRM's two levels: what the outer gradient is, to first and to second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.meta_reward import meta_objective, spread_objective
from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.losses.ranking import spread
from rlhf_jax.types import GroupBatch, MetaBatch, PreferenceBatch, Sequences

KEY = jax.random.key(0)
PARAMS = {
    "inner": jax.random.normal(KEY, (9, 4)),
    "outer": jax.random.normal(jax.random.key(1), (4,)),
}


def everything(params):
    return params, {}


def outer_alone(params):
    return {"outer": params["outer"]}, {"inner": params["inner"]}


def smooth_apply(params, sequences, score_at, key):
    """A reward with curvature in both parameters."""
    hidden = jnp.tanh(params["inner"][sequences.tokens].mean(axis=1))
    return jnp.tanh(hidden @ params["outer"])[:, None] * 2.0


def rows(count, seed):
    tokens = jax.random.randint(jax.random.key(seed), (count, 5), 0, 9)
    ones = jnp.ones_like(tokens)
    return Sequences(
        tokens=tokens, positions=ones, segment=ones, completion_mask=ones > 0
    )


def meta_batch():
    pairs = PreferenceBatch(
        sequences=rows(6, 2),
        score_at=jnp.full((6, 1), 4),
        chosen=jnp.arange(0, 6, 2),
        rejected=jnp.arange(1, 6, 2),
        weight=jnp.ones(3),
    )
    shifted = GroupBatch(
        sequences=rows(8, 3),
        score_at=jnp.full((8, 1), 4),
        members=jnp.arange(8).reshape(2, 4),
        mask=jnp.ones((2, 4), bool),
        weight=jnp.ones(2),
    )
    return MetaBatch(pairs=pairs, shifted=shifted)


def objective(**options):
    options = {"inner_lr": 0.1, "split": everything} | options
    return meta_objective(
        spread_objective(smooth_apply), reward_objective(smooth_apply), **options
    )


def value(function):
    return lambda params, batch: function(params, batch, KEY)[0].value()


J = value(spread_objective(smooth_apply))
L = value(reward_objective(smooth_apply))


def axpy(scale, step, params):
    return jax.tree.map(lambda p, g: p + scale * g, params, step)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_the_inner_objective_is_the_mean_spread_of_the_prompts():
    batch = meta_batch().shifted
    rewards = smooth_apply(PARAMS, batch.sequences, batch.score_at, KEY)[:, 0]
    expected = spread(rewards.reshape(2, 4), batch.mask).mean()
    np.testing.assert_allclose(J(PARAMS, batch), expected, rtol=1e-6)


def test_first_order_is_the_outer_gradient_at_the_moved_weights():
    """Algorithm 1: theta <- theta - alpha grad L(theta'), applied at theta."""
    batch = meta_batch()
    step = jax.grad(J)(PARAMS, batch.shifted)
    moved = axpy(0.1, step, PARAMS)
    got = jax.grad(value(objective()))(PARAMS, batch)
    assert_trees_close(got, jax.grad(L)(moved, batch.pairs), rtol=1e-5, atol=1e-7)


def test_second_order_is_the_gradient_through_the_inner_step():
    batch = meta_batch()

    def ahead(params):
        step = jax.grad(J)(params, batch.shifted)
        return L(axpy(0.1, step, params), batch.pairs)

    got = jax.grad(value(objective(second_order=True)))(PARAMS, batch)
    assert_trees_close(got, jax.grad(ahead)(PARAMS), rtol=1e-5, atol=1e-7)


def test_the_orders_differ_by_eta_times_the_hessian_of_j_on_the_outer_gradient():
    """To first order in eta: second - first = eta H_J grad L."""
    batch, eta = meta_batch(), 1e-3
    orders = [
        jax.grad(value(objective(inner_lr=eta, second_order=order)))(PARAMS, batch)
        for order in (True, False)
    ]
    slope = jax.grad(L)(PARAMS, batch.pairs)
    _, curved = jax.jvp(lambda p: jax.grad(J)(p, batch.shifted), (PARAMS,), (slope,))
    difference = jax.tree.map(lambda a, b: (a - b) / eta, *orders)
    assert_trees_close(difference, curved, rtol=2e-2, atol=2e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(curved)) > 1e-2


def test_frozen_leaves_do_not_move_in_the_inner_step():
    batch = meta_batch()
    step = jax.grad(J)(PARAMS, batch.shifted)
    moved = {"inner": PARAMS["inner"], "outer": PARAMS["outer"] + 0.1 * step["outer"]}
    got, metrics = objective(split=outer_alone)(PARAMS, batch, KEY)
    np.testing.assert_allclose(got.value(), L(moved, batch.pairs), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["meta/grad_norm"].value(), jnp.linalg.norm(step["outer"]), rtol=1e-5
    )


def test_a_normalised_inner_step_has_the_asked_length():
    _, metrics = objective(normalise=True, inner_lr=0.3)(PARAMS, meta_batch(), KEY)
    np.testing.assert_allclose(metrics["meta/step_norm"].value(), 0.3, rtol=1e-5)


@pytest.mark.parametrize("second_order", [False, True])
def test_tied_rewards_leave_the_plain_outer_gradient(second_order):
    batch = meta_batch()
    tied = {"inner": PARAMS["inner"], "outer": jnp.zeros(4)}
    got = jax.grad(value(objective(second_order=second_order, normalise=True)))(
        tied, batch
    )
    assert_trees_close(got, jax.grad(L)(tied, batch.pairs), rtol=1e-5, atol=1e-6)


def test_the_inner_step_raises_the_spread():
    batch = meta_batch()
    moved = axpy(0.05, jax.grad(J)(PARAMS, batch.shifted), PARAMS)
    assert J(moved, batch.shifted) > J(PARAMS, batch.shifted)
