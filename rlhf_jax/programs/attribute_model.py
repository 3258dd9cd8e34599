"""What `attributes` writes and what reads it: regressions, penalties and the gate.

`save` and `load` are each other's inverse; `score` goes from a backbone's states to
rewards, `reward_apply` from tokens, as one function to jit: what `scorer` makes of
`attributes:DIR`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from rlhf_jax.algorithms import attributes as regressions
from rlhf_jax.algorithms import gate as gates
from rlhf_jax.algorithms.gate import GateConfig
from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.types import Sequences


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


def load_card(out: str | pathlib.Path) -> dict[str, Any]:
    """The card in a directory that `attributes` wrote: numbers, model and config.

    Raises:
        ValueError: there is none.
    """
    folder = pathlib.Path(out).expanduser()
    for name in ("attributes.npz", "attributes.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder}: no {name}; make one with `attributes`")
    return json.loads((folder / "attributes.json").read_text(encoding="utf-8"))


def load(out: str | pathlib.Path) -> AttributeModel:
    """What `attributes` wrote into a directory.

    Raises:
        ValueError: there is none.
    """
    folder = pathlib.Path(out).expanduser()
    given = dict(load_card(folder)["config"]["gate"])
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
    return np.asarray(_gated(model, jnp.asarray(prompts), jnp.float32(rewards)))


def clean(model: AttributeModel, rewards: Any) -> Any:
    """r', the rewards of attributes [N A] less the verbosity in them."""
    return regressions.debias(rewards, model.penalties, model.verbosity)


def _gated(model: AttributeModel, prompts: Any, rewards: Any) -> jax.Array:
    weights = gates.gate(model.gate, prompts, model.config)
    return gates.scores(model.gate, weights, rewards)


def head_params(model: AttributeModel) -> dict[str, Any]:
    """The arrays of a model in float32, for `reward_apply`."""
    arrays = {name: getattr(model, name) for name in ("weights", "penalties", "gate")}
    return jax.tree.map(np.float32, arrays)


def reward_apply(
    backbone: RewardModel, model: AttributeModel
) -> Callable[[Any, Any, Sequences, Array], Float[Array, "B S"]]:
    """A function (params, head, sequences, score_at [B S]) -> rewards [B S], float32.

    A completion whose row has no token of its prompt gets nan: its gate has no state to
    read.

    Args:
        backbone: whose states are read; its own head is not used. `params` are its.
        model: of which only sizes and options are used; its arrays are `head`, from
            `head_params`.
    """

    def apply(
        params: Any, head: Any, sequences: Sequences, score_at: Int[Array, "B S"]
    ) -> Float[Array, "B S"]:
        prompts = prompt_ends(sequences, score_at)
        columns = jnp.concatenate([score_at, jnp.maximum(prompts, 0)], axis=1)
        found: Any = backbone.apply(
            {"params": params}, sequences, columns, method="states"
        )
        completion, prompt = (
            part.reshape(-1, part.shape[-1]).astype(jnp.float32)
            for part in jnp.split(found[1], 2, axis=1)
        )
        filled = model._replace(**head)
        rewards = jnp.einsum(
            "qd,ad->qa", completion, head["weights"], precision="highest"
        )
        scores = _gated(filled, prompt, clean(filled, rewards))
        return jnp.where(prompts >= 0, scores.reshape(score_at.shape), jnp.nan)

    return apply


def prompt_ends(sequences: Sequences, score_at: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Column of the last prompt token of each scored completion, -1 for none.

    Args:
        sequences: rows in any layout.
        score_at: a column of each completion.
    """

    def there(values: Int[Array, "B T"]) -> Int[Array, "B S 1"]:
        return jnp.take_along_axis(values, score_at, axis=1)[:, :, None]

    segment = sequences.segment
    mine = segment[:, None, :] == there(segment)
    if sequences.prefix is not None:
        prefix = there(sequences.prefix)
        mine |= (segment[:, None, :] == prefix) & (prefix != 0)
    mine &= ~sequences.completion_mask[:, None, :] & (segment[:, None, :] != 0)
    columns = jnp.arange(segment.shape[1])[None, None, :]
    return jnp.max(jnp.where(mine, columns, -1), axis=2)
