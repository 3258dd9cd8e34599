"""Figures of hidden states: independent numbers, whole rows kept, sets compared."""

import numpy as np
import pytest

from rlhf_jax.evals import hidden_states

RNG = np.random.default_rng(0)


def draw(rows=30, width=6):
    before = RNG.normal(0, 3, (rows, width)).astype(np.float32)
    after = before / np.sqrt((before**2).mean(1, keepdims=True))
    return before, after * np.linspace(0.5, 1.5, width, dtype=np.float32)


def slow(norms):
    norms = np.asarray(norms, np.float64)
    apart = norms - norms.mean()
    return {
        "mean": norms.mean(),
        "std": norms.std(),
        "skewness": (apart**3).mean() / (apart**2).mean() ** 1.5,
        "p99": np.quantile(norms, 0.99),
    }


def norm(states):
    return np.sqrt((states.astype(np.float64) ** 2).sum(1))


def test_figures_of_pairs_equal_slow_ones():
    before, after = draw()
    pairs = hidden_states.alternating(30)
    found = hidden_states.state_figures(before, after, pairs)
    expected = {
        "state_norm_before": norm(before),
        "state_norm": norm(after),
        "difference_norm_before": norm(before[0::2] - before[1::2]),
        "difference_norm": norm(after[0::2] - after[1::2]),
    }
    for name, norms in expected.items():
        for figure, value in slow(norms).items():
            got = found.metrics[f"{name}_{figure}"]
            assert got == pytest.approx(value, rel=1e-4), (name, figure)
    for suffix, states in (("", after), ("_before", before)):
        s = np.linalg.svd(states.astype(np.float64), compute_uv=False)
        p = s / s.sum()
        rank = np.exp(-(p * np.log(p)).sum())
        assert found.metrics[f"effective_rank{suffix}"] == pytest.approx(rank, rel=1e-4)
    assert found.metrics["states_n"] == 30
    np.testing.assert_allclose(found.before, norm(before), rtol=1e-5)
    np.testing.assert_allclose(found.after, norm(after), rtol=1e-5)


def test_differences_of_any_pairs_of_rows_are_measured(monkeypatch):
    monkeypatch.setattr(hidden_states, "_PAIRS_AT_ONCE", 4)
    before, after = draw()
    pairs = np.array([(0, 1), (2, 0), (2, 1), (7, 5), (9, 8), (29, 3)])
    found = hidden_states.state_figures(before, after, pairs).metrics
    for name, states in (("_before", before), ("", after)):
        apart = norm(states[pairs[:, 0]] - states[pairs[:, 1]])
        for figure, value in slow(apart).items():
            got = found[f"difference_norm{name}_{figure}"]
            assert got == pytest.approx(value, rel=1e-4, abs=1e-5), (name, figure)


def test_without_a_pair_there_is_no_difference():
    found = hidden_states.state_figures(*draw(), np.zeros((0, 2), int)).metrics
    assert not [name for name in found if name.startswith("difference")]
    assert {"state_norm_p99", "effective_rank", "effective_rank_before"} <= set(found)


def test_whole_rows_are_kept_and_the_draw_is_seeded():
    sizes = [2, 4, 3] * 20
    kept = hidden_states.kept_completions(sizes, limit=50, seed=1)
    assert len(kept) <= 50
    assert len(kept) > 50 - max(sizes)
    ends = np.cumsum(sizes)
    for first, end in zip(ends - sizes, ends, strict=True):
        assert np.isin(np.arange(first, end), kept).sum() in (0, end - first)
    again = hidden_states.kept_completions(sizes, limit=50, seed=1)
    np.testing.assert_array_equal(kept, again)
    other = hidden_states.kept_completions(sizes, limit=50, seed=2)
    assert kept.tolist() != other.tolist()


def test_the_dispersion_is_the_spread_of_the_sets_mean_norms():
    pairs = hidden_states.alternating(30)
    made = {name: hidden_states.state_figures(*draw(), pairs) for name in "abc"}
    found = hidden_states.states_summary(made, head_norm=1.25)
    assert found["head_norm"] == 1.25
    for part in ("after", "before"):
        suffix = "" if part == "after" else "_before"
        means = [np.mean(getattr(f, part), dtype=np.float64) for f in made.values()]
        expected = pytest.approx(np.std(means), rel=1e-4)
        assert found[f"norm_dispersion{suffix}"] == expected
        bins = found["histograms"][part]
        assert list(bins["counts"]) == ["a", "b", "c"]
        assert all(sum(counts) == 30 for counts in bins["counts"].values())


def test_one_set_has_no_dispersion_and_equal_norms_a_histogram():
    before = np.ones((4, 3), np.float32)
    pairs = hidden_states.alternating(4)
    made = {"a": hidden_states.state_figures(before, before, pairs)}
    found = hidden_states.states_summary(made, head_norm=None)
    assert "norm_dispersion" not in found
    assert sum(found["histograms"]["after"]["counts"]["a"]) == 4
    assert made["a"].metrics["difference_norm_mean"] == 0.0
