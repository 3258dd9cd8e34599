"""`curate`: each step against its formula, nothing lost, nothing overwritten."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.prepare import DataConfig, make_encoder, prepare_pairs
from rlhf_jax.data.rows import Columns
from rlhf_jax.programs import curate
from rlhf_jax.programs.curate import BoundConfig, CurateConfig, WeightConfig
from rlhf_jax.programs.likelihood import open_likelihood
from rlhf_jax.programs.models import load_policy
from rlhf_jax.programs.scorer import Refusal, ScoringConfig
from rlhf_jax.testbed import tokenizer

ROWS = [
    {"prompt": "sort : 3 1 2", "chosen": "1 2 3", "rejected": "3 2", "id": "a"},
    {"prompt": "sort : 5 4", "chosen": "4 5", "rejected": "4 5 5 4", "id": "b"},
    {"prompt": "reverse : 7 8", "chosen": "8 7", "rejected": "7", "id": "c"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(tmp_path, rows=ROWS, **options):
    data = write(tmp_path / "pairs.jsonl", rows)
    return read(
        curate.run(CurateConfig(data=data, out=str(tmp_path / "o.jsonl"), **options))
    )


def shorter(prompts, completions):
    return [-float(len(text)) for text in completions]


def test_pairs_that_the_second_source_orders_otherwise_are_left_out(tmp_path, capsys):
    found = run(tmp_path, agree_with=f"{__name__}:shorter")
    assert [row["id"] for row in found] == ["b"]
    aside = read(tmp_path / "o.jsonl.errors.jsonl")
    assert [line["row"]["id"] for line in aside] == ["a", "c"]
    assert {line["reason"] for line in aside} == {"second source disagrees"}
    assert "3 pairs read, 1 written" in capsys.readouterr().out


def test_bounds_by_length_are_those_of_the_formula(tmp_path):
    found = run(tmp_path, bound=BoundConfig(by="length", scale=2.0, offset=1.0))
    for row, ratio in zip(found, (3 / 5, 3 / 7, 1 / 3), strict=True):
        assert row["gap_bound"] == pytest.approx(2.0 / (ratio + 0.001) + 1.0, rel=1e-5)
        assert row["id"] in "abc"


def test_bounds_by_states_are_tightest_for_equal_texts(tmp_path):
    same = {"prompt": "sort : 3 1", "chosen": "1 3", "rejected": "1 3"}
    bound = BoundConfig(by="states", model="testbed")
    found = run(tmp_path, [*ROWS, same], bound=bound)
    bounds = [row["gap_bound"] for row in found]
    assert bounds[-1] == pytest.approx(10 / 1.001 - 5, rel=1e-3)
    assert all(bounds[-1] < other for other in bounds[:-1])


def test_similarity_of_states_is_that_of_their_angle_up_to_a_right_one():
    states = np.array(
        [
            [[2.0, 0.0], [5.0, 0.0]],  # the same direction
            [[1.0, 0.0], [3.0, 3.0]],  # 45 degrees
            [[1.0, 0.0], [0.0, 2.0]],  # 90 degrees
            [[1.0, 0.0], [-1.0, 1.0]],  # 135 degrees
            [[1.0, 0.0], [-4.0, 0.0]],  # 180 degrees
        ]
    )
    np.testing.assert_allclose(
        curate.angle_similarity(states), [1.0, 0.75, 0.5, 0.5, 0.5], atol=1e-7
    )


def test_shuffled_bounds_are_the_same_bounds_at_other_pairs(tmp_path):
    rows = [
        {"prompt": f"sort : {n}", "chosen": "1" * (n + 1), "rejected": "1" * 20}
        for n in range(12)
    ]
    apart = run(tmp_path, rows, bound=BoundConfig(by="length"))
    bound = BoundConfig(by="length", shuffled=True)
    mixed = run(tmp_path, rows, bound=bound, overwrite=True)
    bounds = [[row["gap_bound"] for row in found] for found in (apart, mixed)]
    assert sorted(bounds[0]) == sorted(bounds[1])
    assert sum(a == b for a, b in zip(*bounds)) < 6
    with pytest.raises(ValueError, match="no bounds to shuffle; set by to length"):
        BoundConfig(shuffled=True)


@pytest.mark.slow
def test_likelihood_is_the_sum_of_the_completions_log_probabilities():
    likelihood = open_likelihood("testbed", ScoringConfig())
    model, params, _ = load_policy("testbed")
    texts = [ROWS[0]["chosen"], ROWS[0]["rejected"]]
    encoded = [likelihood.encode(ROWS[0]["prompt"], text) for text in texts]
    found = likelihood.rewards(encoded)
    for each, value in zip(encoded, found, strict=True):
        ids = np.concatenate([each.prompt, each.completion])
        logits = model.apply(
            {"params": params}, jnp.asarray(ids)[None], method=logits_of
        )
        logs = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
        places = range(len(each.prompt), len(ids))
        assert value == pytest.approx(
            sum(logs[t - 1, ids[t]] for t in places), abs=1e-3
        )


def logits_of(model, tokens):
    from rlhf_jax.types import Sequences

    ones = jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    rows = Sequences(tokens, positions, ones, ones.astype(bool))
    return model.logits(model(rows))


@pytest.fixture
def known(monkeypatch):
    """Policies whose log-probabilities follow from the number of tokens."""

    def likelihood(spec, scoring):
        nats = {"new": -1.0, "old": -1.5}[spec]
        scorer = types.SimpleNamespace(
            encode_all=lambda texts: [
                text.split()
                if len(text.split()) <= (scoring.max_length or 99)
                else Refusal("longer than max_length", f"{len(text.split())} tokens")
                for text in texts.completions
            ],
            rewards=lambda encoded: nats * np.array([len(ids) for ids in encoded]),
        )
        return scorer

    monkeypatch.setattr(curate, "open_likelihood", likelihood)


def test_weights_are_those_of_the_formula(tmp_path, known):
    weight = WeightConfig(policy="new", reference="old", flattening=0.5, mixing=0.2)
    found = run(tmp_path, weight=weight)
    for row in found:
        # log p - log q is half a nat a token.
        ratios = [0.5 * len(row[side].split()) for side in ("chosen", "rejected")]
        logs = [-np.log(0.2 + 0.8 * np.exp(-x)) for x in ratios]
        assert row["weight"] == pytest.approx(np.exp(0.5 * sum(logs)), rel=1e-5)


def test_off_prompt_pairs_come_with_their_soft_labels(tmp_path, capsys):
    found = run(tmp_path, off_prompt=True)
    assert {row["soft_label"] for row in found} == {1.0, 0.5}
    assert "--rows.columns.soft_label soft_label" in capsys.readouterr().out


def test_pairs_of_a_new_policy_over_the_old(tmp_path):
    prompts = ["sort : 2 1", "sort : 4 3", "sort : 6 5"]
    new = [
        {"prompt": p, "completion": c, "reward": 0.0, "schema": 1}
        for p, c in zip(prompts, ("1 2", "3 4", "5"))
    ]
    old = [
        {"prompt": p, "completion": c}
        for p, c in zip(prompts, ("1 2 1 2 1", "3 4", "6 5 6 5"))
    ]
    out = curate.run(
        CurateConfig(
            new=write(tmp_path / "new.jsonl", new),
            old=write(tmp_path / "old.jsonl", old),
            reward=f"{__name__}:shorter",
            out=str(tmp_path / "o.jsonl"),
        )
    )
    assert [row["prompt"] for row in read(out)] == [prompts[0], prompts[2]]
    assert read(out)[1]["chosen"] == "5"
    aside = read(tmp_path / "o.jsonl.errors.jsonl")
    assert [line["where"] for line in aside] == [f"{tmp_path / 'new.jsonl'}:2"]
    assert aside[0]["reason"] == "equal to the old, or worse"


def test_rows_that_are_no_pairs_are_set_aside_with_their_place(tmp_path):
    rows = [*ROWS, {"prompt": "p", "chosen": "a"}, {"prompt": "p", "completion": "a"}]
    found = run(tmp_path, rows, bound=BoundConfig(by="length"))
    assert len(found) == 3
    aside = read(tmp_path / "o.jsonl.errors.jsonl")
    assert [line["where"].rsplit(":", 1)[1] for line in aside] == ["4", "5"]


def test_what_other_programs_wrote_beside_a_pair_stays(tmp_path):
    rows = [ROWS[0] | {"chosen_reward": 1.0, "rejected_reward": 2.0, "schema": 1}]
    assert (
        run(tmp_path, rows, bound=BoundConfig(by="length"))[0]["chosen_reward"] == 1.0
    )


def test_every_pair_has_every_column_and_trains(tmp_path, capsys):
    run(tmp_path, off_prompt=True, bound=BoundConfig(by="length"))
    said = capsys.readouterr().out
    assert "--regularizers 1*bounded_gap" in said
    columns = Columns(gap_bound="gap_bound", soft_label="soft_label")
    dataset, account = prepare_pairs(
        [str(tmp_path / "o.jsonl")],
        make_encoder(tokenizer.testbed_tokenizer()),
        DataConfig(columns=columns),
    )
    assert account.kept == account.total > 30
    assert dataset.gap_bound is not None and np.isfinite(dataset.gap_bound).all()


def test_columns_that_were_there_before_are_not_named_as_written(tmp_path, capsys):
    rows = [row | {"soft_label": 1.0} for row in ROWS]
    run(tmp_path, rows, bound=BoundConfig(by="length"))
    assert "soft_label" not in capsys.readouterr().out


def test_a_column_of_a_standard_name_is_not_overwritten(tmp_path):
    rows = [{"question": "q", "chosen": "a", "rejected": "b", "prompt": "SYSTEM"}]
    with pytest.raises(ValueError, match="a column 'prompt' beside its 'question'"):
        run(
            tmp_path,
            rows,
            columns=Columns(prompt="question"),
            bound=BoundConfig(by="length"),
        )


def test_texts_too_long_for_the_policy_are_set_aside(tmp_path, known):
    weight = WeightConfig(policy="new", reference="old")
    found = run(tmp_path, weight=weight, scoring=ScoringConfig(max_length=3))
    assert [row["id"] for row in found] == ["a", "c"]
    aside = read(tmp_path / "o.jsonl.errors.jsonl")
    assert [line["row"]["id"] for line in aside] == ["b"]
    assert aside[0]["reason"] == "longer than max_length"
    with pytest.raises(ValueError, match="no pair is left"):
        run(
            tmp_path, weight=weight, scoring=ScoringConfig(max_length=1), overwrite=True
        )
    assert len(read(tmp_path / "o.jsonl.errors.jsonl")) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing to do"),
        ({"new": "a", "agree_with": "m:f"}, "expected pairs as --data, or else"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        CurateConfig(data="pairs.jsonl", out="o", **options)


def test_wrong_weights_and_bounds_are_named():
    with pytest.raises(ValueError, match="weight: expected policy and reference"):
        WeightConfig(policy="m")
    with pytest.raises(ValueError, match="weight: mixing 1.0"):
        WeightConfig(mixing=1.0)
    with pytest.raises(ValueError, match="bound: by states, model None"):
        BoundConfig(by="states")


def test_what_is_there_is_not_overwritten(tmp_path):
    bound = BoundConfig(by="length")
    with pytest.raises(ValueError, match=":1: the row has a column 'gap_bound'"):
        run(tmp_path, [ROWS[0] | {"gap_bound": 1.0}], bound=bound)
    run(tmp_path, bound=bound)
    with pytest.raises(ValueError, match="exists; name another file"):
        run(tmp_path, bound=bound)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    config = CurateConfig(
        data="no such file", out=str(tmp_path / "file" / "o"), off_prompt=True
    )
    with pytest.raises(ValueError, match="cannot write there"):
        curate.run(config)


def test_other_prompts_or_no_completions_are_refused(tmp_path):
    one = write(tmp_path / "1.jsonl", [{"prompt": "p", "completion": "a"}])
    two = write(tmp_path / "2.jsonl", [{"prompt": "q", "completion": "a"}])
    pairs = write(tmp_path / "3.jsonl", ROWS)
    options = {"reward": f"{__name__}:shorter", "out": str(tmp_path / "o.jsonl")}
    with pytest.raises(ValueError, match="1.jsonl:1: expected the prompt of .*2.jsonl"):
        curate.run(CurateConfig(new=one, old=two, **options))
    with pytest.raises(ValueError, match="got 3 and 1"):
        curate.run(CurateConfig(new=pairs, old=one, **options))
    with pytest.raises(ValueError, match="left out: equal to the old, or worse"):
        curate.run(CurateConfig(new=one, old=one, **options))
    none = write(tmp_path / "4.jsonl", [{"prompt": "p", "completion": ""}])
    with pytest.raises(ValueError, match="none of 1 rows can be used; .*4.jsonl:1: "):
        curate.run(CurateConfig(new=none, old=one, **options))


def test_no_pair_at_all_says_what_the_first_row_was(tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows can be used; .*pairs.jsonl:1"):
        run(tmp_path, [{"prompt": "p"}], bound=BoundConfig(by="length"))
