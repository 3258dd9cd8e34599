"""`rlhf-jax judge`: which of two completions is better, by a judge, and how far that
judge can be trusted.

The judge is a reward (a model, a function, http://...) or a chat model behind an
endpoint, which sees every pair in both orders. Into --out go judged.jsonl, a row a pair
with the verdicts, set_aside.jsonl, and judge.json:

    agreement      with the labels: share of the verdicts for `chosen`, a tie one half
    consistency    pairs on which both orders give the same verdict
    first          verdicts for the completion shown first; one half is no position bias
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.data.rows import Columns
from rlhf_jax.evals.accuracy import (
    bootstrap_interval,
    cluster_index,
    mean_with_interval,
    outcomes,
)
from rlhf_jax.io import progress
from rlhf_jax.io.chat import ChatClient, ChatConfig, Question
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import curate_rows, scored_rows
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam_prompts import as_text, normal

INSTRUCTION = (
    "Two answers to a request are given. Judge which one serves the person who asked "
    "better: correct first, then complete, then clear. Length is no merit and neither "
    "is the order in which they stand.\n\nRequest:\n{prompt}\n\nAnswer A:\n{first}\n\n"
    "Answer B:\n{second}\n\nEnd with one line, alone: A, B or TIE."
)
_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_AROUND = frozenset(
    ("answer", "better", "best", "final", "is", "judgement", "judgment", "my", "the")
    + ("verdict", "winner")
)
"""Words that may stand around a verdict."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Judge pairs of completions, and audit the judge against labels."""

    data: str
    """Pairs, SPEC; `chosen` is what the label prefers."""
    out: str
    """Directory for judged.jsonl, set_aside.jsonl and judge.json."""
    reward: str | None = None
    """The judge: a reward model, package.module:function, or http://..."""
    chat: ChatConfig = ChatConfig(max_tokens=256)
    """Or a chat model behind an endpoint."""
    instruction: str = INSTRUCTION
    """What the chat model is asked, with {prompt}, {first} and {second}."""
    overwrite: bool = False
    """Replace the files of an earlier judgement."""
    seed: int = 0
    """Of the intervals."""
    timeout_s: float = 60.0
    """Longest call of a reward that is a function or HTTP."""
    columns: Columns = Columns()
    """Names of the columns of data."""
    scoring: ScoringConfig = ScoringConfig()
    """How a reward model reads texts."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.chat.base_url is None):
            raise ValueError(
                "judge: expected --reward, or --chat.base_url and --chat.model"
            )
        missing = [
            name
            for name in ("{prompt}", "{first}", "{second}")
            if name not in self.instruction
        ]
        if missing:
            raise ValueError(f"instruction: expected {missing[0]} in it")


def run(config: JudgeConfig) -> dict[str, Any]:
    """Judges, writes, prints; returns what judge.json holds."""
    out = pathlib.Path(config.out).expanduser()
    path = out / "judged.jsonl"
    if path.exists() and not config.overwrite:
        raise ValueError(
            f"out {config.out}: holds a judgement; name another directory or set "
            "--overwrite true"
        )
    found = curate_rows.read_pairs(config.data, config.columns)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {config.out}: cannot write there: {error}") from None
    verdicts = _by_reward(config, found) if config.reward else _by_chat(config, found)
    scored_rows.write_whole(
        path,
        (
            {**row, "verdicts": each.tolist(), "schema": 1}
            for row, each in zip(found.rows, verdicts, strict=True)
        ),
    )
    scored_rows.write_whole(out / "set_aside.jsonl", found.left_out)
    result = {
        "schema": 1,
        "judge": config.reward or config.chat.model,
        "pairs": len(found.rows),
        "set_aside": dict(Counter(line["reason"] for line in found.left_out)),
        **_figures(verdicts, [normal(row["prompt"]) for row in found.rows], config),
    }
    write_atomic(out / "judge.json", json.dumps(result, indent=1))
    _show(result, out)
    return result


def _by_reward(config: JudgeConfig, found: curate_rows.Curated) -> np.ndarray:
    """Verdicts [Q 1]: a reward reads one completion at a time and knows no order."""
    rewards = open_rewards(
        [str(config.reward)], scoring=config.scoring, timeout_s=config.timeout_s
    )
    return outcomes(*curate_rows.side_rewards(found, rewards))[:, None]


def _by_chat(config: JudgeConfig, found: curate_rows.Curated) -> np.ndarray:
    """Verdicts [Q 2]: with `chosen` shown first, and second."""
    questions = [
        Question([{"role": "user", "content": _ask(row, order, config)}], 0.0)
        for row in found.rows
        for order in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    with ChatClient(config.chat) as chat:
        progress.say(f"{config.chat.model}: {chat.estimate(questions).describe()}")
        with progress.counting_bar("judging", len(questions)) as advance:
            replies = chat.ask(questions, advance)
    votes: list[list[float] | None] = []
    reasons: list[str | None] = []
    for first, second in zip(replies[::2], replies[1::2], strict=True):
        errors = [reply.error for reply in (first, second) if reply.error is not None]
        read = [_verdict(reply.text) for reply in (first, second)]
        if errors:
            reasons.append(f"no reply: {errors[0]}")
        elif None in read:
            text = (first, second)[read.index(None)].text
            reasons.append(f"no verdict: {text[-80:]!r}")
        else:
            reasons.append(None)
            votes.append([float(read[0] or 0.0), 1.0 - float(read[1] or 0.0)])
    found.keep(reasons)
    return np.array(votes)


def _ask(row: Row, order: Sequence[str], config: JudgeConfig) -> str:
    parts = {
        "{prompt}": as_text(row["prompt"]),
        "{first}": row[order[0]],
        "{second}": row[order[1]],
    }
    # In one pass: a text that holds such a name is not filled in.
    names = "|".join(map(re.escape, parts))
    return re.sub(names, lambda match: parts[match.group()], config.instruction)


def _verdict(text: str) -> float | None:
    """1 for the first, 0 for the second, one half for a tie: the last line, if it is
    nothing else; None without one."""
    for line in reversed(text.strip().splitlines()):
        words = re.findall("[A-Za-z]+", line)
        if words:
            left = [word.upper() for word in words if word.lower() not in _AROUND]
            return _VERDICTS.get(left[0]) if len(left) == 1 else None
    return None


def _figures(
    verdicts: np.ndarray, prompts: list[str], config: JudgeConfig
) -> dict[str, Any]:
    """Every number with its 95 % interval over prompts."""
    columns = {"agreement": verdicts.mean(axis=1)}
    if verdicts.shape[1] == 2:
        shown_first, shown_second = verdicts.T
        columns["consistency"] = (shown_first == shown_second).astype(float)
        columns["first"] = (shown_first + 1 - shown_second) / 2
    return {
        name: _interval(values, prompts, config.seed)
        for name, values in columns.items()
    }


def _interval(values: np.ndarray, prompts: list[str], seed: int) -> list[float]:
    """[mean, low, high]; resampled where a value is not simply right or wrong, which
    the interval of a proportion would take for a coin."""
    if np.isin(values, (0.0, 1.0)).all() or not np.ptp(values):
        return list(mean_with_interval(values, prompts, seed=seed)[:3])
    clusters = cluster_index(prompts)
    low, high = bootstrap_interval(values, clusters, samples=2000, seed=seed)
    return [float(values.mean()), low, high]


def _show(result: dict[str, Any], out: pathlib.Path) -> None:
    table = Table(title=f"{result['judge']}: {result['pairs']:,} pairs")
    for name in ("", "share", "95 %"):
        table.add_column(name, justify="right" if name else "left")
    meanings = {
        "agreement": "agrees with the labels",
        "consistency": "same verdict in both orders",
        "first": "prefers what is shown first",
    }
    for name, meaning in meanings.items():
        if name in result:
            value, low, high = result[name]
            table.add_row(meaning, f"{value:.3f}", f"{low:.3f} to {high:.3f}")
    console = Console(highlight=False)
    console.print(table)
    aside = ", ".join(f"{n:,} {reason}" for reason, n in result["set_aside"].items())
    text = f"{out / 'judged.jsonl'}; set aside: {aside or 'none'}"
    console.print(text, markup=False, soft_wrap=True)
