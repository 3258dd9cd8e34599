"""The adaptive KL coefficient follows its target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.kl_controller import adaptive

SETTINGS = dict(target=6.0, horizon=10_000, count=512)


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_proportional_and_clipped_by_hand(kl, error):
    np.testing.assert_allclose(
        adaptive(0.05, kl, **SETTINGS), 0.05 * (1 + error * 0.0512), rtol=1e-6
    )


def test_ziegler_constant():
    # K_beta = 0.1, KL 10 % above the target: one per cent more
    np.testing.assert_allclose(
        adaptive(0.2, 11.0, target=10.0, horizon=100, count=10), 0.202, rtol=1e-6
    )


def test_infinite_kl_moves_by_the_limit_only():
    np.testing.assert_allclose(
        adaptive(0.05, jnp.float32(jnp.inf), **SETTINGS), 0.05 * 1.01024, rtol=1e-6
    )


def test_jit_gives_the_same_float32():
    plain = adaptive(0.05, 7.3, **SETTINGS)
    jitted = jax.jit(lambda beta, kl: adaptive(beta, kl, **SETTINGS))(
        jnp.float32(0.05), jnp.float32(7.3)
    )
    assert plain.dtype == jitted.dtype == jnp.float32
    np.testing.assert_allclose(plain, jitted, rtol=1e-6)


def test_settles_where_the_kl_meets_its_target():
    coef = jnp.float32(0.01)
    for _ in range(600):
        coef = adaptive(coef, 0.3 / coef, **SETTINGS)  # a KL that falls with beta
    np.testing.assert_allclose(coef, 0.05, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "number"), [("target", 0.0), ("horizon", 0), ("count", -1)]
)
def test_settings_outside_their_ranges_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        adaptive(0.05, 6.0, **(SETTINGS | {name: number}))


def test_a_horizon_so_short_that_the_sign_could_flip_is_refused():
    with pytest.raises(ValueError, match="a longer horizon keeps kl_coef positive"):
        adaptive(0.05, 6.0, target=6.0, horizon=100, count=500)
    assert float(adaptive(0.05, 0.0, target=6.0, horizon=100, count=499)) > 0
