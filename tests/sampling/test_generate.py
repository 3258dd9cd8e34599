"""Completions and their log-probabilities are those of full forwards without a cache.

`slow_generate` draws in float64 with one full forward a token. Stop token 0 is also the
filler of `Rollout.tokens` and may be the prompts' padding: nobody must mistake it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.data.groups import Group, pack_groups, to_completions
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.parameters import unrolled
from rlhf_jax.sampling.generate import SamplingConfig, make_generate
from rlhf_jax.testing import tiny_config
from rlhf_jax.types import PromptBatch, Sequences
from tests.parameters import random_parameters

VOCAB, STOPS = 61, (0, 7, 11, 23, 42, 60)
PROMPTS = ([5], [8, 9, 0, 3, 17, 30, 2], [7, 44, 12], [33, 33, 21, 50, 4])
KEY = jax.random.key(5)
BASE = SamplingConfig(num_samples=3, max_new_tokens=8, temperature=0.7)
TOTAL = len(PROMPTS) * BASE.num_samples

SMALL = tiny_config(vocab_size=VOCAB, num_layers=1)
WINDOW = tiny_config(vocab_size=VOCAB, sliding_window=4, qk_norm=True)
BIASED = tiny_config(
    vocab_size=VOCAB, num_kv_heads=4, tie_word_embeddings=False, attention_bias=True
)
LORA = LoraConfig(rank=2, alpha=4.0)
MODELS = {
    "small": Llama(SMALL),
    "window, norms, adapters": Llama(WINDOW, lora=LORA),
    "biases, untied, adapters, unrolled": Llama(
        BIASED, ComputeConfig(scan_layers=False), LORA
    ),
    "bfloat16": Llama(WINDOW, ComputeConfig(dtype="bfloat16")),
}


@functools.cache
def parameters(name):
    return random_parameters(MODELS[name])


@functools.cache
def compiled(name, config):
    return jax.jit(make_generate(MODELS[name], config, stop_ids=STOPS))


def generate(name, config, prompts=None, key=KEY):
    batch = placed(PROMPTS) if prompts is None else prompts
    return jax.device_get(compiled(name, config)(parameters(name), batch, key))


def placed(prompts, *, width=9, start=lambda n, room: 0, pad=0):
    """Prompts in rows of one width, each from column start(number, free columns)."""
    tokens = np.full((len(prompts), width), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for n, prompt in enumerate(prompts):
        at = start(n, width - len(prompt))
        tokens[n, at : at + len(prompt)] = prompt
        mask[n, at : at + len(prompt)] = True
    return PromptBatch(tokens=jnp.array(tokens), mask=jnp.array(mask))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ones = jnp.ones_like(tokens)
    sequences = Sequences(
        tokens=tokens, positions=positions, segment=ones, completion_mask=ones > 0
    )
    return model.apply({"params": params}, sequences, method="everything")


def forced_logits(name, prompts, completions):
    """[M C V] float64: scores of each completion token, from full forwards."""
    samples = len(completions) // len(prompts)
    steps = completions.shape[1]
    tokens = np.zeros((len(completions), 7 + steps), np.int32)
    before = np.zeros(completions.shape, np.int64)
    for m, completion in enumerate(completions):
        prompt = prompts[m // samples]
        tokens[m, : len(prompt)] = prompt
        tokens[m, len(prompt) : len(prompt) + steps] = completion
        before[m] = len(prompt) - 1 + np.arange(steps)
    logits = _logits(MODELS[name], parameters(name), jnp.array(tokens))
    logits = np.asarray(logits, np.float64)
    return np.take_along_axis(logits, before[:, :, None], axis=1)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def forced_logprobs(name, rollout, temperature, prompts=PROMPTS):
    table = log_softmax(forced_logits(name, prompts, rollout.tokens) / temperature)
    picked = np.take_along_axis(table, rollout.tokens[:, :, None], axis=2)[:, :, 0]
    return np.where(rollout.mask, picked, 0.0)


def slow_distribution(logits, used, step, config):
    """What one token is drawn from; [V] float64."""
    warped = logits.copy()
    for token in used:
        penalty = config.repetition_penalty
        warped[token] *= 1 / penalty if warped[token] > 0 else penalty
    if step < config.min_new_tokens:
        warped[list(STOPS)] = -np.inf
    if config.temperature == 0:
        return np.eye(VOCAB)[np.argmax(warped)]
    probs = np.exp(log_softmax(warped / config.temperature))
    if config.top_k:
        probs[probs < np.sort(probs)[-config.top_k]] = 0
        probs /= probs.sum()
    if config.top_p < 1:
        order = np.argsort(-probs)
        needed = np.searchsorted(np.cumsum(probs[order]), config.top_p) + 1
        probs[order[needed:]] = 0
        probs /= probs.sum()
    probs[probs < config.min_p * probs.max()] = 0
    return probs / probs.sum()


def slow_generate(name, config, key=KEY):
    """(tokens, mask, stopped, log-probabilities of the draws), one forward a token."""
    total, steps = len(PROMPTS) * config.num_samples, config.max_new_tokens
    tokens = np.zeros((total, steps), np.int32)
    mask, stopped = np.zeros(tokens.shape, bool), np.zeros(total, bool)
    drawn_from = np.zeros(tokens.shape)
    for t in range(steps):
        logits = forced_logits(name, PROMPTS, tokens)[:, t]
        for m in np.flatnonzero(~stopped):
            used = set(tokens[m, :t].tolist())
            if config.penalise_prompt:
                used |= set(PROMPTS[m // config.num_samples])
            probs = slow_distribution(logits[m], used, t, config)
            place = jax.random.fold_in(jax.random.fold_in(key, m), t)
            noise = float(jax.random.uniform(place))
            token = int(np.searchsorted(np.cumsum(probs), noise, side="right"))
            tokens[m, t], mask[m, t], stopped[m] = token, True, token in STOPS
            drawn_from[m, t] = np.log(probs[token])
    return tokens, mask, stopped, drawn_from


def assert_well_formed(rollout, steps):
    """A stop token ends a completion and belongs to it; after it there is nothing."""
    sizes = rollout.mask.sum(axis=1)
    assert rollout.tokens.dtype == np.int32 and (sizes >= 1).all()
    np.testing.assert_array_equal(rollout.mask, np.arange(steps) < sizes[:, None])
    is_stop = np.isin(rollout.tokens, STOPS) & rollout.mask
    at_end = np.arange(steps) == sizes[:, None] - 1
    np.testing.assert_array_equal(is_stop, at_end & rollout.stopped[:, None])
    assert (rollout.stopped | (sizes == steps)).all()
    assert (rollout.tokens[~rollout.mask] == 0).all()
    for name in ("logprobs", "policy_logprobs", "sampling_logprobs"):
        values = getattr(rollout, name)
        assert values.dtype == np.float32 and np.isfinite(values).all()
        assert (values <= 0).all() and (values[~rollout.mask] == 0).all()


def assert_same_completions(left, right):
    for name in ("tokens", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    for name in ("logprobs", "policy_logprobs", "sampling_logprobs"):
        np.testing.assert_allclose(
            getattr(left, name), getattr(right, name), atol=1e-4, err_msg=name
        )


def with_(**changes):
    return dataclasses.replace(BASE, **changes)


SETTINGS = {
    "temperature": BASE,
    "everything": with_(
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.4,
        min_new_tokens=3,
        slots=5,
    ),
    "greedy": with_(temperature=0.0, slots=1),
    "greedy, own tokens penalised": with_(
        temperature=0.0, repetition_penalty=2.0, penalise_prompt=False
    ),
    "never a stop": with_(temperature=1.3, min_new_tokens=8, slots=11),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_completions_are_those_of_a_slow_loop(setting):
    config = SETTINGS[setting]
    rollout = generate("small", config)
    assert_well_formed(rollout, config.max_new_tokens)
    tokens, mask, stopped, drawn_from = slow_generate("small", config)
    np.testing.assert_array_equal(rollout.tokens, tokens)
    np.testing.assert_array_equal(rollout.mask, mask)
    np.testing.assert_array_equal(rollout.stopped, stopped)
    np.testing.assert_allclose(rollout.sampling_logprobs, drawn_from, atol=1e-4)
    # Ratios and KL are made of the distribution without truncation and penalties.
    for got, temperature in (
        (rollout.logprobs, config.temperature or 1.0),
        (rollout.policy_logprobs, 1.0),
    ):
        expected = forced_logprobs("small", rollout, temperature)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    shortest = config.min_new_tokens + (config.min_new_tokens < config.max_new_tokens)
    assert mask.sum(axis=1).min() >= shortest
    assert stopped.any() == (setting not in ("greedy", "never a stop"))


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("window, norms, adapters", 0),
        ("window, norms, adapters", 5),
        ("biases, untied, adapters, unrolled", 5),
    ],
)
def test_every_architecture_decodes_as_it_is_trained(name, slots):
    rollout = generate(name, with_(slots=slots))
    assert_well_formed(rollout, BASE.max_new_tokens)
    assert rollout.mask.sum() > TOTAL
    for got, temperature in ((rollout.logprobs, 0.7), (rollout.policy_logprobs, 1.0)):
        expected = forced_logprobs(name, rollout, temperature)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_stacked_and_unrolled_parameters_give_the_same_completions():
    stacked_model, params = MODELS["small"], unrolled(parameters("small"))
    model = stacked_model.clone(compute=ComputeConfig(scan_layers=False))
    run = jax.jit(make_generate(model, BASE, stop_ids=STOPS))
    ours = jax.device_get(run(params, placed(PROMPTS), KEY))
    assert_same_completions(ours, generate("small", BASE))


def test_bfloat16_decodes_what_bfloat16_computes():
    """bfloat16 rounds each activation to 2^-9 of its size; over two layers logits near
    1 differ by about 0.01 between two orders of summation, and some by a few times
    that. A wrong key, position or mask moves them by 1."""
    rollout = generate("bfloat16", BASE)
    assert_well_formed(rollout, BASE.max_new_tokens)
    expected = forced_logprobs("bfloat16", rollout, 0.7)
    error = np.abs(rollout.logprobs - expected)[rollout.mask]
    assert error.max() < 0.15 and error.mean() < 0.03


@functools.partial(jax.jit, static_argnums=0)
def _row_logprobs(model, params, sequences):
    apply = policy_apply(model, temperature=0.7, deterministic=True)
    return apply(params, sequences, jax.random.key(0))[0]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_rows_to_learn_from_have_the_sampled_logprobs(layout):
    rollout = generate("small", BASE)
    groups = [
        Group(np.array(prompt), range(n * 3, n * 3 + 3))
        for n, prompt in enumerate(PROMPTS)
    ]
    packed = pack_groups(
        groups, rollout.tokens, rollout.mask, layout=layout, row_length=24, rows=TOTAL
    )
    rows = _row_logprobs(MODELS["small"], parameters("small"), packed.sequences)
    np.testing.assert_allclose(
        to_completions(packed, rows), rollout.logprobs, atol=1e-4
    )


@pytest.mark.parametrize("slots", [1, 4])
def test_the_number_of_slots_changes_nothing(slots):
    rollout = generate("small", with_(slots=slots))
    assert_same_completions(rollout, generate("small", BASE))


@pytest.mark.parametrize(
    "start",
    [lambda n, room: room, lambda n, room: (n * 3) % (room + 1)],
    ids=["left", "anywhere"],
)
@pytest.mark.parametrize("pad", [0, 42, 5])
def test_where_prompts_are_padded_and_with_what_changes_nothing(start, pad):
    expected = generate("small", BASE)
    moved = generate("small", BASE, placed(PROMPTS, start=start, pad=pad))
    assert_same_completions(moved, expected)


def test_more_padding_and_more_prompts_change_nothing_for_a_row():
    expected = generate("small", BASE)
    prompts = placed([*PROMPTS, [1, 2, 3]], width=12, pad=9)
    more = generate("small", BASE, prompts)
    assert_same_completions(jax.tree.map(lambda x: x[:TOTAL], more), expected)
    others = placed([PROMPTS[0], [9, 9], PROMPTS[2], [1]])
    changed = generate("small", BASE, others)
    keep = np.isin(np.arange(TOTAL) // 3, (0, 2))
    assert_same_completions(
        jax.tree.map(lambda x: x[keep], changed),
        jax.tree.map(lambda x: x[keep], expected),
    )
    assert (changed.tokens[~keep] != expected.tokens[~keep]).any()


def test_a_padding_token_is_not_penalised():
    config = SETTINGS["everything"]
    other = generate("small", config, placed(PROMPTS, pad=31))
    assert_same_completions(other, generate("small", config))


def test_a_key_decides_the_noise_and_no_two_completions_share_it():
    expected = generate("small", BASE)
    assert_same_completions(generate("small", BASE), expected)
    seen = {tuple(row) for row in expected.tokens.tolist()}
    other = generate("small", BASE, key=jax.random.key(6))
    seen |= {tuple(row) for row in other.tokens.tolist()}
    assert len(seen) > 1.8 * TOTAL  # two short ones may agree by chance
    alike = placed([PROMPTS[1]] * len(PROMPTS))
    rollout = generate("small", BASE, alike)
    assert len({tuple(row) for row in rollout.tokens.tolist()}) > 0.8 * TOTAL


def test_greedy_completions_do_not_depend_on_the_key():
    config = SETTINGS["greedy"]
    rollout = generate("small", config)
    assert_same_completions(generate("small", config, key=jax.random.key(1)), rollout)
    for n in range(0, TOTAL, 3):
        np.testing.assert_array_equal(
            rollout.tokens[n : n + 3], rollout.tokens[[n] * 3]
        )
    assert (rollout.sampling_logprobs == 0).all()


MANY = SamplingConfig(num_samples=2048, max_new_tokens=2, slots=256)
TWO = (PROMPTS[1], PROMPTS[2])


def chi_square(found, expected):
    """p-value; tokens expected fewer than 5 times count as one."""
    bins = np.where(expected < 5, VOCAB, np.arange(VOCAB))
    found, expected = np.bincount(bins, found), np.bincount(bins, expected)
    used = expected > 0
    return scipy.stats.chisquare(found[used], expected[used]).pvalue


def test_tokens_are_as_frequent_as_the_model_says_in_refilled_slots():
    """All but 256 of 4096 completions begin in a slot that another one has left.

    A correct sampler gives p < 1e-4 for one key in 10^4; the key is fixed, so the test
    never flakes. Noise or context of a wrong completion gives p far below. Counts of
    second tokens add up different distributions and vary a little less than
    chi-square says, so their p is too large, never too small.
    """
    rollout = generate("small", MANY, placed(TWO))
    assert_well_formed(rollout, 2)
    assert set(rollout.tokens[rollout.stopped, 0]) >= set(STOPS)  # any of them stops
    table = np.exp(log_softmax(forced_logits("small", TWO, rollout.tokens)))
    late = np.arange(4096) >= MANY.slots
    for n in (0, 1):
        rows = late & (np.arange(4096) // 2048 == n)
        found = np.bincount(rollout.tokens[rows, 0], minlength=VOCAB)
        assert chi_square(found, table[rows, 0].sum(axis=0)) > 1e-4
        rows &= rollout.mask[:, 1]
        found = np.bincount(rollout.tokens[rows, 1], minlength=VOCAB)
        assert chi_square(found, table[rows, 1].sum(axis=0)) > 1e-4


def count_loops(config):
    run = make_generate(MODELS["small"], config, stop_ids=STOPS)
    jaxpr = jax.make_jaxpr(run)(parameters("small"), placed(PROMPTS), KEY)
    return str(jaxpr).count(" while[")


def test_without_refill_there_is_one_loop():
    assert count_loops(BASE) == 1
    assert count_loops(with_(slots=TOTAL)) == 1
    assert count_loops(with_(slots=TOTAL - 1)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "sampling.num_samples: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens: expected at least 1, got 0"),
        ({"min_new_tokens": 9}, r"sampling.min_new_tokens: expected 0 .. 8, got 9"),
        ({"min_new_tokens": -1}, r"sampling.min_new_tokens: expected 0 .. 8, got -1"),
        ({"temperature": -0.1}, "sampling.temperature: expected at least 0.0, got -0"),
        ({"temperature": float("nan")}, "sampling.temperature: .* got nan"),
        ({"top_k": -1}, "sampling.top_k: expected at least 0, got -1"),
        ({"top_p": 0.0}, "sampling.top_p: expected a number above 0, got 0.0"),
        ({"top_p": 1.5}, "sampling.top_p: expected at most 1, got 1.5"),
        ({"top_p": float("nan")}, "sampling.top_p: .* got nan"),
        ({"min_p": 1.5}, r"sampling.min_p: expected 0.0 .. 1.0, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: .* above 0, got 0.0"),
        ({"slots": -1}, "sampling.slots: expected at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_(**changes)


@pytest.mark.parametrize("stops", [(), (VOCAB,), (3, -1)])
def test_stop_tokens_outside_the_vocabulary_are_refused(stops):
    with pytest.raises(ValueError, match=r"stop_ids .*at least one, each in 0 \.\. 60"):
        make_generate(MODELS["small"], BASE, stop_ids=stops)


def test_a_vocabulary_of_stop_tokens_has_nothing_to_go_on_with():
    every = tuple(range(VOCAB))
    with pytest.raises(ValueError, match="min_new_tokens 2: every token"):
        config = dataclasses.replace(BASE, min_new_tokens=2)
        make_generate(MODELS["small"], config, stop_ids=every)
    config = dataclasses.replace(BASE, min_new_tokens=0)
    make_generate(MODELS["small"], config, stop_ids=every)
