"""The SEAM selection study: what it refuses, what it measures, and that it goes on."""

import numpy as np
import pytest

from rlhf_jax.studies import seam_filter
from rlhf_jax.studies.seam_filter import SeamFilterConfig


def test_selections_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match="estimator generate: expected one of contrast"
    ):
        SeamFilterConfig(estimator="generate")
    with pytest.raises(
        ValueError, match=r"random_drop \(0.3,\): expected some of drop"
    ):
        SeamFilterConfig(drop=(0.2,), random_drop=(0.3,))


def test_rank_correlations_are_with_the_gain_of_each_prompt():
    """Three prompts: SEAM 1, 2, infinite; gold gains -.1, .1, .3."""
    lines = [
        {
            "estimator": name,
            "prompt": f"p{n}",
            "seam": seam,
            "worse": [{"misjudged": True, "logprob": -4.0, "num_tokens": 2}],
        }
        for name in seam_filter.ESTIMATORS
        for n, seam in enumerate([1.0, 2.0, None])
    ]
    before, after = [0.5, 0.4, 0.3], [0.4, 0.5, 0.6]
    samples = {
        name: [
            {"prompt": f"p{n}", "responses": [{"score": v - 0.1}, {"score": v + 0.1}]}
            for n, v in enumerate(values)
        ]
        for name, values in (("before", before), ("after", after))
    }
    found = seam_filter._estimators(lines, samples)["attack"]
    assert found["gain"] == pytest.approx(1.0) and found["before"] == pytest.approx(-1)
    assert (found["misjudged"], found["logprob"]) == (1.0, -2.0)


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path):
    pytest.importorskip("faiss", reason="needs the seam extra")
    config = SeamFilterConfig(
        run_dir=str(tmp_path / "s"),
        seeds=1,
        prompts=24,
        drop=(0.25,),
        random_drop=(0.25,),
        sft_steps=5,
        reward_steps=2,
        steps=2,
    )
    found = seam_filter.run(config)
    assert seam_filter.run(config) == found
    (seed,) = found["seeds"]
    assert set(seed["rl"]) == {"all", "seam-0.25", "random-0.25"}
    assert set(seed["estimators"]) == set(seam_filter.ESTIMATORS)
    assert all(0 <= value <= 1 for value in seed["mismatch"].values())
    assert np.isfinite(list(seed["rl"]["all"].values())).all()
