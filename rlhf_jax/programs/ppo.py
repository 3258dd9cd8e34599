"""`rlhf-jax ppo`: PPO with a critic of its own, by default as PPO-max.

Read `run` from top to bottom: setting, critic, objectives, updates, targets, loop. The
critic starts from the reward model. Defaults: Wang et al. 2024, arXiv:2401.06080 (code:
MOSS-RLHF) and Zheng et al. 2023, arXiv:2307.04964.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.sft import logprobs_apply, sft_objective
from rlhf_jax.data import prepare
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.io import progress
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.models.heads import ValueModel
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import models, ppo_targets, rl_metrics, rl_setup, sharded
from rlhf_jax.programs.experience import ShapingConfig
from rlhf_jax.programs.ppo_targets import PpoLossConfig
from rlhf_jax.programs.reinforcement import (
    Learner,
    RLCursor,
    RLLoopConfig,
)
from rlhf_jax.programs.rl_setting import Setting
from rlhf_jax.programs.scorer import MADE_OF_MODELS, ScoringConfig
from rlhf_jax.rl import kl_controller
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Experience, TrainState


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Train a policy with PPO."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Policy: HF directory, hub id, .gguf, preset name or run directory."""
    data: list[str]
    """Prompts, SPEC or WEIGHT*SPEC; repeat to mix."""
    reward: list[str]
    """[WEIGHT*]SPEC of a reward model, package.module:function or http://...; repeat to
    add."""
    critic: str | None = None
    """What the critic starts from, with the policy's tokenizer; null = the first reward
    model, or the policy with a new head where the reward is no model."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Held-out prompts as NAME=SPEC; repeat for several sets."""
    ptx_data: list[str] = dataclasses.field(default_factory=list)
    """Supervised rows mixed into the policy's loss, for loss.ptx_coef > 0."""
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
    loss: PpoLossConfig = PpoLossConfig()
    """Which PPO."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    shaping: ShapingConfig = ShapingConfig()
    """Penalties, and what truncated completions count."""
    scoring: ScoringConfig = ScoringConfig()
    """How reward models score."""
    rows: DataConfig = DataConfig()
    """How prompts are read, and the layout of rows."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=5e-7, beta2=0.95, eps=1e-6
    )
    """AdamW of the policy."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1.5e-6, beta2=0.95
    )
    """AdamW of the critic."""
    loop: RLLoopConfig = RLLoopConfig()
    """When to evaluate, save and report."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters of the policy."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        rl_setup.check_rl(self)
        if bool(self.ptx_data) != bool(self.loss.ptx_coef):
            raise ValueError(
                f"ptx_data {self.ptx_data} and loss.ptx_coef {self.loss.ptx_coef}: "
                "expected both or neither"
            )
        if self.loss.critic_warmup >= self.steps:
            raise ValueError(
                f"loss.critic_warmup {self.loss.critic_warmup}: expected fewer than "
                f"steps {self.steps}, or the policy never learns"
            )
        completions = self.batch_size * self.sampling.num_samples
        least = completions * kl_controller.MAX_ERROR
        if self.loss.kl_target is not None and not self.loss.kl_horizon > least:
            raise ValueError(
                f"loss.kl_horizon {self.loss.kl_horizon}: expected more than "
                f"{least:g}, a fifth of the {completions} completions of a step"
            )


def run(config: PpoConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    with rl_setup.open_rl(config) as setting:
        critic_state, critic_update, values = _critic(config, setting)
        policy, policy_update, schedule = _policy(config, setting)
        ptx = _ptx_rows(config, setting) if config.ptx_data else None

        def gather(
            learner: Learner, cursor: RLCursor
        ) -> tuple[xp.Completions, dict[str, float], list[dict]]:
            completions, metrics, table = setting.gather(learner, cursor)
            assert learner.critic is not None
            now = functools.partial(values, learner.critic)
            completions.values = xp.forward(
                lambda rows: now(setting.put(rows)),
                completions,
                setting.packing,
                chunk=setting.chunk,
            )
            return completions, metrics, table

        def learn(
            learner: Learner, batch: Any, key: jax.Array, cursor: RLCursor
        ) -> tuple[Learner, dict[str, jax.Array]]:
            device_batch = setting.put_micro(batch)
            critic_key = jax.random.fold_in(key, 1)
            critic, found = critic_update(learner.critic, device_batch, critic_key)
            metrics = rl_metrics.named(found, "value")
            policy = learner.policy
            if cursor.step >= config.loss.critic_warmup:
                if ptx is not None:
                    mixed = ptx(int(policy.step), batch)
                    device_batch = setting.put_micro(mixed)
                policy, found = policy_update(policy, device_batch, key)
                metrics |= rl_metrics.named(found, "train")
            return Learner(policy, critic), metrics

        rl_setup.train(
            config,
            setting,
            learner=Learner(policy, critic_state),
            gather=gather,
            targets=functools.partial(ppo_targets.make_targets, config.loss),
            learn=learn,
            schedule=schedule,
            kl_coef=config.loss.kl_coef,
        )
    return setting.run_dir


def _critic(config: PpoConfig, setting: Setting) -> tuple[Any, ...]:
    """(state, update, jitted values of (state, rows))."""
    spec = config.critic or next(iter(setting.rewards.models), config.model)
    if spec.startswith(MADE_OF_MODELS):
        raise ValueError(
            f"critic: the reward {spec} is not one model with a scalar head, which a "
            "critic starts from; name one with --critic: a member of the ensemble, its "
            "average in warm/, or the policy itself"
        )
    loaded = models.load_reward_model(
        spec,
        compute=config.compute,
        mesh=setting.mesh,
        key=jax.random.key(config.seed),
    )
    own = prepare.make_encoder(loaded.tokenizer, config.rows).fingerprint
    if own != setting.encoder.fingerprint:
        raise ValueError(
            f"critic {spec}: its tokenizer or template is not the policy's, whose "
            "tokens it must read; name another with --critic (the policy itself will "
            "do: it gets a new head)"
        )
    model = ValueModel(loaded.model.config, config.compute)
    updates = config.steps * config.epochs * config.minibatches
    tx = make_optimizer(
        config.critic_optimizer, make_schedule(config.critic_optimizer, updates)
    )
    state = sharded.create_state(loaded.params, tx, setting.mesh)
    objective = ppo.critic_objective(
        ppo.value_apply(model, deterministic=not config.compute.dropout),
        clip_eps=config.loss.value_clip,
    )
    update = sharded.compile_update(
        objective, tx, state, accum_steps=config.accum_steps
    )
    apply = ppo.value_apply(model, deterministic=True)
    values = jax.jit(lambda p, s: apply(p, s, jax.random.key(0)))
    return state, update, lambda state, rows: values(state.params, rows)


def _policy(
    config: PpoConfig, setting: Setting
) -> tuple[TrainState, Any, Callable[[int], Any]]:
    """(state, update, schedule)."""
    active = config.steps - config.loss.critic_warmup
    schedule = make_schedule(
        config.optimizer, active * config.epochs * config.minibatches
    )
    tx = make_optimizer(config.optimizer, schedule)
    state = sharded.create_state(
        setting.trained, tx, setting.mesh, frozen=setting.frozen
    )
    deterministic = not (config.compute.dropout or config.lora.dropout)
    objective = ppo.ppo_objective(
        policy_apply(
            setting.model,
            temperature=config.sampling.temperature or 1.0,
            deterministic=deterministic,
        ),
        clip_eps=config.loss.clip_eps,
        dual_clip=config.loss.dual_clip,
        entropy_coef=config.loss.entropy_coef,
    )
    if config.ptx_data:
        sft = sft_objective(logprobs_apply(setting.model, deterministic=deterministic))
        objective = ppo.with_ptx(objective, sft, ptx_coef=config.loss.ptx_coef)
    update = sharded.compile_update(
        objective, tx, state, accum_steps=config.accum_steps
    )
    return state, update, schedule


def _ptx_rows(
    config: PpoConfig, setting: Setting
) -> Callable[[int, Experience], ppo.Mixed]:
    """(policy update, experience) -> the batch with as many supervised rows as prompts.

    The rows are a function of the update's number, so a resumed run sees the same.
    """
    dataset, account = prepare.prepare_conversations(
        config.ptx_data,
        setting.encoder,
        config.rows,
        side_file=setting.run_dir / "set_aside" / "ptx.jsonl",
    )
    progress.say(f"ptx: {account.summary()}")
    size = config.batch_size // config.minibatches

    stream = Batches(
        dataset,
        size,
        seed=config.seed,
        accum_steps=config.accum_steps,
        layout=config.rows.layout,
        row_length=config.rows.row_length,
        num_shapes=config.rows.num_shapes,
        rows_multiple_of=setting.packing.rows_multiple_of,
        prefetch=0,
    )

    def rows(update: int, batch: Experience) -> ppo.Mixed:
        ptx, _ = stream.build(update * size)
        # Of these tokens alone the policy's loss is the mean.
        learnt = np.take_along_axis(
            np.asarray(batch.weight) > 0,
            np.asarray(batch.sample).reshape(*batch.weight.shape[:-1], -1),
            axis=-1,
        ).reshape(batch.sample.shape)
        sampled = np.sum(np.asarray(batch.sequences.completion_mask) & learnt)
        supervised = np.sum(np.asarray(ptx.completion_mask))
        scale: Any = np.full(ptx.tokens.shape, sampled / supervised, np.float32)
        return ppo.Mixed(experience=batch, ptx=ptx, ptx_scale=scale)

    return rows
