"""The LLaMA family as Linen modules over plain nested dicts of float32 parameters.

`Llama` embeds, runs `Block`s (scanned over stacked parameters or unrolled), normalises;
block.py has the layer. What all layers share (rotation, visibility) is made once per
forward and travels as `Context`. Dropout keys are explicit inputs of a layer, never
Linen rngs. No module here holds state; the cache goes in and comes out.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import attention as attention_lib
from rlhf_jax.models import decode as decode_lib
from rlhf_jax.models import rope
from rlhf_jax.models.block import Block, Context, RMSNorm
from rlhf_jax.models.cache import KVCache, write_tokens
from rlhf_jax.models.config import ComputeConfig, LlamaConfig, LoraConfig
from rlhf_jax.models.lora import Linear
from rlhf_jax.models.parameters import unrolled
from rlhf_jax.sharding import ShardingRules, constrain
from rlhf_jax.types import Sequences

__all__ = ["Llama", "example_sequences", "init_llama", "init_module", "unrolled"]


class Embed(nn.Module):
    """The token table [V D]; used twice where embeddings are tied."""

    config: LlamaConfig

    def setup(self) -> None:
        width = self.config.hidden_size
        normal = nn.initializers.normal(width**-0.5)
        self.embedding = self.param(
            "embedding", normal, (self.config.vocab_size, width)
        )

    def __call__(self, tokens: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
        return self.embedding[tokens].astype(dtype)


class Llama(nn.Module):
    """Decoder backbone: tokens to hidden states, and hidden states to logits."""

    config: LlamaConfig
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    rules: ShardingRules = ShardingRules()

    def setup(self) -> None:
        config, compute = self.config, self.compute
        settings = (config, compute, self.lora, self.rules)
        block = _rematerialised(compute)
        self.embed = Embed(config)
        if compute.scan_layers:
            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_layers,
            )
            self.layers: Any = scan(*settings)
        else:
            self.layers = [block(*settings) for _ in range(config.num_layers)]
        self.final_norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                (config.hidden_size,),
                (config.vocab_size,),
                compute.dtype,
                output_dtype="float32",
            )

    def __call__(
        self,
        sequences: Sequences,
        *,
        cache: KVCache | decode_lib.DecodeCache | None = None,
        deterministic: bool = True,
        normalise: bool = True,
        offset: Float[Array, "B T D"] | None = None,
    ) -> Any:
        """Hidden states [B T D] after the final norm, in the compute dtype.

        Args:
            sequences: tokens and their visibility.
            offset: added to the embeddings; its gradient at 0 is theirs.
            normalise: False leaves the final norm to the caller, who then applies
                `final_norm` to the states it needs.
            cache: if given, the tokens continue it; returns (hidden, new cache). A
                DecodeCache takes one token a row.
            deterministic: False draws dropout masks from the rng named "dropout".

        Raises:
            ValueError: a cache together with scan_layers.
        """
        if cache is not None and self.compute.scan_layers:
            raise ValueError(
                "cache: expected unrolled layers, got compute.scan_layers=True (a scan "
                "copies the whole cache at every layer); set scan_layers to false and "
                "convert the parameters with rlhf_jax.models.llama.unrolled"
            )
        if isinstance(cache, decode_lib.DecodeCache):
            cache = decode_lib.admit(cache, sequences)
        elif cache is not None:
            cache = write_tokens(cache, sequences)
        context = self._context(sequences, cache)
        x = self.embed(sequences.tokens, self.compute.dtype)
        if offset is not None:
            x = x + offset.astype(x.dtype)
        x = constrain(x, self.rules, "batch", "sequence", "activation_embed")
        x, cache = self._run_layers(x, self._layer_keys(deterministic), context, cache)
        hidden = self.final_norm(x) if normalise else x
        return hidden if cache is None else (hidden, cache)

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        keys: jax.Array | None,
        context: Context,
        cache: KVCache | decode_lib.DecodeCache | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        if self.compute.scan_layers:
            return self.layers(x, keys, context)
        decodes = isinstance(cache, decode_lib.DecodeCache)
        written = []
        for i, layer in enumerate(self.layers):
            key = None if keys is None else keys[i]
            if decodes:
                old = cache.layers[i]
            else:
                old = None if cache is None else (cache.keys[i], cache.values[i])
            x, new = layer(x, key, context, old)
            written.append(new)
        if cache is None:
            return x, None
        if decodes:
            return x, decode_lib.advance(cache, tuple(written))
        new_keys, new_values = zip(*written, strict=True)
        index = cache.index + x.shape[1]
        return x, dataclasses.replace(
            cache, keys=new_keys, values=new_values, index=index
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32, from the hidden states of `__call__`."""
        dtype = self.compute.dtype
        if self.config.tie_word_embeddings:
            table = self.embed.embedding.astype(dtype)
            logits = jnp.einsum(
                "...d,vd->...v", hidden, table, preferred_element_type=jnp.float32
            )
        else:
            logits = self.lm_head(hidden)
        axes = ("batch", "sequence")[: logits.ndim - 1]
        return constrain(logits, self.rules, *axes, "vocab")

    def everything(self, sequences: Sequences) -> Float[Array, "B T V"]:
        """Logits of every token: touches every parameter, for initialisation."""
        return self.logits(self(sequences))

    def _layer_keys(self, deterministic: bool) -> jax.Array | None:
        if deterministic or not (self.compute.dropout or self.lora.dropout):
            return None
        return jax.random.split(self.make_rng("dropout"), self.config.num_layers)

    def _context(
        self, sequences: Sequences, cache: KVCache | decode_lib.DecodeCache | None
    ) -> Context:
        config = self.config
        if isinstance(cache, decode_lib.DecodeCache):
            return Context(
                rotation=rope.angles(config, sequences.positions),
                visible=decode_lib.visibility(cache, sequences, config.sliding_window),
                index=cache.column,
                backend="xla",
                reads_cache=True,
            )
        # Tokens that fill the cache attend to themselves alone: nothing is older.
        reads_cache = cache is not None and cache.length > sequences.tokens.shape[1]
        backend = attention_lib.choose_backend(
            self.compute.attention,
            head_dim=config.head_dim,
            dtype=self.compute.dtype,
            shares_prefix=sequences.prefix is not None,
            reads_cache=reads_cache,
            rules=self.rules,
        )
        return Context(
            rotation=rope.angles(config, sequences.positions),
            visible=attention_lib.visibility(
                sequences,
                backend=backend,
                window=config.sliding_window,
                cache=cache if reads_cache else None,
            ),
            index=None if cache is None else cache.index,
            backend=backend,
            reads_cache=reads_cache,
        )


def init_llama(model: Llama, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: normal, standard deviation 1/sqrt(fan in).

    Projections back into the residual stream are smaller by sqrt(2 L), norms start at
    1, biases and lora_b at 0. jit it with out_shardings to create parameters sharded.
    """
    return init_module(model, key, example_sequences(), method="everything")


def init_module(module: Any, key: jax.Array, *args: Any, method: str) -> dict[str, Any]:
    """Parameters of a module as plain dicts; the example is not sharded."""
    none = {field.name: None for field in dataclasses.fields(ShardingRules)}
    plain = module.clone(rules=ShardingRules(**none))
    # Under jit the example's forward pass is traced and then dropped, not computed.
    init = jax.jit(functools.partial(plain.init, method=method))
    return dict(init(key, *args)["params"])


def example_sequences(batch: int = 1, length: int = 2) -> Sequences:
    """The smallest input that shapes can be initialised from."""
    ones = jnp.ones((batch, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return Sequences(
        tokens=ones, positions=positions, segment=ones, completion_mask=ones > 0
    )


def _rematerialised(compute: ComputeConfig) -> Any:
    """Block under the named remat policy."""
    if compute.remat in ("none", "attention"):
        return Block
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan the loop already keeps XLA from undoing the recomputation.
    return nn.remat(
        Block,
        policy=dots if compute.remat == "dots" else None,
        prevent_cse=not compute.scan_layers,
    )
