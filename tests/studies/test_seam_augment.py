"""The SEAM augmentation study: arms differ in the added rows alone, what judges them is
not among the rows, and it goes on."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.programs import reward, rloo, sft
from rlhf_jax.programs.scored_rows import read_jsonl, write_whole
from rlhf_jax.studies import augment_rows, stages
from rlhf_jax.studies import seam_augment as study
from rlhf_jax.studies.augment_tables import difference_table, row_table, table
from rlhf_jax.studies.quickstart import QuickstartConfig
from rlhf_jax.studies.seam_augment import SeamAugmentStudyConfig
from rlhf_jax.testbed.rows import rows as world

BASE = QuickstartConfig(run_dir="s", seed=3)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match="estimator generate: expected one of contrast"
    ):
        SeamAugmentStudyConfig(estimator="generate")
    with pytest.raises(ValueError, match=r"lowest 0.6, pairs 4: expected a share in"):
        SeamAugmentStudyConfig(lowest=0.6)
    with pytest.raises(ValueError, match="prompts 2: the lowest 0.4 of a half is no"):
        SeamAugmentStudyConfig(prompts=2)
    with pytest.raises(ValueError, match="share: expected a share in"):
        SeamAugmentStudyConfig(share=1.0)


def test_arms_differ_in_the_added_rows_alone():
    """Same steps, rows of a step, seeds, base and evaluations; the same share added."""
    for make, place in ((study.policy_config, 0), (study.model_config, 1)):
        none, *others = (make(BASE, rows, 0.25) for rows in study.ROWS)
        for other, files in zip(others, augment_rows.FILES.values(), strict=True):
            own, added = other.data
            assert own == f"0.75*{none.data[0]}"
            assert added == f"0.25*s/seam-3/rows/{files[place]}"
            assert dataclasses.replace(
                other, data=none.data, run_dir=none.run_dir
            ) == none  # fmt: skip
    arms = [study.arm_config(BASE, name, 0.1) for name in study.ARMS]
    assert len({arm.run_dir for arm in arms}) == len(arms) == 7
    assert len({(arm.model, *arm.reward) for arm in arms}) == 7
    for arm in arms:
        changed = {"run_dir": "", "model": "", "reward": ["r"]}
        assert dataclasses.replace(arm, **changed) == dataclasses.replace(
            arms[0], **changed
        )


def test_the_best_checkpoint_is_the_last():
    """Otherwise the arms would have other numbers of steps after all."""
    for config in (
        study.policy_config(BASE, "guided", 0.1),
        study.model_config(BASE, "guided", 0.1),
    ):
        assert config.loop.eval_every == config.steps


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A `seam` run on 20 prompts; the n-th has SEAM n, and four worse completions."""
    monkeypatch.setattr(augment_rows, "WORSE", 3)
    prompts = world("worse", size=20, count=4, seed=3)
    lines = [
        {
            "index": n,
            "estimator": "given",
            "prompt": row["prompt"],
            "gold": row["gold_completion"],
            "seam": float(n),
            "worse": [
                {
                    "text": each["text"],
                    "source": each["source"],
                    "misjudged": k < 3 and n != 1,
                    "logprob": -4.0,
                    "num_tokens": 2,
                }
                for k, each in enumerate(row["worse"])
            ],
        }
        for n, row in enumerate(prompts)
    ]
    write_whole(tmp_path / "seam.jsonl", lines)
    write_whole(tmp_path / "prompts.jsonl", prompts)
    return tmp_path


def added(measured):
    """Kind -> its SFT rows and its pairs."""
    return {
        kind: [read_jsonl(measured / "rows" / name) for name in names]
        for kind, names in augment_rows.FILES.items()
    }


def test_random_and_guided_rows_are_as_many_and_none_is_held_out(measured):
    for seed in range(4):
        augment_rows.make_rows(measured, 0.4, 2, seed)
        guided, control = (
            [len(rows) for rows in files] for files in added(measured).values()
        )
        assert guided == control and guided[0] == 4 and guided[1] in (6, 8)
    held_out = {
        row["prompt"]
        for name in ("rl_val", "val_id", "val_prompt_ood", "sft_val")
        for row in world(name, size=100, seed=3)
    }
    kinds = added(measured).values()
    prompts = {row["prompt"] for files in kinds for rows in files for row in rows}
    assert prompts and not prompts & held_out


def test_risk_is_measured_on_prompts_that_no_arm_has_rows_of(measured):
    prompts = [row["prompt"] for row in read_jsonl(measured / "prompts.jsonl")]
    for seed in range(4):
        augment_rows.make_rows(measured, 0.4, 4, seed)
        rows = read_jsonl(augment_rows.remembered(measured, 0.4, seed))
        places = [prompts.index(row["prompt"]) for row in rows]
        _, half = augment_rows.halves(measured, seed)
        assert places[:4] == sorted(line["index"] for line in half)[:4]
        assert len(set(places)) == 8
        assert [row["lowest"] for row in rows] == [True] * 4 + [False] * 4
        assert all(len(row["worse"]) == 3 for row in rows)
        kinds = added(measured).values()
        taught = {row["prompt"] for files in kinds for made in files for row in made}
        assert len(taught) >= 4 and taught.isdisjoint(row["prompt"] for row in rows)


def test_prompts_without_enough_worse_completions_are_not_measured(
    measured, monkeypatch
):
    monkeypatch.setattr(augment_rows, "WORSE", 5)
    with pytest.raises(ValueError, match="prompts: 0 of the 10 to measure risk on"):
        augment_rows.remembered(measured, 0.4, 0)


def test_added_rows_are_counted(measured):
    found = []
    for seed in range(4):
        augment_rows.make_rows(measured, 0.4, 2, seed)
        augment_rows.remembered(measured, 0.4, seed)
        found.append(augment_rows.count_rows(measured))
        first, _ = augment_rows.halves(measured, seed)
        # Nothing of prompt 1 is misjudged.
        unmisjudged = int(any(line["index"] == 1 for line in first))
        assert found[-1]["lowest"] == 4
        assert found[-1]["not_misjudged"] == unmisjudged
        assert found[-1]["guided_pairs"] == 2 * (4 - unmisjudged)
        assert found[-1]["random_pairs"] == found[-1]["guided_pairs"]
        assert 0 <= found[-1]["texts_in_rows"] <= 1
    assert {numbers["not_misjudged"] for numbers in found} == {0, 1}
    assert row_table(found).row_count == 4


def test_tables_have_a_row_an_arm_and_all_three_differences():
    keys = [
        *("gold", "gold_before", "gain", "kl", "proxy_gain", "accuracy"),
        *("accuracy_new", "agreement", "risk_lowest", "risk_others"),
    ]
    found = [
        {
            arm: dict.fromkeys(keys, float(n + seed * n**2))
            for n, arm in enumerate(study.ARMS)
        }
        for seed in range(2)
    ]
    for part in ("policy", "pair"):
        assert table(found, part).row_count == len(study.ARMS)
    made = difference_table(found)
    assert made.row_count == 5 * 3 + 3
    cells = [str(next(iter(column.cells))) for column in made.columns[2:]]
    assert [cell.split()[0] for cell in cells] == ["+1.500", "+4.000", "+2.500"]
    tested = [
        (row, column.header)
        for column in made.columns
        for row, cell in enumerate(column.cells)
        if "(p " in str(cell)
    ]
    # Of gold, with both taught.
    assert tested == [(2, "guided - random")]


@pytest.mark.slow
def test_the_study_runs_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the seam extra")
    monkeypatch.setattr(stages, "PROMPTS", "testbed:rl_val?size=32&seed=1")
    monkeypatch.setattr(study, "JUDGED", 16)
    monkeypatch.setattr(augment_rows, "WORSE", 4)
    config = SeamAugmentStudyConfig(
        run_dir=str(tmp_path / "s"),
        seeds=1,
        prompts=24,
        lowest=0.25,
        sft_steps=5,
        reward_steps=2,
        steps=2,
    )
    made = dict.fromkeys(("sft", "reward", "rloo"), 0)
    for name, program in (("sft", sft), ("reward", reward), ("rloo", rloo)):
        monkeypatch.setattr(program, "run", _counted(made, name, program.run))
    with pytest.raises(InterruptedError):
        study.run(config)
    found = study.run(config)
    assert made == {"sft": 3, "reward": 3, "rloo": 7}
    assert study.run(config) == found
    assert made == {"sft": 3, "reward": 3, "rloo": 7}
    (seed,) = found["seeds"]
    assert seed["rows"]["lowest"] == 3
    seed = seed["arms"]
    assert list(seed) == list(study.ARMS)
    for name in ("gold", "kl", "gain", "accuracy", "risk_lowest", "risk_others"):
        assert np.isfinite([numbers[name] for numbers in seed.values()]).all()
    assert seed["policy, guided"]["accuracy"] == seed["none"]["accuracy"]
    assert seed["reward model, guided"]["gold_before"] == seed["none"]["gold_before"]
    assert (
        json.loads((tmp_path / "s" / "study.json").read_text())["seeds"]
        == (found["seeds"])
    )


def _counted(made, name, run):
    """The program, counted; the third SFT run is stopped before it begins, once."""
    stopped = []

    def counted(config):
        if name == "sft" and made["sft"] == 2 and not stopped:
            stopped.append(True)
            raise InterruptedError
        made[name] += 1
        return run(config)

    return counted
