"""Objectives that couple a batch: eight devices and micro-batches change nothing."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.contrastive import (
    ContrastiveConfig,
    contrastive_objective,
    init_prototypes,
    make_contrast,
)
from rlhf_jax.algorithms.meta_reward import meta_objective, spread_objective
from rlhf_jax.algorithms.reward_model import (
    over_micro_batches,
    reward_apply,
    reward_objective,
    reward_states_apply,
)
from rlhf_jax.data.encoded import EncodedPair
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.kwise import KwiseDataset
from rlhf_jax.data.store import PairDataset, flatten
from rlhf_jax.losses.regularizers import batch_sum_to_zero
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.lora import split_params
from rlhf_jax.programs import sharded
from rlhf_jax.sharding import MeshConfig, batch_devices, make_mesh
from rlhf_jax.testing import random_pairs, tiny_config
from rlhf_jax.types import MetaBatch

KEY = jax.random.key(0)
MODEL = RewardModel(tiny_config(num_heads=4, num_kv_heads=4))


def contrastive(kind, stacked):
    apply = reward_states_apply(MODEL, deterministic=True)
    prototypes = 3 if kind == "swav" else None
    contrast = make_contrast(ContrastiveConfig(kind=kind, num_prototypes=prototypes))
    return contrastive_objective(
        over_micro_batches(apply) if stacked else apply, contrast=contrast
    )


def summed_to_zero(stacked):
    apply = reward_apply(MODEL, deterministic=True)
    return reward_objective(
        over_micro_batches(apply) if stacked else apply,
        regularizers=[(batch_sum_to_zero, 0.5)],
    )


def meta(stacked):
    apply = reward_apply(MODEL, deterministic=True)
    apply = over_micro_batches(apply) if stacked else apply
    return meta_objective(
        spread_objective(apply),
        reward_objective(apply),
        split=lambda params: split_params(params, "all"),
        inner_lr=0.5,
        second_order=True,
    )


OBJECTIVES = {
    "bsr": summed_to_zero,
    "simcse": functools.partial(contrastive, "simcse"),
    "swav": functools.partial(contrastive, "swav"),
    "meta": meta,
}


@pytest.fixture(scope="module")
def datasets():
    pairs = random_pairs(16, seed=1)
    parts = [part for pair in pairs for part in pair]
    kwise = KwiseDataset(
        tokens=flatten(parts),
        part_lengths=np.array([len(part) for part in parts]),
        counts=np.full(16, 2),
        where=[""] * 16,
        source_row=np.arange(16),
    )
    return PairDataset.of(EncodedPair(*pair) for pair in pairs), kwise


def first_steps(name, datasets, mesh, *, accum_steps=1):
    """Losses and gradient norms of two steps."""
    tx = optax.adam(1e-2)
    objective = OBJECTIVES[name](accum_steps > 1)
    params = init_head_model(MODEL, KEY)
    if name == "swav":
        params = params | {"prototypes": init_prototypes(3, 32, KEY)}
    with jax.set_mesh(mesh):
        state = sharded.create_state(params, tx, mesh)
        update = sharded.compile_update(objective, tx, state)
        put = sharded.make_put(mesh, accum_steps=accum_steps)
        streams = [
            Batches(
                dataset,
                8,
                accum_steps=accum_steps,
                rows_multiple_of=batch_devices(mesh),
                num_shapes=1,
                prefetch=0,
            )
            for dataset in datasets[: 2 if name == "meta" else 1]
        ]
        history = []
        for _, batches in zip(range(2), zip(*streams)):
            batch = batches[0][0]
            if name == "meta":
                batch = MetaBatch(pairs=batch, shifted=batches[1][0])
            state, metrics = update(state, put(batch), KEY)
            history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(history)


@pytest.mark.parametrize(
    "name",
    [
        "bsr",
        *(pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES if n != "bsr"),
    ],
)
def test_eight_devices_and_micro_batches_take_the_steps_of_one(name, datasets):
    one_device = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    expected = first_steps(name, datasets, one_device)
    eight = first_steps(name, datasets, make_mesh(MeshConfig(2, 2, 2)))
    np.testing.assert_allclose(eight, expected, rtol=1e-4)
    micro = first_steps(name, datasets, one_device, accum_steps=4)
    np.testing.assert_allclose(micro, expected, rtol=1e-4)
