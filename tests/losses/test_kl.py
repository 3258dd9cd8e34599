"""The three KL estimators: values, expectations and gradients of expectations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses.kl import k1, k2, k3

ESTIMATORS = [k1, k2, k3]


def slow(name, logprob, ref_logprob):
    d = float(ref_logprob) - float(logprob)
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[name]


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(2.0, (5, 7)).astype(np.float32)
    ref_logprobs = (logprobs + rng.normal(0, 0.8, (5, 7))).astype(np.float32)
    mask = rng.uniform(size=(5, 7)) < 0.6
    return logprobs, ref_logprobs, mask


def distributions():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (6,)), jax.nn.log_softmax(
        jax.random.normal(keys[1], (6,))
    )


def test_by_hand():
    logprobs, ref = jnp.array([-1.0]), jnp.array([-1.0 + math.log(2)])
    np.testing.assert_allclose(k1(logprobs, ref), -math.log(2), rtol=1e-6)
    np.testing.assert_allclose(k2(logprobs, ref), math.log(2) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(k3(logprobs, ref), 1 - math.log(2), rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_matches_the_float64_loop(estimator):
    logprobs, ref, mask = tokens()
    got = estimator(*map(jnp.array, (logprobs, ref, mask)))
    for index in np.ndindex(mask.shape):
        want = slow(estimator.__name__, logprobs[index], ref[index])
        want = want if mask[index] else 0.0
        np.testing.assert_allclose(got[index], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased_over_the_whole_vocabulary(estimator):
    logits, ref = distributions()
    policy = jax.nn.log_softmax(logits)
    kl = (jnp.exp(policy) * (policy - ref)).sum()
    expected = (jnp.exp(policy) * estimator(policy, ref)).sum()
    np.testing.assert_allclose(expected, kl, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "objective"),
    [
        (k1, lambda policy, ref: 0.0 * policy.sum()),
        (k2, lambda policy, ref: (jnp.exp(policy) * (policy - ref)).sum()),
        (k3, lambda policy, ref: (jnp.exp(ref) * (ref - policy)).sum()),
    ],
)
def test_expected_gradient_is_the_one_documented(estimator, objective):
    logits, ref = distributions()
    sampled = jnp.exp(jax.nn.log_softmax(logits))  # x ~ pi, not differentiated

    def expectation(logits):
        return (sampled * estimator(jax.nn.log_softmax(logits), ref)).sum()

    want = jax.grad(lambda x: objective(jax.nn.log_softmax(x), ref))(logits)
    np.testing.assert_allclose(jax.grad(expectation)(logits), want, atol=1e-6)


def test_k2_and_k3_are_zero_at_equality_and_never_negative():
    gaps = jnp.concatenate([jnp.linspace(-20, 20, 401), jnp.logspace(-8, -1, 50)])
    for estimator in (k2, k3):
        assert float(estimator(jnp.zeros(()), jnp.zeros(()))) == 0.0
        values = estimator(jnp.zeros_like(gaps), gaps)
        assert (np.asarray(values) >= -1e-7 * np.abs(gaps)).all()


def test_small_gaps_keep_the_digits_that_a_plain_exp_loses():
    gaps = np.logspace(-5, -1, 40).astype(np.float32)
    exact = np.expm1(gaps.astype(np.float64)) - gaps
    error = np.abs(np.asarray(k3(jnp.zeros(40), jnp.array(gaps))) - exact)
    assert (error <= 5e-7 * gaps).all()
    plain = np.abs(np.asarray(jnp.exp(gaps) - 1 - gaps) - exact)
    assert (plain > 1e-3 * gaps).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_tokens_have_no_value_and_no_gradient_whatever_they_hold(estimator):
    logprobs, ref, mask = map(jnp.array, tokens())

    def total(a, b):
        return estimator(a, b, mask).sum()

    clean = jax.grad(total, (0, 1))(logprobs, ref)
    for junk in ((jnp.nan, 0.0), (-jnp.inf, -jnp.inf), (-1e30, 1e30)):
        a, b = (jnp.where(mask, x, y) for x, y in zip((logprobs, ref), junk))
        np.testing.assert_array_equal(total(a, b), total(logprobs, ref))
        for got, want in zip(jax.grad(total, (0, 1))(a, b), clean, strict=True):
            np.testing.assert_array_equal(got, want)
            assert (np.asarray(got)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_match_finite_differences_and_jit_changes_nothing(estimator):
    logprobs, ref, mask = map(jnp.array, tokens())
    np.testing.assert_allclose(
        jax.jit(estimator)(logprobs, ref, mask),
        estimator(logprobs, ref, mask),
        atol=1e-6,
    )
    check_grads(
        jax.jit(lambda a, b: estimator(a, b, mask)),
        (logprobs, ref),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_from_bfloat16(estimator):
    assert estimator(*jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_another_shape_is_refused_not_broadcast(estimator):
    with pytest.raises(Exception, match="ref_logprobs"):
        estimator(jnp.zeros((4, 4)), jnp.zeros((4, 1)))
