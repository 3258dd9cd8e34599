"""`reward`, `meta-reward`, `dpo` and `strength` end to end, with a tiny model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.__main__ import main
from rlhf_jax.algorithms.contrastive import ContrastiveConfig
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.curation.clean import CleanConfig
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.io.checkpoint import load_params
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import dpo, meta_reward, reward, strength
from rlhf_jax.programs.models import load_policy, load_reward_model
from rlhf_jax.programs.rewards import kind_of
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.programs.supervised import LoopConfig

ROWS = DataConfig(num_shapes=1, row_length=128)
PAIRS = "testbed:train?size=32"
BASE = {
    "model": "tiny",
    "data": [PAIRS],
    "batch_size": 16,
    "steps": 2,
    "rows": ROWS,
    "optimizer": OptimizerConfig(learning_rate=1e-3),
    "loop": LoopConfig(log_every=1),
}


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]


@pytest.fixture
def shifted(tmp_path):
    path = tmp_path / "shifted.jsonl"
    rows = [
        {"prompt": f"Reverse this list: {a} {b}.", "responses": [a, b, f"{b} {a}"]}
        for a in ("cat", "dog", "fox")
        for b in ("red", "green")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_a_coupled_regularizer_takes_the_same_steps_in_micro_batches(tmp_path):
    terms = {"regularizers": ["0.5*batch_sum_to_zero"]}
    runs = [
        reward.run(
            reward.RewardConfig(
                run_dir=str(tmp_path / f"{a}"), accum_steps=a, **BASE, **terms
            )
        )
        for a in (1, 2)
    ]
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-4)


@pytest.mark.slow
def test_a_swav_run_leaves_a_plain_reward_model(tmp_path):
    config = reward.RewardConfig(
        run_dir=str(tmp_path / "swav"),
        contrastive=ContrastiveConfig(kind="swav", num_prototypes=4),
        compute=ComputeConfig(dropout=0.05),
        eval_data=["id=testbed:val_id?size=16"],
        **BASE,
    )
    run_dir = reward.run(config)
    assert "prototypes" in load_params(run_dir)
    _, params, _ = load_reward_model(str(run_dir))
    assert sorted(params) == ["backbone", "head"]
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("train/contrastive/share" in row for row in rows)
    evaluated = next(row for row in rows if "eval/id/loss" in row)
    assert "eval/id/contrastive/loss" not in evaluated  # one view has nothing to find


@pytest.mark.slow
def test_kwise_rows_train_and_pairs_evaluate(tmp_path):
    config = reward.RewardConfig(
        run_dir=str(tmp_path / "ranked"),
        loss="plackett_luce",
        eval_data=["id=testbed:val_id?size=16"],
        **BASE | {"data": ["testbed:quads_val_id?size=32"]},
    )
    rows = (reward.run(config) / "metrics.jsonl").read_text()
    assert "eval/id/accuracy" in rows and "train/accuracy" in rows


@pytest.mark.slow
def test_a_run_of_two_seeds_shares_its_head(tmp_path):
    heads = []
    for seed in (0, 1):
        run_dir = reward.run(
            reward.RewardConfig(
                run_dir=str(tmp_path / str(seed)),
                seed=seed,
                head_seed=7,
                **BASE | {"optimizer": OptimizerConfig(learning_rate=0.0), "steps": 1},
            )
        )
        heads.append(load_params(run_dir)["head"]["kernel"])
    np.testing.assert_array_equal(*heads)


def meta_config(tmp_path, shifted, **changes):
    return meta_reward.MetaRewardConfig(
        **BASE
        | {
            "run_dir": str(tmp_path / "meta"),
            "shifted": [shifted],
            "batch_size": 16,
            "inner": meta_reward.InnerConfig(batch_size=4, learning_rate=0.1),
            "eval_data": ["id=testbed:val_id?size=16"],
        }
        | changes
    )


@pytest.mark.slow
def test_meta_reward_resumes_where_it_was(tmp_path, shifted):
    """Both streams go on: the losses are those of the run that never stopped."""
    config = meta_config(
        tmp_path, shifted, steps=3, loop=LoopConfig(save_every=1, keep=3)
    )
    run_dir = meta_reward.run(config)
    expected = losses(run_dir)
    for step in (2, 3):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    assert losses(meta_reward.run(config)) == expected
    assert len(expected) == 3


@pytest.mark.slow
def test_micro_batches_of_meta_reward_see_both_whole_batches(tmp_path, shifted):
    runs = [
        meta_reward.run(
            meta_config(
                tmp_path, shifted, accum_steps=a, run_dir=str(tmp_path / f"a{a}")
            )
        )
        for a in (1, 2)
    ]
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from rlhf_jax.programs import sft

    config = sft.SftConfig(
        run_dir=str(tmp_path_factory.mktemp("dpo") / "sft"),
        **BASE | {"data": ["testbed:sft?size=32"], "steps": 1},
    )
    return str(sft.run(config))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_dpo_starts_at_log_two_and_its_run_is_a_policy(tmp_path, policy, rank):
    config = dpo.DpoConfig(
        **BASE
        | {
            "run_dir": str(tmp_path / "dpo"),
            "model": policy,
            "lora": LoraConfig(rank=rank),
            "eval_data": ["id=testbed:val_id?size=16"],
        }
    )
    run_dir = dpo.run(config)
    np.testing.assert_allclose(losses(run_dir)[0], np.log(2), rtol=1e-5)
    _, params, _ = load_policy(str(run_dir))
    _, before, _ = load_policy(policy)
    assert jax.tree.structure(params) == jax.tree.structure(before)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, before)
    assert max(jax.tree.leaves(moved)) > 0


def strength_config(tmp_path, **changes):
    names = ("model", "batch_size", "steps", "rows", "optimizer")
    return strength.StrengthConfig(
        **{name: BASE[name] for name in names}
        | {
            "run_dir": str(tmp_path / "strength"),
            "data": "testbed:train?size=24&flip_rate=0.25",
            "members": 2,
            "clean": CleanConfig(flip_fraction=0.25, drop_fraction=0.125, margin=True),
        }
        | changes
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured_root(tmp_path_factory):
    return strength.run(strength_config(tmp_path_factory.mktemp("strength")))


@pytest.mark.slow
def test_strength_writes_columns_actions_and_what_reward_can_train_on(
    measured_root, tmp_path
):
    root = measured_root
    measured = read(root / "strength.jsonl")
    assert len(measured) == 24
    for row in measured:
        gaps = np.subtract(row["chosen_rewards"], row["rejected_rewards"])
        np.testing.assert_allclose(row["strength_mean"], gaps.mean(), atol=1e-5)
        np.testing.assert_allclose(row["strength_std"], gaps.std(), atol=1e-5)
    order = np.argsort([row["strength_mean"] for row in measured], kind="stable")
    actions = [measured[n]["action"] for n in order]
    assert actions == ["drop"] * 3 + ["flip"] * 3 + ["keep"] * 18
    cleaned = {row["prompt"]: row for row in read(root / "cleaned.jsonl")}
    assert len(read(root / "cleaned.jsonl")) == 21
    for row in measured:
        if row["action"] == "flip":
            new = cleaned[row["prompt"]]
            assert (new["chosen"], new["rejected"]) == (row["rejected"], row["chosen"])
            np.testing.assert_allclose(new["margin"], -row["strength_mean"], rtol=1e-6)
    rows = dataclasses.replace(
        ROWS, columns=dataclasses.replace(ROWS.columns, margin="margin")
    )
    again = reward.RewardConfig(
        run_dir=str(tmp_path / "again"),
        **BASE | {"data": [str(root / "cleaned.jsonl")], "rows": rows, "steps": 1},
    )
    reward.run(again)


@pytest.mark.slow
def test_warm_is_the_mean_of_the_members_and_loads(measured_root):
    root = measured_root
    members = [load_reward_model(str(root / "members" / m)).params for m in ("0", "1")]
    _, average, _ = load_reward_model(str(root / "warm"))
    head = (members[0]["head"]["kernel"] + members[1]["head"]["kernel"]) / 2
    np.testing.assert_allclose(average["head"]["kernel"], head, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["mean-std", "mean", "min"],
)
def test_an_ensemble_is_one_scorer_of_all_members(measured_root, how):
    spec = f"ensemble:{measured_root}?combine={how}"
    assert kind_of(spec) == "model"
    texts = [("Reverse this list: cat dog.", t) for t in ("dog cat", "cat", "Answer:")]
    scorers = [open_scorer(s, ScoringConfig()) for s in (spec, *folders(measured_root))]
    together, *apart = (s.rewards([s.encode(*t) for t in texts]) for s in scorers)
    members = np.stack(apart, axis=1)
    expected = {
        "mean": members.mean(axis=1),
        "min": members.min(axis=1),
        "mean-std": members.mean(axis=1) - members.std(axis=1),
    }
    np.testing.assert_allclose(together, expected[how], atol=1e-5)


def folders(root):
    return [str(path) for path in sorted((root / "members").iterdir())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?combine=most", "combine: expected one of mean, min, mean-std, got 'most'"),
        ("?with=min", "unknown option 'with'; expected combine"),
        ("/members/0", "expected two or more"),
    ],
)
def test_an_ensemble_that_cannot_be_is_named(measured_root, tmp_path, query, message):
    place = tmp_path if query.startswith("/") else measured_root
    with pytest.raises(ValueError, match=message):
        open_scorer(f"ensemble:{place}{query}", ScoringConfig())


@pytest.mark.slow
def test_members_at_once_are_those_trained_one_by_one(tmp_path, monkeypatch):
    """The same heads, orders and steps; exported instead of kept as runs."""
    rows = DataConfig(num_shapes=1)
    apart = strength.run(strength_config(tmp_path, rows=rows))
    assert (apart / "members" / "0" / "checkpoints").exists()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    there = {"run_dir": str(tmp_path / "together"), "rows": rows}
    together = strength.run(strength_config(tmp_path, **there))
    assert "2 need about" in json.loads((together / "members.json").read_text())["why"]
    assert not (together / "members" / "0" / "checkpoints").exists()
    for a, b in zip(read(apart / "strength.jsonl"), read(together / "strength.jsonl")):
        np.testing.assert_allclose(a["strength_mean"], b["strength_mean"], atol=1e-4)
        np.testing.assert_allclose(a["chosen_rewards"], b["chosen_rewards"], atol=1e-4)


@pytest.mark.slow
def test_cross_fitting_scores_pairs_with_models_that_never_saw_them(tmp_path):
    root = strength.run(strength_config(tmp_path, folds=2, steps=1))
    assert sorted(p.name for p in (root / "members").iterdir()) == [
        f"{fold}-{member}" for fold in (0, 1) for member in (0, 1)
    ]
    rows = read(root / "strength.jsonl")
    for fold in (0, 1):
        trained = [row["prompt"] for row in read(root / f"folds/without-{fold}.jsonl")]
        judged = [row["prompt"] for n, row in enumerate(rows) if n % 2 == fold]
        assert not set(trained) & set(judged)
    assert not (root / "warm").exists()


def test_a_column_that_would_be_overwritten_stops_before_training(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"prompt": "a", "chosen": "cat", "rejected": "dog", "action": "x"})
    )
    with pytest.raises(SystemExit) as stopped:
        main(
            ["strength", "--run_dir", str(tmp_path / "s"), "--model", "tiny"]
            + ["--data", str(path)]
        )
    assert stopped.value.code == 2
    assert "rows.jsonl:1: the row has a column 'action'" in capsys.readouterr().err
    assert not (tmp_path / "s" / "members").exists()
