"""The compiled functions that serve every cell of the saturation grid.

`runs` is RLOO, `vmap`ped over seeds; `sample` and `score` judge one policy each. The
cells differ in arrays alone, so each function compiles once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax.algorithms import rloo_run
from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.reward_model import reward_apply
from rlhf_jax.algorithms.rloo import rloo_objective
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.iterate import Order
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.models import load_policy
from rlhf_jax.sampling.generate import SamplingConfig, make_generate
from rlhf_jax.studies.quickstart import UNROLLED
from rlhf_jax.types import PromptBatch, Rollout


@struct.dataclass
class Standardised:
    """A reward model whose reward is (r - mean) / std."""

    params: Any
    mean: Float[Array, ""]
    std: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What all cells share."""

    architecture: LlamaConfig
    encoder: Encoder
    train: PromptBatch
    """All prompts to train on, [N P]."""
    groups: Any
    """Of their mixture, for their order."""
    held_out: list[EncodedPrompt]
    judged: PromptBatch
    """The held-out prompts in batches, [N/B B P]."""
    steps: int
    batch_size: int
    runs: Callable[..., Any]
    """(policies, reward models, prompts, keys) -> (policies, metrics), over seeds."""
    sample: Callable[..., Any]
    """(policy, prompts [N/B B P], key) -> completions, by batch."""
    score: Callable[..., Any]
    """(reference, reward model, prompts, completions, key) -> (rewards [N G], metrics a
    batch)."""

    def prompts(self, seed: int) -> PromptBatch:
        """[S B P], in the order of a run of the program with that seed."""
        order = Order(len(self.train.tokens), seed=seed, groups=self.groups)
        rows = np.reshape(
            order(0, self.steps * self.batch_size), (self.steps, self.batch_size)
        )
        return jax.tree.map(lambda x: x[rows], self.train)

    def scale_prompts(self) -> PromptBatch:
        """As many prompts as judge, of those to train on."""
        return jax.tree.map(
            lambda x, like: x[: like.shape[0] * like.shape[1]].reshape(like.shape),
            self.train,
            self.judged,
        )


def open_bench(
    model: str,
    *,
    data: list[str],
    held_out: str,
    steps: int,
    batch_size: int,
    kl_coef: float,
    num_samples: int,
    max_new_tokens: int,
    optimizer: OptimizerConfig,
) -> Bench:
    """The bench of RLOO as the paper has it, at temperature 1; the rest is not chosen.

    Args:
        model: a policy; its architecture and tokenizer are read.
        data: SPECs of the prompts to train on, at least as many as judge.
        held_out: SPEC of the prompts that judge, a multiple of batch_size.
        steps: of RLOO.
        batch_size: prompts of a step.
        kl_coef: standard deviations of reward per nat.
        num_samples: completions of a prompt.
        max_new_tokens: of a completion.
        optimizer: of the policy.
    """
    llama, _, tokenizer = load_policy(model, compute=UNROLLED)
    encoder = prepare.make_encoder(tokenizer)
    train, _ = prepare.prepare_prompts(data, encoder)
    judges, _ = prepare.prepare_prompts([held_out], encoder)
    if len(judges) % batch_size or len(judges) > len(train):
        raise ValueError(
            f"held_out {held_out}: {len(judges)} prompts; expected a multiple of "
            f"batch_size {batch_size}, and at most the {len(train)} to train on"
        )
    listed = [judges[n] for n in range(len(judges))]
    both = _arrays([*(train[n] for n in range(len(train))), *listed], encoder.pad_id)
    generate = make_generate(
        llama,
        SamplingConfig(num_samples=num_samples, max_new_tokens=max_new_tokens),
        stop_ids=(encoder.eos_id,),
    )
    tx = make_optimizer(optimizer, make_schedule(optimizer, steps))
    return Bench(
        architecture=llama.config,
        encoder=encoder,
        train=jax.tree.map(lambda x: x[: len(train)], both),
        groups=train.groups,
        held_out=listed,
        judged=jax.tree.map(
            lambda x: x[len(train) :].reshape(-1, batch_size, x.shape[1]), both
        ),
        steps=steps,
        batch_size=batch_size,
        **_compiled(llama, generate, tx, eos_id=encoder.eos_id, kl_coef=kl_coef),
    )


def _compiled(
    llama: Llama, generate: Any, tx: Any, *, eos_id: int, kl_coef: float
) -> dict[str, Callable[..., Any]]:
    """runs, sample and score, see `Bench`."""
    policy = policy_apply(llama, temperature=1.0, deterministic=True)
    reward = standardised(
        reward_apply(RewardModel(llama.config, UNROLLED), deterministic=True)
    )
    run = rloo_run.make_rloo_run(
        rloo_run.make_act(generate, policy, reward, eos_id=eos_id),
        rloo_objective(policy),
        tx,
        kl_coef=kl_coef,
    )
    score = rloo_run.make_score(policy, reward, eos_id=eos_id)
    return {
        "runs": jax.jit(jax.vmap(run)),
        "sample": jax.jit(make_sample(generate)),
        "score": jax.jit(by_batch(score)),
    }


def standardised(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The reward of `Standardised` parameters.

    Args:
        reward: from `reward_apply`.
    """

    def apply(model: Standardised, *inputs: Any) -> jax.Array:
        return (reward(model.params, *inputs) - model.mean) / model.std

    return apply


def _arrays(prompts: Sequence[EncodedPrompt], pad_id: int) -> PromptBatch:
    """All prompts in one width, that of the longest."""
    batch = xp.prompt_batch(prompts, pad_id=pad_id)
    longest = max(len(prompt.tokens) for prompt in prompts)
    return jax.tree.map(lambda x: x[:, :longest], batch)


def make_sample(generate: Any) -> Callable[..., Rollout]:
    """A pure function (policy, prompts [N/B B P], key) -> completions, one batch after
    the other."""

    def sample(params: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
        keys = jax.random.split(key, len(prompts.tokens))
        return jax.lax.map(lambda one: generate(params, *one), (prompts, keys))

    return sample


def by_batch(score: rloo_run.Score) -> Callable[..., tuple[jax.Array, Any]]:
    """A pure function (reference, reward model, prompts [N/B B P], completions, key) ->
    (their rewards [N G], metrics a batch)."""

    def judge(
        ref: Any, model: Any, prompts: PromptBatch, rollout: Rollout, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        def one(batch: tuple[PromptBatch, Rollout]) -> tuple[jax.Array, Any]:
            scored = score(ref, model, *batch, key)
            return scored.rewards, rloo_run.measure(scored)

        rewards, metrics = jax.lax.map(one, (prompts, rollout))
        return rewards.reshape(-1, rewards.shape[-1]), metrics

    return judge
