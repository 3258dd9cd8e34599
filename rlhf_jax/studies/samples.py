"""Completions of a policy with their gold rewards, sampled once and kept, and
how a reward model orders them."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.rows import kwise_row
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.programs import generate
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.studies.quickstart import GOLD


def sample(
    policy: str | os.PathLike[str],
    out: pathlib.Path,
    prompts: str,
    *,
    samples: int = 1,
    max_new_tokens: int = 48,
    gold: str = GOLD,
) -> pathlib.Path:
    """JSON lines of `generate`: a line a completion, or with several samples a line a
    prompt. A file that is there is not made again.

    Args:
        policy: as in `models`.
        out: the file.
        prompts: SPEC.
        samples: completions of each prompt.
        max_new_tokens: of a completion.
        gold: the reward that scores them.
    """
    if not out.exists():
        partial = out.with_suffix(".partial")
        generate.run(
            generate.GenerateConfig(
                model=str(policy),
                data=[prompts],
                out=str(partial),
                overwrite=True,
                grouped=samples > 1,
                gold=gold,
                batch_size=128 // samples,
                sampling=SamplingConfig(
                    num_samples=samples, max_new_tokens=max_new_tokens
                ),
            )
        )
        partial.rename(out)
    return out


def agreement(model: str, paths: Sequence[pathlib.Path]) -> float:
    """Share of the pairs of completions of one prompt that a reward model orders as
    gold does.

    Args:
        model: the reward model.
        paths: files of rows with scored `responses`.
    """
    rows = [kwise_row(row) for path in paths for row in read_jsonl(path)]
    scorer = open_scorer(model, ScoringConfig())
    encoded = [
        scorer.encoder.encode(row.prompt, response.text)
        for row in rows
        for response in row.responses
    ]
    ends = np.cumsum([len(row.responses) for row in rows])
    rewards = np.split(scorer.rewards(encoded), ends[:-1].tolist())
    gold = [np.array([r.score for r in row.responses]) for row in rows]
    return evaluate_ranking(rewards, gold, samples=2).get("accuracy", float("nan"))
