"""What a growing reward is made of: a reward model's figures while it is trained.

`diagnosed_objective` adds those of the training batch to every step.
`make_diagnosed_evaluate` gives, for every batch of an evaluation set, the rewards and
the hidden states themselves: a mean over batches of a deviation, a percentile or a rank
is not that of the set, so `programs.held_out` takes them over all of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.reward_model import PairFunction, pair_losses, pair_values
from rlhf_jax.algorithms.update import Objective, join_trees
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.losses.statistics import distribution, head_norm, state_statistics
from rlhf_jax.types import Mean, PairStates, PreferenceBatch, TrainState

StatesApply: TypeAlias = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""(params, sequences, score_at, key) -> (rewards [B S], states before the final norm
[B S D], after it [B S D])."""
DiagnosedEvaluate: TypeAlias = Callable[
    [TrainState, PreferenceBatch], tuple[dict[str, Mean], PairStates]
]


def diagnosed_objective(
    apply: StatesApply,
    *,
    loss: PairFunction = bradley_terry,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
) -> Objective:
    """`reward_model.reward_objective`, and figures of the batch's rewards and states.

    Args:
        apply: see `StatesApply`.
        loss: see `reward_objective`.
        regularizers: see `reward_objective`.

    Returns:
        The objective. Beside the metrics of `reward_objective`: `head_norm`, and of the
        batch alone `batch/` reward_mean, _std, _min, _max; state_norm_ and
        difference_norm_ with mean, std, skewness and p99, and the same with
        norm_before_ (the final norm). Of micro-batches the mean of theirs.

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
        figures = _reward_figures(
            jnp.concatenate([chosen, rejected]), jnp.concatenate([mask, mask])
        )
        for suffix, states in (("", after), ("_before", before)):
            pair = pair_values(states, batch)
            figures |= state_statistics(*pair, mask, suffix=suffix)
        found = {f"batch/{name}": value for name, value in figures.items()}
        found["head_norm"] = head_norm(params["head"]["kernel"])
        return total, metrics | _means(found, mask)

    return objective


def make_diagnosed_evaluate(
    apply: StatesApply,
    *,
    loss: PairFunction = bradley_terry,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
) -> DiagnosedEvaluate:
    """`update.make_evaluate` of a `reward_objective`, which also gives what it scored.

    Args:
        apply: see `StatesApply`; without dropout.
        loss: see `reward_objective`.
        regularizers: see `reward_objective`.

    Returns:
        (state, batch) -> (loss, metrics of `reward_objective` and `head_norm` as means
        to be added over batches; the rewards and states of every pair).
    """
    score = pair_losses(loss, regularizers)

    def evaluate(
        state: TrainState, batch: PreferenceBatch
    ) -> tuple[dict[str, Mean], PairStates]:
        params = join_trees(state.params, state.frozen)
        key = jax.random.key(0)
        found = apply(params, batch.sequences, batch.score_at, key)
        sides = [pair_values(values, batch) for values in found]
        total, metrics = score(*sides[0], batch)
        weight = batch.weight.reshape(-1)
        norm = {"head_norm": head_norm(params["head"]["kernel"])}
        means = {"loss": total, **metrics, **_means(norm, weight > 0)}
        rewards, before, after = (jnp.stack(side, axis=1) for side in sides)
        return means, PairStates(
            rewards=rewards, before=before, after=after, weight=weight
        )

    return evaluate


def _reward_figures(rewards: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    rewards = jax.lax.stop_gradient(rewards)
    spread = distribution(rewards, mask)
    low = jnp.min(jnp.where(mask, rewards, jnp.inf))
    high = jnp.max(jnp.where(mask, rewards, -jnp.inf))
    return {
        "reward_mean": spread.mean,
        "reward_std": spread.std,
        "reward_min": low,
        "reward_max": high,
    }


def _means(figures: dict[str, jax.Array], mask: jax.Array) -> dict[str, Mean]:
    """Each weighed by the pairs that count: filler batches of several processes must
    not."""
    weight = jnp.sum(mask).astype(jnp.float32)
    return {
        name: Mean(jnp.where(weight > 0, value * weight, 0.0), weight)
        for name, value in figures.items()
    }
