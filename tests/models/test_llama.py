"""Properties of the backbone: layouts, causality, scan, remat, dropout, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ComputeConfig, LlamaConfig, LoraConfig
from rlhf_jax.models.llama import Llama, init_llama
from rlhf_jax.models.parameters import stacked, unrolled
from rlhf_jax.testing import (
    LAYOUTS,
    completion_sequences,
    preference_batch,
    random_pairs,
    tiny_config,
)
from rlhf_jax.types import Sequences

CONFIG = tiny_config(vocab_size=61, qk_norm=True, attention_bias=True, mlp_bias=True)


@jax.jit
def _perturbed(params, seed=7):
    """Away from initialisation: scales other than 1, biases and lora_b other than 0."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def _model(config=CONFIG, lora=LoraConfig(), **compute):
    model = Llama(config, ComputeConfig(**compute), lora)
    return model, _perturbed(init_llama(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnames=("model", "deterministic"))
def _hidden(model, params, sequences, deterministic=True, rngs=None):
    return model.apply(
        {"params": params}, sequences, deterministic=deterministic, rngs=rngs
    )


def _plain(tokens, positions=None):
    tokens = jnp.asarray(tokens)
    span = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Sequences(
        tokens=tokens,
        positions=span if positions is None else positions,
        segment=jnp.ones_like(tokens),
        completion_mask=jnp.ones(tokens.shape, bool),
    )


@pytest.mark.parametrize("window", [None, 4])
def test_every_layout_gives_the_same_hidden_states(window):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    model, params = _model(config)
    pairs = random_pairs(2, vocab_size=61)
    alone = [p + c for p, *both in pairs for c in both]
    expected = [_hidden(model, params, _plain([ids]))[0, -1] for ids in alone]
    for layout in LAYOUTS:
        batch = preference_batch(layout, pairs)
        hidden = np.asarray(_hidden(model, params, batch.sequences))
        rows = np.take_along_axis(hidden, batch.score_at[:, :, None], axis=1)
        flat = rows.reshape(-1, rows.shape[-1])
        ours = np.empty_like(np.stack(expected))
        ours[0::2], ours[1::2] = flat[batch.chosen], flat[batch.rejected]
        np.testing.assert_allclose(ours, np.stack(expected), atol=1e-4, err_msg=layout)


def test_padding_to_any_length_changes_nothing():
    model, params = _model()
    pairs = random_pairs(2, vocab_size=61)
    short = completion_sequences("padded", pairs)
    long = completion_sequences("padded", pairs, length=150)
    columns = short.tokens.shape[1]
    expected = _hidden(model, params, short)
    real = short.segment != 0
    ours = _hidden(model, params, long)[:, :columns]
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5)


def test_hidden_states_do_not_depend_on_later_tokens():
    """Causality by gradient, through the embedding of each token."""
    model, params = _model()
    tokens = jnp.arange(12)[None]

    def read(table, at):
        changed = {**params, "embed": {"embedding": table}}
        return model.apply({"params": changed}, _plain(tokens))[0, at].sum()

    slopes = jax.jit(jax.grad(read))
    for at in (0, 5, 11):
        reach = np.abs(slopes(params["embed"]["embedding"], at)[:12]).sum(axis=1)
        assert np.all(reach[: at + 1] > 0) and np.all(reach[at + 1 :] == 0)


def test_no_gradient_leaks_between_packed_sequences():
    model, params = _model()
    sequences = _plain(jnp.arange(12)[None])
    segment = jnp.array([[1] * 4 + [2] * 4 + [3] * 4])
    shared = sequences.replace(
        segment=segment, prefix=jnp.array([[0] * 4 + [1] * 4 + [0] * 4])
    )

    def read(table, sequences, at):
        changed = {**params, "embed": {"embedding": table}}
        return model.apply({"params": changed}, sequences)[0, at].sum()

    slopes = jax.jit(jax.grad(read))
    reach = [
        np.abs(slopes(params["embed"]["embedding"], shared, at)[:12]).sum(axis=1) > 0
        for at in (3, 7, 11)
    ]
    assert reach[0].tolist() == [True] * 4 + [False] * 8
    assert reach[1].tolist() == [True] * 8 + [False] * 4
    assert reach[2].tolist() == [False] * 8 + [True] * 4


@pytest.mark.slow
def test_scan_equals_unrolled_with_dropout_too():
    settings = {"dropout": 0.3}
    lora = LoraConfig(rank=2, dropout=0.2)
    model, params = _model(lora=lora, **settings)
    loop = Llama(CONFIG, ComputeConfig(scan_layers=False, **settings), lora)
    sequences = _plain(jnp.arange(20).reshape(2, 10))
    for kwargs in (
        {},
        {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}},
    ):
        expected = _hidden(model, params, sequences, **kwargs)
        ours = _hidden(loop, unrolled(params), sequences, **kwargs)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_stacked_undoes_unrolled():
    _, params = _model()
    again = stacked(unrolled({"backbone": params, "head": {"kernel": jnp.ones(3)}}))
    jax.tree.map(np.testing.assert_array_equal, again["backbone"], params)
    host = jax.tree.map(np.asarray, unrolled(params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stacked(host)))


def test_dropout_masks_differ_by_layer_key_and_call():
    model, params = _model(dropout=0.5)
    same = unrolled(params)
    loop = Llama(CONFIG, ComputeConfig(dropout=0.5, scan_layers=False))
    zeros = jax.tree.map(jnp.zeros_like, same)
    # One bias is all that is left: what its layer adds is the dropout mask alone.
    masks = []
    for layer in ("layers_0", "layers_1"):
        alone = dict(zeros)
        alone["final_norm"] = {"scale": jnp.ones(32)}
        bias = {"kernel": zeros[layer]["mlp"]["down"]["kernel"], "bias": jnp.ones(32)}
        alone[layer] = {**zeros[layer], "mlp": {**zeros[layer]["mlp"], "down": bias}}
        hidden = _hidden(
            loop,
            alone,
            _plain(jnp.zeros((1, 8), int)),
            deterministic=False,
            rngs={"dropout": jax.random.key(1)},
        )
        masks.append(np.asarray(hidden) != 0)
    kept = [mask.mean() for mask in masks]
    assert all(0.35 < share < 0.65 for share in kept)
    assert (masks[0] != masks[1]).any()

    def run(seed, **kwargs):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(
            _hidden(model, params, _plain(jnp.arange(8)[None]), rngs=rngs, **kwargs)
        )

    assert (run(1, deterministic=False) != run(2, deterministic=False)).any()
    assert (run(1) == run(2)).all()


@functools.cache
def _gradient(remat, scan_layers):
    sequences = completion_sequences("packed", random_pairs(2, vocab_size=61))
    model, params = _model(remat=remat, scan_layers=scan_layers, dropout=0.2)
    real = sequences.segment[:, :, None] != 0

    def loss(params):
        hidden = model.apply(
            {"params": params},
            sequences,
            deterministic=False,
            rngs={"dropout": jax.random.key(5)},
        )
        return (jnp.where(real, hidden, 0) ** 3).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("full", True),
        pytest.param("dots", True, marks=pytest.mark.slow),
        pytest.param("attention", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_remat_changes_nothing(remat, scan_layers):
    ours, expected = _gradient(remat, scan_layers), _gradient("none", scan_layers)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        ours,
        expected,
    )


@pytest.mark.slow
def test_remat_recomputes_what_its_name_says():
    """Counted in the gradient's program: none < attention < dots < full."""
    sequences = completion_sequences("packed", random_pairs(2, vocab_size=61))

    def products(remat):
        model, params = _model(remat=remat, scan_layers=False)
        loss = jax.grad(lambda p: model.apply({"params": p}, sequences).sum())
        return jax.jit(loss).lower(params).as_text().count("dot_general")

    counts = [products(name) for name in ("none", "attention", "dots", "full")]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[3]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16_compute_is_close_and_outputs_are_float32(tied):
    """bfloat16 keeps 8 bits: activations of size 1 carry errors of about 1 per cent, so
    logits of size about 1 agree to a few hundredths; parameters stay float32."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    sequences = _plain(jnp.arange(24).reshape(2, 12))
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = Llama(config, ComputeConfig(dtype=dtype))
        params = init_llama(model, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
            jnp.dtype("float32")
        }
        hidden = _hidden(model, params, sequences)
        assert hidden.dtype == dtype
        logits = model.apply({"params": params}, hidden, method="logits")
        assert logits.dtype == jnp.float32
        outputs[dtype] = np.asarray(logits)
    scale = outputs["float32"].std()
    error = np.abs(outputs["bfloat16"] - outputs["float32"]).max()
    assert 0 < error < 0.1 * scale


def test_gradients_are_finite_with_fully_padded_rows():
    model, params = _model()
    sequences = _plain(jnp.zeros((2, 9), int))
    segment = jnp.array([[1] * 5 + [0] * 4, [0] * 9])
    sequences = sequences.replace(segment=segment)

    def loss(params):
        hidden = model.apply({"params": params}, sequences)
        return hidden.sum() + jnp.where(segment[:, :, None] != 0, hidden, 0).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_initial_logits_and_residual_stream_are_of_size_one():
    config = LlamaConfig(512, 128, 344, 6, 4, 2, 32)
    model = Llama(config)
    params = init_llama(model, jax.random.key(0))
    assert type(params) is dict and "lm_head" in params
    hidden = _hidden(model, params, _plain(jnp.arange(64)[None]))
    logits = model.apply({"params": params}, hidden, method="logits")
    assert 0.8 < float(logits.std()) < 1.2
    different = init_llama(model, jax.random.key(1))
    kernels = [tree["layers"]["mlp"]["up"]["kernel"] for tree in (params, different)]
    assert bool((kernels[0] != kernels[1]).all())
    assert bool((kernels[0][0] != kernels[0][1]).all())  # layers differ from each other


def test_scan_compiles_one_layer_however_deep():
    def lines(layers):
        model = Llama(dataclasses.replace(CONFIG, num_layers=layers))
        params = jax.eval_shape(lambda key: init_llama(model, key), jax.random.key(0))
        lowered = _hidden.lower(model, params, _plain(jnp.arange(8)[None]))
        return lowered.as_text().count("\n")

    assert lines(2) == lines(6)
