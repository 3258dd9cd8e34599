"""`rlhf-jax meta-reward`: MetaRM. Preference pairs and completions of the shifted
policy in, a reward model's run directory out.

Read `run` from top to bottom: it is the reward program with another objective and with
batches that also hold unlabelled completions, several to a prompt. `meta-rounds`
samples such completions from the policy of each round.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms.meta_reward import meta_objective, spread_objective
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.algorithms.reward_model import (
    over_micro_batches,
    reward_apply,
    reward_objective,
)
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.data import prepare
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.kwise import KwiseDataset
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.io import progress
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import objectives, training
from rlhf_jax.programs.models import load_reward_model
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig, batch_devices
from rlhf_jax.types import MetaBatch


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """The inner step: ascent on the spread of the shifted completions' rewards."""

    learning_rate: float = 5e-6
    """eta. The papers' value moves weights very little; with `normalise` it is the
    length of the step, and 0.01 to 0.1 are sizes to try."""
    batch_size: int = 16
    """Prompts with shifted completions in a step, over all devices."""
    second_order: bool = False
    """Differentiate through the inner step; needs the xla attention backend."""
    normalise: bool = False
    """Divide the inner gradient by its norm."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"inner.learning_rate: expected a finite number above 0, got "
                f"{self.learning_rate}; at 0 this is the reward program"
            )
        if self.batch_size < 1:
            raise ValueError(
                f"inner.batch_size: expected at least 1, got {self.batch_size}"
            )


@dataclasses.dataclass(frozen=True)
class MetaRewardConfig:
    """Train a reward model that tells the completions of the present policy apart."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Backbone or reward model: HF directory, hub id, .gguf, preset or run."""
    data: list[str]
    """Training pairs, SPEC or WEIGHT*SPEC; repeat to mix (see docs: data)."""
    shifted: list[str]
    """Completions of the shifted policy, SPEC of rows with a prompt and two or more
    responses; no scores are read."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Evaluation pairs as NAME=SPEC; repeat for several sets."""
    loss: str = "bradley_terry"
    """Loss of a pair, as in the reward program."""
    regularizers: list[str] = dataclasses.field(default_factory=list)
    """Added to the loss, as in the reward program."""
    inner: InnerConfig = InnerConfig()
    """The inner step."""
    batch_size: int = 16
    """Pairs in an optimizer step, over all devices."""
    accum_steps: int = 1
    """Micro-batches that a step is cut into, to fit in memory; each level of the update
    still sees its whole batch."""
    epochs: float = 1.0
    """Passes over the pairs, unless `steps` says otherwise."""
    steps: int | None = None
    """Optimizer steps."""
    seed: int = 0
    """Seed of the head, the data order and dropout."""
    states: bool = True
    """Statistics of the evaluation sets' hidden states, as in the reward program."""
    train_only: Literal["all", "head"] = "all"
    """Leaves that both levels move, as in the reward program."""
    rows: DataConfig = DataConfig()
    """How rows become batches."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6)
    """AdamW and its schedule, of the outer step."""
    loop: LoopConfig = LoopConfig()
    """When to evaluate, save and stop."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        training.check_common(self)
        if not self.shifted:
            raise ValueError("shifted: expected at least one --shifted SPEC")
        if self.inner.batch_size % self.accum_steps:
            raise ValueError(
                f"inner.batch_size {self.inner.batch_size}: expected a multiple of "
                f"accum_steps {self.accum_steps}"
            )
        if self.inner.second_order and self.compute.attention in ("splash", "cudnn"):
            raise ValueError(
                f"inner.second_order: the {self.compute.attention} attention cannot be "
                "differentiated twice; set compute.attention to xla"
            )
        objectives.check(
            self.loss,
            self.regularizers,
            columns=vars(self.rows.columns),
            batch_size=self.batch_size,
        )


def run(config: MetaRewardConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    with training.setting(
        config, load=load_reward_model, prepare=prepare.prepare_pairs
    ) as setting:
        model, mesh, data = setting.model, setting.mesh, setting.data
        objectives.check_margins(config.loss, data.train, *data.evals.values())
        shifted, account = prepare.prepare_kwise(
            config.shifted,
            setting.encoder,
            config.rows,
            side_file=setting.run_dir / "set_aside" / "shifted.jsonl",
            scored=False,
        )
        progress.say(f"shifted: {account.summary()}")
        trainable = "lora" if config.lora.rank else config.train_only
        terms = objectives.parts(
            config.loss,
            config.regularizers,
            devices=batch_devices(mesh) * config.accum_steps,
            batch_size=config.batch_size,
        )

        def objective(deterministic: bool, stacked: bool = False) -> Objective:
            apply = reward_apply(model, deterministic=deterministic)
            apply = over_micro_batches(apply) if stacked else apply
            return meta_objective(
                spread_objective(apply),
                reward_objective(apply, **terms),
                split=lambda tree: lora_lib.split_params(tree, trainable),
                inner_lr=config.inner.learning_rate,
                second_order=config.inner.second_order,
                normalise=config.inner.normalise,
            )

        training.train(
            config,
            setting,
            kind="reward",
            trainable=trainable,
            make_objective=objective,
            headline="accuracy",
            coupled=functools.partial(objective, stacked=True),
            **training.pair_evaluation(
                model,
                objectives.parts_of_evaluation(config.loss, config.regularizers),
                states=config.states,
            ),
            also_read=shifted,
            batches=lambda start: meta_batches(
                config, data.train, shifted, mesh, start_row=start
            ),
        )
    return setting.run_dir


def meta_batches(
    config: MetaRewardConfig,
    pairs: Any,
    shifted: KwiseDataset,
    mesh: Mesh,
    *,
    start_row: int,
) -> Iterator[tuple[MetaBatch, int]]:
    """(MetaBatch, next row of the pairs): the shifted prompts keep step with them."""
    step = start_row // config.batch_size
    groups = Batches(
        shifted,
        config.inner.batch_size,
        seed=config.seed,
        start_row=step * config.inner.batch_size,
        accum_steps=config.accum_steps,
        num_shapes=config.rows.num_shapes,
        rows_multiple_of=batch_devices(mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    stream = training.stream(config, pairs, mesh, start_row=start_row)
    with contextlib.closing(stream), contextlib.closing(groups):
        for (batch, next_row), (group, _) in zip(stream, groups):
            yield MetaBatch(pairs=batch, shifted=group), next_row
