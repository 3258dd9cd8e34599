"""Parameter trees: how their leaves are sharded, and stacked against unrolled layers.

One table gives each parameter its logical axes; `param_specs` reads it for any tree
that contains such paths, optimizer states included. Nothing here runs the model.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rlhf_jax.sharding import ShardingRules

AXES: dict[str, tuple[str | None, ...]] = {
    "embed/embedding": ("vocab", "embed"),
    "lm_head/kernel": ("embed", "vocab"),
    "final_norm/scale": (None,),
    "head/kernel": (None,),
    "prototypes/kernel": (None, "embed"),
    "attention_norm/scale": (None,),
    "mlp_norm/scale": (None,),
    "attention/q/kernel": ("embed", "heads", "head_dim"),
    "attention/q/bias": ("heads", "head_dim"),
    "attention/q/lora_a": ("embed", "rank"),
    "attention/q/lora_b": ("rank", "heads", "head_dim"),
    "attention/k/kernel": ("embed", "kv_heads", "head_dim"),
    "attention/k/bias": ("kv_heads", "head_dim"),
    "attention/k/lora_a": ("embed", "rank"),
    "attention/k/lora_b": ("rank", "kv_heads", "head_dim"),
    "attention/v/kernel": ("embed", "kv_heads", "head_dim"),
    "attention/v/bias": ("kv_heads", "head_dim"),
    "attention/v/lora_a": ("embed", "rank"),
    "attention/v/lora_b": ("rank", "kv_heads", "head_dim"),
    "attention/o/kernel": ("heads", "head_dim", "embed"),
    "attention/o/bias": (None,),
    "attention/o/lora_a": ("heads", "head_dim", "rank"),
    "attention/o/lora_b": ("rank", "embed"),
    "attention/q_norm/scale": (None,),
    "attention/k_norm/scale": (None,),
    "mlp/gate/kernel": ("embed", "mlp"),
    "mlp/gate/bias": ("mlp",),
    "mlp/gate/lora_a": ("embed", "rank"),
    "mlp/gate/lora_b": ("rank", "mlp"),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/up/bias": ("mlp",),
    "mlp/up/lora_a": ("embed", "rank"),
    "mlp/up/lora_b": ("rank", "mlp"),
    "mlp/down/kernel": ("mlp", "embed"),
    "mlp/down/bias": (None,),
    "mlp/down/lora_a": ("mlp", "rank"),
    "mlp/down/lora_b": ("rank", "embed"),
}
"""Path suffix of a parameter -> its logical axes, without the leading layer axis."""

_LEAVES = {path.rsplit("/", 1)[1] for path in AXES}
_LAYER = re.compile(r"layers_(\d+)")


def param_specs(tree: Any, rules: ShardingRules) -> Any:
    """PartitionSpecs of a tree of parameters, or of anything with their paths in it.

    Optimizer states carry the parameters' paths and get their specs; scalars and leaves
    that are no parameters are replicated.

    Raises:
        ValueError: a leaf named like a parameter under an unknown path, or of a wrong
            rank.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(path, leaf, rules), tree
    )


def _spec(path: tuple[Any, ...], leaf: Any, rules: ShardingRules) -> P:
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    if not names or names[-1] not in _LEAVES or np.ndim(leaf) == 0:
        return P()
    found = next(
        (AXES[tail] for n in (3, 2) if (tail := "/".join(names[-n:])) in AXES), None
    )
    if found is None:
        raise ValueError(
            f"parameter {'/'.join(names)}: unknown path, so its sharding is unknown; "
            "add it to rlhf_jax.models.parameters.AXES"
        )
    axes = ("layers", *found) if "layers" in names else found
    if np.ndim(leaf) != len(axes):
        if _is_statistic(path):
            return P()
        raise ValueError(
            f"parameter {'/'.join(names)}: expected {len(axes)} dimensions {axes}, "
            f"got shape {np.shape(leaf)}"
        )
    return rules.spec(*axes)


def _is_statistic(path: tuple[Any, ...]) -> bool:
    """Under an optimizer's named tuple, where factored statistics have other ranks."""
    return any(
        isinstance(key, jax.tree_util.GetAttrKey)
        and key.name not in ("params", "frozen")
        for key in path
    )


def check_divisible(mesh: Mesh, shapes: Any, rules: ShardingRules) -> None:
    """Raises ValueError naming the first parameter that the mesh cannot cut evenly."""
    specs = jax.tree.leaves(
        param_specs(shapes, rules), is_leaf=lambda x: isinstance(x, P)
    )
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        for dim, entry in enumerate(spec):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            pieces = int(np.prod([mesh.shape[axis] for axis in axes]))
            if np.shape(leaf)[dim] % pieces:
                raise _indivisible(path, np.shape(leaf), dim, axes, pieces, rules)


def _indivisible(
    path: Any, shape: tuple[int, ...], dim: int, axes: Any, pieces: int, rules: Any
) -> ValueError:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    parts = name.split("/")
    tail = next(t for n in (3, 2) if (t := "/".join(parts[-n:])) in AXES)
    logical = AXES[tail][dim - ("layers" in parts)]
    return ValueError(
        f"parameter {name} of shape {shape}: dimension {dim} ({logical}) is "
        f"{shape[dim]}, expected a multiple of {pieces}, the devices on mesh axis "
        f"{', '.join(axes)}; "
        f"choose a size of mesh.{axes[0]} that divides {shape[dim]}, or replicate this "
        f"axis with ShardingRules({logical}=None)"
    )


def unrolled(params: dict[str, Any]) -> dict[str, Any]:
    """The tree with `layers` [L ...] taken apart into layers_0, layers_1, ..."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        if name == "layers":
            for i in range(jax.tree.leaves(value)[0].shape[0]):
                out[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            out[name] = unrolled(value) if isinstance(value, dict) else value
    return out


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The tree with layers_0, layers_1, ... stacked into one `layers` [L ...]."""
    out: dict[str, Any] = {}
    layers: dict[int, Any] = {}
    for name, value in params.items():
        if match := _LAYER.fullmatch(name):
            layers[int(match[1])] = value
        else:
            out[name] = stacked(value) if isinstance(value, dict) else value
    if layers:
        ordered = [layers[i] for i in range(len(layers))]
        out["layers"] = jax.tree.map(_stack, *ordered)
    return out


def _stack(*leaves: Any) -> Any:
    host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if host else jnp.stack(leaves)


def num_parameters(params: Any) -> int:
    """Number of elements of all leaves, arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
