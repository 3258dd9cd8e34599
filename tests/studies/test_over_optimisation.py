"""The study's numbers, from metrics written by hand."""

import json

import numpy as np
import pytest

from rlhf_jax.studies import over_optimisation as study


def _run(folder, gold, *, seed):
    """metrics.jsonl of a run whose gold reward takes these values."""
    folder.mkdir()
    rows = [{"step": 0, "eval/val/gold": gold[0], "eval/val/proxy": 0.0}]
    for step, value in enumerate(gold, 1):
        rows.append(
            {
                "step": step,
                "policy/kl": 0.01 * (step - 1) ** 2,
                "reward/proxy": 0.1 * step + 0.01 * seed,
                "reward/proxy_std": 2.0,
                "reward/gold": value,
            }
        )
    rows[-1] |= {"eval/val/gold": gold[-1], "eval/val/proxy": 1.0}
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_gain_interval_and_test_are_paired_over_seeds(tmp_path):
    ends = [0.62, 0.70, 0.66]
    paths = [
        _run(tmp_path / str(n), np.linspace(0.5, end, 40), seed=n)
        for n, end in enumerate(ends)
    ]
    gold = study.summarise(paths)["gold"]
    gains = np.array(ends) - 0.5
    assert gold["gain"] == pytest.approx(gains.mean())
    # Student's t with 2 degrees of freedom: 4.303.
    half = 4.302653 * gains.std(ddof=1) / np.sqrt(3)
    assert gold["half_width"] == pytest.approx(half, rel=1e-5)
    assert 0 < gold["p"] < 0.02


def test_below_peak_sees_a_bend(tmp_path):
    rise, fall = np.linspace(0.5, 0.8, 20), np.linspace(0.8, 0.6, 20)
    bent = _run(tmp_path / "bent", np.concatenate([rise, fall]), seed=0)
    straight = _run(tmp_path / "straight", np.linspace(0.5, 0.8, 40), seed=0)
    assert study.summarise([bent])["gold"]["below_peak"] > 0.15
    assert study.summarise([straight])["gold"]["below_peak"] == pytest.approx(0)


def test_curve_bins_by_root_kl_and_weighs_seeds_alike(tmp_path):
    paths = [
        _run(tmp_path / str(n), np.full(60, 0.5 + 0.1 * n), seed=n) for n in range(2)
    ]
    curve = study.curve(paths)
    assert len(curve["kl"]) == study.BINS
    assert np.all(np.diff(curve["kl"]) > 0)
    np.testing.assert_allclose(curve["gold"], 0.55)
    assert curve["proxy"][0] < curve["proxy"][-1]
