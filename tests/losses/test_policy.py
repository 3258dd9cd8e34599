"""Clipped policy losses per token and per completion, and their statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import policy


def slow_ppo(logprob, old, advantage, low=0.2, high=0.2, dual=None):
    """The published maximum of two products, one token, float64."""
    ratio = math.exp(float(logprob) - float(old))
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-float(advantage) * ratio, -float(advantage) * clipped)
    if dual is not None and advantage < 0:
        loss = min(loss, -dual * float(advantage))
    return loss


def tokens(seed=0, spread=0.4):
    """Ratios inside and outside the range, advantages of both signs and 0."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2.0, (6, 8)).astype(np.float32)
    logprobs = (old + rng.normal(0, spread, (6, 8))).astype(np.float32)
    advantages = rng.normal(-0.2, 1.5, (6, 8)).astype(np.float32)
    advantages[0, :2] = 0.0
    mask = rng.uniform(size=(6, 8)) < 0.6
    mask[1] = False
    return logprobs, old, advantages, mask


def packed(seed=0, rows=4, length=12, count=7):
    """Tokens of 7 completions in 4 rows; 5 has none; junk numbers where masked."""
    rng = np.random.default_rng(seed)
    values = rng.normal(-1.0, 1.0, (rows, length)).astype(np.float32)
    sample = rng.integers(0, count, (rows, length)).astype(np.int32)
    sample[sample == 5] = 6
    mask = rng.uniform(size=(rows, length)) < 0.7
    sample[~mask] = rng.choice([-3, 5, 99], (~mask).sum())
    return values, sample, mask, count


# (ratio, advantage) -> loss at eps 0.2
BY_HAND = [
    (1.5, 2.0, -2.4),  # good token, already up: held at 1.2
    (0.5, 2.0, -1.0),  # good token, down: full pull
    (1.5, -2.0, 3.0),  # bad token, up: full push
    (0.5, -2.0, 1.6),  # bad token, already down: held at 0.8
    (1.1, 2.0, -2.2),
    (1.5, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss"), BY_HAND)
def test_ppo_by_hand(ratio, advantage, loss):
    got = policy.ppo_clip(
        jnp.array([math.log(ratio)]), jnp.zeros(1), jnp.array([advantage])
    )
    np.testing.assert_allclose(got, [loss], rtol=1e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "settings",
    [
        dict(low=0.2, high=0.2, dual=None),
        dict(low=0.2, high=0.28, dual=None),
        dict(low=0.1, high=0.1, dual=1.3),
        dict(low=0.3, high=1.5, dual=3.0),
        dict(low=1.0, high=0.2, dual=None),
    ],
)
def test_ppo_matches_the_float64_loop(seed, settings):
    logprobs, old, advantages, mask = tokens(seed)
    got = policy.ppo_clip(
        *map(jnp.array, (logprobs, old, advantages, mask)),
        clip_eps=settings["low"],
        clip_eps_high=settings["high"],
        dual_clip=settings["dual"],
    )
    for i in np.ndindex(mask.shape):
        want = slow_ppo(logprobs[i], old[i], advantages[i], **settings)
        np.testing.assert_allclose(
            got[i], want if mask[i] else 0.0, rtol=1e-5, atol=1e-6
        )


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    logprobs, old, advantages, _ = map(jnp.array, tokens(spread=3.0))
    plain = policy.ppo_clip(logprobs, old, advantages)
    dual = policy.ppo_clip(logprobs, old, advantages, dual_clip=2.0)
    bad = np.asarray(advantages) < 0
    np.testing.assert_array_equal(dual[~bad], plain[~bad])
    assert (np.asarray(dual)[bad] <= -2.0 * np.asarray(advantages)[bad] + 1e-5).all()
    assert (np.asarray(dual)[bad] < np.asarray(plain)[bad] - 0.1).any()


def test_at_ratio_one_the_loss_is_minus_a_and_the_gradient_the_policy_gradient():
    logprobs, _, advantages, _ = map(jnp.array, tokens())
    loss = policy.ppo_clip(logprobs, logprobs, advantages)
    np.testing.assert_array_equal(loss, -advantages)
    grad = jax.grad(lambda x: policy.ppo_clip(x, x, advantages).sum())(logprobs)
    np.testing.assert_array_equal(grad, -advantages)


def test_gradient_is_minus_a_rho_inside_and_zero_where_clipped():
    for ratio, advantage, _ in BY_HAND:
        grad = jax.grad(
            lambda x, a=advantage: policy.ppo_clip(x, jnp.zeros(()), jnp.array(a))
        )(jnp.array(math.log(ratio)))
        held = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        np.testing.assert_allclose(grad, 0.0 if held else -advantage * ratio, rtol=1e-6)


def test_gradient_matches_finite_differences():
    logprobs, old, advantages, mask = map(jnp.array, tokens(seed=3))
    gap = np.abs(np.exp(np.asarray(logprobs - old)) - np.array([[[0.8]], [[1.2]]]))
    mask = mask & jnp.array((gap > 0.02).all(0))  # away from the kinks
    check_grads(
        jax.jit(lambda x: policy.ppo_clip(x, old, advantages, mask)),
        (logprobs,),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
        eps=1e-3,
    )


def test_old_logprobs_and_advantages_are_constants():
    logprobs, old, advantages, mask = map(jnp.array, tokens())
    grads = jax.grad(lambda o, a: policy.ppo_clip(logprobs, o, a, mask).sum(), (0, 1))(
        old, advantages
    )
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize(
    "junk", [(jnp.nan, 0.0, 1.0), (jnp.inf, -jnp.inf, jnp.nan), (1e30, -1e30, -1.0)]
)
def test_masked_tokens_have_no_loss_and_no_gradient_whatever_they_hold(junk):
    *arrays, mask = map(jnp.array, tokens())
    dirty = [jnp.where(mask, x, y) for x, y in zip(arrays, junk, strict=True)]

    def total(logprobs, old, advantages):
        return policy.ppo_clip(logprobs, old, advantages, mask).sum()

    clean_value, clean_grad = jax.value_and_grad(total)(*arrays)
    value, grad = jax.value_and_grad(total)(*dirty)
    np.testing.assert_array_equal(value, clean_value)
    np.testing.assert_array_equal(grad, clean_grad)
    assert (np.asarray(grad)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("advantage", [0.0, 2.5])
def test_a_ratio_beyond_float32_costs_nothing_where_it_is_clipped(advantage):
    # exp(200) is inf: times the 0 of the branch not taken, a nan gradient
    value, grad = jax.value_and_grad(
        lambda x: policy.ppo_clip(x, jnp.zeros(()), jnp.array(advantage))
    )(jnp.array(200.0))
    np.testing.assert_allclose(value, -1.2 * advantage, rtol=1e-6)
    assert float(grad) == 0.0


def test_a_ratio_beyond_float32_is_seen_where_it_is_not_clipped():
    args = jnp.array(200.0), jnp.zeros(()), jnp.array(-1.0)
    assert float(policy.ppo_clip(*args)) == math.inf
    value, grad = jax.value_and_grad(lambda *a: policy.ppo_clip(*a, dual_clip=3.0))(
        *args
    )
    np.testing.assert_allclose(value, 3.0, rtol=1e-6)
    assert float(grad) == 0.0
    assert np.isnan(policy.ppo_clip(jnp.array(jnp.nan), *args[1:]))


def test_ppo_permutes_and_jit_changes_nothing():
    arrays = tuple(map(jnp.array, tokens()))
    plain = policy.ppo_clip(*arrays)
    order = np.random.default_rng(1).permutation(6)
    np.testing.assert_array_equal(
        plain[order], policy.ppo_clip(*(x[order] for x in arrays))
    )
    np.testing.assert_allclose(jax.jit(policy.ppo_clip)(*arrays), plain, atol=1e-6)


def test_float32_from_bfloat16():
    assert policy.ppo_clip(*jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("seed", range(3))
def test_sequence_sums_match_the_float64_loop(seed):
    values, sample, mask, count = packed(seed)
    want = np.zeros(count)
    for i in np.ndindex(mask.shape):
        if mask[i]:
            want[sample[i]] += float(values[i])
    got = policy.sequence_sums(*map(jnp.array, (values, sample, mask)), count=count)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert got[5] == 0.0


def test_sequence_sums_do_not_depend_on_where_the_tokens_lie():
    values, sample, mask, count = packed()
    order = np.random.default_rng(1).permutation(mask.size)
    moved = [x.ravel()[order].reshape(8, 6) for x in (values, sample, mask)]
    np.testing.assert_allclose(
        policy.sequence_sums(*map(jnp.array, moved), count=count),
        policy.sequence_sums(*map(jnp.array, (values, sample, mask)), count=count),
        atol=1e-5,
    )


def test_sequence_sums_give_masked_tokens_no_value_and_no_gradient():
    values, sample, mask, count = map(jnp.array, packed())
    weights = jnp.arange(1.0, 8.0)

    def total(values):
        return (policy.sequence_sums(values, sample, mask, count=7) * weights).sum()

    dirty = jnp.where(mask, values, jnp.nan)
    np.testing.assert_array_equal(total(dirty), total(values))
    want = np.where(mask, np.asarray(weights)[np.where(mask, sample, 0)], 0.0)
    np.testing.assert_array_equal(jax.grad(total)(dirty), want)
    assert int(count) == 7


def test_sequence_ratio_is_the_product_of_token_ratios():
    # two completions: ratios 1.5 * 0.9 = 1.35 (held at 1.2) and 0.95
    logprobs = jnp.log(jnp.array([[1.5, 0.9, 0.95]]))
    sample = jnp.array([[0, 0, 1]])
    sums = policy.sequence_sums(logprobs, sample, jnp.ones((1, 3), bool), count=2)
    losses = policy.sequence_clip(sums, jnp.zeros(2), jnp.array([0.5, -2.0]))
    np.testing.assert_allclose(losses, [-0.6, 1.9], rtol=1e-6)


def test_sequence_clip_through_packed_rows_matches_the_float64_loop():
    values, sample, mask, count = packed(seed=5)
    rng = np.random.default_rng(6)
    old = (values + rng.normal(0, 0.15, values.shape)).astype(np.float32)
    advantages = rng.normal(size=count).astype(np.float32)
    usable = np.arange(count) != 3
    places = jnp.array(sample), jnp.array(mask)
    sums, old_sums = (
        policy.sequence_sums(jnp.array(x), *places, count=count) for x in (values, old)
    )
    differences = policy.sequence_sums(
        jnp.array(values) - jnp.array(old), *places, count=count
    )
    rest = jnp.array(advantages), jnp.array(usable)
    got = policy.sequence_clip(sums, old_sums, *rest)
    same = policy.sequence_clip(differences, jnp.zeros(count), *rest)
    for m in range(count):
        real = mask & (sample == m)
        new, before = (x.astype(np.float64)[real].sum() for x in (values, old))
        want = slow_ppo(new, before, advantages[m]) if usable[m] else 0.0
        np.testing.assert_allclose(got[m], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(same[m], want, rtol=1e-5, atol=1e-5)


def test_summing_differences_keeps_the_ratio_of_a_long_completion():
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(2.5, (4, 1024)).astype(np.float32)
    old = (logprobs + rng.normal(0, 1e-4, (4, 1024))).astype(np.float32)
    exact = (logprobs.astype(np.float64) - old).sum(1)
    sample = jnp.repeat(jnp.arange(4)[:, None], 1024, axis=1)
    sums = policy.sequence_sums(
        jnp.array(logprobs) - jnp.array(old), sample, sample >= 0, count=4
    )
    np.testing.assert_allclose(sums, exact, atol=1e-6)


def test_statistics_by_hand():
    ratios = np.array([[1.0, 1.5, 0.5, 1.1]], np.float32)
    mask = jnp.array([[True, True, False, True]])
    result = policy.policy_statistics(jnp.log(ratios), jnp.zeros((1, 4)), mask)
    np.testing.assert_allclose(result.ratio.value(), 3.6 / 3, rtol=1e-6)
    np.testing.assert_allclose(result.clip_fraction.value(), 1 / 3, rtol=1e-6)
    want = (0.5 - math.log(1.5) + 0.1 - math.log(1.1)) / 3
    np.testing.assert_allclose(result.kl.value(), want, rtol=1e-5)
    wider = policy.policy_statistics(
        jnp.log(ratios), jnp.zeros((1, 4)), mask, clip_eps_high=0.6
    )
    assert float(wider.clip_fraction.value()) == 0.0


def test_the_unmoved_policy_has_ratio_one_and_nothing_clipped():
    logprobs, _, _, mask = map(jnp.array, tokens())
    result = policy.policy_statistics(logprobs, logprobs, mask)
    assert float(result.ratio.value()) == 1.0
    assert float(result.clip_fraction.value()) == 0.0
    assert float(result.kl.value()) == 0.0


def test_statistics_of_parts_add_and_ignore_what_is_masked():
    logprobs, old, _, mask = map(jnp.array, tokens())
    whole = policy.policy_statistics(logprobs, old, mask)
    assert 0.0 < float(whole.clip_fraction.value()) < 1.0
    dirty = jnp.where(mask, logprobs, jnp.inf)
    parts = [
        policy.policy_statistics(dirty[s], old[s], mask[s])
        for s in (slice(0, 2), slice(2, 6))
    ]
    for a, b, c in zip(*parts, whole, strict=True):
        np.testing.assert_allclose((a + b).value(), c.value(), rtol=1e-5)


def test_statistics_carry_no_gradient_and_jit_changes_nothing():
    logprobs, old, _, mask = map(jnp.array, tokens())

    def total(x):
        return sum(m.total for m in policy.policy_statistics(x, old, mask))

    np.testing.assert_array_equal(jax.grad(total)(logprobs), 0.0)
    np.testing.assert_allclose(jax.jit(total)(logprobs), total(logprobs), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(clip_eps=0.0), "clip_eps: expected a number in"),
        (dict(clip_eps=1.2), "clip_eps: expected a number in"),
        (dict(clip_eps_high=-0.1), "clip_eps_high: expected a positive number"),
        (dict(dual_clip=1.0), "dual_clip: expected a number > 1"),
    ],
)
def test_settings_outside_their_ranges_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        policy.ppo_clip(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), **settings)


def test_no_completions_is_refused():
    with pytest.raises(ValueError, match="count: expected at least 1"):
        policy.sequence_sums(
            jnp.zeros((1, 2)),
            jnp.zeros((1, 2), jnp.int32),
            jnp.ones((1, 2), bool),
            count=0,
        )


def test_advantages_of_another_shape_are_refused_not_broadcast():
    with pytest.raises(Exception, match="advantages"):
        policy.ppo_clip(jnp.zeros((4, 4)), jnp.zeros((4, 4)), jnp.zeros((4, 1)))
