"""`rlhf-jax sft`: prompts with completions, or conversations, in; a policy's run out.

Read `run` from top to bottom. The loss counts the tokens that the assistant wrote.
"""

import dataclasses
import pathlib

from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.algorithms.sft import logprobs_apply, sft_objective
from rlhf_jax.data import prepare
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.programs import training
from rlhf_jax.programs.models import load_policy
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Fine-tune a policy on conversations."""

    run_dir: str
    """Directory of the run. One that holds this very run is resumed."""
    model: str
    """Policy: HF directory, hub id, .gguf, preset name or run directory."""
    data: list[str]
    """Training rows, SPEC or WEIGHT*SPEC; repeat to mix (see docs: data)."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Evaluation rows as NAME=SPEC; repeat for several sets."""
    batch_size: int = 64
    """Conversations in an optimizer step, over all devices."""
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


def run(config: SftConfig) -> pathlib.Path:
    """Trains, or goes on training; returns the run directory."""
    with training.setting(
        config, load=load_policy, prepare=prepare.prepare_conversations
    ) as setting:
        training.train(
            config,
            setting,
            kind="causal",
            trainable="lora" if config.lora.rank else "all",
            make_objective=lambda deterministic: sft_objective(
                logprobs_apply(setting.model, deterministic=deterministic)
            ),
            headline="loss",
        )
    return setting.run_dir
