"""Texts of `seam` through both models: lines without a score, then with one.

`score_part` gives each prompt its line, `with_scores` adds risk, seam and rank,
`without_score` says why a prompt has none. `read_parts` reads lines back.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from rlhf_jax.curation.seam import scores
from rlhf_jax.curation.seam.scores import SeamFormula
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.texts import Texts
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.rewards import Rewards
from rlhf_jax.programs.scorer import Refusal, Scorer
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse

Line: TypeAlias = dict[str, Any]


def read_parts(path: pathlib.Path, total: int, part: int) -> list[Line]:
    """The whole parts of a file of lines; a torn or unfinished part is cut off."""
    if not path.exists():
        return []
    # As bytes: the tear may go through a character.
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) < total:
        lines = lines[: len(lines) // part * part]
        write_atomic(path, b"".join(line + b"\n" for line in lines).decode("utf-8"))
    return [json.loads(line) for line in lines]


def score_part(
    name: str,
    prompts: Sequence[SeamPrompt],
    completions: Worse,
    likelihood: Scorer,
    rewards: Rewards,
) -> list[Line]:
    """One line a prompt, with gold_reward null where the gold completion is refused."""
    offered = [
        [{"text": prompt.gold, "source": "gold"}, *made]
        for prompt, made in zip(prompts, completions, strict=True)
    ]
    texts = _texts(prompts, offered)
    taken = _take(texts, likelihood, rewards)
    lines = [_line(name, prompt) for prompt in prompts]
    encoded, kept, first = [], [], 0
    for line, some in zip(lines, offered, strict=True):
        for place, each in enumerate(some, start=first):
            ids = taken[place]
            if place > first and each["text"].strip() == line["gold"].strip():
                ids = Refusal("the gold completion")
            if isinstance(ids, Refusal):
                why = ": ".join(part for part in (ids.reason, ids.detail) if part)
                line["refused"].append({**each, "reason": why})
                if place == first:
                    break
            else:
                encoded.append(ids)
                kept.append(place)
                line["worse"].append({**each, "num_tokens": len(ids.completion)})
        first += len(some)
    if not kept:
        return lines
    logprobs = likelihood.rewards(encoded)
    found = rewards.score(texts.take(kept)).total
    numbers = iter(zip(logprobs.tolist(), found.tolist(), strict=True))
    for line in lines:
        for each in line["worse"]:
            each["logprob"], each["reward"] = next(numbers)
        if line["worse"]:
            gold = line["worse"].pop(0)
            line["gold_reward"] = gold["reward"]
            line["gold_logprob"] = gold["logprob"]
            line["gold_num_tokens"] = gold["num_tokens"]
        for each in line["worse"]:
            each["misjudged"] = each["reward"] > line["gold_reward"]
    return lines


def _line(name: str, prompt: SeamPrompt) -> Line:
    """The line of a prompt before anything is scored."""
    line: Line = {
        "schema": 1,
        "index": prompt.index,
        "prompt_id": prompt.prompt_id,
        "where": prompt.where,
        "prompt": prompt.prompt,
        "gold": prompt.gold,
        "gold_reward": None,
        "estimator": name,
        "worse": [],
        "refused": [],
    }
    return {**line, "tools": prompt.tools} if prompt.tools else line


def _texts(prompts: Sequence[SeamPrompt], offered: Worse) -> Texts:
    """All texts offered for the prompts, one after another."""
    rows = map(_row, prompts)
    return Texts(
        [prompt.prompt for prompt, some in zip(prompts, offered) for _ in some],
        [each["text"] for some in offered for each in some],
        [row for row, some in zip(rows, offered, strict=True) for _ in some],
    )


def _take(
    texts: Texts, likelihood: Scorer, rewards: Rewards
) -> list[EncodedCompletion | Refusal]:
    """Token ids of the policy, or why one of the models cannot take a text."""
    refused, encoded = rewards.refusals(texts), likelihood.encode_all(texts)
    return [
        (why or ids) if text.strip() else Refusal("empty")
        for text, why, ids in zip(texts.completions, refused, encoded, strict=True)
    ]


def _row(prompt: SeamPrompt) -> Line:
    """What rewards read of a row: `tools` under its standard name."""
    return {**prompt.row, "tools": prompt.tools}


def with_scores(
    lines: Sequence[Line], formula: SeamFormula, min_worse: int
) -> list[Line]:
    """Lines that have a score, with risk, seam (null = infinite) and rank."""
    scored = [line for line in lines if len(line["worse"]) >= min_worse]
    if not scored:
        return []
    log_risks = np.array(
        [
            scores.log_risk(
                np.array([each["logprob"] for each in line["worse"]]),
                np.array([each["num_tokens"] for each in line["worse"]]),
                np.array([each["reward"] for each in line["worse"]]),
                line["gold_reward"],
                formula,
            )
            for line in scored
        ]
    )
    ranks = scores.ranks(-log_risks)
    return [
        {
            **line,
            "risk": float(np.exp(log_risk)),
            "seam": float(-log_risk) if np.isfinite(log_risk) else None,
            "rank": float(rank),
        }
        for line, log_risk, rank in zip(scored, log_risks, ranks, strict=True)
    ]


def without_score(
    prompts: Sequence[SeamPrompt], lines: Sequence[Line], min_worse: int
) -> list[Line]:
    """A line for each prompt that an estimator gives no score, and why."""
    left_out = []
    for prompt, line in zip(prompts, lines, strict=True):
        if len(line["worse"]) >= min_worse:
            continue
        why = [each["reason"] for each in line["refused"]]
        if line["gold_reward"] is None:
            reason = "gold completion cannot be scored"
        elif line["worse"]:
            reason = f"fewer than {min_worse} worse completions"
        elif why:
            reason = "no worse completion can be scored"
        else:
            reason = "no worse completion"
        left_out.append(
            scored_rows.set_aside(
                prompt.where,
                f"{line['estimator']}: {reason}",
                "".join(why[:1]),
                prompt.row,
            )
        )
    return left_out
