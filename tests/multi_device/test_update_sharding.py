"""The reward step on eight devices and in micro-batches gives the numbers of one."""

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.reward_model import reward_apply, reward_objective
from rlhf_jax.data.encoded import EncodedPair
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.store import PairDataset
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.programs import sharded
from rlhf_jax.sharding import MeshConfig, batch_devices, make_mesh
from rlhf_jax.testing import random_pairs, tiny_config

STEPS = 3
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def dataset():
    return PairDataset.of(EncodedPair(*pair) for pair in random_pairs(32, seed=1))


def losses(dataset, mesh, *, accum_steps=1, layout="shared"):
    """Losses and gradient norms of the first steps, on a mesh."""
    model = RewardModel(tiny_config(num_heads=4, num_kv_heads=4))
    tx = optax.adam(1e-2)
    objective = reward_objective(reward_apply(model, deterministic=True))
    with jax.set_mesh(mesh):
        state = sharded.create_state(init_head_model(model, KEY), tx, mesh)
        update = sharded.compile_update(objective, tx, state, accum_steps=accum_steps)
        put = sharded.make_put(mesh, accum_steps=accum_steps)
        stream = Batches(
            dataset,
            8,
            accum_steps=accum_steps,
            layout=layout,
            row_length=128,
            rows_multiple_of=batch_devices(mesh),
            prefetch=0,
        )
        history = []
        for _, (batch, _) in zip(range(STEPS), stream, strict=False):
            state, metrics = update(state, put(batch), KEY)
            history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(history)


@pytest.fixture(scope="module")
def one_device(dataset):
    return losses(dataset, make_mesh(MeshConfig(), devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "shape",
    [MeshConfig(2, 2, 2), pytest.param(MeshConfig(1, 8, 1), marks=pytest.mark.slow)],
    ids=["2x2x2", "fsdp"],
)
def test_eight_devices_take_the_steps_of_one(dataset, one_device, shape):
    np.testing.assert_allclose(losses(dataset, make_mesh(shape)), one_device, rtol=1e-4)


def test_micro_batches_take_the_steps_of_the_whole_batch(dataset, one_device):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    got = losses(dataset, mesh, accum_steps=4)
    np.testing.assert_allclose(got, one_device, rtol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_layout_takes_the_same_steps(dataset, one_device, layout):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    np.testing.assert_allclose(
        losses(dataset, mesh, layout=layout), one_device, rtol=1e-4
    )


def test_state_is_cut_over_the_mesh_and_stays_so(dataset):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    model = RewardModel(tiny_config(num_heads=4, num_kv_heads=4))
    tx = optax.adam(1e-2)
    with jax.set_mesh(mesh):
        state = sharded.create_state(init_head_model(model, KEY), tx, mesh)
    kernel = state.params["backbone"]["layers"]["mlp"]["gate"]["kernel"]
    moment = state.opt_state[0].mu["backbone"]["layers"]["mlp"]["gate"]["kernel"]
    for leaf in (kernel, moment):
        shard = leaf.addressable_shards[0].data.shape
        assert np.prod(shard) * 8 == np.prod(leaf.shape)


def test_indivisible_parameter_is_named():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    model = RewardModel(tiny_config())
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="kernel.*tensor"):
        sharded.create_state(init_head_model(model, KEY), optax.adam(1e-2), mesh)
