"""`rlhf-jax dpo`: preference pairs in, a policy's run directory out, without a reward
model.

Read `run` from top to bottom. The reference is the policy as it was loaded: a frozen
copy, or the base without its adapters (no copy). The pairs' implicit rewards go through
the same losses and regularizers as a reward model's.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.algorithms.dpo import implicit_reward_apply
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.algorithms.reward_model import over_micro_batches, reward_objective
from rlhf_jax.algorithms.sft import logprobs_apply
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.data import prepare
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import objectives, training
from rlhf_jax.programs.models import load_policy
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig, batch_devices


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Train a policy on pairs of completions, without a reward model."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Policy and reference: HF directory, hub id, .gguf or run directory."""
    data: list[str]
    """Training pairs, SPEC or WEIGHT*SPEC; repeat to mix (see docs: data)."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Evaluation pairs as NAME=SPEC; repeat for several sets."""
    beta: float = 0.1
    """Strength of the KL penalty that the implicit reward stands for."""
    loss: str = "bradley_terry"
    """Loss of a pair of implicit rewards, as in the reward program."""
    regularizers: list[str] = dataclasses.field(default_factory=list)
    """Added to the loss, as in the reward program."""
    batch_size: int = 64
    """Pairs in an optimizer step, over all devices."""
    accum_steps: int = 1
    """Micro-batches that a step is cut into, to fit in memory."""
    epochs: float = 1.0
    """Passes over the data, unless `steps` says otherwise."""
    steps: int | None = None
    """Optimizer steps."""
    seed: int = 0
    """Seed of the data order and dropout."""
    rows: DataConfig = DataConfig()
    """How rows become batches."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup=0.1)
    """AdamW and its schedule."""
    loop: LoopConfig = LoopConfig()
    """When to evaluate, save and stop."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters; the reference is then the base without them."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        training.check_common(self)
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta: expected a finite number above 0, got {self.beta}")
        objectives.check(
            self.loss,
            self.regularizers,
            columns=vars(self.rows.columns),
            batch_size=self.batch_size,
        )


def run(config: DpoConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    with training.setting(
        config, load=load_policy, prepare=prepare.prepare_pairs
    ) as setting:
        data = setting.data
        objectives.check_margins(config.loss, data.train, *data.evals.values())
        terms = objectives.parts(
            config.loss,
            config.regularizers,
            devices=batch_devices(setting.mesh) * config.accum_steps,
            batch_size=config.batch_size,
        )

        def objective(deterministic: bool, stacked: bool = False) -> Objective:
            apply = _implicit_rewards(config, setting.model, deterministic)
            return reward_objective(
                over_micro_batches(apply) if stacked else apply, **terms
            )

        reference = None
        if not config.lora.rank:
            reference = jax.tree.map(lambda x: x.copy(), setting.params)
        training.train(
            config,
            setting,
            kind="causal",
            trainable="lora" if config.lora.rank else "all",
            reference=reference,
            make_objective=objective,
            headline="accuracy",
            coupled=functools.partial(objective, stacked=True)
            if any(map(objectives.couples, [config.loss, *config.regularizers]))
            else None,
            evaluated=reward_objective(
                _implicit_rewards(config, setting.model, True),
                **objectives.parts_of_evaluation(config.loss, config.regularizers),
            ),
        )
    return setting.run_dir


def _implicit_rewards(
    config: DpoConfig, model: Any, deterministic: bool
) -> Callable[..., jax.Array]:
    bare = model.clone(lora=LoraConfig())
    own = logprobs_apply(model, deterministic=deterministic)
    base = logprobs_apply(bare, deterministic=True)
    return implicit_reward_apply(
        lambda params, *inputs: own(_without_reference(params), *inputs),
        lambda params, *inputs: base(params.get(training.REFERENCE, params), *inputs),
        beta=config.beta,
    )


def _without_reference(params: Any) -> Any:
    return {k: leaf for k, leaf in params.items() if k != training.REFERENCE}
