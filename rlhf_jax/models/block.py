"""One layer of LLaMA: attention and MLP, each under RMSNorm and added to the residual
stream.

Read from the bottom up: a `Block` is `Attention` and `MLP`. The dropout key of a layer
is an input, folded anew for each use; the layer's cache goes in and comes out. llama.py
stacks the layers.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax.models import attention as attention_lib
from rlhf_jax.models import decode as decode_lib
from rlhf_jax.models import rope
from rlhf_jax.models.cache import write
from rlhf_jax.models.config import ComputeConfig, LlamaConfig, LoraConfig
from rlhf_jax.models.lora import Linear, dropout, over_last
from rlhf_jax.sharding import ShardingRules, constrain

LayerCache = (
    tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | decode_lib.DecodeLayer
)


@struct.dataclass
class Context:
    """What every layer of one forward shares."""

    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
    visible: Any
    """attention.Visibility, or decode.DecodeVisibility with a DecodeCache."""
    index: Any
    """Column of the cache that is written, an int32 scalar; None without a cache."""
    backend: str = struct.field(pytree_node=False)
    reads_cache: bool = struct.field(pytree_node=False)
    """False if the tokens fill the whole cache, so that nothing older can be in it."""


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x32 = x.astype(jnp.float32)
        power = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(power + self.eps)
        return (normed * over_last(scale, x.ndim)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, optional biases and query-key norms."""

    config: LlamaConfig
    compute: ComputeConfig
    lora: LoraConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: jax.Array | None,
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config = self.config
        q = self._heads("q", config.num_heads, x, key)
        k = self._heads("k", config.num_kv_heads, x, key)
        v = self._heads("v", config.num_kv_heads, x, key)
        if config.qk_norm:
            q = RMSNorm(config.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, name="k_norm")(k)
        q, k = rope.rotate(q, context.rotation), rope.rotate(k, context.rotation)
        if isinstance(cache, decode_lib.DecodeLayer):
            cache = decode_lib.write(cache, k, v, context.index)
            out = decode_lib.attention(q, cache, context.visible)
        else:
            if cache is not None:
                cache = (
                    write(cache[0], k, context.index),
                    write(cache[1], v, context.index),
                )
                if context.reads_cache:
                    k, v = (old.astype(q.dtype) for old in cache)
            out = self._attend(q, k, v, context)
        out = constrain(out, self.rules, "batch", "sequence", "heads", "head_dim")
        project = Linear(
            (config.num_heads, config.head_dim),
            (config.hidden_size,),
            self.compute.dtype,
            config.attention_output_bias,
            (2 * config.num_layers) ** -0.5,
            adapter("o", self.lora),
            name="o",
        )
        return project(out, fold(key, "o")), cache

    def _attend(
        self, q: Array, k: Array, v: Array, context: Context
    ) -> Float[Array, "B T N H"]:
        attend = functools.partial(
            attention_lib.attention,
            backend=context.backend,
            window=self.config.sliding_window,
            rules=self.rules,
        )
        if self.compute.remat == "attention" and context.backend == "xla":
            # The kernels of the other backends recompute by themselves.
            attend = jax.checkpoint(attend, prevent_cse=not self.compute.scan_layers)
        return attend(q, k, v, context.visible)

    def _heads(
        self, name: str, heads: int, x: Float[Array, "B T D"], key: jax.Array | None
    ) -> Float[Array, "B T N H"]:
        project = Linear(
            (self.config.hidden_size,),
            (heads, self.config.head_dim),
            self.compute.dtype,
            self.config.attention_bias,
            lora=adapter(name, self.lora),
            name=name,
        )
        axis = "heads" if name == "q" else "kv_heads"
        y = project(x, fold(key, name))
        return constrain(y, self.rules, "batch", "sequence", axis, "head_dim")


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    compute: ComputeConfig
    lora: LoraConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        width, ffw = self.config.hidden_size, self.config.intermediate_size
        inner = nn.silu(self._linear("gate", width, ffw)(x, fold(key, "gate")))
        inner = inner * self._linear("up", width, ffw)(x, fold(key, "up"))
        inner = constrain(inner, self.rules, "batch", "sequence", "mlp")
        scale = (2 * self.config.num_layers) ** -0.5
        return self._linear("down", ffw, width, scale)(inner, fold(key, "down"))

    def _linear(
        self, name: str, inputs: int, outputs: int, scale: float = 1.0
    ) -> Linear:
        return Linear(
            (inputs,),
            (outputs,),
            self.compute.dtype,
            self.config.mlp_bias,
            scale,
            adapter(name, self.lora),
            name=name,
        )


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP."""

    config: LlamaConfig
    compute: ComputeConfig
    lora: LoraConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: jax.Array | None,
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        settings = (self.config, self.compute, self.lora, self.rules)
        eps, rate = self.config.rms_norm_eps, self.compute.dropout
        normed = RMSNorm(eps, name="attention_norm")(x)
        out, cache = Attention(*settings, name="attention")(normed, key, context, cache)
        x = x + dropout(out, rate, fold(key, "attention"))
        x = constrain(x, self.rules, "batch", "sequence", "activation_embed")
        normed = RMSNorm(eps, name="mlp_norm")(x)
        out = MLP(*settings, name="mlp")(normed, key)
        x = x + dropout(out, rate, fold(key, "mlp"))
        return constrain(x, self.rules, "batch", "sequence", "activation_embed"), cache


def adapter(name: str, lora: LoraConfig) -> LoraConfig | None:
    """The LoRA settings of one projection, None if it carries no adapter."""
    return lora if lora.rank and name in lora.targets else None


_USES = ("attention", "mlp", "q", "k", "v", "o", "gate", "up", "down")


def fold(key: jax.Array | None, use: str) -> jax.Array | None:
    """The layer's dropout key for one use, so that no two masks are equal."""
    return None if key is None else jax.random.fold_in(key, _USES.index(use))
