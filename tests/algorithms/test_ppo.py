"""PPO on ragged completions: targets and both objectives equal to float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.policy import counted
from rlhf_jax.algorithms.sft import sft_objective
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.ppo_targets import PpoLossConfig, make_targets
from rlhf_jax.programs.reinforcement import RLCursor
from tests.ragged import (
    LAYOUTS,
    batch_of,
    packing,
    ragged,
    real_tokens,
    table,
    table_apply,
    table_entropy,
    table_logprob,
)

KEY = jax.random.key(0)


def as_values(params, sequences, key):
    """A critic that is the same table as the policy."""
    return table_apply(params, sequences, key)[0]


def targets(completions, cursor=None, **loss):
    cursor = RLCursor(kl_coef=loss.get("kl_coef", 0.02)) if cursor is None else cursor
    return make_targets(PpoLossConfig(**loss), completions, cursor)


# Targets, one number at a time.


def loop_targets(completions, scores, *, kl_coef, gamma=1.0, gae_lambda=0.95):
    """{(m, t): (advantage, return)} before whitening."""
    found = {}
    for m in range(len(completions.tokens)):
        if not completions.counts[m]:
            continue
        times = [t for t in range(completions.mask.shape[1]) if completions.mask[m, t]]
        after, next_value = 0.0, 0.0
        for t in reversed(times):
            old = float(completions.old_logprobs[m, t])
            reward = -kl_coef * (old - float(completions.ref_logprobs[m, t]))
            if t == times[-1]:
                reward += float(scores[m])
            value = float(completions.values[m, t])
            after = reward + gamma * next_value - value + gamma * gae_lambda * after
            next_value = value
            found[m, t] = after, after + value
    return found


def check_targets(done, expected, *, clip=None, whiten=False):
    advantages = np.array([advantage for advantage, _ in expected.values()])
    if whiten:
        centred = advantages - advantages.mean()
        advantages = centred / np.sqrt((centred**2).mean() + 1e-6)
    if clip is not None:
        advantages = advantages.clip(-clip, clip)
    at = tuple(np.array(list(expected)).T)
    np.testing.assert_allclose(done.advantages[at], advantages, rtol=1e-4, atol=1e-5)
    returns = [value for _, value in expected.values()]
    np.testing.assert_allclose(done.returns[at], returns, rtol=1e-4, atol=1e-5)
    left = np.ones(done.mask.shape, bool)
    left[at] = False
    assert not done.advantages[left].any()
    assert not done.returns[left].any()


@pytest.mark.parametrize("truncated", ["keep", "mask"])
@pytest.mark.parametrize(
    "loss",
    [
        {"whiten": False},
        {"whiten": True},
        {"whiten": True, "advantage_clip": 0.5},
        {"whiten": False, "gamma": 0.9, "gae_lambda": 0.6, "kl_coef": 0.7},
    ],
)
def test_targets_equal_a_float64_loop(loss, truncated):
    completions = ragged()
    if truncated == "mask":
        completions.counts = completions.stopped
    done, _ = targets(completions, scores="raw", **loss)
    steps = {k: v for k, v in loss.items() if k in ("gamma", "gae_lambda")}
    expected = loop_targets(
        completions,
        completions.scores.astype(np.float64),
        kl_coef=loss.get("kl_coef", 0.02),
        **steps,
    )
    check_targets(
        done, expected, clip=loss.get("advantage_clip"), whiten=loss["whiten"]
    )


def test_hand_worked_targets():
    """One completion of two tokens: values 1 and 2, score 4, KL 0.5 a token."""
    one = ragged(1, 1, length=2)
    one.mask = np.ones((1, 2), bool)
    one.old_logprobs = np.array([[-1.0, -1.0]], np.float32)
    one.ref_logprobs = np.array([[-1.5, -1.5]], np.float32)
    one.values = np.array([[1.0, 2.0]], np.float32)
    one.scores = np.array([4.0], np.float32)
    done, _ = targets(
        one, scores="raw", whiten=False, kl_coef=0.2, gamma=1.0, gae_lambda=0.5
    )
    # deltas: -0.1 + 2 - 1 = 0.9 and 4 - 0.1 - 2 = 1.9
    np.testing.assert_allclose(done.advantages, [[0.9 + 0.5 * 1.9, 1.9]], rtol=1e-6)
    np.testing.assert_allclose(done.returns, [[2.85, 3.9]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["scale", "normalise"])
def test_scores_are_measured_by_the_moments_of_all_counted_scores_so_far(kind):
    cursor, seen = RLCursor(kl_coef=0.02), []
    for step in range(3):
        completions = ragged(seed=step)
        completions.scores = completions.scores * 10 + 50 * step
        completions.counts = completions.stopped
        seen += completions.scores[completions.counts].astype(np.float64).tolist()
        done, _ = targets(
            completions, cursor, scores=kind, score_clip=1.5, whiten=False
        )
        scores = completions.scores.astype(np.float64)
        if kind == "normalise":
            scores = scores - np.mean(seen)
        scores = (scores / np.std(seen, ddof=1)).clip(-1.5, 1.5)
        check_targets(done, loop_targets(completions, scores, kl_coef=0.02))
    count, mean, m2 = cursor.moments
    assert count == len(seen)
    np.testing.assert_allclose(mean, np.mean(seen), rtol=1e-5)
    np.testing.assert_allclose(m2, np.sum((seen - np.mean(seen)) ** 2), rtol=1e-5)
    again = RLCursor(kl_coef=0.02, moments=cursor.moments)
    assert again.moments == cursor.moments  # plain floats: exact through JSON
    assert all(isinstance(x, float) for x in cursor.moments)


def test_raw_scores_are_clipped_and_leave_no_moments():
    cursor, completions = RLCursor(kl_coef=0.02), ragged()
    done, _ = targets(completions, cursor, scores="raw", score_clip=0.4, whiten=False)
    clipped = completions.scores.astype(np.float64).clip(-0.4, 0.4)
    check_targets(done, loop_targets(completions, clipped, kl_coef=0.02))
    assert cursor.moments == (0.0, 0.0, 0.0)


def test_adaptive_kl_moves_towards_its_target_and_a_fixed_one_stays():
    completions = ragged()
    completions.ref_logprobs = completions.old_logprobs - 1  # a nat a token
    kl = float(completions.mask.sum(axis=1).mean())
    for target, error in ((2 * kl, -0.2), (0.5 * kl, 0.2), (kl / 1.1, 0.1)):
        cursor = RLCursor(kl_coef=0.1)
        _, metrics = targets(completions, cursor, kl_target=target, kl_horizon=100)
        assert metrics["policy/kl_coef"] == 0.1  # what this step was shaped with
        np.testing.assert_allclose(
            cursor.kl_coef, 0.1 * (1 + error * 12 / 100), rtol=1e-5
        )
    cursor = RLCursor(kl_coef=0.1)
    targets(completions, cursor, kl_target=None)
    assert cursor.kl_coef == 0.1


def test_explained_variance_is_that_of_the_counted_tokens():
    completions = ragged()
    completions.counts = completions.stopped
    done, metrics = targets(completions, whiten=False)
    at = tuple(np.array(real_tokens(done)).T)
    returns = done.returns[at].astype(np.float64)
    left = returns - done.values[at].astype(np.float64)
    np.testing.assert_allclose(
        metrics["value/explained_variance"], 1 - left.var() / returns.var(), rtol=1e-4
    )


# The objectives.


def loop_policy(params, done, *, clip_eps, dual_clip=None, entropy_coef=0.0):
    losses = []
    for m, t in real_tokens(done):
        ratio = np.exp(
            table_logprob(params, done, m, t) - float(done.old_logprobs[m, t])
        )
        advantage = float(done.advantages[m, t])
        clipped = min(max(ratio, 1 - clip_eps), 1 + clip_eps)
        loss = max(-advantage * ratio, -advantage * clipped)
        if dual_clip is not None and advantage < 0:
            loss = min(loss, -dual_clip * advantage)
        losses.append(loss - entropy_coef * table_entropy(params, done, m, t))
    return np.mean(losses)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_eps": 0.2},
        {"clip_eps": 0.1, "entropy_coef": 0.3},
        {"clip_eps": 0.2, "dual_clip": 1.5},
    ],
)
def test_policy_objective_equals_a_float64_loop_in_every_layout(options):
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = targets(completions)
    params = table()
    expected = loop_policy(params, done, **options)
    for layout in LAYOUTS:
        objective = ppo.ppo_objective(table_apply, **options)
        loss, metrics = objective(params, batch_of(done, layout), KEY)
        np.testing.assert_allclose(loss.value(), expected, rtol=1e-5, err_msg=layout)
        bare = loop_policy(params, done, **options | {"entropy_coef": 0.0})
        surrogate = metrics["policy/surrogate"].value()
        np.testing.assert_allclose(surrogate, bare, rtol=1e-5)


@pytest.mark.parametrize("clip_eps", [0.2, None])
def test_critic_objective_equals_a_float64_loop_in_every_layout(clip_eps):
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = targets(completions, scores="raw")
    params, losses = table(), []
    for m, t in real_tokens(done):
        value = table_logprob(params, done, m, t)
        old, wanted = float(done.values[m, t]), float(done.returns[m, t])
        error = (value - wanted) ** 2
        if clip_eps is not None:
            near = min(max(value, old - clip_eps), old + clip_eps)
            error = max(error, (near - wanted) ** 2)
        losses.append(error / 2)
    for layout in LAYOUTS:
        objective = ppo.critic_objective(as_values, clip_eps=clip_eps)
        loss, metrics = objective(params, batch_of(done, layout), KEY)
        np.testing.assert_allclose(
            loss.value(), np.mean(losses), rtol=1e-5, err_msg=layout
        )
        returns = [done.returns[at] for at in real_tokens(done)]
        np.testing.assert_allclose(
            metrics["value/return"].value(), np.mean(returns), rtol=1e-4
        )


def test_entropy_bonus_raises_entropy_and_nothing_else():
    done, _ = targets(ragged())
    done.advantages = np.zeros_like(done.advantages)
    objective = ppo.ppo_objective(table_apply, entropy_coef=0.5)
    batch, tx = batch_of(done), optax.sgd(0.1)
    update = jax.jit(make_update(objective, tx))
    state, first = update(init_state(table(), tx), batch, KEY)
    _, second = update(state, batch, KEY)
    assert float(second["policy/entropy"]) > float(first["policy/entropy"])
    assert float(first["policy/surrogate"]) == 0
    np.testing.assert_allclose(
        first["loss"], -0.5 * float(first["policy/entropy"]), rtol=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_zero_where_masked_and_reaches_every_counted_token(layout):
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = targets(completions)
    batch = batch_of(done, layout)
    shape, mask = batch.old_logprobs.shape, np.asarray(counted(batch))
    near = batch.old_logprobs + 0.01 * jax.random.normal(KEY, shape)
    params = {
        "logprobs": jnp.where(mask, near, 500.0),
        "entropy": jnp.full(shape, 500.0),
        "values": jnp.where(mask, batch.old_values + 0.01, 1e6),
    }
    policy = ppo.ppo_objective(
        lambda p, s, k: (p["logprobs"], p["entropy"]), entropy_coef=0.01
    )
    critic = ppo.critic_objective(lambda p, s, k: p["values"])
    total = lambda p: policy(p, batch, KEY)[0].total + critic(p, batch, KEY)[0].total  # noqa: E731
    for name, leaf in jax.grad(total)(params).items():
        grad = np.asarray(leaf)
        assert np.isfinite(grad).all(), name
        assert not grad[~mask].any(), name
        assert (grad[mask] != 0).all(), name
    assert set(np.asarray(batch.sample)[mask]) == set(np.flatnonzero(done.counts))


def test_nothing_left_is_a_zero_loss_and_no_gradient():
    completions = ragged()
    completions.counts = np.zeros(len(completions.counts), bool)
    done, metrics = targets(completions)
    assert metrics["value/explained_variance"] == 0
    assert np.isfinite(done.advantages).all() and not done.advantages.any()
    for objective in (
        ppo.ppo_objective(table_apply, entropy_coef=0.1),
        ppo.critic_objective(as_values),
    ):
        loss, _ = objective(table(), batch_of(done), KEY)
        assert float(loss.value()) == 0 and float(loss.weight) == 0


# PTX, and what accumulation leaves alone.


def supervised(seed=5):
    """Rows of ragged conversations, as Sequences."""
    return batch_of(ragged(4, 1, length=5, seed=seed), "padded").sequences


def mixed_objective(coef):
    policy = ppo.ppo_objective(table_apply)
    sft = sft_objective(lambda p, s, k: table_apply(p, s, k)[0])
    return ppo.with_ptx(policy, sft, ptx_coef=coef)


def mixed(done, rows, accum_steps=1):
    """The batch, its supervised rows cut into as many micro-batches."""
    [batch] = xp.minibatches(
        done,
        packing("shared"),
        count=1,
        accum_steps=accum_steps,
        rng=np.random.default_rng(0),
    )
    sampled = sum(1 for _ in real_tokens(done))
    scale = np.full(rows.tokens.shape, sampled / rows.completion_mask.sum(), np.float32)
    if accum_steps > 1:
        rows, scale = jax.tree.map(
            lambda x: x.reshape(accum_steps, -1, *x.shape[1:]), (rows, scale)
        )
    return ppo.Mixed(experience=batch, ptx=rows, ptx_scale=scale)


def test_ptx_adds_the_mean_loss_of_supervised_tokens():
    completions = ragged()
    completions.counts = completions.stopped
    done, _ = targets(completions)
    rows, params = supervised(), table()
    batch = jax.tree.map(jnp.asarray, mixed(done, rows))
    loss, metrics = mixed_objective(0.7)(params, batch, KEY)
    logprobs = np.asarray(table_apply(params, rows, KEY)[0], np.float64)
    tokens = -logprobs[np.asarray(rows.completion_mask)]
    expected = loop_policy(params, done, clip_eps=0.2) + 0.7 * tokens.mean()
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/ptx_loss"].value(), tokens.mean(), rtol=1e-5
    )


@pytest.mark.parametrize("which", ["policy", "critic", "ptx"])
def test_accumulated_update_equals_the_full_batch(which):
    completions = ragged()
    completions.counts = completions.stopped  # micro-batches of different weight
    done, _ = targets(completions)
    rows, tx, results = supervised(), optax.adam(0.1), []
    objective = {
        "policy": ppo.ppo_objective(table_apply, entropy_coef=0.1),
        "critic": ppo.critic_objective(as_values),
        "ptx": mixed_objective(0.7),
    }[which]
    for accum_steps in (1, 2):
        batch = mixed(done, rows, accum_steps)
        update = jax.jit(make_update(objective, tx, accum_steps=accum_steps))
        batch = batch if which == "ptx" else batch.experience
        results.append(update(init_state(table(), tx), batch, KEY))
    (full, expected), (parts, report) = results
    np.testing.assert_allclose(parts.params["w"], full.params["w"], atol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(
            report[name], value, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_ratios_leave_one_and_are_clipped_after_epochs_at_a_high_learning_rate():
    completions = ragged()
    for m, t in real_tokens(completions):
        completions.old_logprobs[m, t] = table_logprob(table(), completions, m, t)
    done, _ = targets(completions)
    tx, reports = optax.sgd(10.0), []
    update = jax.jit(make_update(ppo.ppo_objective(table_apply), tx))
    state, batch = init_state(table(), tx), batch_of(done)
    for _ in range(4):
        state, report = update(state, batch, KEY)
        reports.append(report)
    np.testing.assert_allclose(reports[0]["policy/ratio"], 1, atol=1e-6)
    assert float(reports[0]["policy/clip_fraction"]) == 0
    assert float(reports[-1]["policy/clip_fraction"]) > 0.1
    assert float(reports[-1]["loss"]) < float(reports[0]["loss"])
