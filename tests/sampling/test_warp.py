"""Penalties, truncations and draws against float64 loops, with ties and corner rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.sampling import warp

top_k = functools.partial(jax.jit, static_argnames="k")(warp.top_k)
top_p = functools.partial(jax.jit, static_argnames="p")(warp.top_p)
min_p = functools.partial(jax.jit, static_argnames="p")(warp.min_p)
draw = jax.jit(warp.draw)


def rows_of_every_kind(vocab, seed=0):
    """[B V] float32: soft, peaked, tied, uniform, one-hot, with zeros."""
    rng = np.random.default_rng(seed)
    logits = (
        rng.normal(size=(8, vocab)) * np.array([1, 1, 3, 3, 9, 9, 0.1, 0.1])[:, None]
    )
    soft = np.exp(logits - logits.max(axis=1, keepdims=True))
    tied = rng.integers(0, 4, (8, vocab)) + (np.arange(vocab) == 3)
    holes = soft * (rng.uniform(size=soft.shape) < 0.5) + (np.arange(vocab) == 2) * 0.15
    rows = np.concatenate(
        [soft, tied, holes, np.ones((1, vocab)), np.eye(vocab)[[0, -1]]]
    )
    return jnp.array(rows / rows.sum(axis=1, keepdims=True), jnp.float32)


def kept_and_renormalised(rows, keep):
    """keep(row of float64) -> the smallest probability that stays."""
    rows = np.asarray(rows, np.float64)
    out = np.zeros_like(rows)
    for n, row in enumerate(rows):
        cut = keep(row)
        out[n] = [p if p >= cut else 0.0 for p in row]
        out[n] /= out[n].sum()
    return out


def slow_top_k(rows, k):
    def keep(row):
        return sorted(row)[-k] if k <= len(row) else 0.0

    return kept_and_renormalised(rows, keep)


def slow_top_p(rows, p):
    def keep(row):
        cuts = sorted(set(row), reverse=True)
        wanted = p * sum(row)
        return next(c for c in cuts if sum(q for q in row if q >= c) >= wanted)

    return kept_and_renormalised(rows, keep)


def slow_min_p(rows, p):
    return kept_and_renormalised(rows, lambda row: p * max(row))


def slow_draw(row, noise):
    """The first token whose cumulative mass exceeds the noise's share of the total."""
    target, mass = float(noise) * float(sum(row)), 0.0
    for token, p in enumerate(row):
        mass += float(p)
        if mass > target:
            return token
    raise AssertionError("noise below 1 is below the total")


def test_truncations_by_hand():
    probs = jnp.array([[0.125, 0.5, 0.125, 0.25]])
    both, everything = [[0, 2 / 3, 0, 1 / 3]], [[0.125, 0.5, 0.125, 0.25]]
    cases = [
        (top_k(probs, k=1), [[0, 1, 0, 0]]),
        (top_k(probs, k=2), both),
        (top_k(probs, k=3), everything),  # the third place is shared
        (top_p(probs, p=0.5), [[0, 1, 0, 0]]),
        (top_p(probs, p=0.75), both),  # exactly that mass
        (top_p(probs, p=0.76), everything),
        (min_p(probs, p=0.5), both),
        (min_p(probs, p=0.51), [[0, 1, 0, 0]]),
        (min_p(probs, p=0.25), everything),
    ]
    for got, expected in cases:
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_repetition_penalty_by_hand():
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0, -3.0]])
    seen = jnp.array([[True, True, True, False, False]])
    got = warp.penalise_repetition(logits, seen, penalty=4.0)
    np.testing.assert_array_equal(got, [[0.5, -8.0, 0.0, 3.0, -3.0]])
    encouraged = warp.penalise_repetition(logits, seen, penalty=0.5)
    np.testing.assert_array_equal(encouraged, [[4.0, -1.0, 0.0, 3.0, -3.0]])
    same = warp.penalise_repetition(logits, seen, penalty=1.0)
    np.testing.assert_array_equal(same, logits)


@pytest.mark.parametrize(
    ("vocab", "k"), [(5, 2), (5, 7), (128, 3), (300, 1), (300, 40), (300, 290)]
)
def test_top_k_equals_a_sort(vocab, k):
    rows = rows_of_every_kind(vocab)
    np.testing.assert_allclose(top_k(rows, k=k), slow_top_k(rows, k), atol=1e-6)


@pytest.mark.parametrize(
    ("vocab", "p"), [(5, 0.9), (128, 0.3), (300, 1e-6), (300, 0.9), (300, 0.999)]
)
def test_top_p_equals_a_loop(vocab, p):
    rows = rows_of_every_kind(vocab)
    np.testing.assert_allclose(top_p(rows, p=p), slow_top_p(rows, p), atol=1e-6)


@pytest.mark.parametrize("p", [1e-3, 0.1, 1.0])
def test_min_p_equals_a_loop(p):
    rows = rows_of_every_kind(300)
    np.testing.assert_allclose(min_p(rows, p=p), slow_min_p(rows, p), atol=1e-6)


def test_top_p_is_exact_where_sums_are():
    """Sixteenths add without rounding, so every edge and every tie can be hit."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(16, np.ones(9) / 9, size=200)
    rows = jnp.array(counts / 16, jnp.float32)
    for sixteenths in (4, 11, 15):
        p = sixteenths / 16
        got = np.asarray(top_p(rows, p=p)) > 0
        np.testing.assert_array_equal(got, slow_top_p(rows, p) > 0)


@pytest.mark.parametrize(
    "truncate",
    [
        functools.partial(top_k, k=3),
        functools.partial(top_p, p=0.8),
        functools.partial(min_p, p=0.2),
    ],
)
def test_truncations_are_distributions_in_any_order_of_the_vocabulary(truncate):
    rows = rows_of_every_kind(128)
    got = np.asarray(truncate(rows))
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
    best = np.asarray(rows).max(axis=1, keepdims=True)
    assert (got[np.asarray(rows) == best] > 0).all()
    assert (got[np.asarray(rows) == 0] == 0).all()
    order = np.random.default_rng(1).permutation(128)
    np.testing.assert_allclose(truncate(rows[:, order]), got[:, order], atol=1e-6)


def test_truncations_that_ask_for_everything_change_nothing():
    rows = rows_of_every_kind(300)
    for got in (top_k(rows, k=10**6), top_p(rows, p=1.0)):
        np.testing.assert_allclose(got, rows, atol=1e-6)


def test_a_step_equals_the_logits_processors_of_transformers():
    torch = pytest.importorskip("torch", reason="transformers' processors need torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(16, 300)) * 2).astype(np.float32)
    used = rng.integers(0, 300, (16, 20))
    scores = torch.tensor(logits)
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.7),
        hf.TemperatureLogitsWarper(0.8),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.05),
    ):
        scores = processor(torch.tensor(used), scores)
    expected = torch.softmax(scores, dim=-1).numpy()
    seen = np.zeros((16, 300), bool)
    np.put_along_axis(seen, used, True, axis=1)
    ours = warp.penalise_repetition(jnp.array(logits), jnp.array(seen), penalty=1.7)
    ours = top_k(jax.nn.softmax(ours / 0.8, axis=-1), k=40)
    ours = min_p(top_p(ours, p=0.9), p=0.05)
    kept = (expected > 0).sum(axis=1)
    assert kept.min() < 40 and kept.max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_draw_by_hand():
    probs = jnp.tile(jnp.array([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]), (7, 1))
    noise = jnp.array(
        [0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, np.nextafter(1, 0, dtype="f")]
    )
    np.testing.assert_array_equal(draw(probs, noise), [1, 1, 3, 3, 3, 4, 4])


@pytest.mark.parametrize("vocab", [1, 128, 300])
def test_draw_equals_the_inverse_cdf_of_a_loop(vocab):
    """Whole numbers below 2^24 add and multiply without rounding: equality is exact."""
    rng = np.random.default_rng(vocab)
    rows = rng.integers(0, 16, (400, vocab)) * (rng.uniform(size=(400, vocab)) < 0.4)
    rows[:, rng.integers(vocab)] += 1
    noise = rng.integers(0, 2048, 400) / 2048
    noise[:2] = 0, 2047 / 2048
    got = draw(jnp.array(rows, jnp.float32), jnp.array(noise, jnp.float32))
    expected = [slow_draw(row, u) for row, u in zip(rows, noise, strict=True)]
    np.testing.assert_array_equal(got, expected)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 127, 300]),
    filled=st.floats(0, 1),
    spread=st.floats(0, 60),
    size=st.floats(-20, 20),
)
def test_a_token_without_probability_is_never_drawn(seed, vocab, filled, spread, size):
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.uniform(-spread, 0, (32, vocab)) + size)
    rows = (rows * (rng.uniform(size=rows.shape) < filled)).astype(np.float32)
    rows[np.arange(32), rng.integers(0, vocab, 32)] += np.float32(1e-20)
    noise = rng.uniform(size=32).astype(np.float32)
    noise = np.minimum(noise, np.nextafter(1, 0, dtype="f"))
    noise[:8], noise[8:16] = 0, np.nextafter(1, 0, dtype="f")
    tokens = np.asarray(draw(jnp.array(rows), jnp.array(noise)))
    assert (tokens >= 0).all() and (tokens < vocab).all()
    assert (rows[np.arange(32), tokens] > 0).all()


def test_a_cumulative_sum_that_steps_back_draws_no_empty_token(monkeypatch):
    """Accelerators sum in trees. Rounded, the mass up to an empty token can then be
    less than that up to the token before it, and noise may fall in between."""

    @functools.partial(jax.jit, static_argnames="axis")
    def tree(x, axis):
        return jax.lax.associative_scan(jnp.add, x, axis=axis)

    rng = np.random.default_rng(0)
    rows = rng.uniform(size=(300, 128)) * (rng.uniform(size=(300, 128)) < 0.7)
    rows = rows.astype(np.float32)
    steps = np.diff(tree(jnp.array(rows), axis=-1), axis=1)
    back = (steps < 0).any(axis=1)
    assert back.sum() > 50
    rows, place = rows[back], np.argmax(steps[back] < 0, axis=1) + 1
    ends = np.asarray(tree(jnp.array(rows), axis=-1))[np.arange(len(rows)), place]
    noise = ends / np.asarray(jnp.array(rows).sum(axis=-1))
    monkeypatch.setattr(jnp, "cumsum", tree)
    draw_with_trees = jax.jit(lambda *args: warp.draw(*args))
    for _ in range(2):
        tokens = np.asarray(draw_with_trees(jnp.array(rows), jnp.array(noise)))
        assert (rows[np.arange(len(rows)), tokens] > 0).all()
        noise = np.nextafter(noise, 1, dtype=np.float32)


def test_evenly_spaced_noise_draws_each_token_as_often_as_probable():
    """A slice of length p holds p N of N even numbers, to less than one of them."""
    vocab, count = 300, 4096
    row = np.exp(np.random.default_rng(0).normal(size=vocab) * 2)
    probs = jnp.array(row / row.sum(), jnp.float32)
    noise = (jnp.arange(count) + 0.5) / count
    tokens = draw(jnp.tile(probs[None], (count, 1)), noise)
    found = np.bincount(tokens, minlength=vocab)
    # 1 for the ends of the slice, 0.01 for sums in float32
    assert np.abs(found - count * np.asarray(probs)).max() < 1.01


def test_frequencies_of_random_draws_are_the_probabilities():
    """A correct sampler gives p < 1e-4 for one key in 10^4; this key is fixed, so the
    test never flakes, and a slice off by one token gives p far below."""
    vocab, count = 200, 20_000
    row = np.exp(np.random.default_rng(0).normal(size=vocab))
    probs = jnp.array(row / row.sum(), jnp.float32)
    noise = jax.random.uniform(jax.random.key(0), (count,))
    tokens = draw(jnp.tile(probs[None], (count, 1)), noise)
    found = np.bincount(tokens, minlength=vocab)
    expected = count * row / row.sum()
    assert expected.min() > 5  # what the chi-square distribution asks for
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-4
