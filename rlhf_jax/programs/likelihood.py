"""Log-probabilities of texts under a policy, through the machinery that scores them.

likelihood = open_likelihood("runs/policy", ScoringConfig())
encoded = [likelihood.encode(prompt, text) for prompt, text in texts]
logprobs = likelihood.rewards(encoded)          log p(text | prompt), nats
"""

import functools
from typing import Any

import jax
import numpy as np

from rlhf_jax.algorithms.dpo import completion_sums
from rlhf_jax.algorithms.sft import logprobs_apply
from rlhf_jax.data.encode import Encoder
from rlhf_jax.programs import models
from rlhf_jax.programs.scorer import Scorer, ScoringConfig
from rlhf_jax.sharding import ShardingRules, batch_devices, batch_sharding, make_mesh


def open_likelihood(spec: str, config: ScoringConfig) -> Scorer:
    """A Scorer whose rewards are log p(completion | prompt), summed over the tokens of
    the completion, its end token included, at temperature 1.

    Args:
        spec: a policy, as in `models`.
        config: how; `untrained_head` has no meaning here.

    Raises:
        ValueError: no such model, or a reward model.
    """
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    with jax.set_mesh(mesh):
        model, params, tokenizer = models.load_policy(
            spec, compute=config.compute, mesh=mesh, rules=rules
        )
    logprobs = logprobs_apply(model, deterministic=True)

    @jax.jit
    def sums(params: Any, sequences: Any, score_at: Any) -> jax.Array:
        found = logprobs(params, sequences, jax.random.key(0))
        return completion_sums(found, sequences, score_at)

    where = batch_sharding(mesh, rules)

    def score(params: Any, sequences: Any, score_at: Any) -> np.ndarray:
        return sums(params, *jax.device_put((sequences, score_at), where))

    return Scorer(
        encoder=Encoder(tokenizer, template=config.template),
        score_fn=functools.partial(score, params),
        max_length=config.max_length or model.config.max_position_embeddings,
        tokens_per_batch=config.tokens_per_batch,
        rows_multiple_of=batch_devices(mesh, rules),
        mesh=mesh,
    )
