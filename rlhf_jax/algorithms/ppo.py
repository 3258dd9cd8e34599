"""PPO: an objective for the policy and one for the critic, which have states apart.

    policy_update = make_update(ppo_objective(apply), policy_tx)
    critic_update = make_update(critic_objective(value_apply(critic)), critic_tx)

`ppo_targets` makes advantages and returns from scores, values and KL. Two updates on
two states are the sum of the two losses on one: no parameter is shared.

Source: Schulman et al. 2017, arXiv:1707.06347; the defaults are those of PPO-max,
Zheng et al. 2023, arXiv:2307.04964, and Wang et al. 2024, arXiv:2401.06080.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.algorithms.policy import PolicyApply, counted, policy_metrics
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses import policy, value
from rlhf_jax.losses.masked import masked_mean
from rlhf_jax.models.heads import ValueModel
from rlhf_jax.rl import shaping
from rlhf_jax.rl.gae import gae
from rlhf_jax.types import Experience, Mean, Sequences


class Targets(NamedTuple):
    """What the policy and the critic are trained towards, each [M C]."""

    advantages: jax.Array
    returns: jax.Array


def ppo_targets(
    scores: jax.Array,
    kl: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float | jax.Array,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    whiten: bool = True,
    clip_advantage: float | None = None,
) -> Targets:
    """Advantages and returns of completions.

    r_t = -beta kl_t + [t is the last token] score, then GAE, then whitening over the
    whole batch and clipping.

    Args:
        scores: [M].
        kl: [M C] log pi_old - log pi_ref, in nats.
        values: [M C] of the critic before the update.
        mask: [M C], True on completion tokens that count.
        kl_coef: beta.
        gamma: discount.
        gae_lambda: lambda.
        whiten: advantages of mean 0 and variance 1.
        clip_advantage: then within +- this; None = as they are.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16; Wang et al. 2024,
    arXiv:2401.06080 (code: MOSS-RLHF).
    """
    rewards = shaping.token_rewards(scores, kl, mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    if whiten:
        advantages = shaping.whiten(advantages, mask)
    if clip_advantage is not None:
        advantages = jnp.clip(advantages, -clip_advantage, clip_advantage)
    return Targets(advantages, returns)


@struct.dataclass
class Mixed:
    """A batch of experience with supervised rows beside it (PTX)."""

    experience: Experience
    ptx: Sequences
    ptx_scale: jax.Array
    """[B T] weight of each supervised token relative to a token of experience: the
    tokens of experience in the whole batch over the supervised ones in it, so that
    micro-batches add up to the mean over the whole batch."""


def ppo_objective(
    apply: PolicyApply,
    *,
    clip_eps: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
) -> Objective:
    """An objective (params, Experience, key) -> (Mean, metrics) for the policy.

    loss = mean_t [ppo_clip_t - c entropy_t] over all tokens of the batch

    Args:
        apply: from `policy_apply`.
        clip_eps: eps of the ratio.
        dual_clip: bound on the loss of tokens with a negative advantage; None = none.
        entropy_coef: c.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9.
    """

    def objective(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        logprobs, entropy = apply(params, batch.sequences, key)
        mask = counted(batch)
        losses = policy.ppo_clip(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            mask,
            clip_eps=clip_eps,
            dual_clip=dual_clip,
        )
        metrics = policy_metrics(batch, logprobs, entropy, mask, clip_eps=clip_eps)
        metrics["policy/surrogate"] = masked_mean(losses, mask)
        metrics["policy/surrogate_size"] = masked_mean(jnp.abs(losses), mask)
        if entropy_coef:
            losses -= entropy_coef * jnp.where(mask, entropy, 0.0)
        return masked_mean(losses, mask), metrics

    return objective


def with_ptx(objective: Objective, sft: Objective, *, ptx_coef: float) -> Objective:
    """An objective on `Mixed` batches: the given one + ptx_coef x the SFT loss.

    loss = loss_RL + gamma mean_t(-logprob_t) over supervised tokens

    Args:
        objective: on Experience, a mean over tokens.
        sft: from `sft_objective`.
        ptx_coef: gamma.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    """

    def mixed(
        params: Any, batch: Mixed, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        policy_key, ptx_key = jax.random.split(key)
        loss, metrics = objective(params, batch.experience, policy_key)
        supervised, _ = sft(params, batch.ptx, ptx_key)
        scale = batch.ptx_scale.max()
        total = loss.total + ptx_coef * scale * supervised.total
        metrics = dict(metrics) | {"policy/ptx_loss": supervised}
        return Mean(total, loss.weight), metrics

    return mixed


def value_apply(model: ValueModel, *, deterministic: bool) -> Callable[..., jax.Array]:
    """(params, sequences, key) -> values [B T] of a Linen value model.

    Args:
        model: the module.
        deterministic: False draws the dropout masks from the key.
    """

    def apply(params: Any, sequences: Sequences, key: jax.Array) -> jax.Array:
        values: Any = model.apply(
            {"params": params},
            sequences,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": key},
        )
        return values

    return apply


def critic_objective(
    apply: Callable[..., jax.Array], *, clip_eps: float | None = 0.2
) -> Objective:
    """An objective (params, Experience, key) -> (Mean, metrics) for the critic.

    loss = mean_t 1/2 max((V - G)^2, (clip(V, V_old +- eps) - G)^2)

    Args:
        apply: (params, sequences, key) -> values [B T].
        clip_eps: eps, in units of value; None = no clipping.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9; the clipping as in the
    authors' baselines and MOSS-RLHF.
    """

    def objective(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        values = apply(params, batch.sequences, key)
        mask = counted(batch)
        assert batch.old_values is not None and batch.returns is not None
        losses = value.clipped_value(
            values, batch.old_values, batch.returns, mask, clip_eps=clip_eps
        )
        return masked_mean(losses, mask), {
            "value/mean": masked_mean(values, mask),
            "value/return": masked_mean(batch.returns, mask),
        }

    return objective
