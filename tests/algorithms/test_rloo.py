"""RLOO on ragged completions: equal to float64 loops, in every layout and variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import rloo
from rlhf_jax.algorithms.policy import counted, policy_metrics
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.reinforcement import RLCursor
from rlhf_jax.programs.rloo import KL_LOSSES, VARIANTS, RlooLossConfig, make_targets
from tests.ragged import (
    LAYOUTS,
    batch_of,
    packing,
    ragged,
    real_tokens,
    table,
    table_apply,
    table_logprob,
)

KEY = jax.random.key(0)
KL_COEF, CLIP_EPS = 0.3, 0.2
KINDS = ("reward", "advantage", "loss_k1", "loss_k2", "loss_k3")


def with_targets(completions, kl="reward", **options):
    loss = RlooLossConfig(kl=kl, kl_coef=KL_COEF, clip_eps=CLIP_EPS, **options)
    return make_targets(loss, completions, RLCursor())


def objective_of(variant, kl):
    return VARIANTS[variant](
        table_apply,
        clip_eps=CLIP_EPS,
        kl_loss=KL_LOSSES.get(kl),
        kl_coef=KL_COEF if kl in KL_LOSSES else 0.0,
    )


# The same in float64, one number at a time.


def loop_advantages(completions, kl):
    """{m: advantage} of the completions that carry weight."""
    samples, found = completions.num_samples, {}
    for start in range(0, len(completions.tokens), samples):
        group = [m for m in range(start, start + samples) if completions.counts[m]]
        if len(group) < 2:
            continue
        away = {
            m: sum(
                float(completions.old_logprobs[m, t])
                - float(completions.ref_logprobs[m, t])
                for t in range(completions.mask.shape[1])
                if completions.mask[m, t]
            )
            for m in group
        }
        inside = KL_COEF if kl == "reward" else 0.0
        reward = {m: float(completions.scores[m]) - inside * away[m] for m in group}
        for m in group:
            others = [reward[j] for j in group if j != m]
            found[m] = reward[m] - sum(others) / len(others)
            if kl == "advantage":
                found[m] -= KL_COEF * away[m]
    return found


def loop_kl(kl, new, ref):
    return {
        "loss_k1": new - ref,
        "loss_k2": (new - ref) ** 2 / 2,
        "loss_k3": np.exp(ref - new) - 1 - (ref - new),
    }[kl]


def loop_clip(advantage, ratio):
    clipped = min(max(ratio, 1 - CLIP_EPS), 1 + CLIP_EPS)
    return max(-advantage * ratio, -advantage * clipped)


def loop_loss(params, completions, variant, kl):
    advantages = loop_advantages(completions, kl)
    losses = []
    for m, advantage in advantages.items():
        new, old, ref = ([], [], [])
        for t in range(completions.mask.shape[1]):
            if completions.mask[m, t]:
                new.append(table_logprob(params, completions, m, t))
                old.append(float(completions.old_logprobs[m, t]))
                ref.append(float(completions.ref_logprobs[m, t]))
        extra = [0.0] * len(new)
        if kl in KL_LOSSES:
            extra = [KL_COEF * loop_kl(kl, *pair) for pair in zip(new, ref)]
        if variant == "sequence":
            ratio = np.exp(sum(new) - sum(old))
            losses.append(loop_clip(advantage, ratio) + sum(extra))
        else:
            ratios = [np.exp(a - b) for a, b in zip(new, old)]
            losses += [loop_clip(advantage, r) + e for r, e in zip(ratios, extra)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("truncated", ["keep", "mask"])
@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_objective_equals_a_float64_loop_in_every_layout(variant, kl, truncated):
    completions = ragged()
    if truncated == "mask":
        completions.counts = completions.stopped
        assert 0 < completions.counts.sum() < len(completions.counts)
    params = table()
    expected = loop_loss(params, completions, variant, kl)
    done, _ = with_targets(completions, kl)
    for layout in LAYOUTS:
        loss, _ = objective_of(variant, kl)(params, batch_of(done, layout), KEY)
        np.testing.assert_allclose(loss.value(), expected, rtol=1e-5, err_msg=layout)


def test_hand_worked_pair():
    """Two completions of one token: A = 1.5 and -1.5, ratios 2 and 1/2."""
    two = ragged(1, 2, length=1)
    two.scores = np.array([1.0, -0.5], np.float32)
    two.old_logprobs = np.full((2, 1), -1.0, np.float32)
    two.ref_logprobs = np.full((2, 1), -1.0, np.float32)
    two.tokens = np.array([[3], [4]], np.int32)
    done, metrics = with_targets(two)
    np.testing.assert_allclose(done.advantages, [1.5, -1.5])
    assert metrics["rollout/groups_without_baseline"] == 0

    def apply(params, sequences, key):
        up = jnp.where(sequences.tokens == 3, np.log(2.0), np.log(0.5))
        return up - 1.0, jnp.zeros_like(up)

    for variant in VARIANTS.values():
        objective = jax.jit(variant(apply, clip_eps=0.2))
        loss, metrics = objective({}, batch_of(done), KEY)
        # max(-1.5 * 2, -1.5 * 1.2) = -1.8 and max(1.5 * 0.5, 1.5 * 0.8) = 1.2
        np.testing.assert_allclose(loss.value(), -0.3, rtol=1e-6)
        np.testing.assert_allclose(metrics["policy/surrogate_size"].value(), 1.5)
        np.testing.assert_allclose(metrics["policy/ratio"].value(), 1.25, rtol=1e-6)
        assert float(metrics["policy/clip_fraction"].value()) == 1.0


def test_penalty_inside_the_reward_is_in_the_baseline_and_outside_is_not():
    completions = ragged()
    away = completions.kl.sum(axis=1).reshape(4, 3).astype(np.float64)
    inside, _ = with_targets(completions, "reward")
    outside, _ = with_targets(completions, "advantage")
    others = (away.sum(axis=1, keepdims=True) - away) / 2
    np.testing.assert_allclose(
        (inside.advantages - outside.advantages).reshape(4, 3),
        KL_COEF * others,
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        inside.advantages.reshape(4, 3).sum(axis=1), 0, atol=1e-5
    )
    for kl in KL_LOSSES:
        plain, _ = with_targets(completions, kl)
        free = loop_advantages(completions, kl)
        np.testing.assert_allclose(plain.advantages, list(free.values()), rtol=1e-4)


def test_whitened_advantages_have_unit_variance_over_the_counted():
    completions = ragged(seed=1)
    completions.counts = completions.stopped
    done, _ = with_targets(completions, whiten=True)
    used = done.advantages[done.counts]
    np.testing.assert_allclose([used.mean(), used.std()], [0, 1], atol=1e-4)
    assert not done.advantages[~done.counts].any()


def by_token(params, sequences, key):
    return params["logprobs"], params["entropy"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("kl", ["reward", "loss_k3"])
def test_gradient_is_zero_where_masked_and_reaches_every_sample(variant, kl, layout):
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = with_targets(completions, kl)
    batch = batch_of(done, layout)
    shape = batch.old_logprobs.shape
    near = batch.old_logprobs + 0.01 * jax.random.normal(KEY, shape)
    # Off the completions the model may say anything at all.
    params = {
        "logprobs": jnp.where(counted(batch), near, 500.0),
        "entropy": jnp.full(shape, 500.0),
    }
    objective = VARIANTS[variant](
        by_token,
        clip_eps=CLIP_EPS,
        kl_loss=KL_LOSSES.get(kl),
        kl_coef=KL_COEF if kl in KL_LOSSES else 0.0,
    )
    grads = jax.grad(lambda p: objective(p, batch, KEY)[0].total)(params)
    assert not np.asarray(grads["entropy"]).any()
    grad = np.asarray(grads["logprobs"])
    mask = np.asarray(counted(batch))
    assert np.isfinite(grad).all()
    assert not grad[~mask].any()
    assert (grad[mask] != 0).all()
    reached = np.unique(np.asarray(batch.sample)[mask])
    np.testing.assert_array_equal(reached, np.flatnonzero(done.counts))
    assert len(real_tokens(done)) == mask.sum()


# Dropped completions.


def test_a_dropped_completion_is_absent_from_loss_mean_and_baseline():
    completions = ragged(3, 3)
    completions.counts = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], bool)
    other = dataclasses.replace(
        completions,
        scores=np.where(completions.counts, completions.scores, 1e6).astype(np.float32),
        old_logprobs=np.where(
            completions.counts[:, None], completions.old_logprobs, -50.0
        ).astype(np.float32),
        ref_logprobs=np.where(
            completions.counts[:, None], completions.ref_logprobs, np.nan
        ).astype(np.float32),
    )
    for variant, kl in (("sequence", "loss_k3"), ("token", "reward")):
        objective = objective_of(variant, kl)
        value = jax.value_and_grad(lambda p, b: objective(p, b, KEY)[0].value())  # noqa: B023
        value = jax.jit(value)
        batches = [batch_of(with_targets(c, kl)[0]) for c in (completions, other)]
        (loss, grad), (same, grad_same) = (value(table(), b) for b in batches)
        assert float(loss) == float(same)
        np.testing.assert_array_equal(grad["w"], grad_same["w"])
        expected = loop_loss(table(), completions, variant, kl)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_group_left_with_one_counts_zero_and_is_reported():
    completions = ragged(4, 3)
    completions.counts = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1], bool)
    done, metrics = with_targets(completions)
    np.testing.assert_array_equal(
        done.counts, [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1]
    )  # fmt: skip
    assert metrics["rollout/groups_without_baseline"] == 0.5
    assert not done.advantages[~done.counts].any()
    loss, _ = rloo.rloo_objective(table_apply)(table(), batch_of(done), KEY)
    assert float(loss.weight) == 5


def test_nothing_left_is_a_zero_loss_and_no_gradient():
    completions = ragged()
    completions.counts = np.zeros(len(completions.counts), bool)
    done, metrics = with_targets(completions)
    assert metrics["rollout/groups_without_baseline"] == 1
    for variant in VARIANTS:
        loss, _ = objective_of(variant, "loss_k3")(table(), batch_of(done), KEY)
        assert float(loss.value()) == 0 and float(loss.weight) == 0
    tx = optax.sgd(1.0)
    update = jax.jit(make_update(objective_of("sequence", "loss_k3"), tx))
    state, report = update(init_state(table(), tx), batch_of(done), KEY)
    np.testing.assert_array_equal(state.params["w"], table()["w"])
    assert float(report["update/finite"]) == 1


# What several updates do.


def epochs_of(done, *, count, epochs, learning_rate, variant="sequence"):
    tx = optax.sgd(learning_rate)
    update = jax.jit(make_update(objective_of(variant, "reward"), tx))
    state, reports = init_state(table(), tx), []
    for epoch in range(epochs):
        rng = xp.epoch_rng(0, 0, epoch)
        for batch in xp.minibatches(
            done, packing("padded"), count=count, accum_steps=1, rng=rng
        ):
            state, report = update(state, batch, KEY)
            reports.append(report)
    return state, reports


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_ratio_is_one_in_the_first_epoch_and_clips_in_later_ones(variant):
    completions = ragged()
    own = np.zeros(completions.mask.shape, np.float32)
    for m, t in real_tokens(completions):
        own[m, t] = table_logprob(table(), completions, m, t)
    done, _ = with_targets(dataclasses.replace(completions, old_logprobs=own))
    _, reports = epochs_of(done, count=1, epochs=4, learning_rate=3.0, variant=variant)
    np.testing.assert_allclose(reports[0]["policy/ratio"], 1, atol=1e-6)
    assert float(reports[0]["policy/clip_fraction"]) == 0
    assert float(reports[-1]["policy/clip_fraction"]) > 0.1
    assert float(reports[-1]["policy/kl_step"]) > 1e-3
    # The first epoch's loss is minus the mean advantage; learning lowers it.
    assert float(reports[-1]["loss"]) < float(reports[0]["loss"]) - 0.1


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_accumulated_update_equals_the_full_batch(variant):
    completions = ragged(4, 3)
    completions.counts = completions.stopped  # micro-batches of different weight
    done, _ = with_targets(completions, "loss_k2")
    tx = optax.adam(0.1)
    results = []
    for accum_steps in (1, 2):
        [batch] = xp.minibatches(
            done,
            packing("shared"),
            count=1,
            accum_steps=accum_steps,
            rng=np.random.default_rng(0),
        )
        update = make_update(
            objective_of(variant, "loss_k2"), tx, accum_steps=accum_steps
        )
        results.append(jax.jit(update)(init_state(table(), tx), batch, KEY))
    (full, expected), (parts, report) = results
    np.testing.assert_allclose(parts.params["w"], full.params["w"], atol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(
            report[name], value, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_metrics_equal_a_float64_loop():
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = with_targets(completions)
    params, batch = table(), batch_of(done, "packed")
    logprobs, entropy = table_apply(params, batch.sequences, KEY)
    found = policy_metrics(batch, logprobs, entropy, counted(batch), clip_eps=CLIP_EPS)
    rows = []
    for m, t in real_tokens(done):
        new = table_logprob(params, done, m, t)
        moved = new - float(done.old_logprobs[m, t])
        away = float(done.ref_logprobs[m, t]) - new
        ratio = np.exp(moved)
        rows.append(
            (ratio, abs(ratio - 1) > 0.2, ratio - 1 - moved, np.exp(away) - 1 - away)
        )
    means = np.mean(rows, axis=0)
    names = ("ratio", "clip_fraction", "kl_step", "kl_ref_k3")
    for name, mean in zip(names, means, strict=True):
        np.testing.assert_allclose(
            found[f"policy/{name}"].value(), mean, rtol=1e-5, err_msg=name
        )
