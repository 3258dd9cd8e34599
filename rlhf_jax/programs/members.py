"""Several reward models trained on pairs in one process: all at once, or one by one.

All at once, the members are one more leading axis of parameters, optimizer state and
batches, and the update is `jax.vmap` of the usual one. On a CPU that is a sixth faster
than one by one, for 1.7 times the memory (docs/results.md); many small models should
gain more on an accelerator, where nobody has measured it. For models of which one fills
the machine, train runs of `reward`; `strength` does so where not all members fit (see
`members_memory`), and then its members survive a stop.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms.update import Objective, init_state, make_update
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.shapes import Shapes
from rlhf_jax.data.store import PairDataset
from rlhf_jax.evals import scoring
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.types import PreferenceBatch

Params = Any


def make_trainer(
    objective: Objective, tx: optax.GradientTransformation, *, at_once: bool = False
) -> Callable[..., list[Params]]:
    """A function that trains members; it compiles once, however often it is called.

    Args:
        objective: (params, PreferenceBatch, key) -> (Mean, metrics).
        tx: optax transformation.
        at_once: vmap over the members; else one after the other.

    Returns:
        train(params, datasets, *, seeds, steps, batch_size, shapes=None) -> parameters
        of every member: `params` are M initial trees of one structure, which are not
        changed, `datasets` the pairs of each (maybe M times the same), `seeds` those of
        each one's data order and dropout, `shapes` those of the batches, for datasets
        that should not each compile their own.
    """
    update = make_update(objective, tx)
    init = functools.partial(init_state, tx=tx)
    together = jax.jit(jax.vmap(update), donate_argnums=0)
    alone = jax.jit(update, donate_argnums=0)

    def train(
        params: Sequence[Params],
        datasets: Sequence[PairDataset],
        *,
        seeds: Sequence[int],
        steps: int,
        batch_size: int,
        shapes: Shapes | None = None,
    ) -> list[Params]:
        if not len(params) == len(datasets) == len(seeds):
            raise ValueError(
                f"members: {len(params)} parameter trees, {len(datasets)} datasets, "
                f"{len(seeds)} seeds; expected one of each a member"
            )
        options: Any = {"num_shapes": 1, "shapes": shapes, "prefetch": 0}
        if at_once and shapes is None:
            # Chosen by one order, they serve all: stacked batches have one shape.
            options["shapes"] = Batches(
                datasets[0], batch_size, seed=seeds[0], **options
            ).shapes
        streams = [
            Batches(dataset, batch_size, seed=seed, **options)
            for dataset, seed in zip(datasets, seeds, strict=True)
        ]
        keys = [jax.random.key(seed) for seed in seeds]
        if at_once:
            states, finite = jax.vmap(init)(_stack(params)), True
            for batches in itertools.islice(zip(*streams, strict=True), steps):
                batch = stack_batches([batch for batch, _ in batches])
                states, metrics = together(states, batch, jnp.stack(keys))
                finite = jnp.logical_and(finite, metrics["update/finite"] > 0)
            _check_finite(np.asarray(finite))
            return [
                jax.tree.map(lambda x, m=m: x[m], states.params)
                for m in range(len(params))
            ]
        trained = []
        for tree, stream, key in zip(params, streams, keys, strict=True):
            state, finite = init(jax.tree.map(jnp.copy, tree)), True
            for batch, _ in itertools.islice(stream, steps):
                state, metrics = alone(state, batch, key)
                finite = jnp.logical_and(finite, metrics["update/finite"] > 0)
            _check_finite(np.asarray(finite))
            trained.append(state.params)
        return trained

    return train


def _check_finite(finite: np.ndarray) -> None:
    if not finite.all():
        raise FloatingPointError(
            "members: a loss or a gradient was not finite, so a member did not learn; "
            "lower the learning rate, or look at the data"
        )


def stack_batches(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """The batches with a leading axis, padded with empty rows to one number of rows.

    Rewards are indexed as row * slots + slot, so rows at the end change no index.
    """
    rows = max(batch.score_at.shape[0] for batch in batches)

    def pad(x: Any) -> Any:
        return np.pad(x, ((0, rows - x.shape[0]), (0, 0)))

    padded = [
        dataclasses.replace(
            batch,
            sequences=jax.tree.map(pad, batch.sequences),
            score_at=pad(batch.score_at),
        )
        for batch in batches
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def make_pair_rewards(
    model: RewardModel, *, tokens_per_batch: int = 8192
) -> Callable[[Sequence[Params], PairDataset], tuple[np.ndarray, np.ndarray]]:
    """(params of M members, pairs) -> (rewards of the chosen completions [Q M], of the
    rejected ones [Q M]); compiles once.

    Args:
        model: the module of all members.
        tokens_per_batch: see `scoring.score`.
    """
    apply = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs))

    def pair_rewards(
        params: Sequence[Params], dataset: PairDataset
    ) -> tuple[np.ndarray, np.ndarray]:
        encoded = list(completions(dataset))
        columns = [
            scoring.score(
                functools.partial(apply, tree),
                encoded,
                tokens_per_batch=tokens_per_batch,
                pad_id=dataset.pad_id,
                share=scoring.can_share(model.compute.attention),
            ).reshape(-1, 2)
            for tree in params
        ]
        rewards = np.stack(columns, axis=2)
        return rewards[:, 0], rewards[:, 1]

    return pair_rewards


def completions(dataset: PairDataset) -> Iterator[EncodedCompletion]:
    """Chosen and rejected of every pair in turn."""
    for row in range(len(dataset)):
        pair = dataset[row]
        for tokens in (pair.chosen, pair.rejected):
            yield EncodedCompletion(pair.prompt, tokens)


def _stack(params: Sequence[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
