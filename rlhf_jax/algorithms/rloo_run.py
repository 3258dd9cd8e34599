"""A whole RLOO run as one pure function of arrays: one `jax.jit`, and it vmaps.

    act = make_act(generate, policy, reward, eos_id=2)
    run = make_rloo_run(act, rloo_objective(policy), tx, kl_coef=0.05)
    runs = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0)))
    params, metrics = runs(policy_params, reward_params, prompts, keys)

Steps are a `lax.scan`; a step samples (`act`), takes leave-one-out advantages and makes
the usual update. Nothing comes back to the host before the last step, so runs that
differ in arrays alone (seeds, reward models, policies) train side by side.

The program `rloo` is the same algorithm with everything that needs a host: rewards of
any kind, text in between, packed rows, checkpoints, logs. Here the reward model reads
the sampled ids as they are, so it shares the policy's tokenizer; a row is a prompt and
all its completions at their longest, [prompt | completion 1 | ... | completion G]; and
one step is one update on all of them.

Source: the form of a run is that of Lu et al. 2022, arXiv:2210.05639 (PureJaxRL).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.policy import PolicyApply
from rlhf_jax.algorithms.rloo import kl_in_reward
from rlhf_jax.algorithms.update import Objective, Params, init_state, make_update
from rlhf_jax.rl import streams
from rlhf_jax.sampling.generate import Generate
from rlhf_jax.types import Experience, PromptBatch, Rollout, Sequences, TrainState


@struct.dataclass
class Scored:
    """M = B G completions with their rewards, in rows of T = P + G C tokens."""

    rollout: Rollout
    sequences: Sequences
    rewards: Float[Array, "B G"]
    old_logprobs: Float[Array, "B T"]
    """log p under the policy that sampled; 0 off the completions."""
    ref_logprobs: Float[Array, "B T"]
    """log p under the reference policy; 0 off the completions."""
    kl: Float[Array, "B G"]
    """k1 estimate of the KL to the reference, in nats."""


Score: TypeAlias = Callable[[Params, Params, PromptBatch, Rollout, jax.Array], Scored]
"""(reference, reward model, prompts, their completions, key) -> Scored."""
Act: TypeAlias = Callable[[Params, Params, Params, PromptBatch, jax.Array], Scored]
"""(policy, reference, reward model, prompts, key) -> Scored."""
Run: TypeAlias = Callable[
    [Params, Params, PromptBatch, jax.Array], tuple[Params, dict[str, jax.Array]]
]
"""(policy, reward model, prompts with a leading axis of steps, key) -> (policy, metrics
with that axis)."""


def make_act(
    generate: Generate,
    policy: PolicyApply,
    reward: Callable[..., jax.Array],
    *,
    eos_id: int,
) -> Act:
    """A pure function that samples completions, scores them and asks the reference.

    Args:
        generate: from `make_generate`, with eos_id as its only stop id.
        policy: see `make_score`.
        reward: see `make_score`.
        eos_id: see `make_score`.
    """
    score = make_score(policy, reward, eos_id=eos_id)

    def act(
        params: Params, ref: Params, model: Params, prompts: PromptBatch, key: jax.Array
    ) -> Scored:
        return score(ref, model, prompts, generate(params, prompts, key), key)

    return act


def make_score(
    policy: PolicyApply, reward: Callable[..., jax.Array], *, eos_id: int
) -> Score:
    """A pure function that scores completions and asks the reference.

    Args:
        policy: from `policy_apply`, at the temperature of the sampling.
        reward: from `reward_apply`.
        eos_id: ends what the reward model reads, of a completion that was cut too.
    """

    def score(
        ref: Params,
        model: Params,
        prompts: PromptBatch,
        rollout: Rollout,
        key: jax.Array,
    ) -> Scored:
        rows, width = prompts.tokens.shape
        sequences = lay_out(prompts, rollout.tokens, rollout.mask)
        tokens, mask = with_end(rollout, eos_id)
        lengths = jnp.sum(mask, axis=1).reshape(rows, -1)
        first = width + jnp.arange(lengths.shape[1])[None] * mask.shape[1]
        ended = lay_out(prompts, tokens, mask)
        rewards = reward(model, ended, first + lengths - 1, key)
        old = jnp.pad(rollout.logprobs.reshape(rows, -1), ((0, 0), (width, 0)))
        ref = jnp.where(sequences.completion_mask, policy(ref, sequences, key)[0], 0.0)
        away = jnp.sum((old - ref)[:, width:].reshape(rollout.tokens.shape), axis=1)
        return Scored(
            rollout=rollout,
            sequences=sequences,
            rewards=rewards,
            old_logprobs=old,
            ref_logprobs=ref,
            kl=away.reshape(rows, -1),
        )

    return score


def lay_out(
    prompts: PromptBatch, tokens: Int[Array, "M C"], mask: Bool[Array, "M C"]
) -> Sequences:
    """Rows [prompt | completion 1 | ... | completion G], one a prompt.

    Args:
        prompts: padded on either side.
        tokens: of the completions, from column 0 on.
        mask: True on completion tokens.
    """
    rows, columns = len(prompts.tokens), tokens.shape[1]
    written = mask.reshape(rows, -1)
    group, place = jnp.divmod(jnp.arange(written.shape[1]), columns)
    prompt = prompts.mask.astype(jnp.int32)
    length = jnp.sum(prompt, axis=1, keepdims=True)

    def join(first: jax.Array, second: jax.Array) -> jax.Array:
        own = jnp.where(written, second, 0).astype(first.dtype)
        return jnp.concatenate([first, own], axis=1)

    return Sequences(
        tokens=join(prompts.tokens, tokens.reshape(rows, -1)),
        positions=join(prompt * (jnp.cumsum(prompt, axis=1) - 1), length + place[None]),
        segment=join(prompt, group[None] + 2),
        completion_mask=join(jnp.zeros_like(prompts.mask), written),
        prefix=join(jnp.zeros_like(prompt), jnp.ones_like(written)),
    )


def with_end(
    rollout: Rollout, eos_id: int
) -> tuple[Int[Array, "M C+1"], Bool[Array, "M C+1"]]:
    """(tokens, mask) of completions that all end with eos_id."""
    length = jnp.sum(rollout.mask, axis=1, keepdims=True)
    columns = jnp.arange(rollout.tokens.shape[1] + 1)[None]
    tokens = jnp.pad(rollout.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(columns == length, eos_id, tokens)
    return tokens, columns < length + ~rollout.stopped[:, None]


def make_rloo_step(
    act: Act,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    kl_coef: float,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, reference, reward model, prompts, key) -> (state, metrics).

    The key is that of the run; state.step makes it that of the step. Metrics are those
    of `make_update` and, of the completions before it, proxy reward, KL in nats,
    length, share that stopped by themselves, and what `train_flops` needs: tokens and
    visible query-key pairs of the rows, and new tokens among them.

    Args:
        act: from `make_act`.
        objective: from `rloo_objective` or `rloo_token_objective`.
        tx: optax transformation.
        kl_coef: beta of the penalty inside the reward, see `rloo.kl_in_reward`.
    """
    update = make_update(objective, tx)

    def step(
        state: TrainState,
        ref: Params,
        model: Params,
        prompts: PromptBatch,
        key: jax.Array,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        noise = jax.random.fold_in(
            jax.random.fold_in(key, streams.SAMPLING), state.step
        )
        scored = act(state.params, ref, model, prompts, noise)
        batch = to_experience(scored, kl_coef=kl_coef)
        state, metrics = update(state, batch, jax.random.fold_in(key, streams.UPDATE))
        return state, metrics | measure(scored)

    return step


def to_experience(scored: Scored, *, kl_coef: float) -> Experience:
    """What RLOO learns from: every completion counts, none was left out.

    Raises:
        ValueError: one completion a prompt.
    """
    if scored.rewards.shape[1] < 2:
        raise ValueError(
            "num_samples: expected at least 2, got 1: RLOO's baseline of each "
            "completion is the mean of the others"
        )
    advantages = kl_in_reward(
        scored.rewards,
        scored.kl,
        jnp.ones(scored.rewards.shape, bool),
        kl_coef=kl_coef,
    )
    rows, samples = scored.rewards.shape
    segment = scored.sequences.segment
    number = jnp.arange(rows)[:, None] * samples + segment - 2
    return Experience(
        sequences=scored.sequences,
        sample=jnp.where(segment > 1, number, 0),
        weight=jnp.ones(rows * samples),
        old_logprobs=scored.old_logprobs,
        ref_logprobs=scored.ref_logprobs,
        advantages=advantages.reshape(-1),
    )


def measure(scored: Scored) -> dict[str, jax.Array]:
    """Metrics of the completions; see `make_rloo_step`."""
    sequences, rollout = scored.sequences, scored.rollout
    real = sequences.segment != 0
    return {
        "reward/proxy": jnp.mean(scored.rewards),
        "policy/kl": jnp.mean(scored.kl),
        "completion/length": jnp.mean(jnp.sum(rollout.mask, axis=1, dtype=jnp.float32)),
        "completion/eos_rate": jnp.mean(rollout.stopped, dtype=jnp.float32),
        "count/tokens": jnp.sum(real, dtype=jnp.float32),
        "count/visible": jnp.sum(jnp.where(real, sequences.positions + 1.0, 0.0)),
        "count/new_tokens": jnp.sum(rollout.mask, dtype=jnp.float32),
    }


def make_rloo_run(
    act: Act,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    kl_coef: float,
) -> Run:
    """A pure function (policy, reward model, prompts [S B P], key) -> (policy, metrics)
    that takes S steps from the policy, which is also the reference of the KL.

    An update whose loss or gradient is not finite is skipped: the policy stays that of
    before it, and the run goes on. update/finite [S] of the metrics is 0 there: look at
    it, as nothing here can stop.

    Args:
        act: from `make_act`, with at least 2 completions a prompt.
        objective: see `make_rloo_step`.
        tx: optax transformation, its schedule made for S steps.
        kl_coef: see `make_rloo_step`.

    Raises:
        ValueError: from the function, when it is traced: one completion a prompt.
    """
    step = make_rloo_step(act, objective, tx, kl_coef=kl_coef)

    def run(
        policy: Params, model: Params, prompts: PromptBatch, key: jax.Array
    ) -> tuple[Params, dict[str, jax.Array]]:
        def body(state: TrainState, batch: PromptBatch) -> Any:
            return step(state, policy, model, batch, key)

        state, metrics = jax.lax.scan(body, init_state(policy, tx), prompts)
        return state.params, metrics

    return run
