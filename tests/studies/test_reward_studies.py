"""The studies on reward models, run small: they work, stop, go on and add up."""

import json

import numpy as np
import pytest

from rlhf_jax.curation.strength import strength
from rlhf_jax.studies import comparison, denoise, scenarios
from rlhf_jax.studies.stages import summarise

SMALL = {"seeds": 2, "steps": 2, "sft_steps": 2, "eval_rows": 16, "pairs": 64}


@pytest.mark.slow
def test_denoise_runs_resumes_and_reports(tmp_path, capsys):
    config = denoise.DenoiseConfig(run_dir=str(tmp_path), members=2, **SMALL)
    first = denoise.run(config)["seeds"]
    assert len(first) == 2 and first[0] != first[1]
    assert set(first[0]["methods"]) == {*denoise.METHODS, denoise.CEILING}
    (tmp_path / "seed-1.json").unlink()
    assert denoise.run(config)["seeds"] == first
    assert (tmp_path / "plots" / "u-shape-0.png").exists()
    assert "finding the flipped labels" in capsys.readouterr().out


@pytest.mark.slow
def test_scenarios_compare_all_objectives_on_the_same_pairs(tmp_path):
    config = scenarios.ScenariosConfig(run_dir=str(tmp_path), **SMALL)
    found = scenarios.run(config)
    assert set(found) == set(scenarios.TERMS)
    assert all(len(results) == 2 for results in found.values())
    again = json.loads((tmp_path / "study.json").read_text())
    assert [seed["BT"] for seed in again["seeds"]] == found["BT"]


def test_the_states_of_a_split_stand_beside_its_accuracy():
    def result(seed, bsr):
        keys = ("accuracy", *comparison.STATE_FIGURES)
        splits = ("train", *comparison.SCENARIOS)
        found = {f"{k}/{s}": 2.0 + seed - bsr for k in keys for s in splits}
        return found | {"state_norm_before_mean/train": 8.0}

    found = {
        name: [result(seed, bsr) for seed in range(3)]
        for name, bsr in (("BT", 0.0), ("BSR", 0.5), ("hinge", 1.0))
    }
    table = scenarios.states_by_split(found)
    columns = {str(c.header): list(c.cells) for c in table.columns}
    splits = 1 + len(comparison.SCENARIOS)
    assert columns["objective"] == ["BT", "BSR"] * splits
    assert columns["split"][::2] == ["train", *comparison.SCENARIOS]
    assert columns["std of |h|"][0] == "3.000 ± 2.484"
    assert columns["effective rank"][1].endswith("\n-0.500 ± 0.000")
    assert columns["that / mean |h|"][0].startswith("0.375")


def test_the_rules_count_what_they_keep_and_what_stays_wrong():
    gaps = np.array([4.0, -4.0, 0.1, 4.0])
    found = strength(np.stack([gaps, gaps], 1), np.zeros((4, 2)), standardise=False)
    flipped = np.array([False, True, True, True])
    rules = denoise.rules(found, flipped)
    for rule in rules.values():
        # The sure pairs are kept, the second one swapped, which is right; the last one
        # stays wrong.
        assert rule["kept"] == 0.75
        assert rule["wrong_after"] == pytest.approx(1 / 3)


def test_rlhf_summary_reads_gains_and_the_bend():
    gold = [0.5, 0.7, 0.9, 0.6]
    rows = [{"eval/val/gold": 0.5, "eval/val/proxy": 0.0, "eval/val/length": 9.0}]
    rows += [
        {"reward/gold": g, "reward/proxy_std": 2.0, "policy/kl": float(n)}
        for n, g in enumerate(gold)
    ]
    rows[-1] |= {"eval/val/gold": 0.6, "eval/val/proxy": 1.0, "eval/val/length": 7.0}
    found = summarise(rows)
    assert found["gold_gain"] == pytest.approx(0.1)
    assert found["below_peak"] == pytest.approx(0.3)
    assert found["proxy_gain"] == 0.5 and found["length"] == 7.0
    assert found["kl"] == pytest.approx(1.5)
