"""The attacks study: all methods are measured on the same prompts."""

import json

import numpy as np
import pytest

from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.writer import WriterConfig
from rlhf_jax.studies import attacks, attacks_figures
from rlhf_jax.studies.attacks import AttacksConfig, run
from rlhf_jax.studies.attacks_figures import figures
from rlhf_jax.testbed.gold import gold_rewards
from rlhf_jax.testbed.rows import rows as world

ROWS = world("rl", size=3)


def worse(text, reward, logprob):
    return {
        "text": text,
        "reward": reward,
        "logprob": logprob,
        "num_tokens": 2,
        "misjudged": reward > 1.0,
    }


def line(n, found, *, gold_reward: float | None = 1.0):
    made = {"prompt": ROWS[n]["prompt"], "gold_reward": gold_reward, "worse": found}
    return made | {"gold_logprob": -4.0 * (n + 1), "gold_num_tokens": 4}


def almost(n):
    return ROWS[n]["gold_completion"][:-1]  # no full stop: form 2/3


def judge(lines, texts):
    return np.array(gold_rewards([each["prompt"] for each in lines], texts))


def lines(*, last=()):
    """Two prompts with completions, and the last's."""
    first = [
        line(n, [worse("no idea", 0.5, -8.0), worse(almost(n), 2.0 * n, -3.0)])
        for n in range(2)
    ]
    return [*first, line(2, list(last))]


def test_figures_are_means_over_prompts_of_their_completions_or_the_best():
    found = figures({"one": lines()[:2]}, judge)
    assert found["scorable"] == found["common"] == 2
    assert found["gold_logprob"] == -1.5
    one = found["methods"]["one"]
    assert one["found"] == 1
    assert one["success"] == 0.5  # .5 and 2 are the best, above 1 one of them
    assert one["misjudged"] == 0.25
    assert one["logprob"] == pytest.approx((-4.0 - 1.5) / 2)
    assert one["gap"] == pytest.approx((-0.5 + 1.0) / 2)
    assert one["best_logprob"] == pytest.approx((-4.0 - 1.5) / 2)
    assert one["gold"] == pytest.approx(0.95 / 2, abs=0.01)


def test_a_prompt_without_a_completion_is_no_success_and_in_no_methods_means():
    more = lines(last=[worse("no idea", 5.0, -1.0)])
    found = figures({"one": lines(), "more": more}, judge)
    assert (found["scorable"], found["common"]) == (3, 2)
    one, other = found["methods"]["one"], found["methods"]["more"]
    assert one["found"] == pytest.approx(2 / 3) and other["found"] == 1
    assert one["success"] == pytest.approx(1 / 3)
    assert other["success"] == pytest.approx(2 / 3)
    for name in ("misjudged", "logprob", "gap", "gold", "best_logprob"):
        assert one[name] == other[name]


def test_a_gold_completion_that_cannot_be_scored_counts_for_no_method():
    refused = [*lines()[:2], line(2, [], gold_reward=None)]
    found = figures({"one": refused}, judge)
    assert found["scorable"] == 2 and found["methods"]["one"]["success"] == 0.5


def test_methods_without_a_prompt_in_common_are_not_compared():
    with pytest.raises(ValueError, match="prompts with one: one 2, none 0"):
        figures({"one": lines(), "none": [line(n, []) for n in range(3)]}, judge)


def test_without_a_gold_reward_there_is_no_figure_of_it_and_no_column():
    found = figures({"one": lines()}, None)
    assert "gold" not in found["methods"]["one"]
    headers = [column.header for column in attacks_figures.table([found]).columns]
    assert len(headers) == len(attacks_figures.MEANING)  # the first has the names
    assert attacks_figures.MEANING["gold"] not in headers


def test_the_table_says_what_is_divided_by_what():
    found = figures({"given": lines()}, judge)
    caption = str(attacks_figures.table([found, found]).caption)
    assert "all 6 prompts" in caption and "the 4 of them" in caption
    assert "`given`, the testbed's known corruptions, stands in" in caption


def test_the_plot_draws_one_seed_which_has_no_interval(tmp_path):
    attacks_figures.plot([figures({"one": lines()}, judge)], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


READY = {"policy": "p", "reward": ["a", "b"], "seeds": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "p"}, r"policy p, reward \[\]: expected both"),
        ({"reward": ["a"]}, r"policy None, reward \['a'\]: expected both"),
        (READY | {"seeds": 5}, "reward: expected 5 .* got 2; .* set seeds to 2"),
        ({"data": ["x.jsonl"]}, r"data \['x.jsonl'\]: models of the testbed read its"),
        (READY | {"reward": ["a", "b.c:d"]}, "attack follows .* reward b.c:d is none"),
        (READY | {"gold": "x*rm"}, r"reward 'x\*rm': expected SPEC or WEIGHT\*SPEC"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AttacksConfig(**changes)


def test_the_estimators_are_those_that_the_prompts_and_the_writer_allow():
    assert AttacksConfig().others == ["contrast", "given", "perturb"]
    writer = WriterConfig(model="w")
    both = AttacksConfig(writer=writer).others
    assert both == ["contrast", "generate", "given", "perturb"]
    own = AttacksConfig(**READY, data=["x.jsonl"], writer=writer)
    assert own.others == ["contrast", "generate", "perturb"] and not own.on_testbed


@pytest.mark.slow
def test_the_study_runs_goes_on_and_takes_ready_models(tmp_path, monkeypatch):
    config = AttacksConfig(
        run_dir=str(tmp_path / "a"), seeds=1, prompts=6, sft_steps=3, reward_steps=2
    )
    found = run(config)
    assert run(config) == found
    assert (tmp_path / "a" / "plots" / "attacks.png").exists()
    methods = found["seeds"][0]["methods"]
    assert list(methods) == [*config.others, *attacks.ATTACKS]
    one, more = (methods[name]["gap"] for name in ("greedy, 1 edit", "greedy, 60 %"))
    assert more >= one

    policy, reward = (str(tmp_path / "a" / name) for name in ("sft", "reward-0"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in world("rl", size=4)))
    ready = AttacksConfig(
        run_dir=str(tmp_path / "b"),
        seeds=1,
        policy=policy,
        reward=[reward],
        data=[str(prompts)],
        gold="rlhf_jax.testbed:gold_rewards",
        writer=WriterConfig(model=policy, count=16, max_new_tokens=64),
    )
    monkeypatch.setattr(attacks, "ATTACKS", {"greedy": AttackConfig(max_edits=1)})
    methods = run(ready)["seeds"][0]["methods"]
    assert list(methods) == ["contrast", "generate", "perturb", "greedy"]
    assert all(0 <= figures["gold"] < 1 for figures in methods.values())
