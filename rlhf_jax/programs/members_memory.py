"""Whether the members of an ensemble are trained together: do they fit the memory?

`member_bytes` counts what training one takes without training it, `free_bytes` asks the
device, `decide` compares. Together was measured on a CPU alone (docs/results.md), where
it is a sixth faster; on an accelerator it is expected to gain more, which nobody has
measured.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax.algorithms.update import Objective, init_state

SHARE = 0.7
"""Of the free memory, to be filled with members: the compiler needs up to 1.4 times
what is counted."""


class Decision(NamedTuple):
    """How members are trained, and why."""

    at_once: bool
    why: str


def decide(
    *,
    members: int,
    member_bytes: int,
    free_bytes: int | None,
    devices: int = 1,
    alone: str = "",
) -> Decision:
    """Together where all members fit one device, and one by one elsewhere.

    Args:
        members: M.
        member_bytes: of one in training.
        free_bytes: of the device; None = nobody knows.
        devices: that one by one would use: members together are trained on one.
        alone: what the config asks for that members together cannot have.
    """
    if alone:
        return Decision(False, f"{alone} is not for members at once")
    if devices > 1:
        return Decision(False, f"each uses all {devices} devices, and all at once one")
    if free_bytes is None:
        return Decision(False, "the device does not tell how much memory is free")
    needed, room = members * member_bytes, SHARE * free_bytes
    return Decision(
        needed <= room,
        f"{members} need about {_size(needed)}, of {_size(free_bytes)} free",
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def member_bytes(
    objective: Objective, tx: optax.GradientTransformation, params: Any, batch: Any
) -> int:
    """Bytes of a member in training: parameters, gradient, optimizer state, and what
    the forward pass keeps for the backward one.

    The last is what autodiff keeps, read from the traced function. With the testbed's
    model that is 69 MB a member, and XLA reports 61 on a CPU; 64 and 89 with a scan
    over its layers.

    Args:
        objective: (params, batch, key) -> (Mean, metrics); without rematerialisation,
            whose need while it computes anew is not counted.
        tx: optax transformation.
        params: shapes are enough.
        batch: shapes are enough.
    """
    state = jax.eval_shape(functools.partial(init_state, tx=tx), params)

    def kept(params: Any, batch: Any) -> list[jax.Array]:
        def loss(params: Any) -> jax.Array:
            return objective(params, batch, jax.random.key(0))[0].total

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    traced = jax.make_jaxpr(kept)(params, batch).jaxpr
    given = {*traced.invars, *traced.constvars}
    new = {v: None for v in traced.outvars if not hasattr(v, "val") and v not in given}
    return sum(map(_bytes, [*jax.tree.leaves(state), *jax.tree.leaves(params)])) + sum(
        _bytes(variable.aval) for variable in new
    )


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def free_bytes(device: Any) -> int | None:
    """Bytes that are free on a device, a CPU's being the host's; None = unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats and "bytes_in_use" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return host_free_bytes() if device.platform == "cpu" else None


def host_free_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that Linux has available, or that the limit of the container leaves, if it
    is less; None = another system.

    Args:
        root: of the file system.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    kilobytes = {name: value.split()[0] for name, _, value in lines if value.split()}
    if "MemAvailable" not in kilobytes:
        return None
    found = [1024 * int(kilobytes["MemAvailable"])]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        files = [root / "sys/fs/cgroup" / name for name in (limit, used)]
        if all(file.exists() for file in files):
            most, now = (file.read_text().strip() for file in files)
            if most != "max":
                found.append(max(int(most) - int(now), 0))
    return min(found)
