"""The optimizer chain of every program: clipping, AdamW, schedule; as one config."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, decay and clipping by global norm."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """Decay after the warm-up; inverse_sqrt is peak * sqrt(warm-up steps / step)."""
    warmup: float = 0.05
    """Length of the linear warm-up, as a fraction of all steps."""
    final_scale: float = 0.0
    """Learning rate at the last step, as a fraction of the peak (linear and cosine)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("warmup", 0.0, 1.0),
            ("final_scale", 0.0, 1.0),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("eps", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("max_grad_norm", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or math.isinf(value):
                raise ValueError(
                    f"optimizer.{name}: expected a number in [{low:g}, {high:g}], "
                    f"got {value}"
                )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """step -> learning rate over a run of `steps` optimizer steps."""
    peak, final = config.learning_rate, config.learning_rate * config.final_scale
    warmup_steps = round(config.warmup * steps)
    decay_steps = max(steps - warmup_steps, 1)
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, final, decay_steps)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, config.final_scale)
    elif config.schedule == "inverse_sqrt":
        warm = max(warmup_steps, 1)
        # Asked for steps before the warm-up's end, too, whose value is not used.
        decay = lambda step: peak * jnp.sqrt(warm / (warm + jnp.maximum(step, 0)))  # noqa: E731
    else:
        decay = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return decay
    # from peak/warmup_steps, so that the first step is not lost on a zero learning rate
    rise = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([rise, decay], [warmup_steps])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """clip by global norm -> AdamW on the schedule."""
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def decayed(params: Any) -> Any:
    """True on the leaves that weight decay acts on: all but norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("scale", "bias"), params
    )
