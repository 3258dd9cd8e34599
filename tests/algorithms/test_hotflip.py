"""HotFlip: exact where the reward is linear in the embeddings, and true rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.hotflip import make_flips
from rlhf_jax.testing import tiny_config, tiny_reward_model
from rlhf_jax.types import Sequences

LENGTH, VOCAB = 10, 512
ALLOWED = jnp.arange(VOCAB) >= 20


def rows(batch=3, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(LENGTH - 3, LENGTH + 1, batch)
    segment = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    completion = (segment > 0) & (np.arange(LENGTH) >= 3)
    sequences = Sequences(
        tokens=rng.integers(1, VOCAB, (batch, LENGTH)) * segment,
        positions=np.tile(np.arange(LENGTH), (batch, 1)),
        segment=segment,
        completion_mask=completion,
    )
    score_at = lengths - 1
    editable = completion & (np.arange(LENGTH) != score_at[:, None])
    return jax.tree.map(jnp.asarray, (sequences, score_at, editable))


class Linear:
    """r = sum over the row's tokens of w_t . e_t: first order is exact."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = rng.normal(size=(LENGTH, 4)).astype(np.float32)
        table = rng.normal(size=(VOCAB, 4)).astype(np.float32)
        self.params = {"backbone": {"embed": {"embedding": jnp.asarray(table)}}}

    def apply(self, variables, sequences, score_at, *, offset=None):
        table = variables["params"]["backbone"]["embed"]["embedding"]
        x = table[sequences.tokens]
        if offset is not None:
            x = x + offset
        score = jnp.einsum("btd,td->bt", x, self.weights)
        return jnp.where(sequences.segment > 0, score, 0.0).sum(axis=1, keepdims=True)


def test_flips_of_a_linear_reward_are_the_best_of_all():
    model, (sequences, score_at, editable) = Linear(), rows()
    flips = jax.jit(make_flips(model, count=50))(
        model.params, sequences, score_at, editable, ALLOWED
    )
    table = np.asarray(model.params["backbone"]["embed"]["embedding"])
    for b in range(len(score_at)):
        real = np.asarray(sequences.segment[b]) > 0
        every = {}
        for t in np.flatnonzero(editable[b]).tolist():
            for v in np.flatnonzero(ALLOWED).tolist():
                tokens = np.array(sequences.tokens[b])
                if tokens[t] != v:
                    tokens[t] = v
                    score = (table[tokens] * model.weights).sum(axis=1)
                    every[t, v] = score[real].sum()
        best = sorted(every, key=every.get, reverse=True)[:50]
        found = list(
            zip(flips.position[b].tolist(), flips.token[b].tolist(), strict=True)
        )
        assert found == best
        np.testing.assert_allclose(
            flips.flipped[b], [every[f] for f in found], rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def of_a_model():
    model, params = tiny_reward_model(tiny_config())
    sequences, score_at, editable = rows(batch=16)
    flips = jax.jit(make_flips(model, count=12))(
        params, sequences, score_at, editable, ALLOWED
    )
    return model, params, sequences, score_at, editable, flips


def test_rewards_are_those_of_the_model_on_the_flipped_rows(of_a_model):
    model, params, sequences, score_at, _, flips = of_a_model
    reward = jax.jit(
        lambda s, at: model.apply({"params": params}, s, at[:, None])[:, 0]
    )
    np.testing.assert_allclose(flips.rewards, reward(sequences, score_at), atol=1e-5)
    every = jnp.arange(len(score_at))
    for f in range(12):
        tokens = sequences.tokens.at[every, flips.position[:, f]].set(flips.token[:, f])
        expected = reward(sequences.replace(tokens=tokens), score_at)
        np.testing.assert_allclose(flips.flipped[:, f], expected, atol=1e-5)


def test_only_editable_columns_get_allowed_other_tokens(of_a_model):
    _, _, sequences, _, editable, flips = of_a_model
    assert np.take_along_axis(np.asarray(editable), flips.position, axis=1).all()
    assert np.asarray(ALLOWED)[flips.token].all()
    before = np.take_along_axis(np.asarray(sequences.tokens), flips.position, axis=1)
    assert (before != flips.token).all()


def test_flips_chosen_by_gradient_raise_the_reward_more_than_random_ones(of_a_model):
    model, params, sequences, score_at, editable, flips = of_a_model
    raised = np.asarray(flips.flipped - flips.rewards[:, None])
    rng = np.random.default_rng(0)
    at = jnp.array([rng.choice(np.flatnonzero(row), 60) for row in editable])
    tokens = jnp.asarray(rng.integers(20, VOCAB, at.shape))
    every = jnp.arange(len(score_at))

    @jax.jit
    def reward(position, token):
        row = sequences.replace(tokens=sequences.tokens.at[every, position].set(token))
        return model.apply({"params": params}, row, score_at[:, None])[:, 0]

    random = np.stack([reward(at[:, n], tokens[:, n]) for n in range(60)], axis=1)
    by_chance = random - np.asarray(flips.rewards)[:, None]
    assert raised.mean() > by_chance.mean() + 3 * by_chance.std() / by_chance.size**0.5


def test_rows_with_too_few_possibilities_say_so():
    model, (sequences, score_at, editable) = Linear(), rows()
    one = jnp.arange(VOCAB) == 100
    flips = jax.jit(make_flips(model, count=12))(
        model.params, sequences, score_at, editable, one
    )
    possible = np.isfinite(flips.flipped).sum(axis=1)
    here = (np.asarray(sequences.tokens) != 100) & np.asarray(editable)
    assert possible.tolist() == here.sum(axis=1).tolist()
