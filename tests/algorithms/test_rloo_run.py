"""RLOO as one pure function: equal over seeds at once and one by one, and equal to the
steps that the program takes with host arrays and packed rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import rloo_run
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.reward_model import reward_apply
from rlhf_jax.algorithms.rloo import rloo_objective
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.data.encoded import EncodedCompletion, EncodedPrompt
from rlhf_jax.evals import scoring
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.models.heads import predecessors
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.reinforcement import RLCursor
from rlhf_jax.programs.rloo import RlooLossConfig, make_targets
from rlhf_jax.rl import streams
from rlhf_jax.sampling.generate import SamplingConfig, make_generate
from rlhf_jax.testing import tiny_config, tiny_llama, tiny_reward_model
from rlhf_jax.types import PromptBatch, Rollout

EOS, STEPS, SEEDS, SAMPLES, KL_COEF = 2, 2, 2, 3, 0.3
VOCAB, LONGEST = 8, 5
"""Few tokens: some completions stop early and some are cut."""
LENGTHS = ((3, 5), (2, 4))
"""Of the prompts of each step."""
TX = optax.sgd(0.3, momentum=0.9)


def table_pieces():
    """(policy, reward models, generate, apply, score) of tables over pairs of tokens:
    the smallest thing that samples, and compiles at once."""

    def apply(params, sequences, key):
        before = predecessors(sequences)
        columns = jnp.maximum(before, 0)
        previous = jnp.take_along_axis(sequences.tokens, columns, axis=1)
        logits = jax.nn.log_softmax(params["w"])[previous]
        picked = jnp.take_along_axis(logits, sequences.tokens[..., None], axis=-1)
        entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
        return jnp.where(before >= 0, picked[..., 0], 0.0), entropy

    def generate(params, prompts, key):
        last = jnp.sum(prompts.mask, axis=1, keepdims=True) - 1
        first = jnp.take_along_axis(prompts.tokens, last, axis=1)[:, 0]
        logits = jax.nn.log_softmax(params["w"])

        def draw(carry, key):
            token, active = carry
            new = jax.random.categorical(key, logits[token])
            return (new, active & (new != EOS)), (new, active, logits[token, new])

        start = jnp.repeat(first, SAMPLES)
        carry = (start, jnp.ones(start.shape, bool))
        (_, active), drawn = jax.lax.scan(draw, carry, jax.random.split(key, LONGEST))
        tokens, mask, logprobs = (x.T for x in drawn)
        logprobs = jnp.where(mask, logprobs, 0.0)
        return Rollout(
            tokens=jnp.where(mask, tokens, 0),
            mask=mask,
            stopped=~active,
            logprobs=logprobs,
            policy_logprobs=logprobs,
            sampling_logprobs=logprobs,
        )

    def score(params, sequences, score_at, key):
        before = jnp.maximum(predecessors(sequences), 0)
        tokens = jnp.take_along_axis(sequences.tokens, before, axis=1)
        values = params["r"][tokens] + 0.1 * sequences.positions
        return jnp.take_along_axis(values, score_at, axis=1)

    keys = jax.random.split(jax.random.key(0), 3)
    policy = {"w": jax.random.normal(keys[0], (VOCAB, VOCAB))}
    rewards = [{"r": jax.random.normal(key, (VOCAB,))} for key in keys[1:]]
    return policy, rewards, generate, apply, score


def llama_pieces():
    """The same of the package's models and sampler."""
    shape = tiny_config(vocab_size=VOCAB, num_layers=1)
    unrolled = ComputeConfig(scan_layers=False)
    model, policy = tiny_llama(shape, compute=unrolled)
    made = [tiny_reward_model(shape, seed=n, compute=unrolled) for n in (1, 2)]
    sampling = SamplingConfig(num_samples=SAMPLES, max_new_tokens=LONGEST)
    return (
        policy,
        [params for _, params in made],
        make_generate(model, sampling, stop_ids=(EOS,)),
        policy_apply(model, temperature=1.0, deterministic=True),
        reward_apply(made[0][0], deterministic=True),
    )


class World:
    """Prompts, and the runs of all seeds at once."""

    def __init__(self, pieces) -> None:
        self.policy, self.rewards, self.generate, self.apply, self.score = pieces
        self.objective = rloo_objective(self.apply)
        act = rloo_run.make_act(self.generate, self.apply, self.score, eos_id=EOS)
        self.run = rloo_run.make_rloo_run(act, self.objective, TX, kl_coef=KL_COEF)
        rng = np.random.default_rng(0)
        self.prompts = [
            [
                EncodedPrompt(rng.integers(3, VOCAB, size).tolist(), "", {})
                for size in LENGTHS[step]
            ]
            for step in range(STEPS)
        ]
        batches = [xp.prompt_batch(prompts, pad_id=0) for prompts in self.prompts]
        self.batches: PromptBatch = jax.tree.map(
            lambda *x: np.stack(x)[..., :LONGEST], *batches
        )
        self.keys = jnp.stack([jax.random.key(seed) for seed in range(SEEDS)])
        runs = jax.jit(jax.vmap(self.run, in_axes=(None, 0, None, 0)))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *self.rewards)
        together = runs(self.policy, stacked, self.batches, self.keys)
        self.together = [
            jax.tree.map(lambda x, n=n: x[n], together) for n in range(SEEDS)
        ]


class Pieces:
    """What the program jits."""

    def __init__(self, world: World) -> None:
        self.generate = jax.jit(world.generate)
        self.score = jax.jit(lambda p, s, at: world.score(p, s, at, None))
        self.logprobs = jax.jit(lambda s: world.apply(world.policy, s, None)[0])
        self.update = jax.jit(make_update(world.objective, TX))


def program(world, pieces, n):
    """(parameters, metrics of each step) of seed n."""
    packing = xp.Packing("padded", row_length=12, rows_multiple_of=1, pad_id=0)
    state, key = init_state(world.policy, TX), world.keys[n]
    noise, found = jax.random.fold_in(key, streams.SAMPLING), []
    for step, prompts in enumerate(world.prompts):
        batch = jax.tree.map(lambda x, step=step: x[step], world.batches)
        draw = jax.random.fold_in(noise, step)
        rollout = jax.device_get(pieces.generate(state.params, batch, draw))
        raw = scoring.score(
            functools.partial(pieces.score, world.rewards[n]),
            [
                EncodedCompletion(
                    prompts[m // SAMPLES].tokens,
                    [*rollout.tokens[m][real], *([] if ended else [EOS])],
                )
                for m, (real, ended) in enumerate(zip(rollout.mask, rollout.stopped))
            ],
            row_length=12,
        )
        done = xp.collect(prompts, rollout, raw, xp.ShapingConfig())
        done.ref_logprobs = xp.forward(pieces.logprobs, done, packing, chunk=len(raw))
        done, _ = make_targets(RlooLossConfig(kl_coef=KL_COEF), done, RLCursor())
        (experience,) = xp.minibatches(
            done, packing, count=1, accum_steps=1, rng=xp.epoch_rng(0, step, 0)
        )
        update_key = jax.random.fold_in(key, streams.UPDATE)
        state, metrics = pieces.update(state, experience, update_key)
        found.append(
            {
                "reward/proxy": raw.mean(),
                "policy/kl": done.kl.sum(axis=1).mean(),
                "completion/length": done.mask.sum(axis=1).mean(),
                "completion/eos_rate": done.stopped.mean(),
                "grad_norm": metrics["grad_norm"],
                "policy/entropy": metrics["policy/entropy"],
            }
        )
    return state.params, found


@pytest.fixture(
    scope="module",
    params=[table_pieces, pytest.param(llama_pieces, marks=pytest.mark.slow)],
)
def world(request):
    return World(request.param())


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_seeds_side_by_side_equal_seeds_one_by_one(world):
    alone = jax.jit(world.run)
    for n, found in enumerate(world.together):
        assert_close(
            found, alone(world.policy, world.rewards[n], world.batches, world.keys[n])
        )


def test_each_seed_of_many_takes_the_steps_of_the_program(world):
    """The same steps one seed at a time, through host arrays, packed rows and
    make_targets."""
    pieces = Pieces(world)
    for n, (params, curves) in enumerate(world.together):
        expected, metrics = program(world, pieces, n)
        assert_close(params, expected)
        for name in metrics[0]:
            assert_close(curves[name], np.array([float(one[name]) for one in metrics]))
        assert 0 < metrics[0]["completion/eos_rate"] < 1
    first, second = (params for params, _ in world.together)
    for pair in ((first, world.policy), (first, second)):
        leaves = zip(*map(jax.tree.leaves, pair), strict=True)
        assert max(float(jnp.abs(a - b).max()) for a, b in leaves) > 1e-3


def test_one_completion_a_prompt_is_refused_when_it_is_traced():
    policy, rewards, generate, apply, score = table_pieces()

    def one(params, prompts, key):
        return jax.tree.map(lambda x: x[::SAMPLES], generate(params, prompts, key))

    act = rloo_run.make_act(one, apply, score, eos_id=EOS)
    run = rloo_run.make_rloo_run(act, rloo_objective(apply), TX, kl_coef=KL_COEF)
    tokens = np.full((STEPS, 2, 3), 5)
    prompts = PromptBatch(tokens=jnp.array(tokens), mask=jnp.array(tokens > 0))
    with pytest.raises(ValueError, match="num_samples: expected at least 2, got 1"):
        jax.eval_shape(run, policy, rewards[0], prompts, jax.random.key(0))


def rollout_of(tokens, mask, stopped):
    tokens, mask = np.array(tokens), np.array(mask, bool)
    none = jnp.zeros(tokens.shape)
    return Rollout(
        tokens=jnp.array(tokens),
        mask=jnp.array(mask),
        stopped=jnp.array(stopped),
        logprobs=none,
        policy_logprobs=none,
        sampling_logprobs=none,
    )


def test_what_was_cut_is_scored_with_an_end_and_what_stopped_has_its_own():
    drawn = rollout_of([[5, EOS, 0], [5, 6, 7]], [[1, 1, 0], [1, 1, 1]], [True, False])
    tokens, mask = rloo_run.with_end(drawn, EOS)
    assert [row[real].tolist() for row, real in zip(tokens, np.array(mask))] == [
        [5, EOS],
        [5, 6, 7, EOS],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_the_prompt_and_its_completions_whatever_side_is_padded(side):
    prompt = [[0, 5, 6]] if side == "left" else [[5, 6, 0]]
    prompts = PromptBatch(tokens=jnp.array(prompt), mask=jnp.array(prompt) != 0)
    drawn = rollout_of([[7, EOS], [EOS, 0]], [[1, 1], [1, 0]], [True, True])
    rows = rloo_run.lay_out(prompts, drawn.tokens, drawn.mask)
    real = np.array(rows.segment[0]) != 0
    assert rows.prefix is not None
    fields = (rows.tokens, rows.positions, rows.segment, rows.prefix)
    assert [np.array(field[0])[real].tolist() for field in fields] == [
        [5, 6, 7, EOS, EOS],
        [0, 1, 2, 3, 2],
        [1, 1, 2, 2, 3],
        [0, 0, 1, 1, 1],
    ]
    assert np.array(rows.completion_mask[0])[real].tolist() == [0, 0, 1, 1, 1]
