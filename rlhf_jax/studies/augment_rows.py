"""The rows of `study seam-augment`: which prompts are taught, by guided and by random
rows, and on which others the risk of a pair is measured.
"""

import pathlib
from typing import Any

import numpy as np

from rlhf_jax.curation.seam import augment, scores
from rlhf_jax.programs.scored_rows import read_jsonl, write_whole
from rlhf_jax.programs.seam_select import read_run
from rlhf_jax.testbed.prompts import generator

FILES = {
    "random": ("random-sft.jsonl", "random-pairs.jsonl"),
    "guided": ("sft.jsonl", "pairs.jsonl"),
}
"""Added rows -> (their SFT rows, their pairs), files as those of `seam-augment`."""
WORSE = 5
"""Worse completions of each prompt when the risk of a pair is measured again; prompts
with fewer are not measured."""
AGAIN = "again.jsonl"
"""The prompts that risk is measured on."""
_STREAM = ("seam-augment",)
"""First label of this study's random draws; each has a name of its own after it."""
Line = dict[str, Any]
"""Of a seam.jsonl."""


def halves(measured: pathlib.Path, seed: int) -> tuple[list[Line], list[Line]]:
    """The scored prompts of a `seam` run, cut in two at random: those that rows are
    made of, and those that risk is measured on."""
    _, lines = read_run(str(measured), None)
    order = generator(seed, *_STREAM, "halves").permutation(len(lines))
    first, second = order[: len(lines) // 2], order[len(lines) // 2 :]
    return [lines[n] for n in np.sort(first)], [lines[n] for n in np.sort(second)]


def make_rows(measured: pathlib.Path, share: float, pairs: int, seed: int) -> None:
    """Writes the guided and the random rows, all of the first half.

    Args:
        measured: directory of a `seam` run; rows/ in it gets the files.
        share: of the half, from the lowest on.
        pairs: most of a prompt.
        seed: of the draws.
    """
    lines, _ = halves(measured, seed)
    chosen = _lowest(lines, share, seed, "taught").tolist()
    control = _number(seed, "control")
    made = {
        "guided": augment.augment(lines, chosen, pairs=pairs),
        "random": augment.random_control(lines, chosen, pairs=pairs, seed=control),
    }
    folder = measured / "rows"
    folder.mkdir(exist_ok=True)
    for kind, tables in made.items():
        for name, rows in zip(FILES[kind], tables, strict=True):
            write_whole(folder / name, rows)


def count_rows(measured: pathlib.Path) -> dict[str, float]:
    """How many rows were added, and of how many prompts; and the share of the texts
    that risk is measured on that some added row has too, of another prompt."""
    of = {
        kind: [read_jsonl(measured / "rows" / name) for name in names]
        for kind, names in FILES.items()
    }
    sft, pairs = of["guided"]
    texts = {row["completion"] for kind in of for row in of[kind][0]}
    texts |= {row["rejected"] for kind in of for row in of[kind][1]}
    again = [text for row in read_jsonl(measured / AGAIN) for text in row["worse"]]
    judged_well = {row["prompt"] for row in sft} - {row["prompt"] for row in pairs}
    return {
        "lowest": len(sft),
        "not_misjudged": len(judged_well),
        "guided_pairs": len(pairs),
        "random_pairs": len(of["random"][1]),
        "texts_in_rows": float(np.mean([text in texts for text in again])),
    }


def remembered(measured: pathlib.Path, share: float, seed: int) -> pathlib.Path:
    """A file of the lowest prompts of the second half and as many others of it, each
    with WORSE of its worse completions, so that all pairs are measured on the same
    texts.

    Raises:
        ValueError: too few prompts have that many.
    """
    _, half = halves(measured, seed)
    lines = [line for line in half if len(line["worse"]) >= WORSE]
    lowest = _lowest(lines, share, seed, "measured")
    if not len(lowest):
        raise ValueError(
            f"prompts: {len(lines)} of the {len(half)} to measure risk on have {WORSE} "
            "worse completions; take more prompts or another estimator"
        )
    others = np.setdiff1d(np.arange(len(lines)), lowest)
    draw = generator(seed, *_STREAM, "others")
    drawn = draw.permutation(others)[: len(lowest)]
    path = measured / AGAIN
    write_whole(
        path,
        (
            {
                "prompt": lines[n]["prompt"],
                "gold_completion": lines[n]["gold"],
                "worse": [each["text"] for each in lines[n]["worse"][:WORSE]],
                "lowest": kind,
            }
            for kind, chosen in ((True, lowest), (False, drawn))
            for n in chosen
        ),
    )
    return path


def _lowest(lines: list[Line], share: float, seed: int, name: str) -> np.ndarray:
    seam_of = np.array([scores.of_line(line) for line in lines])
    return scores.lowest(seam_of, share, seed=_number(seed, "ties", name))


def _number(seed: int, *labels: str) -> int:
    """A seed of a draw of its own."""
    return int(generator(seed, *_STREAM, *labels).integers(2**31))
