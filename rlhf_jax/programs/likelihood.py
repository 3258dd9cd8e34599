"""What a policy makes of texts, through the machinery that scores them.

    likelihood = open_likelihood("runs/policy", ScoringConfig())
    encoded = likelihood.encode_all(Texts(prompts, completions, rows))
    logprobs = likelihood.rewards(encoded)         log p(text | prompt), nats

`open_pooling` gives the mean hidden state of each text instead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.dpo import completion_sums
from rlhf_jax.algorithms.sft import logprobs_apply
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import models
from rlhf_jax.programs.scorer import Scorer, ScoringConfig, make_scorer
from rlhf_jax.sharding import ShardingRules, batch_sharding, make_mesh


def open_likelihood(spec: str, config: ScoringConfig) -> Scorer:
    """A Scorer whose rewards are log p(completion | prompt), summed over the tokens of
    the completion, its end token included, at temperature 1.

    Args:
        spec: a policy, as in `models`.
        config: how; `untrained_head` has no meaning here.

    Raises:
        ValueError: no such model, or a reward model.
    """
    return _open(spec, config, _sums)


def _sums(model: Llama) -> Callable[..., jax.Array]:
    logprobs = logprobs_apply(model, deterministic=True)

    def sums(params: Any, sequences: Any, score_at: Any) -> jax.Array:
        found = logprobs(params, sequences, jax.random.key(0))
        return completion_sums(found, sequences, score_at)

    return sums


def open_pooling(spec: str, config: ScoringConfig) -> Scorer:
    """A Scorer whose states are means of the policy's hidden states, after the final
    norm, over the tokens of prompt and completion; its rewards mean nothing.

    Args:
        spec: a policy, as in `models`.
        config: how; `untrained_head` has no meaning here.

    Raises:
        ValueError: no such model, or a reward model.
    """
    scorer = _open(spec, config, _pooled)
    return dataclasses.replace(scorer, states_fn=scorer.score_fn)


def _pooled(model: Llama) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    def pooled(params: Any, sequences: Any, score_at: Any) -> Any:
        hidden: Any = model.apply({"params": params}, sequences)
        own = jnp.take_along_axis(sequences.segment, score_at, axis=1)
        mine = sequences.segment[:, None, :] == own[:, :, None]
        if sequences.prefix is not None:
            prompt = jnp.take_along_axis(sequences.prefix, score_at, axis=1)[:, :, None]
            mine |= (sequences.segment[:, None, :] == prompt) & (prompt != 0)
        mine = mine.astype(jnp.float32)
        total = jnp.einsum("bst,btd->bsd", mine, hidden.astype(jnp.float32))
        means = total / mine.sum(axis=2, keepdims=True)
        return jnp.zeros(score_at.shape), means, means

    return pooled


def _open(spec: str, config: ScoringConfig, make: Callable[[Llama], Any]) -> Scorer:
    """The function that `make` makes of a policy, jitted, as a Scorer's."""
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    with jax.set_mesh(mesh):
        model, params, tokenizer = models.load_policy(
            spec, compute=config.compute, mesh=mesh, rules=rules
        )
    function, where = jax.jit(make(model)), batch_sharding(mesh, rules)

    def call(sequences: Any, score_at: Any) -> Any:
        return function(params, *jax.device_put((sequences, score_at), where))

    return make_scorer(call, tokenizer, model.config, config)
