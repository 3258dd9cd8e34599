"""Projections with optional low-rank adapters, and the trees that training LoRA needs.

`Linear` is the only projection of the model; `merge_lora` folds adapters into kernels;
`split_params` and `join_params` part a tree into trained and frozen leaves, so that
only the trained tree is differentiated (frozen leaves inside it would still cost
gradient memory).

Source: Hu et al. 2021, arXiv:2106.09685.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from rlhf_jax.models.config import LoraConfig

TRAINABLE = ("all", "lora", "head")
_ADAPTERS = ("lora_a", "lora_b")


class Linear(nn.Module):
    """y = x W + b over the last len(inputs) axes of x, plus the adapter."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: str
    use_bias: bool = False
    init_scale: float = 1.0
    lora: LoraConfig | None = None
    """None or rank 0: no adapter here."""
    output_dtype: str | None = None
    """Dtype of y if not `dtype`: products are then accumulated and kept in it."""

    @nn.compact
    def __call__(self, x: Array, dropout_key: jax.Array | None = None) -> Array:
        fan_in = math.prod(self.inputs)
        normal = nn.initializers.normal(self.init_scale * fan_in**-0.5)
        kernel = self.param("kernel", normal, self.inputs + self.outputs)
        y = self._contract(x, kernel, len(self.inputs))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs)
            y = y + over_last(bias.astype(self.dtype), y.ndim)
        if self.lora is None or self.lora.rank == 0:
            return y
        rank = (self.lora.rank,)
        a = self.param(
            "lora_a", nn.initializers.normal(fan_in**-0.5), self.inputs + rank
        )
        b = self.param("lora_b", nn.initializers.zeros, rank + self.outputs)
        x = dropout(x, self.lora.dropout, dropout_key)
        inner = self._contract(x, a, len(self.inputs))
        return y + self.lora.scale * self._contract(inner, b, 1)

    def _contract(self, x: Array, kernel: Array, axes: int) -> Array:
        return jnp.tensordot(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            axes,
            preferred_element_type=self.output_dtype,
        )


def over_last(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1 added: broadcasting is never implicit."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """x with elements zeroed with probability rate, the rest scaled to keep the mean.

    Without a key it is x: evaluation passes none.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def merge_lora(params: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The same model without adapters: W + (alpha/r) A B in float32, stacked or not.

    Raises:
        ValueError: the tree has no adapters.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    adapted = [path[:-1] for path in flat if path[-1] == "lora_a"]
    if not adapted:
        raise ValueError(
            "merge_lora: the parameters hold no lora_a; pass the joined tree of a run "
            "trained with lora.rank > 0"
        )
    for path in adapted:
        a, b = flat.pop((*path, "lora_a")), flat.pop((*path, "lora_b"))
        product = _product if "layers" not in path else jax.vmap(_product)
        kernel = flat[(*path, "kernel")]
        flat[(*path, "kernel")] = kernel + lora.scale * product(a, b)
    return traverse_util.unflatten_dict(flat)


def _product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.tensordot(a, b, 1, precision="highest")


def split_params(
    params: dict[str, Any], trainable: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen): nested dicts with disjoint leaves.

    Args:
        params: a whole tree.
        trainable: all; lora = adapters and head; head = the scalar head alone.

    Raises:
        ValueError: an unknown name, or nothing would be trained.
    """
    if trainable not in TRAINABLE:
        raise ValueError(
            f"trainable {trainable!r}: expected one of {', '.join(TRAINABLE)}"
        )

    def trained(path: tuple[str, ...]) -> bool:
        adapter = trainable == "lora" and path[-1] in _ADAPTERS
        return trainable == "all" or adapter or path[0] in ("head", "prototypes")

    flat = traverse_util.flatten_dict(params)
    if trainable == "lora" and not any(path[-1] in _ADAPTERS for path in flat):
        raise ValueError(
            "trainable 'lora': the parameters hold no adapters; set lora.rank above 0"
        )
    if not any(map(trained, flat)):
        raise ValueError(
            f"trainable {trainable!r}: no leaf would be trained; expected a tree with "
            f"'head', got {sorted(params)}; use 'all' or 'lora' without a head"
        )
    parts = [{}, {}]
    for path, leaf in flat.items():
        parts[not trained(path)][path] = leaf
    return tuple(map(traverse_util.unflatten_dict, parts))  # type: ignore[return-value]


def join_params(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The whole tree again from the two parts of `split_params`."""
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict(flat)
