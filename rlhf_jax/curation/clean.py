"""What is done with each pair, given its strength: keep, flip, soften, drop; margins.

The paper's four methods are

    Flip                   flip_fraction=0.2 (its main text; its appendix has 0.1)
    Margin                 margin=True
    Flip + Margin          both
    Soft label + Margin    soft_below=0, margin=True

Its soft label is one constant; `soft_temperature` makes it a function of the strength.

Source: Wang et al. 2024, arXiv:2401.06080, section 2.3, eq. 5-6.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.curation.strength import Strength, below_fraction

ACTIONS = ("keep", "flip", "soft", "drop")


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """Which pairs are changed, by the lowest fraction or below a threshold of mu."""

    flip_fraction: float = 0.0
    """Share of the pairs, of lowest strength, whose labels are swapped."""
    flip_below: float | None = None
    """Swap the labels of pairs with a strength below this."""
    soft_fraction: float = 0.0
    """Share of the pairs, of lowest strength, that get a soft label; 1 = all."""
    soft_below: float | None = None
    """Give a soft label to pairs with a strength below this."""
    soft_label: float = 0.5
    """Probability that the chosen completion of a softened pair is the better one: 1 -
    alpha, which the paper does not state. 0.5 pulls the rewards together."""
    soft_temperature: float | None = None
    """T of the soft label sigmoid(strength / T), instead of `soft_label`: 1 is what the
    members' mean difference says under Bradley-Terry, more is less sure."""
    drop_fraction: float = 0.0
    """Share of the pairs, of lowest strength, that are left out."""
    drop_below: float | None = None
    """Leave out pairs with a strength below this."""
    margin: bool = False
    """Write the strength as the margin of every pair, with the other sign after a
    flip."""
    margin_scale: float = 1.0
    """Factor of the margin."""

    def __post_init__(self) -> None:
        for name in ("flip", "soft", "drop"):
            fraction, below = (
                getattr(self, f"{name}_{kind}") for kind in ("fraction", "below")
            )
            if not 0 <= fraction < 1 and (name, fraction) != ("soft", 1):
                span = "[0, 1]" if name == "soft" else "[0, 1)"
                raise ValueError(
                    f"clean.{name}_fraction: expected a share in {span}, got {fraction}"
                )
            if fraction and below is not None:
                raise ValueError(
                    f"clean.{name}_fraction and clean.{name}_below: give one of the two"
                )
            if below is not None and not np.isfinite(below):
                raise ValueError(
                    f"clean.{name}_below: expected a finite number, got {below}"
                )
        if not 0 <= self.soft_label <= 1:
            raise ValueError(
                f"clean.soft_label: expected a probability in [0, 1], got "
                f"{self.soft_label}"
            )
        self._check_temperature()
        if not 0 < self.margin_scale < np.inf:
            raise ValueError(
                f"clean.margin_scale: expected a finite number above 0, got "
                f"{self.margin_scale}; set clean.margin false for no margins"
            )

    def _check_temperature(self) -> None:
        if self.soft_temperature is None:
            return
        if not 0 < self.soft_temperature < np.inf:
            raise ValueError(
                "clean.soft_temperature: expected a finite number above 0, got "
                f"{self.soft_temperature}"
            )
        if not self.softens:
            raise ValueError(
                "clean.soft_temperature: no pair gets a soft label; set "
                "clean.soft_fraction (1 = all pairs) or clean.soft_below with it"
            )
        if self.soft_label != 0.5:
            raise ValueError(
                "clean.soft_label and clean.soft_temperature: give one of the two"
            )

    @property
    def softens(self) -> bool:
        """Whether any pair can get a soft label."""
        return self.soft_fraction > 0 or self.soft_below is not None


def decide(found: Strength, config: CleanConfig) -> np.ndarray:
    """The action of each pair, [Q] of ACTIONS: drop before flip before soft."""
    actions = np.full(len(found.gaps), "keep", dtype="<U4")
    for name in ("soft", "flip", "drop"):  # later ones win
        fraction = getattr(config, f"{name}_fraction")
        below = getattr(config, f"{name}_below")
        if fraction:
            actions[below_fraction(found.mean, fraction)] = name
        elif below is not None:
            actions[found.mean < below] = name
    return actions


def changed_row(
    row: Mapping[str, Any],
    action: str,
    mean: float,
    config: CleanConfig,
    *,
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> dict[str, Any] | None:
    """The row after its action, with the columns that training reads; None = dropped.

    Args:
        row: of the pairs.
        action: one of ACTIONS.
        mean: its strength.
        config: what was asked for; decides which columns all rows get. A flip swaps
            the two completions alone; other columns stay as they are.
        chosen: name of that column.
        rejected: name of that column.

    Raises:
        ValueError: the row already has a column that would be written.
    """
    written = ["margin"] * config.margin + ["soft_label"] * config.softens
    taken = [name for name in written if name in row]
    if taken:
        raise ValueError(
            f"the row has a column {taken[0]!r} already; rename it: it is not "
            "overwritten"
        )
    if action == "drop":
        return None
    new = dict(row)
    if action == "flip":
        new[chosen], new[rejected] = row[rejected], row[chosen]
    if config.margin:
        sign = -1.0 if action == "flip" else 1.0
        new["margin"] = sign * config.margin_scale * float(mean)
    if config.softens:
        new["soft_label"] = soft_label(mean, config) if action == "soft" else 1.0
    return new


def soft_label(mean: float, config: CleanConfig) -> float:
    """The probability that the chosen completion of a softened pair is the better one.

    p = 1 - alpha             without a temperature
    p = sigmoid(mu / T)       with soft_temperature T

    Args:
        mean: mu, the strength of the pair.
        config: has the two.

    Source: 1 - alpha is Wang et al. 2024, arXiv:2401.06080, eq. 5; sigmoid(mu / T) is
    Bradley-Terry with the mean difference of the members as the rewards' own, T being
    ours.

    >>> soft_label(0.0, CleanConfig(soft_fraction=1.0, soft_temperature=2.0))
    0.5
    """
    if config.soft_temperature is None:
        return config.soft_label
    # By tanh: exp overflows at a low temperature.
    return 0.5 + 0.5 * math.tanh(0.5 * float(mean) / config.soft_temperature)
