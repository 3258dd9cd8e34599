"""What `attributes` writes and what reads it: regressions, penalties and the gate.

`save` and `load` are each other's inverse; `score` goes from a backbone's states to
rewards.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rlhf_jax.algorithms import attributes as regressions
from rlhf_jax.algorithms import gate as gates
from rlhf_jax.algorithms.gate import GateConfig
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.io.run_dir import write_atomic


class AttributeModel(NamedTuple):
    """What `attributes.npz` holds: all but the backbone."""

    names: tuple[str, ...]
    weights: np.ndarray
    """W, [A D]."""
    penalties: np.ndarray
    """lambda, [A]; 0 without verbosity."""
    verbosity: int
    """Its column; any without verbosity."""
    gate: Any
    config: GateConfig


def save(out: pathlib.Path, model: AttributeModel, card: dict[str, Any]) -> None:
    """Writes attributes.npz and the card, attributes.json, into a directory."""
    leaves = traverse_util.flatten_dict(model.gate, sep="/")
    arrays: dict[str, Any] = {f"gate/{name}": leaf for name, leaf in leaves.items()}
    np.savez(
        out / "attributes.npz",
        names=np.array(model.names),
        weights=model.weights,
        penalties=model.penalties,
        verbosity=model.verbosity,
        **arrays,
    )
    text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "attributes.json", text + "\n")


def load(out: str | pathlib.Path) -> AttributeModel:
    """What `run` wrote into a directory.

    Raises:
        ValueError: there is none.
    """
    folder = pathlib.Path(out).expanduser()
    if not (folder / "attributes.npz").exists():
        raise ValueError(f"{folder}: no attributes.npz; make one with `attributes`")
    card = json.loads((folder / "attributes.json").read_text(encoding="utf-8"))
    given = dict(card["config"]["gate"])
    given["optimizer"] = OptimizerConfig(**given["optimizer"])
    with np.load(folder / "attributes.npz") as file:
        arrays = {name: file[name] for name in file.files}
    leaves = {n[5:]: leaf for n, leaf in arrays.items() if n.startswith("gate/")}
    return AttributeModel(
        names=tuple(arrays["names"].tolist()),
        weights=arrays["weights"],
        penalties=arrays["penalties"],
        verbosity=int(arrays["verbosity"]),
        gate=traverse_util.unflatten_dict(leaves, sep="/"),
        config=GateConfig(**given),
    )


def score(
    model: AttributeModel, prompts: np.ndarray, completions: np.ndarray
) -> np.ndarray:
    """Rewards [N] from the states of prompts and completions, [N D] each."""
    rewards = clean(model, np.asarray(completions, np.float64) @ model.weights.T)
    weights = gates.gate(model.gate, jnp.asarray(prompts, jnp.float32), model.config)
    return np.asarray(gates.scores(model.gate, weights, jnp.float32(rewards)))


def clean(model: AttributeModel, rewards: np.ndarray) -> np.ndarray:
    """r', the rewards of attributes [N A] less the verbosity in them."""
    return regressions.debias(rewards, model.penalties, model.verbosity)
