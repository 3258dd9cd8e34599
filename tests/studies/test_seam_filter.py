"""The SEAM selection study: what it refuses, what it measures, and that it goes on."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from rlhf_jax.studies import filter_tables as tables
from rlhf_jax.studies import seam_filter
from rlhf_jax.studies.seam_filter import SeamFilterConfig


def test_selections_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match="estimator generate: expected one of contrast"
    ):
        SeamFilterConfig(estimator="generate")
    with pytest.raises(
        ValueError, match=r"random_drop \(0.3,\): expected some of drop"
    ):
        SeamFilterConfig(drop=(0.2,), random_drop=(0.3,))


def test_models_and_data_are_all_the_testbeds_or_none():
    real = {
        "policy": "sft",
        "reward": ["a", "b"],
        "data": ["prompts.jsonl"],
        "eval_data": "val.jsonl",
        "held_out": "quads.jsonl",
        "rloo": "rloo.yaml",
        "gold": "judge",
        "estimators": ("contrast", "perturb"),
        "seeds": 2,
    }
    SeamFilterConfig(**real)
    with pytest.raises(ValueError, match="held_out: expected too, with policy, reward"):
        SeamFilterConfig(**real | {"held_out": None})
    with pytest.raises(ValueError, match="gold: expected a reward that knows the data"):
        SeamFilterConfig(**real | {"gold": SeamFilterConfig.gold})
    with pytest.raises(ValueError, match="expected 3 reward models, one a seed, got 2"):
        SeamFilterConfig(**real | {"seeds": 3})
    with pytest.raises(ValueError, match="gold: the testbed's own reward judges"):
        SeamFilterConfig(gold="judge")
    with pytest.raises(ValueError, match="estimator given: expected one of contrast"):
        SeamFilterConfig(**real | {"estimator": "given"})


def test_a_real_arm_takes_its_settings_from_the_file_and_the_rest_from_the_study(
    tmp_path,
):
    (tmp_path / "rloo.yaml").write_text(
        "batch_size: 8\nsampling: {num_samples: 2}\nloss: {clip_eps: 0.1}\n"
    )
    config = SeamFilterConfig(
        run_dir="s",
        seeds=1,
        policy="p",
        reward=["r"],
        data=["d"],
        eval_data="e",
        held_out="h",
        gold="g",
        rloo=str(tmp_path / "rloo.yaml"),
        steps=7,
        kl_coef=0.3,
    )
    made = seam_filter.rloo_run(config, "arm", "p", "r", tmp_path / "x.jsonl", 4)
    assert (made.run_dir, made.model, made.reward, made.gold) == (
        "s/arm",
        "p",
        ["r"],
        "g",
    )
    assert (made.data, made.eval_data) == ([str(tmp_path / "x.jsonl")], ["val=e"])
    assert (made.batch_size, made.sampling.num_samples) == (8, 2)
    assert (made.loss.clip_eps, made.loss.kl_coef) == (0.1, 0.3)
    assert (made.steps, made.seed, made.loop.eval_every) == (7, 4, 7)


def test_overlap_is_of_the_same_prompts_and_beside_chance():
    """Ten prompts; the lowest two are the same by one estimator and others by the
    second."""

    def lines(name, order):
        return [
            {"estimator": name, "index": n, "seam": float(value)}
            for n, value in enumerate(order)
        ]

    up, down = list(range(10)), list(range(10, 0, -1))
    first = lines("contrast", up) + lines("perturb", down)
    assert tables.overlaps(first)["contrast / perturb"]["jaccard"] == 0
    # Two of ten twice: 1/45 both, 16/45 one (1/3), by the hypergeometric distribution.
    chance = 1 / 45 + 16 / 45 / 3
    found = tables.model_overlaps(first, lines("contrast", up)[2:] + first[:2])
    assert found["contrast"]["jaccard"] == 1
    assert found["contrast"]["above_chance"] == pytest.approx(1 - chance)


def test_only_the_first_random_share_is_tested(tmp_path):
    def arms(shift):
        names = ("all", "seam-0.2", "random-0.2", "seam-0.4", "random-0.4")
        keys = ("gold", "gold_gain", "proxy_gain", "kl")
        return {
            arm: dict.fromkeys(keys, n + shift * (n + 1)) for n, arm in enumerate(names)
        }

    found = [arms(0.1), arms(0.2), arms(0.4)]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(tables.control_table(found, (0.2, 0.4)))
    said = console.export_text()
    assert said.count("(p ") == 1
    assert "-1.233 ± 0.379 (p " in said
    tables.plot_curve(found, tmp_path / "x.png", drop=(0.4, 0.2), random=(0.2, 0.4))
    assert (tmp_path / "x.png").stat().st_size > 0


def test_rank_correlations_are_with_the_gain_of_each_prompt():
    """Three prompts: SEAM 1, 2, infinite; gold gains -.1, .1, .3."""
    lines = [
        {
            "estimator": name,
            "index": n,
            "prompt": f"p{n}",
            "seam": seam,
            "worse": [{"misjudged": True, "logprob": -4.0, "num_tokens": 2}],
        }
        for name in seam_filter.ESTIMATORS
        for n, seam in enumerate([1.0, 2.0, None])
    ]
    before, after = [0.5, 0.4, 0.3], [0.4, 0.5, 0.6]
    samples = {
        name: [
            {"prompt": f"p{n}", "responses": [{"score": v - 0.1}, {"score": v + 0.1}]}
            for n, v in enumerate(values)
        ]
        for name, values in (("before", before), ("after", after))
    }
    found = seam_filter._estimators(lines, samples)["attack"]
    assert found["gain"] == pytest.approx(1.0) and found["before"] == pytest.approx(-1)
    assert (found["misjudged"], found["logprob"]) == (1.0, -2.0)


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path):
    pytest.importorskip("faiss", reason="needs the seam extra")
    config = SeamFilterConfig(
        run_dir=str(tmp_path / "s"),
        seeds=1,
        prompts=24,
        overlap_prompts=16,
        drop=(0.25,),
        random_drop=(0.25,),
        sft_steps=5,
        reward_steps=2,
        steps=2,
    )
    found = seam_filter.run(config)
    assert seam_filter.run(config) == found
    (seed,) = found["seeds"]
    assert (tmp_path / "s" / "plots" / "filter_rate.png").exists()
    assert set(seed["rl"]) == {"all", "seam-0.25", "random-0.25"}
    assert set(seed["estimators"]) == set(seam_filter.ESTIMATORS)
    assert all(0 <= value <= 1 for value in seed["mismatch"].values())
    assert np.isfinite(list(seed["rl"]["all"].values())).all()
    real = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "real"),
        policy=str(tmp_path / "s" / "sft"),
        reward=[str(tmp_path / "s" / "reward-0")],
        data=["testbed:rl?size=16&seed=7"],
        eval_data="testbed:rl_val?size=16",
        held_out="testbed:quads_val_id?size=8",
        gold=str(tmp_path / "s" / "reward-0"),
        estimators=("contrast",),
        rloo=str(tmp_path / "rloo.yaml"),
    )
    (tmp_path / "rloo.yaml").write_text(
        "batch_size: 8\nsampling: {num_samples: 2, max_new_tokens: 8}\n"
    )
    (seed,) = seam_filter.run(real)["seeds"]
    assert set(seed["estimators"]) == {"contrast"}
    assert seed["mismatch"]["after"] == 0  # gold is the reward model itself
