"""RLOO: REINFORCE with a leave-one-out baseline, and its named variants.

    objective = rloo_objective(apply)                     the paper's
    objective = rloo_token_objective(apply)               as OpenRLHF and verl

Where the KL penalty goes is decided by `advantages`: inside the reward and so inside
the baseline (the paper's), or outside the baseline; as a loss it is the objectives'
`kl_loss`.

Source: Ahmadian et al. 2024, arXiv:2402.14740; Hong et al. 2025, arXiv:2505.07271.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.policy import PolicyApply, counted, policy_metrics
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.losses import policy
from rlhf_jax.losses.masked import masked_mean, weighted_mean
from rlhf_jax.rl import baselines, shaping
from rlhf_jax.types import Experience, Mean

KLLoss = Callable[..., jax.Array]
"""(logprobs, ref_logprobs, mask) -> KL estimate per token: losses.kl.k1, k2 or k3."""


def kl_in_reward(
    scores: jax.Array, kl: jax.Array, counts: jax.Array, *, kl_coef: float | jax.Array
) -> jax.Array:
    """Advantages [B G] with the KL penalty inside the reward and the baseline.

    R = score - beta KL,  A_i = R_i - mean_{j != i} R_j

    Args:
        scores: [B G].
        kl: [B G] k1 estimate in nats, summed over each completion.
        counts: [B G], False leaves a completion out.
        kl_coef: beta.

    Source: Hong et al. 2025, arXiv:2505.07271 (code: async_rloo_trainer.py).
    """
    rewards = shaping.sequence_rewards(scores.ravel(), kl.ravel(), kl_coef=kl_coef)
    return baselines.leave_one_out(rewards.reshape(scores.shape), counts)


def kl_outside(
    scores: jax.Array, kl: jax.Array, counts: jax.Array, *, kl_coef: float | jax.Array
) -> jax.Array:
    """Advantages [B G] with the KL penalty taken off after the baseline.

    A_i = (score_i - mean_{j != i} score_j) - beta KL_i

    Args:
        scores: [B G].
        kl: [B G] k1 estimate in nats, summed over each completion.
        counts: [B G], False leaves a completion out.
        kl_coef: beta.

    Source: the baseline of Kool et al. 2019; the placement as OpenRLHF 0.11 and verl.
    """
    advantages = baselines.leave_one_out(scores, counts)
    penalised = advantages - kl_coef * kl.astype(jnp.float32)
    return jnp.where(baselines.usable(counts), penalised, 0.0)


def rloo_objective(
    apply: PolicyApply,
    *,
    clip_eps: float = 0.2,
    kl_loss: KLLoss | None = None,
    kl_coef: float = 0.0,
) -> Objective:
    """An objective on Experience with one ratio a completion.

    loss = mean_m max(-A_m rho_m, -A_m clip(rho_m, 1 - eps, 1 + eps)) [+ beta KL_m]
    rho_m = exp(sum_t logprob_t - old_logprob_t)

    The metrics policy/ratio, clip_fraction and kl_step are of rho_m.

    Args:
        apply: from `policy_apply`.
        clip_eps: eps.
        kl_loss: adds this estimate of the KL to the reference, summed over the
            completion's tokens; None = no such term.
        kl_coef: beta of that term.

    Source: Hong et al. 2025, arXiv:2505.07271, section 3 (code: async_rloo_trainer.py).
    """

    def objective(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        logprobs, entropy = apply(params, batch.sequences, key)
        mask = counted(batch)
        metrics = policy_metrics(batch, logprobs, entropy, mask, clip_eps=clip_eps)
        count = len(batch.weight)
        moved = policy.sequence_sums(
            logprobs - batch.old_logprobs, batch.sample, mask, count=count
        )
        losses = policy.sequence_clip(
            moved,
            jnp.zeros_like(moved),
            batch.advantages,
            batch.weight > 0,
            clip_eps=clip_eps,
        )
        # What is clipped is one ratio a completion, so that is what is reported.
        whole = policy.policy_statistics(
            moved, jnp.zeros_like(moved), batch.weight > 0, clip_eps=clip_eps
        )
        metrics |= {
            "policy/ratio": whole.ratio,
            "policy/clip_fraction": whole.clip_fraction,
            "policy/kl_step": whole.kl,
            "policy/surrogate": weighted_mean(losses, batch.weight),
            "policy/surrogate_size": weighted_mean(jnp.abs(losses), batch.weight),
        }
        if kl_loss is not None:
            away = kl_loss(logprobs, batch.ref_logprobs, mask)
            losses += kl_coef * policy.sequence_sums(
                away, batch.sample, mask, count=count
            )
        return weighted_mean(losses, batch.weight), metrics

    return objective


def rloo_token_objective(
    apply: PolicyApply,
    *,
    clip_eps: float = 0.2,
    kl_loss: KLLoss | None = None,
    kl_coef: float = 0.0,
) -> Objective:
    """An objective on Experience with one ratio a token.

    loss = mean_t max(-A rho_t, -A clip(rho_t, 1 - eps, 1 + eps)) [+ beta KL_t]

    The mean runs over all tokens of the batch; every token of a completion has the
    completion's advantage.

    Args:
        apply: from `policy_apply`.
        clip_eps: eps.
        kl_loss: adds this estimate of the KL to the reference; None = no such term.
        kl_coef: beta of that term.

    Source: as OpenRLHF 0.11 and verl implement RLOO; the loss is PPO's (Schulman et al.
    2017, arXiv:1707.06347, eq. 7).
    """

    def objective(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        logprobs, entropy = apply(params, batch.sequences, key)
        mask = counted(batch)
        metrics = policy_metrics(batch, logprobs, entropy, mask, clip_eps=clip_eps)
        losses = policy.ppo_clip(
            logprobs,
            batch.old_logprobs,
            batch.advantages[batch.sample],
            mask,
            clip_eps=clip_eps,
        )
        metrics["policy/surrogate"] = masked_mean(losses, mask)
        metrics["policy/surrogate_size"] = masked_mean(jnp.abs(losses), mask)
        if kl_loss is not None:
            losses += kl_coef * kl_loss(logprobs, batch.ref_logprobs, mask)
        return masked_mean(losses, mask), metrics

    return objective
