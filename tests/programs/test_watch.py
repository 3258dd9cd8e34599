"""`watch` speaks of what a person should look at, and is silent on noise."""

import numpy as np
import pytest

from rlhf_jax.programs.watch import WINDOW, watch, watch_supervised

STEPS = 10 * WINDOW


def run(steps=STEPS, *, seed=0, **curves):
    """Metrics of a run: each curve is step -> mean, and has noise of its own."""
    rng = np.random.default_rng(seed)
    healthy = {
        "reward/proxy": (lambda t: 0.5, 0.1),
        "reward/gold": (lambda t: 0.4, 0.1),
        "policy/kl": (lambda t: 0.002, 0.01),
        "policy/entropy": (lambda t: 1.5, 0.05),
        "policy/surrogate": (lambda t: 0.0, 1e-3),
        "policy/surrogate_size": (lambda t: 0.8, 0.02),
        "train/loss": (lambda t: -0.02, 1e-3),
    }
    for name, curve in curves.items():
        known = name.replace("_", "/", 1)
        healthy[known] = (curve, healthy[known][1])
    return [
        {
            name: mean(t) + noise * rng.normal()
            for name, (mean, noise) in healthy.items()
        }
        for t in range(steps)
    ]


def spoken(history):
    """All lines of a run, with the step at which each came."""
    return [
        (t, line) for t in range(1, len(history) + 1) for line in watch(history[:t])
    ]


def test_noise_is_met_with_silence():
    heard = [line for seed in range(20) for line in spoken(run(seed=seed))]
    assert not heard


def test_a_healthy_run_is_met_with_silence():
    """Both rewards rise, KL grows, entropy falls a little."""
    for seed in range(5):
        history = run(
            seed=seed,
            reward_proxy=lambda t: 0.3 + 0.002 * t,
            reward_gold=lambda t: 0.2 + 0.001 * t,
            policy_kl=lambda t: 0.05 * t,
            policy_entropy=lambda t: 1.5 - 0.003 * t,
        )
        assert not spoken(history)


def test_over_optimisation_is_named_once_in_a_window():
    history = run(
        reward_proxy=lambda t: 0.3 + 0.003 * t,
        reward_gold=lambda t: 0.6 - 0.003 * max(t - 60, 0),
    )
    lines = spoken(history)
    assert lines and all("over-optimised" in line for _, line in lines)
    steps = [step for step, _ in lines]
    assert min(steps) > 60
    assert all(step % WINDOW == 0 for step in steps)
    assert len(set(steps)) == len(steps)


def test_a_gold_reward_that_falls_alone_is_no_over_optimisation():
    history = run(reward_gold=lambda t: 0.6 - 0.003 * t)
    assert not spoken(history)
    for values in history:
        del values["reward/gold"]  # most runs have none
    assert not spoken(history)


def test_collapsed_entropy_is_named():
    history = run(
        reward_proxy=lambda t: 0.3 + 0.01 * t,
        policy_entropy=lambda t: 1.5 * np.exp(-t / 20),
        reward_gold=lambda t: 0.3 + 0.01 * t,
    )
    for values in history:  # its noise shrinks with it
        values["policy/entropy"] = abs(values["policy/entropy"] - 1e-3) * 0.5
    del history[5 * WINDOW :]
    quiet = run(policy_entropy=lambda t: 0.05)  # low, but it did not fall
    assert not spoken(quiet)
    lines = spoken([
        h | {"policy/entropy": 1.5 * np.exp(-t / 20)} for t, h in enumerate(history)
    ])  # fmt: skip
    assert any("entropy has collapsed" in line for _, line in lines)


@pytest.mark.parametrize("at", [3 * WINDOW - 1, 3 * WINDOW - 7, 2 * WINDOW])
@pytest.mark.parametrize("lasts", [1, 5, STEPS])
def test_a_jump_of_the_kl_is_named_wherever_in_the_window_it_comes(at, lasts):
    def kl(t):
        return 0.5 + (6.0 if at <= t < at + lasts else 0.0)

    lines = spoken(run(policy_kl=kl))
    assert [step for step, _ in lines] == [3 * WINDOW]
    assert "jumped to 6.5" in lines[0][1]


def test_a_kl_that_grows_or_is_tiny_is_no_jump():
    for curve in (lambda t: 0.001 * t**2, lambda t: 5 * (1 - np.exp(-t / 10))):
        assert not spoken(run(policy_kl=curve))
    assert not spoken(run(policy_kl=lambda t: 0.09 if t == 45 else 0.0))


def test_auxiliary_losses_are_measured_against_the_size_of_the_surrogate():
    """Its mean is near zero by construction and says nothing."""
    bonus = run(train_loss=lambda t: -0.05)  # 50 times the mean, a sixteenth the size
    assert not spoken(bonus)
    loud = spoken(run(train_loss=lambda t: 9.0))
    assert loud and all("auxiliary losses" in line for _, line in loud)
    for values in bonus:
        del values["policy/surrogate"], values["policy/surrogate_size"]
    assert not spoken(bonus)  # a critic's warm-up has none


def test_nothing_is_said_before_two_windows_or_of_metrics_that_are_not_there():
    assert not spoken(run(2 * WINDOW - 1, policy_kl=lambda t: 100.0 * (t > 30)))
    assert not spoken([{}] * STEPS)
    assert not spoken([{"policy/kl": float("nan")}] * STEPS)


# Reward and SFT runs.


def supervised(steps, **values):
    """Steps whose metrics are constants, or functions of the step."""
    return [
        {k: float(v(n) if callable(v) else v) for k, v in values.items()}
        for n in range(steps)
    ]


def test_a_contrastive_term_that_outweighs_the_preferences_is_named():
    name = "train/contrastive/share"
    assert not watch_supervised(supervised(2 * WINDOW, **{name: 0.4}), {})
    (line,) = watch_supervised(supervised(2 * WINDOW, **{name: 0.7}), {})
    assert "70% of the loss" in line


def test_a_jump_of_the_meta_gradient_is_named():
    name = "train/meta/grad_norm"
    calm = supervised(2 * WINDOW, **{name: lambda n: 1e-3 + 1e-5 * (n % 3)})
    assert not watch_supervised(calm, {})
    calm[-4][name] = 0.05
    (line,) = watch_supervised(calm, {})
    assert "meta-gradient's norm jumped to 0.05" in line


def test_a_loss_near_zero_speaks_only_while_validation_stands_still():
    history = supervised(2 * WINDOW, **{"train/loss": 1e-5})
    assert not watch_supervised(history, {})
    assert not watch_supervised(history, {"eval/id/loss": [0.5, 0.4]})
    (line,) = watch_supervised(history, {"eval/id/loss": [0.5, 0.4, 0.6]})
    assert "near zero while validation" in line
