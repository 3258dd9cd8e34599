"""Eight devices draw the tokens of one, whatever the mesh and the decoding rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import LoraConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.parameters import param_specs
from rlhf_jax.sampling.generate import SamplingConfig, make_generate
from rlhf_jax.sharding import (
    MeshConfig,
    ShardingRules,
    batch_sharding,
    make_mesh,
    shardings,
)
from rlhf_jax.testing import tiny_config
from rlhf_jax.types import PromptBatch
from tests.parameters import random_parameters

pytestmark = pytest.mark.multi_device

MODEL = Llama(
    tiny_config(vocab_size=64, num_layers=1, sliding_window=6), lora=LoraConfig(rank=2)
)
STOPS, KEY = (0, 7, 11, 23, 42, 60), jax.random.key(3)
PLAIN = SamplingConfig(num_samples=2, max_new_tokens=6, temperature=0.8, top_p=0.95)
SLOTS = SamplingConfig(
    num_samples=2, max_new_tokens=6, slots=6, repetition_penalty=1.3, min_new_tokens=1
)
TENSOR_PARALLEL = ShardingRules(embed=None)
"""Weights whole on each fsdp device: the loop gathers none of them."""


@functools.cache
def parameters():
    return random_parameters(MODEL)


def prompts():
    rng = np.random.default_rng(0)
    mask = np.arange(7) < rng.integers(1, 8, (8, 1))
    return PromptBatch(
        tokens=np.where(mask, rng.integers(0, 64, mask.shape), 0).astype(np.int32),
        mask=mask,
    )


@functools.cache
def one_device(config):
    generate = jax.jit(make_generate(MODEL, config, stop_ids=STOPS))
    batch = jax.tree.map(jnp.asarray, prompts())
    return jax.device_get(generate(parameters(), batch, KEY))


@pytest.mark.parametrize(
    ("shape", "config", "rules"),
    [
        (MeshConfig(2, 2, 2), SLOTS, None),
        pytest.param(
            MeshConfig(1, 4, 2), PLAIN, TENSOR_PARALLEL, marks=pytest.mark.slow
        ),
    ],
    ids=["2x2x2, slots", "1x4x2, decoding rules"],
)
def test_eight_devices_draw_the_tokens_of_one(shape, config, rules):
    expected = one_device(config)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        where = shardings(mesh, param_specs(parameters(), ShardingRules()))
        placed = jax.device_put(parameters(), where)
        batch = jax.device_put(prompts(), batch_sharding(mesh))
        generate = make_generate(MODEL, config, stop_ids=STOPS, rules=rules)
        compiled = jax.jit(generate).lower(placed, batch, KEY).compile()
        ours = jax.device_get(compiled(placed, batch, KEY))
    assert expected.stopped.any() and not expected.stopped.all()
    for name in ("tokens", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))
    for name in ("logprobs", "policy_logprobs", "sampling_logprobs"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(expected, name), atol=1e-4
        )
    gathered_weights = [
        line
        for line in compiled.as_text().splitlines()
        if "all-gather(" in line and "while/body" in line and "dot_general" in line
    ]
    assert bool(gathered_weights) == (rules is None)
