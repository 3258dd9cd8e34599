"""Where jit and shardings are applied: state, update, evaluation and batches on the
mesh.

Used by every training program, so that algorithms stay pure functions. Call under
`jax.set_mesh(mesh)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rlhf_jax.algorithms.update import (
    Objective,
    Update,
    init_state,
    make_update,
)
from rlhf_jax.models.parameters import check_divisible, param_specs
from rlhf_jax.sharding import ShardingRules, batch_sharding, replicated, shardings
from rlhf_jax.types import TrainState


def param_shardings(
    mesh: Mesh, rules: ShardingRules = ShardingRules()
) -> Callable[[Any], Any]:
    """A function from a tree of shapes to its shardings; refuses what cannot be cut.

    Raises (the returned function):
        ValueError: a dimension that its mesh axes do not divide, with the parameter's
            name.
    """

    def shardings_of(shapes: Any) -> Any:
        check_divisible(mesh, shapes, rules)
        return shardings(mesh, param_specs(shapes, rules))

    return shardings_of


def create_state(
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules = ShardingRules(),
    *,
    frozen: Any | None = None,
) -> TrainState:
    """A TrainState on the mesh; optimizer moments are created sharded like `params`."""
    abstract = jax.eval_shape(lambda p, f: init_state(p, tx, frozen=f), params, frozen)
    where = param_shardings(mesh, rules)(abstract)
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
    step = jax.device_put(jax.numpy.zeros((), jax.numpy.int32), replicated(mesh))
    return TrainState(
        step=step,
        params=jax.device_put(params, where.params),
        opt_state=opt_state,
        frozen=jax.device_put({} if frozen is None else frozen, where.frozen),
    )


def compile_update(
    objective: Objective,
    tx: optax.GradientTransformation,
    state: TrainState,
    *,
    accum_steps: int = 1,
) -> Update:
    """The jitted update: the state is donated and keeps its shardings."""
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        make_update(objective, tx, accum_steps=accum_steps),
        donate_argnums=0,
        out_shardings=(where, state.step.sharding),  # metrics: replicated, as the step
    )


def compile_evaluate(
    evaluate: Callable[[TrainState, Any], Any], state: TrainState
) -> Callable[[TrainState, Any], Any]:
    """The jitted evaluation (state, batch) -> what it found, replicated."""
    return jax.jit(evaluate, out_shardings=state.step.sharding)


def make_put(
    mesh: Mesh, rules: ShardingRules = ShardingRules(), *, accum_steps: int = 1
) -> Callable[[Any], Any]:
    """A function from this process's slice of a host batch to global device arrays."""
    where = batch_sharding(mesh, rules, leading=int(accum_steps > 1))

    def put(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(where, x), batch
        )

    return put
