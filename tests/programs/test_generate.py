"""`rlhf-jax generate`: every prompt continued, every line whole, best-of-n beside."""

import json

import numpy as np
import pytest

from rlhf_jax.programs.generate import GenerateConfig, run
from rlhf_jax.sampling.generate import SamplingConfig

GOLD = "rlhf_jax.testbed:gold_rewards"


def _config(tmp_path, **changes):
    fields = {
        "model": "tiny",
        "data": ["testbed:rl_val?size=5"],
        "out": str(tmp_path / "out.jsonl"),
        "batch_size": 4,
        "sampling": SamplingConfig(num_samples=2, max_new_tokens=6),
    }
    return GenerateConfig(**fields | changes)


def _lines(tmp_path):
    text = (tmp_path / "out.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_prompt_has_its_samples_in_order(tmp_path):
    assert run(_config(tmp_path)) == 10
    lines = _lines(tmp_path)
    assert [line["sample"] for line in lines] == [0, 1] * 5
    prompts = [line["prompt"] for line in lines]
    assert prompts[0::2] == prompts[1::2]
    assert len(set(prompts)) == 5
    for line in lines:
        assert line["schema"] == 1
        assert 1 <= line["num_tokens"] <= 6
        assert line["logprob"] < 0
        assert {"completion", "stopped", "family"} <= set(line)


def test_batch_size_does_not_change_completions(tmp_path):
    run(_config(tmp_path, batch_size=5, sampling=SamplingConfig(temperature=0.0)))
    whole = _lines(tmp_path)
    run(
        _config(
            tmp_path,
            batch_size=2,
            overwrite=True,
            sampling=SamplingConfig(temperature=0.0),
        )
    )
    for a, b in zip(whole, _lines(tmp_path), strict=True):
        assert a["completion"] == b["completion"]
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)


def test_rewards_and_best_of_n_go_into_the_report(tmp_path):
    run(_config(tmp_path, reward=[GOLD], gold=GOLD, report=str(tmp_path / "bon")))
    lines = _lines(tmp_path)
    assert all(line["reward"] == line["gold"] for line in lines)
    found = json.loads((tmp_path / "bon" / "best_of_n.json").read_text())
    rewards = np.array([line["reward"] for line in lines]).reshape(5, 2)
    assert found["curve"]["n"] == [1, 2]
    assert found["curve"]["proxy"][1] == pytest.approx(rewards.max(axis=1).mean())
    assert "Best of n" in (tmp_path / "bon" / "report.html").read_text()
    assert (tmp_path / "bon" / "plots" / "best_of_n.png").exists()


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists; name another file"):
        run(_config(tmp_path))
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_a_report_needs_two_rewards_and_several_samples(tmp_path):
    with pytest.raises(ValueError, match="report: expected --reward, --gold"):
        _config(tmp_path, report="x", reward=[GOLD])


def test_no_room_for_a_prompt_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        run(_config(tmp_path, sampling=SamplingConfig(max_new_tokens=5000)))
