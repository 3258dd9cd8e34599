"""The figures of the attacks study, their table and their plot."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from rich.table import Table

from rlhf_jax.io import scatter
from rlhf_jax.programs.seam_scoring import Line
from rlhf_jax.studies.statistics import interval

Judge: TypeAlias = Callable[[Sequence[Line], Sequence[str]], np.ndarray]
"""(lines, a completion of each) -> gold rewards."""
MEANING = {
    "found": "prompts with a completion",
    "success": "prompts with a misjudged one",
    "misjudged": "completions misjudged",
    "logprob": "log p a token",
    "gap": "best: reward above gold's",
    "gold": "best: gold reward",
    "best_logprob": "best: log p a token",
}
"""The figures of a method; the best is a prompt's completion of the highest reward."""


def figures(
    methods: Mapping[str, Sequence[Line]], judge: Judge | None
) -> dict[str, Any]:
    """MEANING's figures of each method, on the same prompts.

    Args:
        methods: lines of `seam_scoring.score_part`, one a prompt, in one order.
        judge: of the best completions; None = no gold rewards.

    Returns:
        `scorable`, how many prompts have a gold completion that both models take, of
        which found and success are shares; `common`, how many of them have a completion
        by every method, over which the rest are means; `gold_logprob` a token of their
        gold completions; `methods`.

    Raises:
        ValueError: no prompt has a completion by every method; says how many each has.
    """
    scorable = [
        n
        for n, line in enumerate(next(iter(methods.values())))
        if line["gold_reward"] is not None
    ]
    has = {
        name: [n for n in scorable if lines[n]["worse"]]
        for name, lines in methods.items()
    }
    common = sorted(set(scorable).intersection(*has.values()))
    if not common:
        counts = ", ".join(f"{name} {len(found)}" for name, found in has.items())
        raise ValueError(
            f"attacks: none of {len(scorable)} prompts has a worse completion by every "
            f"method, so nothing can be compared; prompts with one: {counts}"
        )
    return {
        "scorable": len(scorable),
        "common": len(common),
        "gold_logprob": float(
            np.mean(
                [
                    line["gold_logprob"] / line["gold_num_tokens"]
                    for line in (next(iter(methods.values()))[n] for n in common)
                ]
            )
        ),
        "methods": {
            name: {
                "found": len(has[name]) / len(scorable),
                "success": sum(_misjudged(lines[n]) > 0 for n in has[name])
                / len(scorable),
                **_means([lines[n] for n in common], judge),
            }
            for name, lines in methods.items()
        },
    }


def _means(lines: Sequence[Line], judge: Judge | None) -> dict[str, float]:
    best = [max(line["worse"], key=lambda each: each["reward"]) for line in lines]
    texts = [each["text"] for each in best]
    return {
        "misjudged": float(np.mean([_misjudged(line) for line in lines])),
        "logprob": float(
            np.mean([np.mean([_a_token(w) for w in line["worse"]]) for line in lines])
        ),
        "gap": float(
            np.mean(
                [
                    b["reward"] - line["gold_reward"]
                    for line, b in zip(lines, best, strict=True)
                ]
            )
        ),
        **({"gold": float(judge(lines, texts).mean())} if judge else {}),
        "best_logprob": float(np.mean([_a_token(b) for b in best])),
    }


def _misjudged(line: Line) -> float:
    """Share of the prompt's completions."""
    return float(np.mean([each["misjudged"] for each in line["worse"]]))


def _a_token(worse: Mapping[str, Any]) -> float:
    return worse["logprob"] / worse["num_tokens"]


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The methods, means over seeds.

    Args:
        found: from `figures`, one a seed.
    """
    methods = found[0]["methods"]
    names = [name for name in MEANING if name in next(iter(methods.values()))]
    shown = Table(title=f"attacks on {len(found)} reward models")
    shown.add_column("", no_wrap=True)
    for name in names:
        shown.add_column(MEANING[name], justify="right")
    for method in methods:
        rows = [result["methods"][method] for result in found]
        columns = ([row[name] for row in rows] for name in names)
        shown.add_row(method, *(interval(values).plain() for values in columns))
    scorable, common = (sum(f[name] for f in found) for name in ("scorable", "common"))
    gold_logprob = interval([result["gold_logprob"] for result in found])
    shown.caption = (
        f"means and 95 % intervals over seeds. The first two columns: shares of all "
        f"{scorable:,} prompts with a gold completion that both models take; the "
        f"others: means over the {common:,} of them with a completion by every method. "
        f"Best: the completion with the highest reward. Gold completions: "
        f"{gold_logprob.plain()} log p a token"
    )
    if "given" in methods and "generate" not in methods:
        shown.caption += (
            ". `given`, the testbed's known corruptions, stands in for `generate`: the "
            "testbed's policy does not follow a writer's instruction"
        )
    return shown


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """How often the reward model misjudges against how likely the policy writes it.

    Args:
        found: from `figures`, one a seed.
        path: of the PNG.
    """
    points = []
    for name in found[0]["methods"]:
        x, y = (
            interval([result["methods"][name][key] for result in found])
            for key in ("logprob", "misjudged")
        )
        points.append(scatter.Point(name, x.mean, y.mean, x.half, y.half))
    scatter.scatter(
        points,
        path,
        title=f"Misjudged, and likely? (± 95 %, seeds: {len(found)})",
        x="log p a token of the policy",
        y="completions misjudged",
        reference=(
            float(np.mean([result["gold_logprob"] for result in found])),
            "gold completions",
        ),
    )
