"""`rlhf-jax seam-augment`: training rows of the prompts of the lowest SEAM.

Reads the directory of a `seam` run. --out gets sft.jsonl for the policy, pairs.jsonl
for the reward model, and the same numbers of rows of random prompts, random-sft.jsonl
and random-pairs.jsonl, as the control. See `curation.seam.augment`.
"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np
from rich.console import Console

from rlhf_jax.curation.seam import augment, scores
from rlhf_jax.programs import scored_rows
from rlhf_jax.programs.seam_select import make_room, read_run


@dataclasses.dataclass(frozen=True)
class SeamAugmentConfig:
    """SFT rows and pairs of the prompts that policy and reward model do not share."""

    run_dir: str
    """Directory of a `seam` run."""
    out: str
    """Directory for the rows."""
    lowest: float = 0.2
    """Share of the scored prompts to augment from."""
    pairs: int = 4
    """Most pairs of a prompt, against its likeliest misjudged completions."""
    estimator: str | None = None
    """Whose scores; null = the run's only one."""
    control: Literal["any", "misjudged"] = "any"
    """What the random pairs are against: any worse completions, or only such as the
    reward model misjudges, as the pairs of the lowest prompts are."""
    overwrite: bool = False
    """Replace files of these names."""
    seed: int = 0
    """Of the control, and of the draw among equal scores."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= 1 or self.pairs < 1:
            raise ValueError(
                f"lowest {self.lowest}, pairs {self.pairs}: expected a share in (0, 1] "
                "and at least 1"
            )
        if self.control not in ("any", "misjudged"):
            raise ValueError(f"control {self.control!r}: expected any or misjudged")


def run(config: SeamAugmentConfig) -> list[pathlib.Path]:
    """Writes the files; returns their paths."""
    _, lines = read_run(config.run_dir, config.estimator)
    seam = np.array([scores.of_line(line) for line in lines])
    chosen = scores.lowest(seam, config.lowest, seed=config.seed).tolist()
    if not chosen:
        raise ValueError(
            f"lowest {config.lowest}: is no prompt of {len(lines)}; take a larger share"
        )
    sft, pairs = augment.augment(lines, chosen, pairs=config.pairs)
    random_sft, random_pairs = augment.random_control(
        lines,
        chosen,
        pairs=config.pairs,
        seed=config.seed,
        misjudged=config.control == "misjudged",
    )
    out = pathlib.Path(config.out).expanduser()
    files = {
        "sft.jsonl": sft,
        "pairs.jsonl": pairs,
        "random-sft.jsonl": random_sft,
        "random-pairs.jsonl": random_pairs,
    }
    make_room(out, [out / name for name in files], config.overwrite)
    console = Console(highlight=False)
    for name, rows in files.items():
        scored_rows.write_whole(out / name, rows)
        console.print(f"{out / name}: {len(rows):,} rows", markup=False, soft_wrap=True)
    nothing = sum(not np.isfinite(seam[n]) for n in chosen)
    if nothing:
        console.print(
            f"{nothing:,} of the {len(chosen):,} prompts have no misjudged completion, "
            "so no pair"
        )
    return [out / name for name in files]
