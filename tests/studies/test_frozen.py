"""Heads on frozen states: states are computed once, heads learn what there is to learn,
and the studies on them run, stop and go on."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.optimize

from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.data.rows import Response
from rlhf_jax.programs import models
from rlhf_jax.studies import domains, frozen, heads, objectives
from rlhf_jax.studies.by_prompt import judge
from rlhf_jax.studies.frozen import PairStates, head_objective, train_heads

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="cosine")


def pairs(count=600, width=8, seed=0):
    """States, and labels drawn from Bradley-Terry with weights 1, 2, 3, 0, 0 ..."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(2, count, width)).astype(np.float32)
    weights = np.array([1.0, 2.0, 3.0] + [0.0] * (width - 3))
    chance = 1 / (1 + np.exp(-(states[0] - states[1]) @ weights))
    first = rng.random(count) < chance
    return PairStates(
        np.where(first[:, None], states[0], states[1]),
        np.where(first[:, None], states[1], states[0]),
        np.arange(count),
    )


def test_heads_are_those_of_logistic_regression():
    data = pairs()
    kernels = train_heads(
        head_objective(), data, seeds=2, steps=2000, optimizer=OPTIMIZER, share=1.0
    )
    gaps = (data.chosen - data.rejected).astype(np.float64)
    exact = scipy.optimize.minimize(
        lambda w: np.logaddexp(0, -gaps @ w).mean(), np.zeros(gaps.shape[1])
    ).x
    assert kernels.shape == (2, 8) and not np.array_equal(*kernels)
    for kernel in kernels:
        cosine = kernel @ exact / np.linalg.norm(kernel) / np.linalg.norm(exact)
        assert cosine > 0.995
        assert np.linalg.norm(kernel) == pytest.approx(np.linalg.norm(exact), rel=0.1)


def test_a_seed_gives_its_head_whatever_the_number_of_seeds():
    options = {"steps": 5, "optimizer": OPTIMIZER}
    one = train_heads(head_objective(), pairs(), seeds=1, **options)
    three = train_heads(head_objective(), pairs(), seeds=3, **options)
    np.testing.assert_allclose(one[0], three[0], rtol=1e-5)


def test_too_few_pairs_for_a_batch_are_refused():
    with pytest.raises(
        ValueError, match="70 pairs, of which a seed draws 56: expected"
    ):
        train_heads(head_objective(), pairs(70), seeds=1, steps=1, optimizer=OPTIMIZER)


def test_states_are_computed_once_for_each_distinct_completion(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "PART", 8)
    rows = [
        {"prompt": "sort : 2 1", "chosen": "1 2", "rejected": f"2 {n % 7}"}
        for n in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = frozen.open_frozen("testbed", tmp_path / "states")
    found = model.pairs(str(path))
    assert found.chosen.shape == (20, 64)
    np.testing.assert_array_equal(found.chosen[0], found.chosen[19])
    np.testing.assert_array_equal(found.rejected[0], found.rejected[7])
    kept = sorted((tmp_path / "states").iterdir())
    assert len(kept) == 1  # one chosen text and seven rejected ones: 8 in a part
    monkeypatch.setattr(type(model.scorer), "rewards_and_states", None)
    np.testing.assert_array_equal(model.pairs(str(path)).chosen, found.chosen)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (domains.DomainsConfig, {"train": ["a=x"]}, "expected both or none"),
        (domains.DomainsConfig, {"train": ["a=x"], "test": ["a=x"]}, "model: expected"),
        (
            domains.DomainsConfig,
            {"train": ["all=x"]},
            "'all' is the name of all domains",
        ),
        (heads.HeadsConfig, {"model": "m"}, "expected all three, or none"),
        (
            objectives.ObjectivesConfig,
            {"model": "m", "data": "d", "eval_data": []},
            "eval_data: expected rows of scored completions",
        ),
    ],
)
def test_half_a_real_study_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.slow
def test_domains_and_heads_run_on_the_testbed_and_go_on(tmp_path):
    small = {"seeds": 2, "steps": 5, "sft_steps": 2}
    matrix = domains.run(domains.DomainsConfig(run_dir=str(tmp_path / "d"), **small))
    assert set(matrix["accuracy"]) == {*matrix["pairs"]["train"], domains.ALL}
    config = heads.HeadsConfig(run_dir=str(tmp_path / "h"), **small)
    first = heads.run(config)["heads"]
    assert heads.run(config)["heads"] == first
    judged = first["BT"]["val_id"]["accuracy"]
    assert set(first) == set(heads.TERMS) and len(judged) == 400
    assert 0 < np.mean([value for value in judged if value is not None]) < 1


@pytest.mark.slow
def test_whole_models_are_trained_scored_and_read_again(tmp_path):
    policy = frozen.open_policy(tmp_path, 5)
    config = objectives.ObjectivesConfig(
        run_dir=str(tmp_path / "o"),
        model=policy,
        data="testbed:train?size=64",
        eval_data=["id=testbed:quads_val_id?size=12"],
        seeds=2,
    )
    first = objectives.run(config)["models"]
    assert objectives.run(config)["models"] == first
    assert set(first) == set(objectives.OBJECTIVES)
    assert len(first["BSR"]["id"]["kendall_tau"]) == 12
    means = {name: tuple(judged["id"]["reward_mean"]) for name, judged in first.items()}
    assert len(set(means.values())) == len(means)


def test_metrics_of_a_prompt_are_means_over_heads_and_none_without_a_pair():
    """Two heads that disagree: one orders the three completions, one turns them."""
    texts = [Response("a b c d", 3.0), Response("a b c e", 2.0), Response("a", 1.0)]
    tied = [Response("a", 1.0), Response("b", 1.0)]
    rewards = [np.array([[3.0], [2.0], [1.0]]), np.array([[1.0], [2.0]])]
    found = judge([column * [1.0, -1.0] for column in rewards], [texts, tied])
    assert found["accuracy"] == [0.5, None]
    assert found["kendall_tau"] == [0.0, None]
    assert found["length_matched_accuracy"] == [0.5, None]  # one pair of four words
    assert found["reward_mean"] == [0.0, 0.0]


def test_domains_share_all_pairs_in_equal_measure():
    parts = {str(n): pairs(40 + n, seed=n) for n in range(3)}
    drawn = domains._equal(parts)
    assert {len(p.chosen) for p in drawn.values()} == {40}
    own = [
        sum(
            (row == drawn[name].chosen).all(axis=1).any() for row in drawn["all"].chosen
        )
        for name in parts
    ]
    assert own == [14, 13, 13]


def test_other_weights_of_the_same_name_are_another_identity(tmp_path):
    path = tmp_path / "model.gguf"
    identities = set()
    for text in ("a", "bb"):
        path.write_text(text)
        source = models.resolve("testbed")
        found = dataclasses.replace(source, kind="gguf", path=path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "resolve", lambda spec, found=found: found)
            identities.add(frozen._identity("model.gguf", frozen.ScoringConfig()))
    assert len(identities) == 2
