"""A reward model's objective under evaluation, with statistics of hidden states."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.reward_model import PairFunction, pair_losses, pair_values
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.losses.statistics import distribution, head_norm, state_statistics
from rlhf_jax.types import Mean, PreferenceBatch


def diagnosed_objective(
    apply: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    *,
    loss: PairFunction = bradley_terry,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
) -> Objective:
    """`reward_model.reward_objective`, and statistics of rewards and states.

    Args:
        apply: (params, sequences, score_at, key) -> (rewards [B S], states before the
            final norm [B S D], after it [B S D]).
        loss: see `reward_objective`.
        regularizers: see `reward_objective`.

    Returns:
        The objective. Beside the metrics of `reward_objective`: `reward/mean`,
        `reward/std`; `states/` and `states_before/` (the final norm) with
        state_norm_ and difference_norm_ mean, std, skewness and p99;
        `states/head_norm`.
        Except for the mean each is of one batch, and averaged over batches.

    Source: Hong et al. 2025, arXiv:2505.07271, analysis of the hidden states.
    """
    score = pair_losses(loss, regularizers)

    def objective(
        params: Any, batch: PreferenceBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        rewards, before, after = apply(params, batch.sequences, batch.score_at, key)
        chosen, rejected = pair_values(rewards, batch)
        total, metrics = score(chosen, rejected, batch)
        mask = batch.weight.reshape(-1) > 0
        spread = distribution(
            jnp.concatenate([chosen, rejected]), jnp.concatenate([mask, mask])
        )
        found = {"reward/mean": spread.mean, "reward/std": spread.std}
        for name, states in (("states", after), ("states_before", before)):
            figures = state_statistics(*pair_values(states, batch), mask)
            found |= {f"{name}/{key}": value for key, value in figures.items()}
        found["states/head_norm"] = head_norm(params["head"]["kernel"])
        # Filler batches of several processes must not count.
        weight = jnp.sum(mask).astype(jnp.float32)
        return total, metrics | {
            name: Mean(value * weight, weight) for name, value in found.items()
        }

    return objective
