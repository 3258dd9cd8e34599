"""The attacks study: all methods are measured on the same prompts."""

import pytest

from rlhf_jax.studies import attacks, attacks_figures
from rlhf_jax.studies.attacks import AttacksConfig, run
from rlhf_jax.studies.attacks_figures import figures
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


def line(n, found, *, gold_reward=1.0):
    made = {"prompt": ROWS[n]["prompt"], "gold_reward": gold_reward, "worse": found}
    return made | {"gold_logprob": -4.0 * (n + 1), "gold_num_tokens": 4}


def almost(n):
    return ROWS[n]["gold_completion"][:-1]  # no full stop: form 2/3


def lines(*, last=()):
    """Two prompts with completions, and the last's."""
    first = [
        line(n, [worse("no idea", 0.5, -8.0), worse(almost(n), 2.0 * n, -3.0)])
        for n in range(2)
    ]
    return [*first, line(2, list(last))]


def test_figures_are_means_over_prompts_of_their_completions_or_the_best():
    found = figures({"one": lines()[:2]})
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
    found = figures({"one": lines(), "more": more})
    assert (found["scorable"], found["common"]) == (3, 2)
    one, other = found["methods"]["one"], found["methods"]["more"]
    assert one["found"] == pytest.approx(2 / 3) and other["found"] == 1
    assert one["success"] == pytest.approx(1 / 3)
    assert other["success"] == pytest.approx(2 / 3)
    for name in ("misjudged", "logprob", "gap", "gold", "best_logprob"):
        assert one[name] == other[name]


def test_a_gold_completion_that_cannot_be_scored_counts_for_no_method():
    refused = [*lines()[:2], line(2, [], gold_reward=None)]
    found = figures({"one": refused})
    assert found["scorable"] == 2 and found["methods"]["one"]["success"] == 0.5


def test_methods_without_a_prompt_in_common_are_not_compared():
    with pytest.raises(ValueError, match="prompts with one: one 2, none 0"):
        figures({"one": lines(), "none": [line(n, []) for n in range(3)]})


def test_the_table_says_what_is_divided_by_what():
    found = figures({"one": lines()})
    caption = str(attacks_figures.table([found, found]).caption)
    assert "all 6 prompts" in caption and "the 4 of them" in caption
    assert "`given` stands in for `generate`" in caption


def test_the_plot_draws_one_seed_which_has_no_interval(tmp_path):
    attacks_figures.plot([figures({"one": lines()})], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path):
    config = AttacksConfig(
        run_dir=str(tmp_path / "a"), seeds=1, prompts=6, sft_steps=3, reward_steps=2
    )
    found = run(config)
    assert run(config) == found
    assert (tmp_path / "a" / "plots" / "attacks.png").exists()
    methods = found["seeds"][0]["methods"]
    assert list(methods) == [*attacks.OTHERS, *attacks.ATTACKS]
    one, more = (methods[name]["gap"] for name in ("greedy, 1 edit", "greedy, 60 %"))
    assert more >= one
