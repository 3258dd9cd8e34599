"""Reward and value models: the backbone and one scalar head, computed in float32.

The reward head reads the one scored token, so the rest of the row costs nothing after
the backbone. The value head reads every token and follows the package's alignment:
`values[:, t]` is known before token t is chosen (see `predecessors`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models.config import ComputeConfig, LlamaConfig, LoraConfig
from rlhf_jax.models.llama import Llama, example_sequences, init_module
from rlhf_jax.sharding import ShardingRules
from rlhf_jax.types import Sequences


class ScalarHead(nn.Module):
    """h . w in float32, without bias; w starts at N(0, 1/(D+1)).

    Source: Stiennon et al. 2020, arXiv:2009.01325, reward-model initialisation.
    """

    width: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        normal = nn.initializers.normal((self.width + 1) ** -0.5)
        kernel = self.param("kernel", normal, (self.width,))
        return jnp.einsum(
            "...d,d->...", hidden.astype(jnp.float32), kernel, precision="highest"
        )


class RewardModel(nn.Module):
    """Rewards of completions, each read at its last token."""

    config: LlamaConfig
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    rules: ShardingRules = ShardingRules()

    def setup(self) -> None:
        self.backbone = Llama(self.config, self.compute, self.lora, self.rules)
        self.head = ScalarHead(self.config.hidden_size)

    def __call__(
        self,
        sequences: Sequences,
        score_at: Int[Array, "B S"],
        *,
        deterministic: bool = True,
        offset: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B S"]:
        """Rewards [B S], float32.

        Args:
            sequences: rows in any layout.
            score_at: column of the last real token of each completion; what unused
                slots point at is scored too and must be ignored.
            deterministic: False draws dropout masks from the rng named "dropout".
            offset: added to the embeddings, see `Llama`.
        """
        _, after = self.states(
            sequences, score_at, deterministic=deterministic, offset=offset
        )
        return self.head(after)

    def states(
        self,
        sequences: Sequences,
        score_at: Int[Array, "B S"],
        *,
        deterministic: bool = True,
        offset: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Hidden states at the scored tokens, before and after the final norm.

        Args:
            sequences: see `__call__`.
            score_at: see `__call__`.
            deterministic: see `__call__`.
            offset: see `__call__`.
        """
        hidden = self.backbone(
            sequences, deterministic=deterministic, normalise=False, offset=offset
        )
        before = jnp.take_along_axis(hidden, score_at[:, :, None], axis=1)
        return before, self.backbone.final_norm(before)

    def rewards_and_states(
        self,
        sequences: Sequences,
        score_at: Int[Array, "B S"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B S"], Float[Array, "B S D"], Float[Array, "B S D"]]:
        """(rewards, states before the final norm, after it); see `states`."""
        before, after = self.states(sequences, score_at, deterministic=deterministic)
        return self.head(after), before, after


class ValueModel(nn.Module):
    """The value of every token's state, before the token is chosen."""

    config: LlamaConfig
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    rules: ShardingRules = ShardingRules()

    def setup(self) -> None:
        self.backbone = Llama(self.config, self.compute, self.lora, self.rules)
        self.head = ScalarHead(self.config.hidden_size)

    def __call__(
        self, sequences: Sequences, *, deterministic: bool = True
    ) -> Float[Array, "B T"]:
        """Values [B T], float32, each read at the token before; 0 if there is none."""
        raw = self.head(self.backbone(sequences, deterministic=deterministic))
        before = predecessors(sequences)
        values = jnp.take_along_axis(raw, jnp.maximum(before, 0), axis=1)
        return jnp.where(before >= 0, values, 0.0)


def predecessors(sequences: Sequences) -> Int[Array, "B T"]:
    """Column of the token that each token follows, -1 for none.

    Within a segment it is the column before; the first token of a segment that shares a
    prefix follows the prefix's last token; first tokens and padding follow nothing.
    """
    segment = sequences.segment
    rows, length = segment.shape
    columns = jnp.broadcast_to(jnp.arange(length), segment.shape)
    previous = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)))
    before = jnp.where((segment == previous) & (segment != 0), columns - 1, -1)
    if sequences.prefix is None:
        return before
    # A row has at most T segments, numbered from 1.
    last = (
        jnp.full((rows, length + 1), -1)
        .at[jnp.arange(rows)[:, None], segment]
        .max(columns)
    )
    follows = jnp.take_along_axis(last, sequences.prefix, axis=1)
    opens = (before < 0) & (segment != 0) & (sequences.prefix != 0)
    return jnp.where(opens, follows, before)


def init_head_model(model: RewardModel | ValueModel, key: jax.Array) -> dict[str, Any]:
    """Random parameters {"backbone": ..., "head": {"kernel": [D]}}."""
    example = (example_sequences(),)
    if isinstance(model, RewardModel):
        example += (jnp.zeros((1, 1), jnp.int32),)
    return init_module(model, key, *example, method="__call__")


def init_head(config: LlamaConfig, key: jax.Array) -> dict[str, Any]:
    """A fresh head {"kernel": [D]} for a pretrained backbone."""
    hidden = jnp.zeros((1, config.hidden_size))
    return dict(ScalarHead(config.hidden_size).init(key, hidden)["params"])
