"""The gate weighs attributes by prompt, with weights that sum to 1, and it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.gate import (
    GateBatch,
    GateConfig,
    gate,
    gate_objective,
    init_gate,
    scores,
    train_gate,
)
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.algorithms.update import init_state, make_update

SMALL = GateConfig(
    width=32,
    layers=2,
    temperature=1.0,
    dropout=0.0,
    scale=3.0,
    steps=300,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup=0.0),
)
KEY = jax.random.key(0)


def random_params(config=SMALL, width=6, attributes=3, seed=0):
    """Parameters whose last layer is not 0."""
    params = init_gate(jax.random.key(seed), width, attributes, config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )


def toy_pairs(count, seed, width=6):
    """Prompts of three classes; in class k attribute k alone decides."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, count)
    prompts = 0.3 * rng.normal(size=(count, width))
    prompts[np.arange(count), kind] += 1.0
    first, second = rng.normal(size=(2, count, 3))
    index = np.arange(count)
    wins = first[index, kind] > second[index, kind]
    chosen = np.where(wins[:, None], first, second)
    rejected = np.where(wins[:, None], second, first)
    arrays = (prompts, chosen, rejected, np.ones(count))
    return GateBatch(*(jnp.asarray(x, jnp.float32) for x in arrays)), kind


def slow_gate(params, prompts, config):
    """The MLP and the softmax in float64, prompt by prompt."""
    rows = []
    for row in np.float64(prompts):
        for n in range(config.layers):
            layer = params[f"hidden_{n}"]
            row = row @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
            row = np.array([max(x, 0.0) for x in row])
        out = params["out"]
        logits = row @ np.float64(out["kernel"]) + np.float64(out["bias"])
        e = np.exp(logits / config.temperature)
        rows.append(e / e.sum())
    return np.array(rows)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_gate_equals_an_independent_one(temperature):
    config = dataclasses.replace(SMALL, temperature=temperature)
    params, (pairs, _) = random_params(), toy_pairs(20, 0)
    found = gate(params, pairs.prompts, config)
    np.testing.assert_allclose(
        found, slow_gate(params, pairs.prompts, config), rtol=1e-4
    )


def test_weights_are_a_distribution_of_each_prompt_also_with_dropout():
    config = dataclasses.replace(SMALL, dropout=0.5)
    pairs, _ = toy_pairs(20, 0)
    for key in (None, KEY):
        found = gate(random_params(), 100 * pairs.prompts, config, key)
        assert found.shape == (20, 3) and found.dtype == jnp.float32
        assert (found >= 0).all()
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_an_untrained_gate_weighs_all_attributes_alike():
    pairs, _ = toy_pairs(5, 0)
    found = gate(init_gate(KEY, 6, 3, SMALL), pairs.prompts, SMALL)
    np.testing.assert_allclose(found, 1 / 3, rtol=1e-6)


def test_hand_worked_score():
    params = init_gate(KEY, 6, 2, dataclasses.replace(SMALL, scale=2.0))
    found = scores(params, jnp.array([[0.25, 0.75]]), jnp.array([[4.0, -1.0]]))
    np.testing.assert_allclose(found, [2 * (1.0 - 0.75)], rtol=1e-6)


def test_default_sizes_are_those_of_the_paper():
    shapes = jax.eval_shape(lambda key: init_gate(key, 16, 19, GateConfig()), KEY)
    assert {name: leaf["kernel"].shape for name, leaf in shapes.items()
            if name != "log"} == {
        "hidden_0": (16, 1024),
        "hidden_1": (1024, 1024),
        "hidden_2": (1024, 1024),
        "out": (1024, 19),
    }  # fmt: skip


def test_loss_is_bradley_terry_on_the_scores():
    params, (pairs, _) = random_params(), toy_pairs(30, 1)
    weight = jnp.asarray(np.random.default_rng(0).random(30), jnp.float32)
    pairs = pairs._replace(weight=weight.at[3].set(0.0))
    loss, metrics = gate_objective(SMALL)(params, pairs, KEY)
    weights = slow_gate(params, pairs.prompts, SMALL)
    scale = np.exp(float(params["log"]["scale"]))
    total = right = 0.0
    for n in range(30):
        gap = scale * weights[n] @ np.float64(pairs.chosen[n] - pairs.rejected[n])
        total += float(pairs.weight[n]) * np.log1p(np.exp(-gap))
        right += float(pairs.weight[n]) * (gap > 0)
    count = float(pairs.weight.sum())
    assert float(loss.value()) == pytest.approx(total / count, rel=1e-4)
    assert float(metrics["accuracy"].value()) == pytest.approx(right / count, rel=1e-4)


def test_gradient_reaches_the_gate_and_neither_states_nor_regressions():
    pairs, _ = toy_pairs(16, 0)
    frozen = {"regression": jnp.ones((3, 6))}

    def objective(params, batch, key):
        completions = batch.prompts @ params["regression"].T
        batch = batch._replace(chosen=batch.chosen + completions)
        return gate_objective(SMALL)(params["gate"], batch, key)

    tx = optax.sgd(0.1)
    state = init_state({"gate": random_params()}, tx, frozen=frozen)
    after, _ = make_update(objective, tx)(state, pairs, KEY)
    np.testing.assert_array_equal(after.frozen["regression"], 1.0)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), state.params, after.params
    )
    assert min(jax.tree.leaves(moved)) > 0
    through = jax.grad(
        lambda batch: gate_objective(SMALL)(random_params(), batch, KEY)[0].total
    )(pairs)
    for leaf in (through.prompts, through.chosen, through.rejected):
        np.testing.assert_array_equal(leaf, 0.0)


def test_dropout_is_drawn_by_the_key_and_absent_from_evaluation():
    config = dataclasses.replace(SMALL, dropout=0.3)
    params, (pairs, _) = random_params(), toy_pairs(16, 0)
    noisy = gate_objective(config)
    first, second = (noisy(params, pairs, jax.random.key(n))[0].total for n in (0, 1))
    assert float(first) != float(second)
    plain = gate_objective(config, deterministic=True)
    first, second = (plain(params, pairs, jax.random.key(n))[0].total for n in (0, 1))
    assert float(first) == float(second)


@pytest.fixture(scope="module")
def trained():
    train = jax.jit(train_gate, static_argnums=1)
    return train(toy_pairs(2000, 0)[0], SMALL, KEY)


def test_the_gate_learns_which_attribute_matters_for_which_prompt(trained):
    params, metrics = trained
    held_out, kind = toy_pairs(1000, 1)
    _, found = gate_objective(SMALL, deterministic=True)(params, held_out, KEY)
    untrained = init_gate(KEY, 6, 3, SMALL)
    _, equal = gate_objective(SMALL, deterministic=True)(untrained, held_out, KEY)
    assert float(equal["accuracy"].value()) < 0.75
    assert float(found["accuracy"].value()) > 0.9
    weights = np.asarray(gate(params, held_out.prompts, SMALL))
    for k in range(3):
        assert weights[kind == k].mean(axis=0).argmax() == k
        assert weights[kind == k, k].mean() > 0.8
    assert metrics["loss"].shape == (SMALL.steps,)
    assert float(metrics["loss"][-20:].mean()) < 0.5 * float(metrics["loss"][0])
    assert np.all(np.asarray(metrics["update/finite"]) == 1)


def test_training_is_decided_by_its_key():
    short = dataclasses.replace(SMALL, steps=3)
    pairs, _ = toy_pairs(50, 0)
    one, again, other = (
        train_gate(pairs, short, jax.random.key(n))[0]["out"]["kernel"]
        for n in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": 0}, "gate.width: expected at least 1, got 0"),
        ({"steps": 0}, "gate.steps"),
        ({"temperature": 0.0}, "gate.temperature: .* above 0, got 0.0"),
        ({"scale": float("inf")}, "gate.scale: .* finite"),
        ({"dropout": 1.0}, r"gate.dropout: .* \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        GateConfig(**changes)
