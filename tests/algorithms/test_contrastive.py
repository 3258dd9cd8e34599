"""The contrastive objective: both views count, differences, weights of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.contrastive import (
    ContrastiveConfig,
    contrastive_objective,
    make_contrast,
)
from rlhf_jax.losses.contrastive import simcse, swav
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.types import PreferenceBatch, Sequences

KEY = jax.random.key(0)
STATES = jax.random.normal(KEY, (2, 4, 1, 3))
"""Of two views, [B S D] each."""


def batch(weight=(1.0, 1.0)):
    tokens = jnp.zeros((4, 2), jnp.int32)
    ones = jnp.ones_like(tokens)
    return PreferenceBatch(
        sequences=Sequences(
            tokens=tokens, positions=ones, segment=ones, completion_mask=ones > 0
        ),
        score_at=jnp.ones((4, 1), jnp.int32),
        chosen=jnp.array([0, 2]),
        rejected=jnp.array([1, 3]),
        weight=jnp.array(weight),
    )


def noisy_apply(params, sequences, score_at, key):
    """The view that belongs to the key; its reward is the first coordinate."""
    first = jnp.all(jax.random.key_data(key) == jax.random.key_data(KEYS[0]))
    states = jnp.where(first, STATES[0], STATES[1]) * params
    return states[..., 0], states


KEYS = jax.random.split(KEY)


def take(view):
    flat = STATES[view].reshape(4, 3)
    return flat[jnp.array([0, 2])], flat[jnp.array([1, 3])]


def objective(**options):
    contrast = make_contrast(ContrastiveConfig(kind="simcse"))
    return contrastive_objective(noisy_apply, contrast=contrast, **options)


@pytest.mark.parametrize("differences", [False, True])
def test_total_is_the_pair_loss_of_both_views_and_beta_times_the_contrast(differences):
    loss, metrics = objective(coefficient=0.3, differences=differences)(
        jnp.ones(()), batch(), KEY
    )
    pair_loss = jnp.mean(
        jnp.array([bradley_terry(*(h[:, 0] for h in take(view))) for view in (0, 1)])
    )
    items = []
    for view in (0, 1):
        chosen, rejected = take(view)
        both = [chosen - rejected, rejected - chosen] if differences else take(view)
        items.append(jnp.concatenate(both))
    extra = simcse(*items, jnp.ones(4)).mean()
    np.testing.assert_allclose(loss.value(), pair_loss + 0.3 * extra, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive/loss"].value(), extra, rtol=1e-5)
    share = 0.3 * extra / (pair_loss + 0.3 * extra)
    np.testing.assert_allclose(metrics["contrastive/share"].value(), share, rtol=1e-5)


def test_filler_pairs_are_neither_scored_nor_negatives():
    kept, _ = objective()(jnp.ones(()), batch(weight=(1.0, 0.0)), KEY)
    chosen, rejected = (
        jnp.stack([take(v)[side][0] for v in (0, 1)]) for side in (0, 1)
    )
    pair_loss = bradley_terry(chosen[:, 0], rejected[:, 0]).mean()
    views = [jnp.stack([chosen[v], rejected[v]]) for v in (0, 1)]
    extra = simcse(*views, jnp.ones(2)).mean()
    np.testing.assert_allclose(kept.value(), pair_loss + extra, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "items", "weight", "prototypes"),
    [
        ("simcse", "pairs", 1.0, 0),
        ("simcse", "differences", 1.0, 0),
        ("swav", "pairs", 0.1, 50),
        ("swav", "differences", 0.5, 20),
    ],
)
def test_defaults_are_the_papers(kind, items, weight, prototypes):
    config = ContrastiveConfig(kind=kind, items=items)
    assert (config.weight, config.prototypes) == (weight, prototypes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "contrastive.temperature: expected a finite"),
        ({"num_prototypes": 1}, "num_prototypes: expected at least 2"),
        ({"sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon: expected a finite"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations: expected at least 1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(kind="swav", **options)


@pytest.mark.parametrize(
    ("kind", "options", "kinds"),
    [
        ("none", {"coefficient": 2.0}, "simcse or swav"),
        ("none", {"temperature": 0.1}, "simcse or swav"),
        ("none", {"items": "differences"}, "simcse or swav"),
        ("none", {"sinkhorn_epsilon": 0.1}, "swav"),
        ("simcse", {"num_prototypes": 8}, "swav"),
        ("simcse", {"sinkhorn_iterations": 5}, "swav"),
    ],
)
def test_options_that_a_kind_does_not_use_are_refused(kind, options, kinds):
    (name,) = options
    message = f"{name}: contrastive.kind {kind} does not use it; .* to {kinds} with it"
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(kind=kind, **options)


def test_sinkhorns_options_reach_swav():
    config = ContrastiveConfig(kind="swav", sinkhorn_epsilon=0.5, sinkhorn_iterations=1)
    first, second, prototypes = (
        STATES[0].reshape(4, 3),
        STATES[1].reshape(4, 3),
        STATES[0, :2, 0],
    )
    params = {"prototypes": {"kernel": prototypes}}
    found = make_contrast(config)(params, first, second, jnp.ones(4))
    expected = swav(first, second, prototypes, jnp.ones(4), epsilon=0.5, iterations=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    default = make_contrast(ContrastiveConfig(kind="swav"))
    assert not np.allclose(found, default(params, first, second, jnp.ones(4)))
