"""`make_generate`: a function (params, prompts, key) -> Rollout, to be jitted once.

    generate = jax.jit(make_generate(model, SamplingConfig(), stop_ids=(2,)))
    rollout = generate(params, prompts, key)

Prompts are encoded once; their keys are shared by the G samples of each. A loop then
draws one token a row until every row has stopped. The last prompt token is the first
input of that loop, so that the first draw is a step like the others.

Rows live in *slots* (slots.py). With `slots=0` each completion has one and nothing
moves. With fewer slots than completions, those that have stopped are handed to waiting
completions whenever enough are free, so that the throughput does not hang on the
longest.

The noise of a draw is a function of (key, completion, place in it) alone. So neither
the number of slots, nor their order, nor the devices change what is drawn, but for
float ties; another key draws anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import decode
from rlhf_jax.models.cache import init_cache
from rlhf_jax.models.config import LoraConfig
from rlhf_jax.models.decode import DecodeCache
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.lora import merge_lora
from rlhf_jax.models.parameters import param_specs, unrolled
from rlhf_jax.models.tensors import is_stacked
from rlhf_jax.sampling import slots as slots_lib
from rlhf_jax.sampling import warp
from rlhf_jax.sampling.slots import Prompts, Slots
from rlhf_jax.sharding import ShardingRules
from rlhf_jax.types import PromptBatch, Rollout, Sequences

Generate: TypeAlias = Callable[[Any, PromptBatch, jax.Array], Rollout]
REFILL = 8
"""Free slots are refilled once they are 1 / REFILL of all."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn."""

    num_samples: int = 1
    """G, completions of each prompt."""
    max_new_tokens: int = 64
    """C, tokens after which a completion is cut; the stop token counts."""
    min_new_tokens: int = 0
    """Tokens before a stop token may be drawn."""
    temperature: float = 1.0
    """Logits are divided by it; 0 = the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 = all."""
    top_p: float = 1.0
    """Only the most probable tokens that hold this mass; 1 = all."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the best; 0 = all."""
    repetition_penalty: float = 1.0
    """Logits of tokens used before are divided (or, if negative, multiplied) by it."""
    penalise_prompt: bool = True
    """Whether the prompt's tokens count as used before."""
    slots: int = 0
    """Completions in the making at a time, over all devices; 0 = all."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_samples", 1, None),
            ("max_new_tokens", 1, None),
            ("min_new_tokens", 0, self.max_new_tokens),
            ("temperature", 0.0, None),
            ("top_k", 0, None),
            ("min_p", 0.0, 1.0),
            ("slots", 0, None),
        ):
            value = getattr(self, name)
            # not (a <= b) rather than a > b: nan fails
            if not low <= value or (high is not None and not value <= high):
                limit = f"at least {low}" if high is None else f"{low} .. {high}"
                raise ValueError(f"sampling.{name}: expected {limit}, got {value}")
        for name in ("top_p", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"sampling.{name}: expected a number above 0, got "
                    f"{getattr(self, name)}"
                )
        if self.top_p > 1:
            raise ValueError(f"sampling.top_p: expected at most 1, got {self.top_p}")


def make_generate(
    model: Llama,
    config: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    rules: ShardingRules | None = None,
) -> Generate:
    """A pure function (params, prompts [B P], key) -> Rollout of M = B G completions.

    Args:
        model: of the parameters; stacked layers and adapters are unrolled and merged
            once a call.
        config: how completions are drawn; all of it is static.
        stop_ids: tokens that end a completion, the end-of-sequence token among them.
        rules: how weights and cache lie on the mesh while decoding; None = as in
            training.

    Raises:
        ValueError: no stop id, or one outside the vocabulary.
    """
    vocab = model.config.vocab_size
    if not stop_ids or not all(0 <= stop < vocab for stop in stop_ids):
        raise ValueError(
            f"stop_ids {stop_ids}: expected at least one, each in 0 .. {vocab - 1}"
        )
    if config.min_new_tokens and len(set(stop_ids)) == vocab:
        raise ValueError(
            f"sampling.min_new_tokens {config.min_new_tokens}: every token of the "
            "vocabulary stops a completion, so there is none to go on with; set it to 0"
        )
    rules = rules or model.rules
    decoder = model.clone(
        compute=dataclasses.replace(
            model.compute, scan_layers=False, remat="none", dropout=0.0
        ),
        lora=LoraConfig(),
        rules=rules,
    )

    sizes = {
        "num_samples": config.num_samples,
        "max_new_tokens": config.max_new_tokens,
    }

    def generate(params: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
        params = _decoder_params(params, model, rules)
        encoded, cache = _prefill(decoder, params, prompts, config)
        total = len(prompts.tokens) * config.num_samples
        step = _make_step(decoder, params, config, jnp.array(stop_ids), key)
        if not 0 < config.slots < total:
            slots = slots_lib.fill_all(encoded, cache, **sizes)
            slots = jax.lax.while_loop(lambda s: s.active.any(), step, slots)
            return slots.drawn
        slots = slots_lib.empty(encoded, cache, slots=config.slots, **sizes)
        most_free = config.slots - -(-config.slots // REFILL)

        def busy(slots: Slots) -> Bool[Array, ""]:
            enough = jnp.sum(slots.active) > most_free
            return slots.active.any() & (enough | (slots.waiting >= total))

        def fill_and_run(slots: Slots) -> Slots:
            slots = slots_lib.refill(
                slots, encoded, cache, num_samples=config.num_samples
            )
            return jax.lax.while_loop(busy, step, slots)

        more = lambda s: s.active.any() | (s.waiting < total)  # noqa: E731
        return jax.lax.while_loop(more, fill_and_run, slots).drawn

    return generate


def _decoder_params(params: Any, model: Llama, rules: ShardingRules) -> Any:
    """Merged, unrolled, in the compute dtype, and sharded by the decoding rules."""
    if model.lora.rank:
        params = merge_lora(params, model.lora)
    if is_stacked(params):
        params = unrolled(params)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        kernel = path[-1].key in ("kernel", "embedding")
        return leaf.astype(model.compute.dtype) if kernel else leaf

    params = jax.tree_util.tree_map_with_path(cast, params)
    if jax.sharding.get_abstract_mesh().empty:
        return params
    specs = param_specs(params, rules)
    return jax.lax.with_sharding_constraint(params, specs)


def _prefill(
    decoder: Llama, params: Any, prompts: PromptBatch, config: SamplingConfig
) -> tuple[Prompts, DecodeCache]:
    """The prompts, and a cache with G empty rings behind each."""
    rows, width = prompts.tokens.shape
    mask = prompts.mask
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, 0)
    sequences = Sequences(
        tokens=prompts.tokens,
        positions=positions,
        segment=mask.astype(jnp.int32),
        completion_mask=jnp.zeros_like(mask),
    )
    empty = init_cache(decoder.config, rows, width, decoder.compute.dtype)
    filled: Any = decoder.apply({"params": params}, sequences, cache=empty)[1]
    length = mask.sum(axis=1)
    is_last = mask & (positions == length[:, None] - 1)
    last = jnp.sum(jnp.where(is_last, prompts.tokens, 0), axis=1)
    seen = None
    if config.repetition_penalty != 1:
        seen = jnp.zeros((rows, decoder.config.vocab_size), bool)
        if config.penalise_prompt:
            where = jnp.arange(rows)[:, None]
            seen = seen.at[where, prompts.tokens].max(mask)
    # The last token's key is written again by the first step; the prompt goes without.
    readable = jnp.where(mask & ~is_last, positions, -1)
    cache = decode.init_decode(
        filled,
        readable,
        decoder.config,
        num_samples=config.num_samples,
        columns=config.max_new_tokens,
    )
    return Prompts(last=last, length=length, seen=seen), cache


def _make_step(
    decoder: Llama,
    params: Any,
    config: SamplingConfig,
    stop_ids: Int[Array, "n"],
    key: jax.Array,
) -> Callable[[Slots], Slots]:
    """One token for every active slot."""

    def step(slots: Slots) -> Slots:
        sequences = Sequences(
            tokens=slots.token[:, None],
            positions=slots.position[:, None],
            segment=slots.active[:, None].astype(jnp.int32),
            completion_mask=slots.active[:, None],
        )
        variables = {"params": params}
        hidden, cache = decoder.apply(variables, sequences, cache=slots.cache)
        logits: Any = decoder.apply(variables, hidden[:, 0], method="logits")
        token, *logprobs = _choose(logits, slots, config, stop_ids, key)
        count = slots.count + 1
        stopped = jnp.isin(token, stop_ids)
        drawn = slots_lib.record(slots, token, stopped, logprobs)
        seen = slots.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return dataclasses.replace(
            slots,
            cache=cache,
            count=count,
            token=token,
            position=slots.position + 1,
            active=slots.active & ~stopped & (count < config.max_new_tokens),
            seen=seen,
            drawn=drawn,
        )

    return step


def _choose(
    logits: Float[Array, "S V"],
    slots: Slots,
    config: SamplingConfig,
    stop_ids: Int[Array, "n"],
    key: jax.Array,
) -> tuple[Int[Array, "S"], Float[Array, "S"], Float[Array, "S"], Float[Array, "S"]]:
    """(token, log p at the temperature, log p at 1, log p of what was drawn from)."""
    warped = logits
    if slots.seen is not None:
        warped = warp.penalise_repetition(
            warped, slots.seen, penalty=config.repetition_penalty
        )
    if config.min_new_tokens:
        early = slots.count < config.min_new_tokens
        is_stop = jnp.isin(jnp.arange(logits.shape[1]), stop_ids)
        warped = jnp.where(early[:, None] & is_stop[None], -jnp.inf, warped)
    if config.temperature == 0:
        token = jnp.argmax(warped, axis=-1)
        plain = _logprob(logits, token)
        return token, plain, plain, jnp.zeros_like(plain)
    probs = jax.nn.softmax(warped / config.temperature, axis=-1)
    if config.top_k:
        probs = warp.top_k(probs, k=min(config.top_k, logits.shape[1]))
    if config.top_p < 1:
        probs = warp.top_p(probs, p=config.top_p)
    if config.min_p:
        probs = warp.min_p(probs, p=config.min_p)
    token = warp.draw(probs, _noise(key, slots.item, slots.count))
    plain = tempered = _logprob(logits, token)
    if config.temperature != 1:
        tempered = _logprob(logits / config.temperature, token)
    sampling = jnp.log(jnp.take_along_axis(probs, token[:, None], axis=-1)[:, 0])
    return token, tempered, plain, sampling


def _logprob(logits: Float[Array, "S V"], token: Int[Array, "S"]) -> Float[Array, "S"]:
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _noise(
    key: jax.Array, item: Int[Array, "S"], count: Int[Array, "S"]
) -> Float[Array, "S"]:
    """One uniform number in [0, 1) for each (completion, place in it)."""

    def one(item: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(key, item), count)
        )

    return jax.vmap(one)(item, count)
