"""Adapters: silent at the start, mergeable, and the only thing with a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.lora import join_params, merge_lora, split_params
from rlhf_jax.testing import preference_batch, random_pairs, tiny_config

CONFIG = tiny_config(vocab_size=61, attention_bias=True)
LORA = LoraConfig(rank=3, alpha=12.0)
BATCH = preference_batch("packed", random_pairs(3, vocab_size=61))


@functools.cache
def _model(lora=LORA, scan_layers=True):
    model = RewardModel(CONFIG, ComputeConfig(scan_layers=scan_layers), lora)
    return model, init_head_model(model, jax.random.key(0))


def _trained(params):
    """lora_b away from 0."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if path[-1].key == "lora_b" else x, params
    )


@functools.partial(jax.jit, static_argnums=0)
def _rewards(model, params):
    return model.apply({"params": params}, BATCH.sequences, BATCH.score_at)


@pytest.mark.parametrize(
    "scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_merged_equals_adapters_on(scan_layers):
    model, params = _model(scan_layers=scan_layers)
    plain, _ = _model(LoraConfig(), scan_layers)
    params = _trained(params)
    merged = merge_lora(params, LORA)
    names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(merged)}
    assert not names & {"lora_a", "lora_b"}
    expected = _rewards(model, params)
    np.testing.assert_allclose(_rewards(plain, merged), expected, atol=1e-4)
    bare = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if path[-1].key == "lora_b" else x, params
    )
    assert np.abs(_rewards(model, bare) - expected).max() > 1e-2


def test_adapters_change_nothing_at_the_start():
    model, params = _model()
    plain, _ = _model(LoraConfig())
    base = merge_lora(params, LORA)
    np.testing.assert_array_equal(
        base["backbone"]["layers"]["mlp"]["up"]["kernel"],
        params["backbone"]["layers"]["mlp"]["up"]["kernel"],
    )
    np.testing.assert_allclose(
        _rewards(model, params), _rewards(plain, base), atol=1e-6
    )


def test_targets_choose_the_projections():
    _, params = _model(LoraConfig(rank=2, targets=("q", "down")))
    layers = params["backbone"]["layers"]
    adapted = {
        name
        for part in ("attention", "mlp")
        for name, leaves in layers[part].items()
        if "lora_a" in leaves
    }
    assert adapted == {"q", "down"}
    size = CONFIG.intermediate_size
    assert layers["mlp"]["down"]["lora_a"].shape == (2, size, 2)
    assert layers["attention"]["q"]["lora_b"].shape == (2, 2, 4, 8)


def test_only_adapters_and_head_have_gradients():
    model, params = _model()
    params = _trained(params)
    trained, frozen = split_params(params, "lora")

    def loss(trained):
        return (_rewards(model, join_params(trained, frozen)) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(trained)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    names = {
        p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(grads["backbone"])
    }
    assert names == {"lora_a", "lora_b"} and set(grads["head"]) == {"kernel"}


def test_adapter_dropout_falls_on_the_adapter_alone():
    model, params = _model(LoraConfig(rank=2, dropout=0.5))

    @jax.jit
    def run(params, seed):
        return model.apply(
            {"params": params},
            BATCH.sequences,
            BATCH.score_at,
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
        )

    np.testing.assert_array_equal(run(params, 0), run(params, 1))  # lora_b is 0
    params = _trained(params)
    assert bool((run(params, 0) != run(params, 1)).any())


@pytest.mark.parametrize("trainable", ["all", "lora", "head"])
def test_split_parts_are_disjoint_and_join_to_the_whole(trainable):
    _, params = _model()
    trained, frozen = split_params(params, trainable)
    count = len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen))
    assert count == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, join_params(trained, frozen), params)


def test_splits_that_train_nothing_say_so():
    _, params = _model(LoraConfig())
    with pytest.raises(ValueError, match="expected one of all, lora, head"):
        split_params(params, "adapters")
    with pytest.raises(ValueError, match=r"set lora.rank above 0"):
        split_params(params, "lora")
    with pytest.raises(ValueError, match="no leaf would be trained"):
        split_params(params["backbone"], "head")
    with pytest.raises(ValueError, match="hold no lora_a"):
        merge_lora(params, LORA)


def test_rank_zero_adds_no_parameters():
    _, params = _model(LoraConfig(rank=0))
    assert not [
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        if "lora" in path[-1].key
    ]
    assert params["head"]["kernel"].dtype == jnp.float32
