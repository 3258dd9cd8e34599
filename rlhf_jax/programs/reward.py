"""`rlhf-jax reward`: preference pairs in, a reward model's run directory out.

Read `run` from top to bottom: model, data, objective, update, loop. A new pairwise loss
is `--loss package.module:function`, a whole objective `--objective
package.module:function`. With `--loss plackett_luce` the training rows are K-wise; the
evaluation rows are pairs always.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax

from rlhf_jax import config as configs
from rlhf_jax.algorithms.contrastive import (
    ContrastiveConfig,
    contrastive_objective,
    init_prototypes,
    make_contrast,
)
from rlhf_jax.algorithms.diagnostics import diagnosed_objective
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.algorithms.reward_model import (
    over_micro_batches,
    ranking_objective,
    reward_apply,
    reward_states_apply,
)
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.data import prepare
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import objectives, training
from rlhf_jax.programs.models import load_reward_model
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig, batch_devices
from rlhf_jax.types import PAIR_COLUMNS


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Train a reward model on pairs of completions."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Backbone: HF directory, hub id, .gguf, preset name or run directory."""
    data: list[str]
    """Training pairs, SPEC or WEIGHT*SPEC; repeat to mix (see docs: data)."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Evaluation pairs as NAME=SPEC; repeat for several sets."""
    loss: str = "bradley_terry"
    """Loss of a pair, NAME[?OPTION=VALUE&...]: bradley_terry (label_smoothing), hinge
    (min_gap), normalised (eps), direct, scaled_bradley_terry, rao_kupper (log_theta);
    plackett_luce on K-wise rows; or package.module:function of (chosen_rewards [Q],
    rejected_rewards [Q]) -> [Q]."""
    regularizers: list[str] = dataclasses.field(default_factory=list)
    """Added to the loss, COEFFICIENT*NAME[?OPTION=VALUE&...]: batch_sum_to_zero (scale,
    num_groups), centring, squared_rewards, bounded_gap (bound); or
    package.module:function of (chosen_rewards, rejected_rewards, weight) -> [Q]."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    """A contrastive term between two dropout views of each batch."""
    objective: str | None = None
    """package.module:function of (apply) -> objective, instead of `loss`."""
    batch_size: int = 64
    """Pairs in an optimizer step, over all devices."""
    accum_steps: int = 1
    """Micro-batches that a step is cut into, to fit in memory."""
    epochs: float = 1.0
    """Passes over the data, unless `steps` says otherwise."""
    steps: int | None = None
    """Optimizer steps."""
    seed: int = 0
    """Seed of the head, the data order and dropout."""
    head_seed: int | None = None
    """Seed of a fresh head (and of random weights); null = seed."""
    states: bool = True
    """Statistics of the rewards and hidden states of each evaluation set, as evaluate
    --states gives them. Holds two [N, D] of a set, N at most 4096 completions."""
    train_only: Literal["all", "head"] = "all"
    """Leaves that are trained: all, or head (a linear probe). With lora.rank > 0 it is
    the adapters and the head."""
    rows: DataConfig = DataConfig()
    """How rows become batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
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
        if self.objective is not None:
            if self.loss != "bradley_terry" or self.regularizers or self.contrasts:
                raise ValueError(
                    "objective: stands for loss, regularizers and contrastive; give it "
                    "alone, or leave it out"
                )
            if ":" not in self.objective:
                raise ValueError(
                    f"objective {self.objective!r}: expected package.module:function; "
                    "what has a name goes to loss or regularizers"
                )
            return
        if self.ranks:
            if self.regularizers or self.contrasts:
                raise ValueError(
                    "loss plackett_luce: ranks K-wise rows; regularizers and "
                    "contrastive are for pairs, leave them out"
                )
            columns = self.rows.columns
            named = [n for n in (*PAIR_COLUMNS, "weight") if getattr(columns, n)]
            if named:
                raise ValueError(
                    f"rows.columns.{named[0]}: is of pairs, and loss plackett_luce "
                    "trains on K-wise rows, which have none; leave it out"
                )
            return
        if self.contrasts and self.train_only == "head" and not self.lora.rank:
            raise ValueError(
                f"contrastive.kind {self.contrastive.kind}: shapes the hidden states, "
                "which train_only head leaves as they are; use train_only all"
            )
        adapters_drop = self.lora.rank > 0 and self.lora.dropout > 0
        if self.contrasts and not (self.compute.dropout or adapters_drop):
            raise ValueError(
                f"contrastive.kind {self.contrastive.kind}: without dropout the two "
                "views are the same; set compute.dropout (the paper's is 0.05)"
            )
        if self.contrasts and self.batch_size < 2:
            raise ValueError(
                f"contrastive.kind {self.contrastive.kind}: the other pairs of the "
                f"batch are the negatives, and batch_size is {self.batch_size}; use 2 "
                "or more"
            )
        objectives.check(
            self.loss,
            self.regularizers,
            columns=vars(self.rows.columns),
            batch_size=self.batch_size,
        )

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive term."""
        return self.contrastive.kind != "none"

    @property
    def ranks(self) -> bool:
        """Whether the training rows are K-wise."""
        return self.objective is None and self.loss == "plackett_luce"

    @property
    def couples(self) -> bool:
        """Whether the objective must see the whole batch at once."""
        coupled = any(map(objectives.couples, [self.loss, *self.regularizers]))
        return self.objective is None and not self.ranks and (self.contrasts or coupled)


def run(config: RewardConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    custom = config.objective and configs.load_function(config.objective, "--objective")
    with training.setting(
        config,
        load=load_reward_model,
        prepare=prepare.prepare_pairs,
        prepare_train=prepare.prepare_kwise if config.ranks else None,
        seed=config.head_seed,
    ) as setting:
        data = setting.data
        objectives.check_margins(config.loss, data.train, *data.evals.values())
        if config.contrastive.prototypes:
            setting = _with_prototypes(config, setting)
        devices = batch_devices(setting.mesh)
        make_objective = custom or _make_objective(config, devices)
        apply = reward_apply if custom or config.ranks else reward_states_apply

        def objective(deterministic: bool, stacked: bool = False) -> Objective:
            applied = apply(setting.model, deterministic=deterministic)
            return make_objective(over_micro_batches(applied) if stacked else applied)

        training.train(
            config,
            setting,
            kind="reward",
            trainable="lora" if config.lora.rank else config.train_only,
            make_objective=objective,
            headline="accuracy",
            coupled=functools.partial(objective, stacked=True)
            if config.couples
            else None,
            **_evaluated(config, setting.model),
        )
    return setting.run_dir


def _with_prototypes(
    config: RewardConfig, setting: training.Setting
) -> training.Setting:
    """With SwAV's prototypes among the parameters."""
    width = setting.model.config.hidden_size
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    fresh = init_prototypes(config.contrastive.prototypes, width, key)
    params = setting.params | {"prototypes": fresh}
    return dataclasses.replace(setting, params=params)


def _evaluated(config: RewardConfig, model: Any) -> dict[str, Any]:
    """What evaluation sets are judged by, for `training.train`: nothing = the user's
    own objective."""
    if config.objective is not None:
        return {}
    terms = (
        {}
        if config.ranks
        else objectives.parts_of_evaluation(config.loss, config.regularizers)
    )
    return training.pair_evaluation(model, terms, states=config.states)


def _terms(config: RewardConfig, devices: int) -> dict[str, Any]:
    return objectives.parts(
        config.loss,
        config.regularizers,
        devices=devices * config.accum_steps,
        batch_size=config.batch_size,
    )


def _make_objective(
    config: RewardConfig, devices: int
) -> Callable[[Callable[..., Any]], Objective]:
    """apply -> objective, from loss, regularizers and the contrastive term."""
    if config.ranks:
        return ranking_objective
    terms = _terms(config, devices)
    if not config.contrasts:
        return functools.partial(diagnosed_objective, **terms)
    return functools.partial(
        contrastive_objective,
        contrast=make_contrast(config.contrastive),
        coefficient=config.contrastive.weight,
        differences=config.contrastive.differences,
        **terms,
    )
