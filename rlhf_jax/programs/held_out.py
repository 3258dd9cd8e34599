"""Evaluation sets while a model is trained: every number from one pass over a set.

`mean_figures` serves any objective, whose metrics are means over examples.
`pair_figures` also keeps rewards and hidden states, so its figures are those of the
whole set, as `evaluate --states true` gives them for the same weights and rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.evals import hidden_states
from rlhf_jax.evals.distribution import reward_statistics
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.types import Mean, PairStates, TrainState

Batch = Any
_REWARDS = ("mean", "std", "min", "max")


def mean_figures(
    state: TrainState,
    *,
    evaluate: Callable[[TrainState, Batch], dict[str, Mean]],
    eval_sets: Mapping[str, Sequence[Batch]],
    put: Callable[[Batch], Batch],
) -> dict[str, float]:
    """eval/NAME/METRIC of every set: means over all its batches, divided once.

    Args:
        state: holds the parameters.
        evaluate: jitted.
        eval_sets: host batches by name.
        put: host batch -> device batch.
    """
    values: dict[str, float] = {}
    for name, batches in eval_sets.items():
        total: dict[str, Mean] = {}
        for means in _fetched(evaluate, state, batches, put):
            total = _added(total, means)
        values |= {f"eval/{name}/{k}": float(m.value()) for k, m in total.items()}
    return values


def pair_figures(
    state: TrainState,
    *,
    evaluate: Callable[[TrainState, Batch], tuple[dict[str, Mean], PairStates]],
    eval_sets: Mapping[str, Sequence[Batch]],
    sizes: Mapping[str, int],
    put: Callable[[Batch], Batch],
) -> dict[str, float]:
    """`mean_figures`, and figures of each set's rewards and hidden states.

    States are held of `hidden_states.MAX_COMPLETIONS` completions: of a larger set a
    subset, the same at every evaluation.

    Args:
        state: see `mean_figures`.
        evaluate: jitted; see `algorithms.diagnostics.make_diagnosed_evaluate`.
        eval_sets: see `mean_figures`; pairs, in one order always.
        sizes: pairs of each set.
        put: see `mean_figures`.

    Returns:
        As `mean_figures`, and eval/NAME/ reward_mean, _std, _min, _max, and what
        `hidden_states.state_figures` returns.
    """
    values: dict[str, float] = {}
    for name, batches in eval_sets.items():
        total: dict[str, Mean] = {}
        wanted = _drawn(sizes[name])
        parts, seen = [], 0
        for means, pairs in _fetched(evaluate, state, batches, put):
            total = _added(total, means)
            real = np.flatnonzero(pairs.weight > 0)
            keep = real[wanted[seen : seen + len(real)]]
            seen += len(real)
            # Copies, so that the batch itself is freed.
            states = (pairs.before[keep], pairs.after[keep])
            parts.append((pairs.rewards[real], *states))
        figures = {k: float(m.value()) for k, m in total.items()}
        if parts:
            figures |= _figures(*map(np.concatenate, zip(*parts, strict=True)))
        values |= {f"eval/{name}/{key}": value for key, value in figures.items()}
    return values


def _drawn(size: int) -> np.ndarray:
    """[size] bool, the pairs whose states are held: those that `evaluate` holds."""
    kept = np.zeros(2 * size, bool)
    kept[hidden_states.kept_completions([2] * size)] = True
    return kept[::2]


def _figures(
    rewards: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, float]:
    """Of rewards [N 2] and states [M 2 D]."""
    spread = reward_statistics(rewards.reshape(-1))
    found = {f"reward_{name}": spread[name] for name in _REWARDS}
    # One device is enough, and under the mesh of the run all of them would repeat it.
    alone = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    with jax.set_mesh(alone):
        states = hidden_states.state_figures(
            _flat(before), _flat(after), hidden_states.alternating(2 * len(after))
        )
    return found | states.metrics


def _flat(states: np.ndarray) -> np.ndarray:
    """[2M D] from [M 2 D], in float32 as `evaluate` holds them."""
    return states.astype(np.float32).reshape(-1, states.shape[-1])


def _added(total: dict[str, Mean], means: dict[str, Mean]) -> dict[str, Mean]:
    return {k: total[k] + m if k in total else m for k, m in means.items()}


def _fetched(
    evaluate: Callable[[TrainState, Batch], Any],
    state: TrainState,
    batches: Sequence[Batch],
    put: Callable[[Batch], Batch],
) -> Iterator[Any]:
    """What evaluate found of each batch, on the host; fetched after the next call is
    under way."""
    waiting: Any = None
    for batch in batches:
        found = evaluate(state, put(batch))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = found
    if waiting is not None:
        yield jax.device_get(waiting)
