"""The attacks study: its numbers are of each prompt's best completion."""

import pytest

from rlhf_jax.studies.attacks import METHODS, AttacksConfig, figures, run
from rlhf_jax.testbed.rows import rows as world


def test_figures_are_means_of_the_completion_with_the_highest_reward():
    lines = []
    for n, row in enumerate(world("rl", size=2)):
        texts = [("no idea", 0.5, -8.0), (row["gold_completion"][:-1], 2.0 * n, -3.0)]
        lines.append(
            {
                "prompt": row["prompt"],
                "gold_reward": 1.0,
                "gold_logprob": -4.0,
                "gold_num_tokens": 4,
                "worse": [
                    {"text": text, "reward": reward, "logprob": logprob,
                     "num_tokens": 2, "misjudged": reward > 1.0}
                    for text, reward, logprob in texts
                ],
            }
        )  # fmt: skip
    found = figures(lines)
    assert found["success"] == 0.5  # .5 and 2 are the best, above 1 one of them
    assert found["gap"] == pytest.approx((-0.5 + 1.0) / 2)
    assert found["logprob"] == pytest.approx((-4.0 - 1.5) / 2)
    assert found["gold_logprob"] == -1.0
    assert found["gold"] == pytest.approx(0.95 / 2, abs=0.01)  # no full stop: form 2/3


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path):
    config = AttacksConfig(
        run_dir=str(tmp_path / "a"), seeds=1, prompts=6, sft_steps=3, reward_steps=2
    )
    found = run(config)
    assert run(config) == found and set(found) == set(METHODS)
    one, more = (found[name][0]["gap"] for name in ("greedy, 1 edit", "greedy, 60 %"))
    assert more >= one
