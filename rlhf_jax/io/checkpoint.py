"""Checkpoints of a run: orbax, asynchronous, atomic; params, optimizer, cursor apart.

checkpoints/STEP/{params,opt_state,cursor}, and for RL also critic (parameters and
optimizer state) and experience (the completions that are being learnt from). The cursor
is JSON: the data position and what else the loop must know to go on exactly (see
programs/supervised.py and programs/reinforcement.py). Frozen leaves are not saved: they
come from the source that `model/architecture.json` names.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.types import TrainState


def open_checkpoints(run_dir: pathlib.Path) -> ocp.CheckpointManager:
    """The checkpoint manager of a run directory; close it to wait for pending saves."""
    return ocp.CheckpointManager(
        (pathlib.Path(run_dir) / "checkpoints").absolute(),
        item_names=("params", "opt_state", "cursor", "critic", "experience"),
        options=ocp.CheckpointManagerOptions(create=True, max_to_keep=None),
    )


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    cursor: dict[str, Any],
    *,
    step: int | None = None,
    critic: TrainState | None = None,
    experience: dict[str, np.ndarray] | None = None,
) -> None:
    """Starts saving, once the save before it is done.

    Args:
        manager: see `open_checkpoints`.
        state: of the trained model.
        cursor: what else the loop must know; JSON.
        step: number of the checkpoint; None = the state's.
        critic: the value model's state, in the same checkpoint.
        experience: arrays of the completions that are being learnt from.
    """
    step = int(state.step) if step is None else step
    if step in manager.all_steps():
        return
    items: dict[str, Any] = {
        "params": ocp.args.StandardSave(state.params),
        "opt_state": ocp.args.StandardSave(state.opt_state),
        "cursor": ocp.args.JsonSave(cursor | {"state_step": int(state.step)}),
    }
    if critic is not None:
        items["critic"] = ocp.args.StandardSave(_trained(critic))
    if experience is not None:
        items["experience"] = ocp.args.StandardSave(experience)
    manager.save(step, args=ocp.args.Composite(**items))


def _trained(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def prune(manager: ocp.CheckpointManager, *, keep: int, best_step: int | None) -> None:
    """Waits for the save under way, then drops all but the newest `keep` and the best.

    Called before the next save, never after it began: at any time the newest finished
    checkpoint is on disk.
    """
    manager.wait_until_finished()
    for old in sorted(manager.all_steps())[:-keep]:
        if old != best_step:
            manager.delete(old)


def restore(
    manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint and its cursor, in the shapes and shardings of `state`.

    Args:
        manager: of a run with at least one checkpoint.
        state: arrays or ShapeDtypeStructs with shardings; `frozen` is kept as it is.
    """
    step = manager.latest_step()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items: Any = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            cursor=ocp.args.JsonRestore(),
        ),
    )
    cursor = dict(items.cursor)
    at = cursor.pop("state_step", step)
    restored = dataclasses.replace(
        state,
        step=jax.device_put(jax.numpy.int32(at), state.step.sharding),
        params=items.params,
        opt_state=items.opt_state,
    )
    return restored, cursor


def restore_critic(manager: ocp.CheckpointManager, critic: TrainState) -> TrainState:
    """The critic of the newest checkpoint, in the shapes and shardings of `critic`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _trained(critic))
    items: Any = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(critic=ocp.args.StandardRestore(abstract)),
    )
    return dataclasses.replace(critic, **items.critic)


def restore_experience(manager: ocp.CheckpointManager) -> dict[str, np.ndarray] | None:
    """The experience of the newest checkpoint; None if it was saved between steps."""
    step = manager.latest_step()
    assert step is not None
    folder = pathlib.Path(manager.directory) / str(step) / "experience"
    if not folder.exists():
        return None
    with ocp.StandardCheckpointer() as reader:
        return dict(reader.restore(folder))


def load_params(
    run_dir: pathlib.Path, *, step: int | None = None, shardings: Any = None
) -> Any:
    """The trained leaves of the best checkpoint, or of the newest if none is best.

    Args:
        run_dir: a run directory.
        step: a certain step instead.
        shardings: function of a tree of ShapeDtypeStructs -> a tree of shardings;
            None = the first local device.

    Raises:
        ValueError: no checkpoint, or not this step; lists those that are there.
    """
    folder = (pathlib.Path(run_dir) / "checkpoints").absolute()
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps:
        raise ValueError(
            f"{run_dir}: no checkpoint in it yet; expected checkpoints/STEP"
        )
    if step is None:
        best = read_best(run_dir)
        step = best["step"] if best and best["step"] in steps else steps[-1]
    if step not in steps:
        raise ValueError(f"{run_dir}: no checkpoint of step {step}; there are {steps}")
    path = folder / str(step) / "params"
    with ocp.StandardCheckpointer() as reader:
        metadata = reader.metadata(path).item_metadata
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            dict(metadata.tree),
        )
        where = (
            jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
            if shardings is None
            else shardings(shapes)
        )
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            shapes,
            where,
        )
        return reader.restore(path, target)


def write_best(run_dir: pathlib.Path, step: int, metric: str, value: float) -> None:
    """Names a step the best: best.json {"schema", "step", "metric", "value"}."""
    record = {"schema": 1, "step": step, "metric": metric, "value": value}
    write_atomic(pathlib.Path(run_dir) / "best.json", json.dumps(record) + "\n")


def read_best(run_dir: pathlib.Path) -> dict[str, Any] | None:
    """best.json of a run, None where nothing was evaluated yet."""
    path = pathlib.Path(run_dir) / "best.json"
    return json.loads(path.read_text()) if path.exists() else None
