"""MetaRM: a reward model trained where it tells the completions of today apart.

    theta' = theta + eta grad J(theta; X_s)       J: `losses.ranking.spread`
    theta <- theta - alpha grad L(theta'; X_t)    L: a pair loss

X_s are completions of the shifted policy, without labels, X_t preference pairs. Both
levels are one objective, so any optimizer, sharding and step builder applies:

    objective = meta_objective(spread_objective(apply), reward_objective(apply),
                               split=split, inner_lr=1e-3)
    update = jax.jit(make_update(objective, tx), donate_argnums=0)

Source: Wang et al. 2024, arXiv:2401.06080, section 4; Dou et al. 2024,
arXiv:2405.00438, algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.reward_model import group_values
from rlhf_jax.algorithms.update import Objective, join_trees
from rlhf_jax.losses.masked import weighted_mean
from rlhf_jax.losses.ranking import spread
from rlhf_jax.types import GroupBatch, Mean, MetaBatch


def spread_objective(apply: Callable[..., jax.Array]) -> Objective:
    """(params, GroupBatch, key) -> (Mean of J over the prompts, metrics).

    Args:
        apply: (params, sequences, score_at, key) -> rewards [B S].
    """

    def objective(
        params: Any, batch: GroupBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        rewards = apply(params, batch.sequences, batch.score_at, key)
        rewards, mask, weight = group_values(rewards, batch)
        return weighted_mean(spread(rewards, mask), weight), {}

    return objective


def meta_objective(
    inner: Objective,
    outer: Objective,
    *,
    split: Callable[[Any], tuple[Any, Any]],
    inner_lr: float,
    second_order: bool = False,
    normalise: bool = False,
) -> Objective:
    """The outer objective, taken one gradient ascent step of the inner one ahead.

    first order    gradient = grad L(theta + eta grad J(theta)), eta grad J constant:
                   the algorithm as written, grad L + eta H_L grad J + O(eta^2)
    second order   the gradient of the same value through grad J as well, which adds
                   eta H_J grad L; this is what the paper's eq. 17 describes

    Args:
        inner: J, (params, batch.shifted, key) -> (Mean, metrics).
        outer: L, (params, batch.pairs, key) -> (Mean, metrics).
        split: params -> (trained, frozen); the inner step moves the trained leaves.
        inner_lr: eta; with `normalise` the length of the inner step.
        second_order: see above; needs an attention backend that can be differentiated
            twice.
        normalise: divide grad J by its global norm: its size then does not depend on
            the scale of the rewards.

    Returns:
        An objective (params, MetaBatch, key) -> (Mean, metrics); its metrics are those
        of `outer` at theta', and `meta/spread` (J at theta), `meta/grad_norm` (of J)
        and `meta/step_norm`, the length of the inner step.

    Source: see the module. Differs from the paper: `second_order` and `normalise` are
    options.
    """

    def objective(
        params: Any, batch: MetaBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        trained, frozen = split(params)
        inner_key, outer_key = jax.random.split(key)

        def rise(leaves: Any, *rest: Any) -> jax.Array:
            joined = join_trees(leaves, rest[0])
            return inner(joined, *rest[1:])[0].value()

        rest = jax.lax.stop_gradient((frozen, batch.shifted, inner_key))
        if second_order:
            found: Any = _value_and_gradient(rise, trained, *rest)
            value, step = found
        else:
            at = jax.lax.stop_gradient(trained)
            value, step = jax.value_and_grad(rise)(at, *rest)
        # At norm 0 every reward ties: there is no direction, and sqrt has no slope.
        norm = jnp.sqrt(jnp.maximum(optax.tree.norm(step, squared=True), 1e-24))
        scale = inner_lr / norm if normalise else inner_lr
        ahead = jax.tree.map(lambda p, g: p + scale * g, trained, step)
        loss, metrics = outer(join_trees(ahead, frozen), batch.pairs, outer_key)
        return loss, {
            **metrics,
            "meta/spread": _one(value),
            "meta/grad_norm": _one(norm),
            "meta/step_norm": _one(scale * norm),
        }

    return objective


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_gradient(
    function: Callable[..., jax.Array], at: Any, *rest: Any
) -> tuple[jax.Array, Any]:
    """`jax.value_and_grad`, whose own gradient is a Hessian-vector product by forward
    over reverse mode: nothing is kept between the two passes, where reverse over
    reverse keeps every intermediate of the inner gradient."""
    return jax.value_and_grad(function)(at, *rest)


def _forward(function: Callable[..., jax.Array], at: Any, *rest: Any) -> Any:
    return _value_and_gradient(function, at, *rest), (at, rest)


def _backward(
    function: Callable[..., jax.Array], saved: Any, cotangents: tuple[jax.Array, Any]
) -> Any:
    (at, rest), (of_value, direction) = saved, cotangents
    gradient, product = jax.jvp(
        lambda leaves: jax.grad(function)(leaves, *rest), (at,), (direction,)
    )
    total = jax.tree.map(lambda g, hv: of_value * g + hv, gradient, product)
    return total, *(None for _ in rest)


_value_and_gradient.defvjp(_forward, _backward)


def _one(value: jax.Array) -> Mean:
    return Mean(value, jnp.ones((), jnp.float32))
