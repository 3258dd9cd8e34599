"""`rlhf-jax ppo`: PPO with a critic of its own, by default as PPO-max.

Read `run` from top to bottom: setting, critic, objectives, updates, targets, loop. The
critic starts from the reward model. Defaults: Wang et al. 2024, arXiv:2401.06080 (code:
MOSS-RLHF) and Zheng et al. 2023, arXiv:2307.04964.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
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
from rlhf_jax.losses.value import explained_variance
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.models.heads import ValueModel
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import models, rl_metrics, rl_setup, sharded
from rlhf_jax.programs.experience import ShapingConfig
from rlhf_jax.programs.reinforcement import (
    Learner,
    RLCursor,
    RLLoopConfig,
)
from rlhf_jax.programs.rl_setting import Setting
from rlhf_jax.programs.scorer import ENSEMBLE, ScoringConfig
from rlhf_jax.rl import kl_controller, moments
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Experience, TrainState

NORMALISERS = {"scale": moments.scale, "normalise": moments.normalise}


@dataclasses.dataclass(frozen=True)
class PpoLossConfig:
    """Which PPO."""

    clip_eps: float = 0.2
    """Ratios are clipped to 1 - eps .. 1 + eps."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage; null = none."""
    value_clip: float | None = 0.2
    """Values are clipped to within this of the old ones in the loss; null = not."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: float = 0.02
    """Reward per nat of KL, taken off at every token."""
    kl_target: float | None = None
    """KL of a completion, in nats, that kl_coef is adapted to; null = kl_coef is
    fixed."""
    kl_horizon: int = 10_000
    """Completions over which the adaptation acts."""
    scores: Literal["raw", "scale", "normalise"] = "scale"
    """Scores as they are, over their running standard deviation, or less their running
    mean too."""
    score_clip: float | None = None
    """Then within +- this; null = as they are."""
    whiten: bool = True
    """Advantages of mean 0 and variance 1 over the step."""
    advantage_clip: float | None = None
    """Then within +- this; null = as they are."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: float = 0.0
    """Weight of the loss on supervised rows (ptx_data)."""
    critic_warmup: int = 0
    """Steps at the start in which only the critic learns."""

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"loss.{name}: expected a number in [0, 1], got "
                    f"{getattr(self, name)}"
                )
        for name in ("kl_coef", "entropy_coef", "ptx_coef", "critic_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"loss.{name}: expected at least 0, got {getattr(self, name)}"
                )
        for name in ("value_clip", "kl_target", "score_clip", "advantage_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"loss.{name}: expected a number above 0 or null, got {value}"
                )
        if not 0 < self.clip_eps <= 1:
            raise ValueError(
                f"loss.clip_eps: expected a number in (0, 1], got {self.clip_eps}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"loss.dual_clip: expected a number above 1 or null, got "
                f"{self.dual_clip}"
            )


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
            targets=functools.partial(make_targets, config.loss),
            learn=learn,
            schedule=schedule,
            kl_coef=config.loss.kl_coef,
        )
    return setting.run_dir


def make_targets(
    loss: PpoLossConfig, completions: xp.Completions, cursor: RLCursor
) -> tuple[xp.Completions, dict[str, float]]:
    """Advantages and returns; moves the running moments and the KL controller."""
    counts = jnp.asarray(completions.counts)
    mask = jnp.asarray(completions.mask) & counts[:, None]
    scores = jnp.asarray(completions.scores)
    if loss.scores != "raw":
        count, mean, m2 = (jnp.float32(x) for x in cursor.moments)
        seen = moments.RunningMoments(count=count, mean=mean, m2=m2)
        seen = moments.update(seen, scores, counts)
        cursor.moments = (float(seen.count), float(seen.mean), float(seen.m2))
        scores = NORMALISERS[loss.scores](scores, seen, clip=loss.score_clip)
    elif loss.score_clip is not None:
        scores = jnp.clip(scores, -loss.score_clip, loss.score_clip)
    distance = jnp.asarray(completions.kl, jnp.float32)
    targets = ppo.ppo_targets(
        scores,
        distance,
        jnp.asarray(completions.values),
        mask,
        kl_coef=cursor.kl_coef,
        gamma=loss.gamma,
        gae_lambda=loss.gae_lambda,
        whiten=loss.whiten,
        clip_advantage=loss.advantage_clip,
    )
    metrics = {
        "policy/kl_coef": cursor.kl_coef,
        "value/explained_variance": float(
            explained_variance(jnp.asarray(completions.values), targets.returns, mask)
        ),
    }
    away = float(distance.sum(axis=1).mean())
    # A KL that is nan must not stay in the controller after its step was dropped.
    if loss.kl_target is not None and math.isfinite(away):
        cursor.kl_coef = float(
            kl_controller.adaptive(
                cursor.kl_coef,
                away,
                target=loss.kl_target,
                horizon=loss.kl_horizon,
                count=len(completions.scores),
            )
        )
    done = dataclasses.replace(
        completions,
        advantages=np.asarray(targets.advantages),
        returns=np.asarray(targets.returns),
    )
    return done, metrics


def _critic(config: PpoConfig, setting: Setting) -> tuple[Any, ...]:
    """(state, update, jitted values of (state, rows))."""
    spec = config.critic or next(iter(setting.rewards.models), config.model)
    if spec.startswith(ENSEMBLE):
        raise ValueError(
            f"critic: the reward {spec} is several models, of which none is the "
            "critic's start; name one with --critic, such as a member or the average "
            "in warm/"
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
