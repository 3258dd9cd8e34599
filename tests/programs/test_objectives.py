"""Losses and regularizers by name: what is understood, what is refused and how."""

import functools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.contrastive import ContrastiveConfig
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.rows import Columns
from rlhf_jax.losses.preference import hinge
from rlhf_jax.losses.regularizers import batch_sum_to_zero
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import dpo, meta_reward, objectives, reward, strength
from rlhf_jax.programs.dpo import DpoConfig
from rlhf_jax.programs.meta_reward import InnerConfig, MetaRewardConfig
from rlhf_jax.programs.models import load_tokenizer_of
from rlhf_jax.programs.reward import RewardConfig
from rlhf_jax.programs.strength import StrengthConfig

ANY = {"run_dir": "r", "model": "tiny", "data": ["a.jsonl"]}
R = jnp.array([2.0, -1.0])
ZERO = jnp.zeros(2)


def test_options_reach_the_loss():
    named = objectives.loss("hinge?min_gap=3")
    np.testing.assert_array_equal(named(R, ZERO), hinge(R, ZERO, min_gap=3.0))
    assert objectives.loss("hinge") is hinge


def test_coefficient_and_options_reach_the_regularizer():
    function, coefficient = objectives.regularizer(
        "1e-3*batch_sum_to_zero?scale=official&num_groups=devices", devices=2
    )
    assert coefficient == 1e-3
    expected = batch_sum_to_zero(R, ZERO, R * 0 + 1, scale="official", num_groups=2)
    np.testing.assert_array_equal(function(R, ZERO, R * 0 + 1), expected)


def test_only_terms_that_couple_ask_for_the_whole_batch():
    assert objectives.couples("batch_sum_to_zero")
    assert not objectives.couples("0.01*centring")
    assert objectives.couples("my_package.losses:anything?gamma=2")
    assert not objectives.couples("hinge?min_gap=2")


def unannotated(chosen_rewards, rejected_rewards, *, gamma=2.0, flag=False, other=None):
    assert isinstance(gamma, float) and isinstance(flag, bool)
    return chosen_rewards * gamma if flag else rejected_rewards


def test_options_of_a_users_own_loss_have_the_type_of_their_defaults():
    here = f"{__name__}:unannotated"
    named = objectives.loss(f"{here}?gamma=3&flag=true")
    np.testing.assert_array_equal(named(R, ZERO), 3 * R)
    with pytest.raises(ValueError, match="flag: expected true or false, got 'yes'"):
        objectives.loss(f"{here}?flag=yes")
    with pytest.raises(ValueError, match="other: its type is not known; annotate"):
        objectives.loss(f"{here}?other=1")


def test_evaluation_leaves_out_what_couples_a_batch():
    found = objectives.parts_of_evaluation(
        "hinge", ["batch_sum_to_zero?num_groups=16", "0.1*centring"]
    )
    assert [function.__name__ for function, _ in found["regularizers"]] == ["centring"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hingee", "unknown name; did you mean 'hinge'[?] expected one of bradley"),
        ("DR", "unknown name; did you mean 'direct'[?] expected one of bradley"),
        ("hinge?margins=1", "unknown option 'margins'; its options: min_gap"),
        ("hinge?min_gap=wide", "min_gap: expected a finite number, got 'wide'"),
        ("hinge?min_gap=nan", "min_gap: expected a finite number, got 'nan'"),
        ("hinge?min_gap", "expected OPTION=VALUE, got 'min_gap'"),
        ("2*hinge", "a loss has no coefficient"),
        ("", r"expected \[COEFFICIENT\*\]NAME"),
        ("no_such_module:f", "cannot import"),
        ("direct?x=1", "its options: none"),
        ("normalised?eps=-1", "eps: expected a number above 0, got -1.0"),
        ("normalised?eps=0", "eps: expected a number above 0, got 0.0"),
        ("bradley_terry?label_smoothing=2", r"in \[0, 1\], got 2.0"),
        ("rao_kupper?log_theta=-1", "log_theta: expected a number above 0, got -1"),
    ],
)
def test_a_loss_that_cannot_be_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**ANY, loss=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1*centring", "expected a finite coefficient >= 0"),
        ("inf*centring", "expected a finite coefficient >= 0"),
        ("batch_sum_to_zer", "did you mean 'batch_sum_to_zero'"),
        ("batch_sum_to_zero?scale=B", "scale: expected one of mean, official, sum"),
        ("batch_sum_to_zero?num_groups=1.5", "num_groups: expected a whole number"),
        ("batch_sum_to_zero?num_groups=0", "num_groups 0: expected a number that"),
        ("batch_sum_to_zero?num_groups=-1", "num_groups -1: expected a number that"),
    ],
)
def test_a_regularizer_that_cannot_be_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**ANY, regularizers=[text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"regularizers": ["batch_sum_to_zero"], "batch_size": 1},
            "use 2 or more, or centring",
        ),
        ({"loss": "scaled_bradley_terry"}, "needs the column margin"),
        (
            {"loss": "direct", "rows": DataConfig(columns=Columns(margin="m"))},
            "margin 'm': neither loss 'direct' nor a regularizer uses it",
        ),
        (
            {"contrastive": ContrastiveConfig(kind="simcse")},
            "without dropout the two views are the same",
        ),
        (
            {
                "contrastive": ContrastiveConfig(kind="simcse"),
                "compute": ComputeConfig(dropout=0.05),
                "batch_size": 1,
            },
            "batch_size is 1; use 2 or more",
        ),
        (
            {"loss": "plackett_luce", "regularizers": ["centring"]},
            "regularizers and contrastive are for pairs",
        ),
        ({"objective": "a:b", "loss": "hinge"}, "stands for loss, regularizers"),
        (
            {"regularizers": ["batch_sum_to_zero?num_groups=7"]},
            "num_groups 7: expected a number that divides the 64 pairs",
        ),
        (
            {"regularizers": ["batch_sum_to_zero?num_groups=8"], "batch_size": 8},
            "num_groups 8: .* the 8 pairs .* into groups of 2 or more",
        ),
        (
            {"loss": "plackett_luce", "rows": DataConfig(columns=Columns(weight="w"))},
            "rows.columns.weight: is of pairs",
        ),
        (
            {
                "contrastive": ContrastiveConfig(kind="simcse"),
                "lora": LoraConfig(dropout=0.1),
            },
            "without dropout the two views are the same",
        ),
        (
            {
                "contrastive": ContrastiveConfig(kind="simcse"),
                "compute": ComputeConfig(dropout=0.1),
                "train_only": "head",
            },
            "which train_only head leaves as they are",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_loaded(
    options, message
):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**ANY, **options)


@pytest.mark.parametrize("devices", [4, 8])
def test_groups_of_all_devices_are_checked_once_the_mesh_is_known(devices):
    texts = ["1e-3*batch_sum_to_zero?num_groups=devices"]
    RewardConfig(**ANY, regularizers=texts, batch_size=8)
    known = {"devices": devices, "batch_size": 8}
    if devices == 4:
        assert objectives.parts("hinge", texts, **known)["regularizers"]
        return
    with pytest.raises(
        ValueError, match=r"num_groups 8 \(devices times accum_steps: 8"
    ):
        objectives.parts("hinge", texts, **known)


def pairs_of_margins(*margins):
    where = [f"pairs.jsonl:{n}" for n, _ in enumerate(margins, 1)]
    return types.SimpleNamespace(margin=np.array(margins, np.float32), where=where)


def test_a_margin_below_zero_is_refused_where_the_loss_multiplies_by_it():
    good, bad = pairs_of_margins(0.0, 2.0), pairs_of_margins(1.0, -0.5, -2.0)
    objectives.check_margins("scaled_bradley_terry", good)
    objectives.check_margins("hinge?min_gap=2", bad)
    with pytest.raises(ValueError, match=r"pairs.jsonl:3: margin -2.0: .*numbers >= 0"):
        objectives.check_margins("scaled_bradley_terry", good, bad)


def config_of(program, tmp_path, data, evals):
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": "tiny",
        "loss": "scaled_bradley_terry",
        "rows": DataConfig(columns=Columns(margin="margin")),
    }
    if program is strength:
        return StrengthConfig(**settings, data=data, at_once=True)
    settings |= {"data": [data], "eval_data": [f"id={evals}"]}
    return {
        reward: RewardConfig,
        dpo: DpoConfig,
        meta_reward: functools.partial(MetaRewardConfig, shifted=["s.jsonl"]),
    }[program](**settings)


@pytest.mark.parametrize(
    ("program", "side"),
    [
        (reward, "data"),
        (reward, "evals"),
        (meta_reward, "data"),
        (dpo, "data"),
        (strength, "data"),
    ],
)
def test_every_program_with_a_pair_loss_checks_its_margins(
    program, side, tmp_path, monkeypatch
):
    paths = {}
    for name in ("data", "evals"):
        margins = (1.0, -1.0 if name == side else 1.0)
        row = {"prompt": "a", "chosen": "cat", "rejected": "dog"}
        lines = [json.dumps(row | {"margin": m}) for m in margins]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        paths[name] = str(path)
    for loader in ("load_reward_model", "load_policy"):  # weights are not needed
        monkeypatch.setattr(program, loader, weightless, raising=False)
    with pytest.raises(ValueError, match=rf"{side}.jsonl:2: margin -1.0"):
        program.run(config_of(program, tmp_path, **paths))


def weightless(spec, **options):
    return None, {}, load_tokenizer_of(spec)


def test_a_bound_column_is_used_by_its_regularizer_alone():
    rows = DataConfig(columns=Columns(gap_bound="b"))
    RewardConfig(**ANY, rows=rows, regularizers=["bounded_gap"])
    with pytest.raises(ValueError, match="gap_bound 'b': neither"):
        RewardConfig(**ANY, rows=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shifted": []}, "expected at least one --shifted"),
        (
            {"batch_size": 4, "accum_steps": 2, "inner": InnerConfig(batch_size=3)},
            "inner.batch_size 3: expected a multiple of accum_steps 2",
        ),
        (
            {
                "inner": InnerConfig(second_order=True),
                "compute": ComputeConfig(attention="splash"),
            },
            "cannot be differentiated twice",
        ),
    ],
)
def test_meta_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaRewardConfig(**(ANY | {"shifted": ["s.jsonl"]} | options))


def test_an_inner_step_of_nothing_is_refused():
    with pytest.raises(ValueError, match="inner.learning_rate: expected a finite"):
        InnerConfig(learning_rate=0.0)


def test_dpo_refuses_a_beta_of_nothing():
    with pytest.raises(ValueError, match="beta: expected a finite number above 0"):
        DpoConfig(**ANY, beta=0.0)
