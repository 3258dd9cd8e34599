"""A set's figures in training, on eight devices, are those that `evaluate` gives."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.diagnostics import make_diagnosed_evaluate
from rlhf_jax.algorithms.reward_model import reward_states_apply
from rlhf_jax.data.encoded import EncodedCompletion, EncodedPair
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.store import PairDataset
from rlhf_jax.evals import scoring, suite
from rlhf_jax.evals.hidden_states import alternating, state_figures
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.programs import held_out, sharded
from rlhf_jax.sharding import MeshConfig, batch_devices, make_mesh
from rlhf_jax.testing import random_pairs, tiny_config

PAIRS = random_pairs(13, seed=1)
"""Not a multiple of the devices: batches have filler."""


def test_sharded_figures_equal_those_of_the_evaluation_of_a_finished_model():
    model = RewardModel(tiny_config(num_heads=4, num_kv_heads=4))
    params = init_head_model(model, jax.random.key(0))
    norm = params["backbone"]["final_norm"]
    # Unequal weights: else |h| after the norm is one number, whose skewness is noise.
    norm["scale"] = norm["scale"] * np.linspace(0.2, 2, len(norm["scale"]))
    # As `evaluate` does: each completion scored in rows of its own packing.
    encoded = [
        EncodedCompletion(prompt, text) for prompt, *texts in PAIRS for text in texts
    ]
    states_fn = jax.jit(
        functools.partial(model.apply, {"params": params}, method="rewards_and_states")
    )
    scored = scoring.score_with_states(states_fn, encoded, np.arange(len(encoded)))
    chosen, rejected = scored.rewards[0::2], scored.rewards[1::2]
    expected = suite.evaluate_pairs(chosen, rejected)
    expected |= state_figures(
        scored.before, scored.after, alternating(len(encoded))
    ).metrics
    expected["head_norm"] = float(np.linalg.norm(params["head"]["kernel"]))

    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        state = sharded.create_state(params, optax.sgd(1.0), mesh)
        batches = Batches(
            PairDataset.of(EncodedPair(*pair) for pair in PAIRS),
            6,
            shuffle=False,
            epochs=1,
            row_length=128,
            rows_multiple_of=batch_devices(mesh),
            prefetch=0,
        )
        apply = reward_states_apply(model, deterministic=True)
        found = held_out.pair_figures(
            state,
            evaluate=sharded.compile_evaluate(make_diagnosed_evaluate(apply), state),
            eval_sets={"id": [batch for batch, _ in batches]},
            sizes={"id": len(PAIRS)},
            put=sharded.make_put(mesh),
        )
    own = {key.removeprefix("eval/id/"): value for key, value in found.items()}
    shared = set(own) & set(expected)
    assert {"accuracy", "loss", "reward_min", "effective_rank_before"} <= shared
    assert {"difference_norm_p99", "state_norm_before_skewness"} <= shared
    for key in shared:
        assert own[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
    assert set(own) - shared == {"reward/chosen", "reward/rejected"}
