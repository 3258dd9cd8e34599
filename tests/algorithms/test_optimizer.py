"""Schedules and the optimizer chain."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    decayed,
    make_optimizer,
    make_schedule,
)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_warmup_rises_to_the_peak_and_the_first_step_moves(schedule):
    rate = make_schedule(
        OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup=0.1), 100
    )
    np.testing.assert_allclose(
        [rate(i) for i in range(10)], np.arange(1, 11) / 10, rtol=1e-6
    )
    assert float(rate(10)) == pytest.approx(1.0)


def test_linear_and_cosine_end_at_the_final_scale():
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig(
            learning_rate=1.0, schedule=schedule, warmup=0.0, final_scale=0.1
        )
        rate = make_schedule(config, 50)
        assert float(rate(0)) == 1.0
        assert float(rate(50)) == pytest.approx(0.1)
        middle = 0.55  # both curves are symmetric about their middle
        assert float(rate(25)) == pytest.approx(middle)


def test_inverse_sqrt_halves_when_the_steps_are_four_times_the_warmup():
    config = OptimizerConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup=0.1)
    rate = make_schedule(config, 100)
    assert float(rate(40)) == pytest.approx(0.5)
    assert float(rate(90)) == pytest.approx(1 / 3)


def test_one_step_run_has_a_usable_schedule():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup=0.5), 1)
    assert float(rate(0)) == 1.0


def test_large_gradients_are_clipped_before_adam():
    config = OptimizerConfig(max_grad_norm=1.0, beta1=0.0, beta2=0.0, eps=1.0)
    tx = make_optimizer(config, lambda step: 1.0)
    params = {"kernel": jnp.zeros(4)}
    grads = {"kernel": jnp.full(4, 50.0)}  # norm 100 -> each element becomes 0.5
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 / 1.5, rtol=1e-5)


def test_norms_and_biases_do_not_decay():
    params = {"q": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}}
    assert decayed(params) == {
        "q": {"kernel": True, "bias": False},
        "norm": {"scale": False},
    }


@pytest.mark.parametrize("field", ["learning_rate", "warmup", "max_grad_norm"])
def test_negative_settings_are_named(field):
    with pytest.raises(ValueError, match=f"optimizer.{field}"):
        OptimizerConfig(**{field: -1.0})
