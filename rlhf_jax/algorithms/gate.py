"""The gate: which attributes matter for a prompt, learnt from preferences.

    g = softmax(MLP(h_prompt) / temperature)
    score = scale * sum_k g_k r'_k

h_prompt is the frozen state of the prompt's last token, r' the rewards of `attributes`.
`train_gate` is one pure function to jit.

Source: Wang et al. 2024, arXiv:2406.12845 (ArmoRM), and its published code.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from rlhf_jax.algorithms.update import Metrics, Objective, init_state, make_update
from rlhf_jax.losses.masked import weighted_mean
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.types import Mean


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """The gate and its training on frozen states."""

    width: int = 1024
    """Units of each hidden layer."""
    layers: int = 3
    """Hidden layers, with ReLU."""
    temperature: float = 10.0
    """The outputs of the last layer are divided by this before the softmax."""
    dropout: float = 0.2
    """After each hidden layer, in training."""
    scale: float = 1.0
    """Factor of the score at the start; trained, and always above 0."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 1024
    """Pairs in a step, drawn with replacement."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3, schedule="cosine", warmup=0.0
    )
    """AdamW and its schedule."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"gate.{name}: expected at least 1, got {getattr(self, name)}"
                )
        for name in ("temperature", "scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"gate.{name}: expected a finite number above 0, got "
                    f"{getattr(self, name)}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"gate.dropout: expected a probability in [0, 1), got {self.dropout}"
            )


class GateBatch(NamedTuple):
    """Pairs as the gate sees them."""

    prompts: Float[Array, "Q D"]
    """State of each prompt's last token."""
    chosen: Float[Array, "Q A"]
    """r' of the chosen completions."""
    rejected: Float[Array, "Q A"]
    weight: Float[Array, "Q"]


def init_gate(
    key: jax.Array, width: int, attributes: int, config: GateConfig
) -> dict[str, Any]:
    """Parameters of the gate; its last layer is 0, so it starts with equal weights.

    Args:
        key: of the hidden layers.
        width: D, of the states.
        attributes: A.
        config: sizes.
    """
    params: dict[str, Any] = {}
    for n, layer_key in enumerate(jax.random.split(key, config.layers)):
        kernel = jax.random.normal(layer_key, (width, config.width))
        params[f"hidden_{n}"] = {
            "kernel": kernel * (2 / width) ** 0.5,
            "bias": jnp.zeros(config.width),
        }
        width = config.width
    params["out"] = {
        "kernel": jnp.zeros((width, attributes)),
        "bias": jnp.zeros(attributes),
    }
    # The logarithm, so that no step can turn the order of all scores round.
    params["log"] = {"scale": jnp.log(jnp.float32(config.scale))}
    return params


def gate(
    params: Any,
    prompts: Float[Array, "Q D"],
    config: GateConfig,
    key: jax.Array | None = None,
) -> Float[Array, "Q A"]:
    """The weight of each attribute for each prompt, [Q A], float32; a row sums to 1.

    g = softmax(MLP(h_prompt) / temperature)

    Args:
        params: from `init_gate`.
        prompts: states, [Q D].
        config: temperature and dropout.
        key: draws dropout masks; None = no dropout.
    """
    hidden = prompts.astype(jnp.float32)
    for n in range(config.layers):
        hidden = jax.nn.relu(_dense(params[f"hidden_{n}"], hidden))
        if key is not None and config.dropout:
            drawn = jax.random.fold_in(key, n)
            kept = jax.random.bernoulli(drawn, 1 - config.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - config.dropout), 0.0)
    return jax.nn.softmax(_dense(params["out"], hidden) / config.temperature, axis=-1)


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("qd,df->qf", x, layer["kernel"]) + layer["bias"][None, :]


def scores(
    params: Any, weights: Float[Array, "Q A"], rewards: Float[Array, "Q A"]
) -> Float[Array, "Q"]:
    """scale * g . r', [Q]."""
    return jnp.exp(params["log"]["scale"]) * jnp.einsum("qa,qa->q", weights, rewards)


def gate_objective(config: GateConfig, *, deterministic: bool = False) -> Objective:
    """An objective (params, GateBatch, key) -> (Mean, metrics): Bradley-Terry.

    Args:
        config: of the gate.
        deterministic: leaves dropout out.

    Returns:
        The objective; its metrics are `accuracy` (a tie counts one half), `gap`, and
        `gate/entropy` in nats.

    Source: arXiv:2406.12845, section 3.2.
    """

    def objective(
        params: Any, batch: GateBatch, key: jax.Array
    ) -> tuple[Mean, dict[str, Mean]]:
        batch = jax.lax.stop_gradient(batch)  # states and regressions stay frozen
        weights = gate(params, batch.prompts, config, None if deterministic else key)
        chosen, rejected = (
            scores(params, weights, r) for r in (batch.chosen, batch.rejected)
        )
        gap = chosen - rejected
        won = (gap > 0) + 0.5 * (gap == 0)
        entropy = jnp.sum(jax.scipy.special.entr(weights), axis=-1)
        metrics = {
            "accuracy": weighted_mean(won, batch.weight),
            "gap": weighted_mean(gap, batch.weight),
            "gate/entropy": weighted_mean(entropy, batch.weight),
        }
        loss = bradley_terry(chosen, rejected)
        return weighted_mean(loss, batch.weight), metrics

    return objective


def train_gate(
    pairs: GateBatch, config: GateConfig, key: jax.Array
) -> tuple[Any, Metrics]:
    """(parameters of the gate, metrics [steps]) after the whole training.

    Args:
        pairs: all of them.
        config: of the gate and its training; static under jit.
        key: of the first weights, the draws and dropout.
    """
    count, width = pairs.prompts.shape
    tx = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps))
    update = make_update(gate_objective(config), tx)
    init_key, draw_key, step_key = jax.random.split(key, 3)
    params = init_gate(init_key, width, pairs.chosen.shape[1], config)

    def step(state: Any, number: jax.Array) -> tuple[Any, Metrics]:
        drawn = jax.random.fold_in(draw_key, number)
        rows = jax.random.randint(drawn, (config.batch_size,), 0, count)
        return update(state, jax.tree.map(lambda x: x[rows], pairs), step_key)

    state, metrics = jax.lax.scan(
        step, init_state(params, tx), jnp.arange(config.steps)
    )
    return state.params, metrics
