"""The saturation study: what it refuses, what its tables say, and that it goes on."""

import json

import numpy as np
import pytest
from rich.console import Console

from rlhf_jax.io import heatmap
from rlhf_jax.studies import saturation, saturation_bench, saturation_tables
from rlhf_jax.studies.saturation import SaturationConfig
from rlhf_jax.studies.statistics import Interval
from rlhf_jax.testbed.prompts import pool_of
from rlhf_jax.testbed.rows import rows
from rlhf_jax.testbed.tasks import Task, parse_prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": (1000, 250)}, r"pairs: expected rising numbers from 1, got \(1000"),
        ({"sft_steps": ()}, r"sft_steps: expected rising numbers from 1, got \(\)"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"least_gain": 0.0}, "least_gain: expected a number above 0, got 0.0"),
        ({"eval_prompts": 40}, "eval_prompts 40: expected a multiple of 32"),
    ],
)
def test_grids_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SaturationConfig(**changes)


def test_a_reward_model_sees_its_pairs_once():
    config = SaturationConfig()
    steps = [saturation.model_config(config, n, 0).steps for n in config.pairs]
    assert steps == [4, 16, 63, 250]
    assert saturation.model_config(config, 1, 0).steps == 1


def test_a_seed_has_policies_of_its_own_and_reward_models_on_its_best():
    config = SaturationConfig()
    made = [
        saturation.policy_config(config, steps, seed)
        for steps in config.sft_steps
        for seed in range(3)
    ]
    assert len({one.run_dir for one in made}) == 12
    assert {(one.seed, *one.data) for one in made} == {
        (seed, f"testbed:sft?size=10000&seed={seed}") for seed in range(3)
    }
    assert all(one.loop.eval_every == one.steps for one in made)
    for seed in range(3):
        model = saturation.model_config(config, 250, seed)
        assert model.model == made[9 + seed].run_dir and model.seed == seed


def contents(name, **options):
    return [parse_prompt(row["prompt"]).content for row in rows(name, **options)]


def test_held_out_pairs_share_no_task_with_training_pairs():
    name, options = saturation.HELD_OUT_PAIRS.removeprefix("testbed:").split("?")
    held_out = set(contents(name, **dict(o.split("=") for o in options.split("&"))))
    assert len(held_out) == 1000
    for seed in range(3):
        assert held_out.isdisjoint(contents("train", size=100, seed=seed))
    # Pools are disjoint by content, whatever the size and the seed.
    tasks_of = {"train": contents("train", size=100), "ood": held_out}
    for pool, found in tasks_of.items():
        for content in found:
            family, key, items = content.split("|")
            task = Task(family, tuple(items.split()), tuple(key.split()))
            assert pool_of(task) == pool


def test_rewards_are_standardised_by_what_the_model_carries():
    reward = saturation_bench.standardised(lambda params, x: params * x)
    rewards = reward(saturation_bench.Standardised(2.0, 3.0, 4.0), np.array([1.0, 4.0]))
    np.testing.assert_allclose(rewards, [-0.25, 1.25])


@pytest.mark.parametrize(
    ("mean", "half", "says"),
    [
        (0.0, 0.019, "saturated"),
        (0.01, 0.01, "open"),
        (0.015, 0.01, "gains"),
        (0.01, 0.005, "saturated"),
        (-0.1, 0.01, "saturated"),
        (0.0, float("nan"), "open"),
    ],
)
def test_saturation_is_claimed_only_where_the_interval_excludes_the_gain(
    mean, half, says
):
    assert saturation_tables.verdict(Interval(mean, half), 0.02) == says


def test_a_cell_makes_only_the_seeds_that_its_file_lacks(tmp_path):
    asked = []

    def measure(seeds):
        asked.append(list(seeds))
        return [{"after": {"gold": float(seed)}} for seed in seeds]

    for seeds in (1, 3, 2, 3):
        found = saturation._cell(tmp_path / "cell.json", seeds, measure)
        assert [one["after"]["gold"] for one in found["seeds"]] == list(range(seeds))
    assert asked == [[0], [1, 2]]


def study(gold):
    """A study.json whose gold reward of each cell and seed is that of an array."""
    part = {"sampled": 1.0, "trained": 2.0, "flops": 3e15, "wall_s": 4.0}

    def seed(row, value):
        side = {"proxy": 0, "kl": 1, "length": 9, "mismatch": None, "retokenised": 0}
        side["eos_rate"] = 0.975
        before = side | {"gold": [0.2, 0.4][row] + value / 100}
        return {
            "before": before,
            "after": side | {"gold": value},
            "reward_std": 1.5,
            "compute": part,
        }

    return {
        "sft_steps": [1, 2],
        "pairs": [10, 20],
        "least_gain": 0.02,
        "accuracy": {"10": [0.5, 0.6], "20": [0.7, 0.9]},
        "cells": {
            f"{steps}-{pairs}": [seed(row, float(v)) for v in gold[row, column]]
            for row, steps in enumerate([1, 2])
            for column, pairs in enumerate([10, 20])
        },
        "compute": {"SFT": part, "RLOO": part},
    }


def test_steps_along_an_axis_are_paired_means_over_the_other():
    gold = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.8], [0.6, 0.96]]])
    tables = saturation_tables.all_tables(study(gold))
    columns = [[str(cell) for cell in column.cells] for column in tables[2].columns]
    assert columns[0] == ["1 -> 2 SFT steps", "10 -> 20 pairs"]
    # Accuracy: mean of .2 and .3. Gold: .35 and .58 of SFT averaged over the pairs ...
    assert columns[1][1].startswith("+0.250")
    assert [cell[:6] for cell in columns[2]] == ["+0.465", "+0.165"]
    # ... .3 and .56 with the most pairs; .1 and .16 of pairs after the longer SFT.
    assert [cell[:6] for cell in columns[4]] == ["+0.430", "+0.130"]
    # Two seeds: intervals are as wide as t is at one degree of freedom.
    assert columns[3] == columns[5] == ["open", "open"]
    console = Console(width=120, record=True)
    for table in tables:
        console.print(table)
    text = console.export_text()
    assert "0.150 ±" in text and "1 (0.20" in text and "10 pairs (0.550)" in text
    assert "0.975" in text and "a gain of 0.02 gold" in text and "(p " not in text


def test_the_heat_map_draws_equal_numbers_and_missing_intervals(tmp_path):
    same = np.full((2, 2), 0.5)
    panel = heatmap.Panel("gold", same, np.full((2, 2), np.nan))
    names = ("steps", ["1", "2"])
    path = heatmap.heatmaps([panel], tmp_path / "p.png", rows=names, columns=names)
    assert path.stat().st_size > 1000


def test_no_gain_is_drawn_in_the_middle_of_the_colours():
    zeros = np.zeros((2, 2))
    assert heatmap.value_range(heatmap.Panel("", zeros, zeros)) == (0, 1)
    low, high = heatmap.value_range(heatmap.Panel("", zeros, zeros, signed=True))
    assert low == -high < 0


@pytest.mark.slow
def test_the_study_runs_goes_on_and_takes_more_seeds(tmp_path, monkeypatch):
    options = {
        "run_dir": str(tmp_path / "s"),
        "sft_steps": (2, 4),
        "pairs": (64, 128),
        "steps": 2,
        "eval_prompts": 32,
        "max_new_tokens": 8,
    }
    found = saturation.run(SaturationConfig(seeds=1, **options))
    assert len(found["cells"]) == 4
    assert json.loads((tmp_path / "s" / "study.json").read_text()) == found
    assert (tmp_path / "s" / "plots" / "saturation.png").exists()
    one = found["cells"]["4-128"][0]
    assert 0 <= one["after"]["gold"] <= 1 and one["after"]["kl"] != 0
    assert abs(one["before"]["kl"]) < 1e-4
    assert one["compute"]["sampled"] > 0 and found["compute"]["SFT"]["flops"] > 0
    again = saturation.run(SaturationConfig(seeds=2, **options))
    for name, seeds in again["cells"].items():
        assert len(seeds) == 2 and seeds[0] == found["cells"][name][0] != seeds[1]
    monkeypatch.setattr(saturation, "_open_bench", None)
    assert saturation.run(SaturationConfig(seeds=2, **options)) == again
