"""The reward objective: layouts agree, fillers do not count, misuse is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.reward_model import pair_metrics, reward_objective
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.types import PreferenceBatch, Sequences

KEY = jax.random.key(0)


def toy_batch(rows=4, length=5, **columns):
    tokens = jax.random.randint(KEY, (rows, length), 0, 9)
    ones = jnp.ones_like(tokens)
    pairs = rows // 2
    fields = {
        "sequences": Sequences(
            tokens=tokens, positions=ones, segment=ones, completion_mask=ones > 0
        ),
        "score_at": jnp.full((rows, 1), length - 1),
        "chosen": jnp.arange(0, rows, 2),
        "rejected": jnp.arange(1, rows, 2),
        "weight": jnp.ones(pairs),
    }
    return PreferenceBatch(**(fields | columns))


def toy_apply(params, sequences, score_at, key):
    table = params["table"][sequences.tokens]
    return jnp.take_along_axis(jnp.cumsum(table, axis=1), score_at, axis=1)


PARAMS = {"table": jax.random.normal(KEY, (9,))}


def test_value_is_the_mean_loss_of_the_pairs():
    batch = toy_batch()
    loss, metrics = reward_objective(toy_apply)(PARAMS, batch, KEY)
    rewards = np.asarray(PARAMS["table"], np.float64)[
        np.asarray(batch.sequences.tokens)
    ]
    rewards = rewards.sum(1)
    gaps = rewards[0::2] - rewards[1::2]
    np.testing.assert_allclose(loss.value(), np.logaddexp(0, -gaps).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"].value(), (gaps > 0).mean())
    np.testing.assert_allclose(metrics["margin"].value(), gaps.mean(), rtol=1e-5)


def test_filler_pairs_change_nothing():
    plain = toy_batch()
    filled = toy_batch(
        chosen=jnp.array([0, 2, 0, 0]),
        rejected=jnp.array([1, 3, 0, 0]),
        weight=jnp.array([1.0, 1.0, 0.0, 0.0]),
    )
    objective = reward_objective(toy_apply)
    for batch in (plain, filled):
        loss, metrics = objective(PARAMS, batch, KEY)
        if batch is plain:
            expected = (loss.value(), {k: v.value() for k, v in metrics.items()})
    np.testing.assert_allclose(loss.value(), expected[0], rtol=1e-6)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-6)


def test_margin_and_soft_label_reach_the_loss():
    batch = toy_batch(margin=jnp.array([0.5, 2.0]), soft_label=jnp.array([0.9, 0.2]))
    loss, _ = reward_objective(toy_apply)(PARAMS, batch, KEY)
    rewards = toy_apply(PARAMS, batch.sequences, batch.score_at, KEY).reshape(-1)
    direct = bradley_terry(
        rewards[0::2], rewards[1::2], margin=batch.margin, soft_label=batch.soft_label
    )
    np.testing.assert_allclose(loss.value(), direct.mean(), rtol=1e-6)


def test_column_the_loss_does_not_take_is_an_error():
    def plain_loss(chosen, rejected):
        return jax.nn.softplus(rejected - chosen)

    with pytest.raises(ValueError, match="carries margin, for which 'plain_loss' have"):
        reward_objective(toy_apply, loss=plain_loss)(
            PARAMS, toy_batch(margin=jnp.ones(2)), KEY
        )


def test_loss_that_takes_any_keyword_gets_every_column():
    def open_loss(chosen, rejected, **columns):
        return chosen - rejected - columns["margin"]

    batch = toy_batch(margin=jnp.ones(2))
    plain, _ = reward_objective(toy_apply, loss=lambda c, r: c - r)(
        PARAMS, toy_batch(), KEY
    )
    loss, _ = reward_objective(toy_apply, loss=open_loss)(PARAMS, batch, KEY)
    np.testing.assert_allclose(loss.value(), plain.value() - 1, rtol=1e-6)


def test_loss_that_reduces_is_an_error():
    def reduced(chosen, rejected):
        return jnp.mean(rejected - chosen)

    with pytest.raises(ValueError, match="one value a pair"):
        reward_objective(toy_apply, loss=reduced)(PARAMS, toy_batch(), KEY)


def test_ties_count_one_half():
    metrics = pair_metrics(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]), jnp.ones(2))
    assert float(metrics["accuracy"].value()) == 0.75
