"""The clipped value loss and the explained variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses.value import clipped_value, explained_variance


def slow_value(value, old, target, eps):
    value, old, target = map(float, (value, old, target))
    error = (value - target) ** 2
    if eps is not None:
        near = min(max(value, old - eps), old + eps)
        error = max(error, (near - target) ** 2)
    return error / 2


def slow_explained(values, returns, mask):
    returns = returns[mask].astype(np.float64)
    residuals = returns - values[mask].astype(np.float64)
    return 1 - residuals.var() / returns.var()


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    old = rng.normal(-0.5, 1.0, (6, 8)).astype(np.float32)
    values = (old + rng.normal(0, 0.4, (6, 8))).astype(np.float32)
    returns = rng.normal(-0.5, 1.5, (6, 8)).astype(np.float32)
    mask = rng.uniform(size=(6, 8)) < 0.6
    mask[2] = False
    return values, old, returns, mask


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "grad"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside: plain
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved too far towards the target: held
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away: full pull back
        (-0.5, 0.0, -2.0, 1.62, 0.0),
    ],
)
def test_by_hand(value, old, target, loss, grad):
    got, slope = jax.value_and_grad(clipped_value)(
        *map(jnp.array, (value, old, target))
    )
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(slope, grad, rtol=1e-5)


@pytest.mark.parametrize("eps", [0.2, 0.7, None])
def test_matches_the_float64_loop(eps):
    values, old, returns, mask = tokens()
    got = clipped_value(*map(jnp.array, (values, old, returns, mask)), clip_eps=eps)
    for i in np.ndindex(mask.shape):
        want = slow_value(values[i], old[i], returns[i], eps) if mask[i] else 0.0
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


def test_clipping_only_raises_the_loss():
    values, old, returns, _ = map(jnp.array, tokens())
    plain = clipped_value(values, old, returns, clip_eps=None)
    clipped = clipped_value(values, old, returns, clip_eps=0.1)
    assert (np.asarray(clipped) >= np.asarray(plain)).all()
    assert (np.asarray(clipped) > np.asarray(plain) + 0.01).any()


@pytest.mark.parametrize("eps", [0.2, None])
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, 1e30])
def test_masked_tokens_have_no_loss_and_no_gradient_whatever_they_hold(eps, junk):
    *arrays, mask = map(jnp.array, tokens())

    def total(values, old, returns):
        return clipped_value(values, old, returns, mask, clip_eps=eps).sum()

    clean = jax.value_and_grad(total)(*arrays)
    dirty = jax.value_and_grad(total)(*(jnp.where(mask, x, junk) for x in arrays))
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert (np.asarray(dirty[1])[~np.asarray(mask)] == 0).all()


def test_only_the_values_are_learned():
    values, old, returns, mask = map(jnp.array, tokens())
    grads = jax.grad(lambda o, g: clipped_value(values, o, g, mask).sum(), (0, 1))(
        old, returns
    )
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)


def test_gradient_matches_finite_differences_and_jit_changes_nothing():
    values, old, returns, mask = map(jnp.array, tokens())
    near = jnp.clip(values, old - 0.2, old + 0.2)
    smooth = (jnp.abs(jnp.abs(values - old) - 0.2) > 0.01) & (
        (near == values)
        | (jnp.abs(jnp.abs(values - returns) - abs(near - returns)) > 0.01)
    )
    mask = mask & smooth
    check_grads(
        jax.jit(lambda x: clipped_value(x, old, returns, mask)),
        (values,),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
        eps=1e-3,
    )
    np.testing.assert_allclose(
        jax.jit(clipped_value)(values, old, returns, mask),
        clipped_value(values, old, returns, mask),
        atol=1e-6,
    )


def test_float32_from_bfloat16():
    assert clipped_value(*jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.float32


def test_explained_variance_by_hand():
    returns = jnp.array([[1.0, -1.0, 3.0, 50.0]])
    mask = jnp.array([[True, True, True, False]])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    assert float(explained_variance(returns + 7.0, returns, mask)) == 1.0
    assert float(explained_variance(jnp.zeros((1, 4)), returns, mask)) == 0.0
    np.testing.assert_allclose(
        explained_variance(-returns, returns, mask), -3.0, rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_explained_variance_matches_float64_on_ragged_masks(seed):
    values, _, returns, mask = tokens(seed)
    want = slow_explained(values, returns, mask)
    args = jnp.array(mask)
    got = explained_variance(jnp.array(values), jnp.array(returns), args)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    dirty = explained_variance(
        jnp.where(args, values, jnp.inf), jnp.where(args, returns, jnp.nan), args
    )
    np.testing.assert_array_equal(dirty, got)
    np.testing.assert_allclose(
        jax.jit(explained_variance)(jnp.array(values), jnp.array(returns), args),
        got,
        rtol=1e-5,
    )


def test_explained_variance_of_returns_that_do_not_vary_is_zero():
    values, _, _, mask = map(jnp.array, tokens())
    constant = jnp.full(values.shape, 0.1)
    assert float(explained_variance(values, constant, mask)) == 0.0
    assert float(explained_variance(values, values, jnp.zeros_like(mask))) == 0.0


def test_explained_variance_carries_no_gradient():
    values, _, returns, mask = map(jnp.array, tokens())
    grad = jax.grad(explained_variance)(values, returns, mask)
    np.testing.assert_array_equal(grad, 0.0)


def test_a_clip_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="clip_eps: expected a positive number"):
        clipped_value(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), clip_eps=0.0)


def test_returns_of_another_shape_are_refused_not_broadcast():
    with pytest.raises(Exception, match="returns"):
        clipped_value(jnp.zeros((4, 4)), jnp.zeros((4, 4)), jnp.zeros((4, 1)))
