"""Reward modelling on pairs: the objective that makes a pairwise loss a training step.

    objective = reward_objective(
        apply, loss=bradley_terry, regularizers=[(batch_sum_to_zero, 1e-3)]
    )
    update = jax.jit(make_update(objective, tx), donate_argnums=0)

One forward pass scores chosen and rejected together, in whatever layout the batch has.
Terms that couple the pairs of a batch must see all of it: give the objective the
stacked micro-batches and `over_micro_batches(apply)`, instead of accumulating.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses.masked import masked_mean, weighted_mean
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.losses.ranking import plackett_luce
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.types import PAIR_COLUMNS, GroupBatch, Mean, PreferenceBatch, Sequences

PairFunction: TypeAlias = Callable[..., jax.Array]


def reward_objective(
    apply: Callable[..., jax.Array],
    *,
    loss: PairFunction = bradley_terry,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
    **hyper_parameters: Any,
) -> Objective:
    """An objective (params, PreferenceBatch, key) -> (Mean, metrics) from a pair loss.

    Args:
        apply: (params, sequences, score_at, key) -> rewards [B S]; the key feeds
            dropout.
        loss: (chosen_rewards [Q], rejected_rewards [Q], **kwargs) -> losses [Q]. The
            batch's columns (margin, soft_label, gap_bound) are passed to it by name.
        regularizers: (function, coefficient); a function takes (chosen_rewards [Q],
            rejected_rewards [Q], weight [Q], **kwargs) -> values [Q], which are added
            to the losses, times the coefficient.
        hyper_parameters: further keyword arguments of the loss.

    Returns:
        The objective: sum_i w_i (loss_i + regularizers) / sum_i w_i over the pairs of a
        step, so that only the ratios of the weights within it count. Its metrics are
        those of `pair_metrics` and, for each regularizer, its mean value before the
        coefficient, `regularizer/NAME`.

    Raises:
        ValueError: the batch carries a column that neither the loss nor a regularizer
            takes, or one of them does not return one value a pair.
    """
    score = pair_losses(loss, regularizers, **hyper_parameters)

    def objective(
        params: Any, batch: PreferenceBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        rewards = apply(params, batch.sequences, batch.score_at, key)
        return score(*pair_values(rewards, batch), batch)

    return objective


def pair_losses(
    loss: PairFunction,
    regularizers: Sequence[tuple[PairFunction, float]] = (),
    **hyper_parameters: Any,
) -> Callable[..., tuple[Mean, dict[str, Mean]]]:
    """(chosen [Q], rejected [Q], batch) -> (Mean, metrics); see `reward_objective`."""
    functions = [loss, *(function for function, _ in regularizers)]

    def score(
        chosen: jax.Array, rejected: jax.Array, batch: PreferenceBatch
    ) -> tuple[Mean, dict[str, Mean]]:
        columns = {
            name: value.reshape(-1)
            for name in PAIR_COLUMNS
            if (value := getattr(batch, name)) is not None
        }
        _check_used(columns, functions)
        weight = batch.weight.reshape(-1)
        losses = loss(chosen, rejected, **_taken(loss, columns), **hyper_parameters)
        metrics = pair_metrics(chosen, rejected, weight)
        _check_shape(loss, losses, chosen)
        for function, coefficient in regularizers:
            values = function(chosen, rejected, weight, **_taken(function, columns))
            _check_shape(function, values, chosen)
            metrics[f"regularizer/{_name(function)}"] = weighted_mean(values, weight)
            losses = losses + coefficient * values
        return weighted_mean(losses, weight), metrics

    return score


def pair_values(
    values: jax.Array, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """(chosen [Q ...], rejected [Q ...]) from values of all score slots [B S ...].

    With stacked micro-batches [A B S ...] the pairs of all of them follow each other,
    Q = A pairs of a micro-batch.
    """
    if batch.chosen.ndim == 2:
        take = jax.vmap(lambda v, i: v.reshape(-1, *v.shape[2:])[i])
        return tuple(
            take(values, index).reshape(-1, *values.shape[3:])
            for index in (batch.chosen, batch.rejected)
        )
    flat = values.reshape(-1, *values.shape[2:])
    return flat[batch.chosen], flat[batch.rejected]


def group_values(
    rewards: jax.Array, batch: GroupBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rewards [R K], mask [R K], weight [R]) from the rewards of all score slots.

    Stacked micro-batches follow each other, as in `pair_values`.
    """
    if batch.members.ndim == 3:
        values = jax.vmap(lambda r, i: r.reshape(-1)[i])(rewards, batch.members)
    else:
        values = rewards.reshape(-1)[batch.members]
    size = values.shape[-1]
    return (
        values.reshape(-1, size),
        batch.mask.reshape(-1, size),
        batch.weight.reshape(-1),
    )


def ranking_objective(apply: Callable[..., jax.Array]) -> Objective:
    """An objective (params, GroupBatch, key) -> (Mean, metrics): Plackett-Luce on the
    scored completions of each prompt.

    Args:
        apply: see `reward_objective`.

    Returns:
        The objective; its metric `accuracy` is the share of the pairs with unequal
        scores, inside the prompts, that the rewards order alike (a tie counts half).

    Raises:
        ValueError: the batch has no scores.
    """

    def objective(
        params: Any, batch: GroupBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        if batch.scores is None:
            raise ValueError("the completions have no scores to rank them by")
        rewards = apply(params, batch.sequences, batch.score_at, key)
        rewards, mask, weight = group_values(rewards, batch)
        scores = batch.scores.reshape(mask.shape)
        losses = plackett_luce(rewards, scores, mask)
        better = mask[:, :, None] & mask[:, None, :] & (weight > 0)[:, None, None]
        better &= scores[:, :, None] > scores[:, None, :]
        gap = rewards[:, :, None] - rewards[:, None, :]
        right = (gap > 0) + 0.5 * (gap == 0)
        return weighted_mean(losses, weight), {
            "accuracy": masked_mean(right, better),
        }

    return objective


def over_micro_batches(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` for batches with a leading axis of micro-batches [A ...].

    The micro-batches go through the model one after the other, and only what it
    returns is kept of each: the backward pass computes a micro-batch's activations
    anew. So a loss that couples the whole batch needs the memory of one micro-batch,
    for one more forward pass.

    Source: the gradient cache of Gao et al. 2021, arXiv:2101.06983, by
    rematerialisation.
    """

    def stacked(
        params: Any, sequences: Sequences, score_at: jax.Array, key: jax.Array
    ) -> Any:
        one = jax.checkpoint(lambda micro: apply(params, *micro))
        keys = jax.random.split(key, score_at.shape[0])
        return jax.lax.map(one, (sequences, score_at, keys))

    return stacked


def _taken(function: PairFunction, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that a function has arguments for."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: value for name, value in columns.items() if name in parameters}


def _check_used(columns: dict[str, Any], functions: Sequence[PairFunction]) -> None:
    unused = [n for n in columns if not any(n in _taken(f, columns) for f in functions)]
    if unused:
        names = " and ".join(repr(_name(f)) for f in functions)
        raise ValueError(
            f"the batch carries {', '.join(unused)}, for which {names} have no "
            "argument; drop the column or choose a loss that uses it"
        )


def _check_shape(function: PairFunction, values: jax.Array, chosen: jax.Array) -> None:
    if values.shape != chosen.shape:
        raise ValueError(
            f"{_name(function)!r} must return one value a pair: expected shape "
            f"{chosen.shape}, got {values.shape}"
        )


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", str(function))


def pair_metrics(
    chosen: jax.Array, rejected: jax.Array, weight: jax.Array
) -> dict[str, Mean]:
    """Accuracy, margin and the two mean rewards, as addable means over pairs [Q].

    Pairs of non-zero weight count once each. A pair's accuracy is 1 where chosen >
    rejected, one half where they tie.
    """
    counted = (weight > 0).astype(jnp.float32)
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    return {
        "accuracy": weighted_mean(right, counted),
        "margin": weighted_mean(chosen - rejected, counted),
        "reward/chosen": weighted_mean(chosen, counted),
        "reward/rejected": weighted_mean(rejected, counted),
    }


def reward_states_apply(
    model: RewardModel, *, deterministic: bool
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(params, sequences, score_at, key) -> (rewards [B S], states before the final
    norm [B S D], after it [B S D]); the head reads the latter.

    Args:
        model: the module.
        deterministic: False draws the dropout masks from the key.
    """
    return _applied(model, deterministic, "rewards_and_states")


def reward_apply(
    model: RewardModel, *, deterministic: bool
) -> Callable[..., jax.Array]:
    """(params, sequences, score_at, key) -> rewards [B S] of a Linen reward model.

    Args:
        model: the module.
        deterministic: False draws the dropout masks from the key.
    """
    return _applied(model, deterministic, "__call__")


def _applied(model: RewardModel, deterministic: bool, method: str) -> Any:
    def apply(
        params: Any, sequences: Sequences, score_at: jax.Array, key: jax.Array
    ) -> Any:
        return model.apply(
            {"params": params},
            sequences,
            score_at,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": key},
            method=method,
        )

    return apply
