"""Pair losses against numbers by hand and independent float64 loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses.preference import (
    bradley_terry,
    direct,
    hinge,
    normalised,
    rao_kupper,
    scaled_bradley_terry,
)


def slow_loss(chosen, rejected, margin, soft_label):
    """-p log sigma(d - m) - (1 - p) log sigma(m - d), one pair at a time in float64."""
    losses = []
    for c, r, m, p in zip(chosen, rejected, margin, soft_label, strict=True):
        gap = float(c) - float(r) - float(m)
        losses.append(
            p * float(np.logaddexp(0.0, -gap)) + (1 - p) * float(np.logaddexp(0.0, gap))
        )
    return np.array(losses)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [rng.normal(size=13).astype(np.float32) * 3 for _ in range(3)] + [
        rng.uniform(size=13).astype(np.float32)
    ]


def test_equal_rewards_cost_log_two():
    loss = bradley_terry(jnp.zeros(3), jnp.zeros(3))
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


def test_matches_the_float64_loop_with_margin_and_soft_label(pairs):
    chosen, rejected, margin, soft_label = pairs
    loss = bradley_terry(
        jnp.array(chosen),
        jnp.array(rejected),
        margin=jnp.array(margin),
        soft_label=jnp.array(soft_label),
    )
    np.testing.assert_allclose(loss, slow_loss(*pairs), rtol=1e-5, atol=1e-6)


def test_margin_and_soft_label_default_to_none_and_one(pairs):
    chosen, rejected, _, _ = map(jnp.array, pairs)
    plain = bradley_terry(chosen, rejected)
    full = bradley_terry(
        chosen, rejected, margin=jnp.zeros(13), soft_label=jnp.ones(13)
    )
    np.testing.assert_allclose(plain, full, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_value_and_gradient_at_extreme_rewards(dtype):
    extreme = jnp.array([1e4, -1e4, 0.0], dtype)

    def total(c, r):
        return bradley_terry(c, r).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(extreme, -extreme)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)
    # the wrongly ordered pair pulls with full force: no epsilon inside the logarithm
    np.testing.assert_allclose(np.asarray(grads[0], np.float32)[1], -1.0)


def test_loss_is_float32_for_bfloat16_rewards():
    assert bradley_terry(*jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_margin_of_another_rank_is_refused_not_broadcast():
    with pytest.raises(Exception, match="margin"):
        bradley_terry(jnp.zeros(4), jnp.zeros(4), margin=jnp.zeros((4, 1)))


def test_gradient_is_minus_sigmoid_of_minus_gap(pairs):
    chosen, rejected, _, _ = map(jnp.array, pairs)
    grads = jax.grad(lambda c: bradley_terry(c, rejected).sum())(chosen)
    np.testing.assert_allclose(
        grads, -jax.nn.sigmoid(-(chosen - rejected)), rtol=1e-5, atol=1e-7
    )
    check_grads(
        jax.jit(bradley_terry), (chosen, rejected), order=1, atol=1e-2, rtol=1e-2
    )


def test_label_smoothing_mixes_the_two_labels(pairs):
    chosen, rejected, _, soft_label = map(jnp.array, pairs)
    smoothed = bradley_terry(
        chosen, rejected, soft_label=soft_label, label_smoothing=0.2
    )
    mixed = 0.8 * soft_label + 0.2 * (1 - soft_label)
    np.testing.assert_allclose(
        smoothed, bradley_terry(chosen, rejected, soft_label=mixed), rtol=1e-5
    )


def test_a_smoothing_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="label_smoothing: expected a number in"):
        bradley_terry(jnp.zeros(1), jnp.zeros(1), label_smoothing=1.5)


def test_smoothing_of_one_half_has_its_minimum_at_equal_rewards():
    slope = jax.grad(lambda d: bradley_terry(d, 0 * d, label_smoothing=0.5).sum())
    np.testing.assert_allclose(slope(jnp.zeros(2)), 0, atol=1e-7)
    assert (slope(jnp.array([1.0])) > 0).all()


# The other losses, each against one pair at a time in float64.


def log1pexp(x):
    return float(np.logaddexp(0.0, float(x)))


def slow_rao_kupper(c, r, p, log_theta):
    win = 1 / (1 + math.exp(log_theta - (c - r)))
    lose = 1 / (1 + math.exp(log_theta + (c - r)))
    tie = 1 - win - lose
    sure = abs(2 * p - 1)
    return -sure * math.log(win if p > 0.5 else lose) - (1 - sure) * math.log(tie)


SLOW = {
    hinge: lambda c, r, m, p: max(0.0, 1.0 + m - (c - r)),
    normalised: lambda c, r, m, p: log1pexp(-(c - r) / math.sqrt(c * c + r * r + 1e-6)),
    direct: lambda c, r, m, p: log1pexp(r - c) + log1pexp(-c) + log1pexp(r),
    scaled_bradley_terry: lambda c, r, m, p: m * log1pexp(r - c),
    rao_kupper: lambda c, r, m, p: slow_rao_kupper(c, r, p, 0.5),
}
COLUMNS = {
    hinge: ("margin",),
    normalised: (),
    direct: (),
    scaled_bradley_terry: ("margin",),
    rao_kupper: ("soft_label",),
}


def columns_of(loss, margin, soft_label):
    both = {"margin": margin, "soft_label": soft_label}
    return {name: both[name] for name in COLUMNS[loss]}


@pytest.mark.parametrize("loss", SLOW)
def test_matches_its_formula_in_float64(loss, pairs):
    chosen, rejected, margin, soft_label = pairs
    margin = np.abs(margin)
    got = loss(
        jnp.array(chosen),
        jnp.array(rejected),
        **columns_of(loss, jnp.array(margin), jnp.array(soft_label)),
    )
    rows = zip(*(x.astype(np.float64) for x in (chosen, rejected, margin, soft_label)))
    expected = [SLOW[loss](*row) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loss", SLOW)
def test_every_loss_is_finite_with_its_gradient_at_extreme_rewards(loss, dtype):
    extreme = jnp.array([1e4, -1e4, 0.0], dtype)
    columns = columns_of(loss, jnp.ones(3), jnp.array([1.0, 0.5, 0.5]))

    def total(c, r):
        return loss(c, r, **columns).sum()

    for rejected in (-extreme, extreme, 0 * extreme):
        value, grads = jax.value_and_grad(total, (0, 1))(extreme, rejected)
        assert np.isfinite(value)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)
        assert loss(extreme, rejected, **columns).dtype == jnp.float32


@pytest.mark.parametrize("loss", SLOW)
def test_gradients_are_those_of_finite_differences(loss, pairs):
    chosen, rejected, margin, soft_label = map(jnp.array, pairs)
    columns = columns_of(loss, jnp.abs(margin), soft_label)
    check_grads(
        lambda c, r: loss(jnp.asarray(c), jnp.asarray(r), **columns),
        (chosen, rejected),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
    )


def test_a_hinge_at_zero_leaves_ordered_pairs_alone():
    slope = jax.grad(lambda c: hinge(c, jnp.zeros(2), min_gap=0.0).sum())
    np.testing.assert_array_equal(slope(jnp.array([0.5, -0.5])), [0.0, -1.0])


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_normalised_refuses_an_eps_that_does_not_guard_the_root(eps):
    with pytest.raises(ValueError, match="eps: expected a number above 0"):
        normalised(jnp.zeros(1), jnp.zeros(1), eps=eps)


def test_normalised_is_never_below_its_floor_whatever_the_scale():
    big, small = (normalised(x * jnp.ones(1), -x * jnp.ones(1)) for x in (1e30, 1e-1))
    np.testing.assert_allclose(big, math.log1p(math.exp(-math.sqrt(2))), rtol=1e-5)
    np.testing.assert_allclose(big, 0.2176, atol=1e-4)
    np.testing.assert_allclose(small, big, rtol=1e-3)


def test_win_tie_and_loss_are_all_there_is():
    chosen, rejected = jnp.array([0.3, -2.0, 5.0]), jnp.array([0.1, 1.0, 0.0])
    total = sum(
        jnp.exp(-rao_kupper(chosen, rejected, soft_label=jnp.full(3, p)))
        for p in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_a_tie_pulls_the_rewards_together():
    slope = jax.grad(
        lambda c: rao_kupper(c, jnp.zeros(2), soft_label=jnp.full(2, 0.5)).sum()
    )(jnp.array([1.0, -1.0]))
    assert slope[0] > 0 > slope[1]


def test_an_impossible_tie_is_refused():
    with pytest.raises(ValueError, match="log_theta: expected a number above 0"):
        rao_kupper(jnp.zeros(1), jnp.zeros(1), log_theta=0.0)
