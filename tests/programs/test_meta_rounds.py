"""The rounds of MetaRM: who starts from what, and what is refused at once."""

import json

import pytest

from rlhf_jax.programs.generate import _grouped
from rlhf_jax.programs.meta_rounds import MetaRoundsConfig, run
from rlhf_jax.programs.sft import SftConfig
from rlhf_jax.programs.sft import run as run_sft
from rlhf_jax.sampling.generate import SamplingConfig

ANY = {
    "run_dir": "rounds",
    "policy": "sft",
    "reward_start": "base",
    "data": ["pairs.jsonl"],
    "prompts": "prompts.jsonl",
}


@pytest.fixture
def yaml(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_each_round_goes_on_from_the_policy_of_the_last(yaml):
    config = MetaRoundsConfig(**ANY, gold="a:b", seed=5)
    first, second = config.rl_of(1), config.rl_of(2)
    assert (first.model, second.model) == ("sft", "rounds/round-1/rloo")
    assert first.reference == second.reference == "sft"
    assert second.reward == ["rounds/round-2/reward"] and second.gold == "a:b"
    meta = config.meta_of(2)
    assert (meta.model, meta.seed) == ("base", 7)
    assert meta.shifted == ["rounds/round-2/shifted.jsonl"]


def test_settings_of_the_parts_come_from_their_own_files(yaml):
    config = MetaRoundsConfig(
        **ANY,
        rl="ppo",
        rl_config=yaml("ppo.yaml", "steps: 7\nloss: {kl_coef: 0.5}"),
        meta_config=yaml("meta.yaml", "inner: {normalise: true}"),
    )
    assert (config.rl_of(1).steps, config.rl_of(1).loss.kl_coef) == (7, 0.5)
    assert config.meta_of(1).inner.normalise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"sampling": SamplingConfig(num_samples=1)}, "expected at least 2, got 1"),
        ({"rl_config": "nowhere.yaml"}, "rl_config 'nowhere.yaml': no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_round(changes, message):
    with pytest.raises(ValueError, match=message):
        MetaRoundsConfig(**ANY | changes)


def test_a_misspelt_key_of_a_part_names_its_file(yaml, capsys):
    path = yaml("meta.yaml", "inner: {normalize: true}")
    with pytest.raises(SystemExit):
        MetaRoundsConfig(**ANY, meta_config=path)
    assert "meta.yaml:1: unknown key 'inner.normalize'" in capsys.readouterr().err


def line(prompt, sample, text):
    return {
        "prompt": prompt,
        "sample": sample,
        "completion": text,
        "gold": 1.0,
        "stopped": True,
        "family": "sort",
    }


def test_grouped_lines_hold_every_completion_with_text(capsys):
    lines = [line("a", 0, "x"), line("a", 1, " "), line("a", 2, "y")]
    lines += [line("b", 0, ""), line("b", 1, "z"), line("b", 2, "\n")]
    rows = list(_grouped(iter(lines)))
    responses = [{"text": t, "score": 1.0} for t in ("x", "y")]
    assert rows == [{"prompt": "a", "family": "sort", "responses": responses}]
    assert capsys.readouterr().err.count("without text") == 2


@pytest.mark.slow
def test_two_rounds_run_and_a_stopped_driver_goes_on(tmp_path, yaml):
    policy = run_sft(
        SftConfig(
            run_dir=str(tmp_path / "sft"),
            model="tiny",
            data=["testbed:sft?size=32"],
            steps=1,
        )
    )
    config = MetaRoundsConfig(
        run_dir=str(tmp_path / "rounds"),
        policy=str(policy),
        reward_start=str(policy),
        data=["testbed:train?size=32"],
        prompts="testbed:rl?size=8",
        rounds=2,
        meta_config=yaml("meta.yaml", "steps: 1\ninner: {batch_size: 8}"),
        rl_config=yaml(
            "rl.yaml",
            "steps: 1\nbatch_size: 8\nsampling: {num_samples: 2, max_new_tokens: 8}",
        ),
        sampling=SamplingConfig(num_samples=2, max_new_tokens=8),
        batch_size=8,
    )
    root = run(config)
    kept = root / "round-1" / "reward" / "metrics.jsonl"
    before = kept.stat().st_mtime_ns
    (root / "round-2" / "rloo" / "finished").unlink()
    run(config)
    assert kept.stat().st_mtime_ns == before
    assert (root / "round-2" / "rloo" / "finished").exists()
    rows = (root / "round-2" / "shifted.jsonl").read_text().splitlines()
    assert all(len(json.loads(row)["responses"]) == 2 for row in rows)
