"""`rlhf-jax rloo`: a policy, prompts and a reward in, a better-scoring policy out.

Read `run` from top to bottom: setting, objective, update, targets, loop. The default is
the form of the BSR paper (arXiv:2505.07271): one ratio a completion, the KL estimate k1
inside the reward and so inside the leave-one-out baseline. `loss.variant` and `loss.kl`
name the others.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import rloo
from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.losses import kl
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import rl_metrics, rl_setup, sharded
from rlhf_jax.programs.experience import ShapingConfig
from rlhf_jax.programs.reinforcement import (
    Learner,
    RLCursor,
    RLLoopConfig,
)
from rlhf_jax.programs.rl_setting import Setting
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.rl import baselines, shaping
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.sharding import MeshConfig

VARIANTS = {
    "sequence": rloo.rloo_objective,
    "token": rloo.rloo_token_objective,
}
KL_LOSSES = {"loss_k1": kl.k1, "loss_k2": kl.k2, "loss_k3": kl.k3}


@dataclasses.dataclass(frozen=True)
class RlooLossConfig:
    """Which RLOO."""

    variant: Literal["sequence", "token"] = "sequence"
    """One ratio a completion (the paper, TRL), or one a token (OpenRLHF, verl)."""
    clip_eps: float = 0.2
    """Ratios are clipped to 1 - eps .. 1 + eps."""
    kl: Literal["reward", "advantage", "loss_k1", "loss_k2", "loss_k3"] = "reward"
    """Where the KL penalty goes: inside the reward and the baseline (k1, the paper),
    off the advantage after the baseline (k1), or into the loss with this estimator."""
    kl_coef: float = 0.05
    """Reward per nat of KL."""
    whiten: bool = False
    """Advantages of mean 0 and variance 1 over the step."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_eps <= 1:
            raise ValueError(
                f"loss.clip_eps: expected a number in (0, 1], got {self.clip_eps}"
            )
        if not self.kl_coef >= 0:
            raise ValueError(f"loss.kl_coef: expected at least 0, got {self.kl_coef}")


@dataclasses.dataclass(frozen=True)
class RlooConfig:
    """Train a policy with RLOO."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Policy: HF directory, hub id, .gguf, preset name or run directory."""
    data: list[str]
    """Prompts, SPEC or WEIGHT*SPEC; repeat to mix."""
    reward: list[str]
    """[WEIGHT*]SPEC of a reward model, package.module:function or http://...; repeat to
    add."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Held-out prompts as NAME=SPEC; repeat for several sets."""
    gold: str | None = None
    """A reward that is logged and never trained on."""
    reference: str | None = None
    """Policy that the KL is measured from; null = the policy at the start."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Tokens that end a completion, besides the template's end token."""
    batch_size: int = 64
    """Prompts in a step, over all devices; each gets sampling.num_samples
    completions."""
    minibatches: int = 1
    """Optimizer updates that an epoch over a step's completions is cut into."""
    accum_steps: int = 1
    """Micro-batches that an update is cut into, to fit in memory."""
    epochs: int = 1
    """Passes over the completions of a step."""
    steps: int = 100
    """Steps: sampling, scoring and learning."""
    seed: int = 0
    """Seed of sampling, prompt order and dropout."""
    recompute_logprobs: bool = False
    """Whether ratios start from log-probabilities of the training forward (exactly 1)
    instead of the sampler's (1 within 1e-4)."""
    loss: RlooLossConfig = RlooLossConfig()
    """Which RLOO."""
    sampling: SamplingConfig = SamplingConfig(num_samples=4)
    """How completions are drawn."""
    shaping: ShapingConfig = ShapingConfig()
    """Penalties, and what truncated completions count."""
    scoring: ScoringConfig = ScoringConfig()
    """How reward models score."""
    rows: DataConfig = DataConfig()
    """How prompts are read, and the layout of rows."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup=0.03)
    """AdamW and its schedule."""
    loop: RLLoopConfig = RLLoopConfig()
    """When to evaluate, save and report."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        rl_setup.check_rl(self)
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples: expected at least 2, got "
                f"{self.sampling.num_samples}: RLOO's baseline of each completion is "
                "the mean of the others"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature: expected a number above 0, got 0: greedy "
                "completions of a prompt are all the same, and nothing could be learnt"
            )


def run(config: RlooConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    with rl_setup.open_rl(config) as setting:
        updates = config.steps * config.epochs * config.minibatches
        schedule = make_schedule(config.optimizer, updates)
        tx = make_optimizer(config.optimizer, schedule)
        state = sharded.create_state(
            setting.trained, tx, setting.mesh, frozen=setting.frozen
        )
        update = sharded.compile_update(
            make_objective(config, setting), tx, state, accum_steps=config.accum_steps
        )

        def learn(
            learner: Learner, batch: Any, key: jax.Array, cursor: RLCursor
        ) -> tuple[Learner, dict[str, jax.Array]]:
            policy, metrics = update(learner.policy, setting.put_micro(batch), key)
            return Learner(policy), rl_metrics.named(metrics, "train")

        rl_setup.train(
            config,
            setting,
            learner=Learner(state),
            gather=setting.gather,
            targets=functools.partial(make_targets, config.loss),
            learn=learn,
            schedule=schedule,
        )
    return setting.run_dir


def make_objective(config: RlooConfig, setting: Setting) -> Any:
    """The objective that config.loss names."""
    drops = bool(config.compute.dropout or config.lora.dropout)
    apply = policy_apply(
        setting.model,
        temperature=config.sampling.temperature or 1.0,
        deterministic=not drops,
    )
    kl_loss = KL_LOSSES.get(config.loss.kl)
    return VARIANTS[config.loss.variant](
        apply,
        clip_eps=config.loss.clip_eps,
        kl_loss=kl_loss,
        kl_coef=config.loss.kl_coef if kl_loss else 0.0,
    )


def make_targets(
    loss: RlooLossConfig, completions: xp.Completions, cursor: RLCursor
) -> tuple[xp.Completions, dict[str, float]]:
    """One advantage a completion, and which completions carry weight."""
    shape = (-1, completions.num_samples)
    scores = jnp.asarray(completions.scores).reshape(shape)
    counts = jnp.asarray(completions.counts).reshape(shape)
    distance = jnp.asarray(completions.kl.sum(axis=1), jnp.float32).reshape(shape)
    coef = 0.0 if loss.kl in KL_LOSSES else loss.kl_coef
    place = rloo.kl_outside if loss.kl == "advantage" else rloo.kl_in_reward
    advantages = place(scores, distance, counts, kl_coef=coef)
    usable = baselines.usable(counts)
    if loss.whiten:
        advantages = shaping.whiten(advantages, usable)
    done = dataclasses.replace(
        completions,
        advantages=np.asarray(advantages).reshape(-1),
        counts=np.asarray(usable).reshape(-1),
    )
    return done, {
        "rollout/groups_without_baseline": float((~usable.any(axis=1)).mean()),
        "rollout/advantage_std": float(np.std(done.advantages)),
    }
