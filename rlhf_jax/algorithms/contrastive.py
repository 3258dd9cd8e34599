"""Reward modelling with a contrastive term between two dropout views of each pair.

    total = mean of the pair loss over both views + coefficient * contrastive loss

The views are two forward passes with separate dropout keys, so a model without dropout
has identical views and nothing to learn from them. All completions of the batch are
each other's negatives: for micro-batches use `reward_model.over_micro_batches`.
`ContrastiveConfig` names the paper's four variants with its weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.reward_model import PairFunction, pair_losses, pair_values
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses import contrastive
from rlhf_jax.losses.masked import weighted_mean
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.types import Mean, PreferenceBatch

_SWAV_ONLY = ("num_prototypes", "sinkhorn_epsilon", "sinkhorn_iterations")


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """A contrastive term in reward modelling; null = the paper's value."""

    kind: Literal["none", "simcse", "swav"] = "none"
    """none, SimCSE (each completion finds itself), or SwAV (clusters agree)."""
    items: Literal["pairs", "differences"] = "pairs"
    """What finds itself again: the states of both completions, or their differences."""
    coefficient: float | None = None
    """Weight beside the pair loss: SimCSE 1, SwAV 0.1 on pairs and 0.5 on
    differences."""
    temperature: float | None = None
    """Of the softmax: SimCSE 0.05, SwAV 0.1 (not stated in the paper)."""
    num_prototypes: int | None = None
    """Clusters of SwAV: 50 on pairs, 20 on differences."""
    sinkhorn_epsilon: float = 0.05
    """SwAV's: smaller = harder assignments to clusters."""
    sinkhorn_iterations: int = 3
    """SwAV's: more = clusters of more equal size."""

    def __post_init__(self) -> None:
        for name in ("coefficient", "temperature", "sinkhorn_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"contrastive.{name}: expected a finite number above 0, got {value}"
                )
        if self.sinkhorn_iterations < 1:
            raise ValueError(
                f"contrastive.sinkhorn_iterations: expected at least 1, got "
                f"{self.sinkhorn_iterations}"
            )
        if self.num_prototypes is not None and self.num_prototypes < 2:
            raise ValueError(
                f"contrastive.num_prototypes: expected at least 2, got "
                f"{self.num_prototypes}"
            )
        for field in dataclasses.fields(self)[1:]:
            kinds = ("swav",) if field.name in _SWAV_ONLY else ("simcse", "swav")
            if self.kind not in kinds and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"contrastive.{field.name}: contrastive.kind {self.kind} does not "
                    f"use it; set contrastive.kind to {' or '.join(kinds)} with it"
                )

    @property
    def differences(self) -> bool:
        """Whether the items are differences."""
        return self.items == "differences"

    @property
    def weight(self) -> float:
        """beta."""
        if self.coefficient is not None:
            return self.coefficient
        return 1.0 if self.kind == "simcse" else 0.5 if self.differences else 0.1

    @property
    def prototypes(self) -> int:
        """Number of prototypes; 0 = none."""
        if self.kind != "swav":
            return 0
        return self.num_prototypes or (20 if self.differences else 50)


def make_contrast(config: ContrastiveConfig) -> Callable[..., jax.Array]:
    """(params, first [N D], second [N D], weight [N]) -> losses [N] of a config.

    SwAV reads `params["prototypes"]["kernel"]`, of shape [K D].
    """
    if config.kind == "swav":
        tau = config.temperature or 0.1
        return lambda params, first, second, weight: contrastive.swav(
            first,
            second,
            params["prototypes"]["kernel"],
            weight,
            temperature=tau,
            epsilon=config.sinkhorn_epsilon,
            iterations=config.sinkhorn_iterations,
        )
    tau = config.temperature or 0.05
    return lambda params, first, second, weight: contrastive.simcse(
        first, second, weight, temperature=tau
    )


def init_prototypes(count: int, width: int, key: jax.Array) -> dict[str, jax.Array]:
    """{"kernel": [K D]}: directions drawn at random."""
    return {"kernel": jax.random.normal(key, (count, width)) * width**-0.5}


def contrastive_objective(
    apply: Callable[..., tuple[jax.Array, ...]],
    *,
    contrast: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array],
    coefficient: float = 1.0,
    differences: bool = False,
    loss: PairFunction = bradley_terry,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
) -> Objective:
    """An objective (params, PreferenceBatch, key) -> (Mean, metrics).

    Args:
        apply: (params, sequences, score_at, key) -> (rewards [B S], ..., hidden
            [B S D]), with dropout drawn from the key; what is between is not read.
        contrast: (params, first [N D], second [N D], weight [N]) -> losses [N].
        coefficient: beta; 1 for SimCSE, 0.1 for SwAV on pairs and 0.5 on differences.
        differences: the items are h_chosen - h_rejected and its negative, instead of
            h_chosen and h_rejected; N = 2 Q either way.
        loss: of a pair, see `reward_model.reward_objective`.
        regularizers: see there.

    Returns:
        The objective; its metrics are those of the pair loss, `contrastive/loss`, and
        `contrastive/share`, the part of the total that the contrastive term is.

    Source: Wang et al. 2024, arXiv:2401.06080, section 3.2 and eq. 10.
    """
    score = pair_losses(loss, regularizers)

    def objective(
        params: Any, batch: PreferenceBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        views = [
            apply(params, batch.sequences, batch.score_at, view_key)
            for view_key in jax.random.split(key)
        ]
        scored = [score(*pair_values(rewards, batch), batch) for rewards, *_ in views]
        pair_loss = scored[0][0] + scored[1][0]
        items = [_items(h, batch, differences) for *_, h in views]
        weight = jnp.tile(batch.weight.reshape(-1), 2)
        extra = weighted_mean(contrast(params, items[0], items[1], weight), weight)
        added = coefficient * extra.total
        metrics = {name: m + scored[1][1][name] for name, m in scored[0][1].items()}
        total = jnp.abs(pair_loss.total) + jnp.abs(added)
        metrics |= {
            "contrastive/loss": extra,
            "contrastive/share": Mean(jnp.abs(added), total),
        }
        return Mean(pair_loss.total + added, pair_loss.weight), metrics

    return objective


def _items(hidden: jax.Array, batch: PreferenceBatch, differences: bool) -> jax.Array:
    """[2Q D] from the states of all score slots."""
    chosen, rejected = pair_values(hidden, batch)
    if differences:
        return jnp.concatenate([chosen - rejected, rejected - chosen])
    return jnp.concatenate([chosen, rejected])
