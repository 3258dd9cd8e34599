"""`rlhf-jax attributes`: a reward made of attributes, on the frozen states of a model.

Read `run`: states of rated completions -> one ridge regression an attribute; states of
pairs -> penalties of verbosity, then the gate. Into --out go

    attributes.npz    names, weights [A D], penalties [A], verbosity, gate/LAYER/LEAF
    attributes.json   every number of the tables, and the config
    set_aside.jsonl   rows that could not be used, and why

`attributes:OUT` is a reward wherever a reward model is: `score`, `evaluate`, `serve`,
`generate`, RLOO and PPO; in Python `attribute_model.load` and `score` do the same on
states. About `held_out` of the prompts choose alpha and judge everything; nothing else
is trained on them.

Source: Wang et al. 2024, arXiv:2406.12845 (ArmoRM).
"""

import dataclasses
import functools
import math
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax.algorithms import attributes as regressions
from rlhf_jax.algorithms import gate as gates
from rlhf_jax.algorithms.gate import GateBatch, GateConfig
from rlhf_jax.data.rows import Columns
from rlhf_jax.io import progress
from rlhf_jax.programs import attribute_model, attribute_rows, scored_rows
from rlhf_jax.programs.attribute_model import AttributeModel
from rlhf_jax.programs.attribute_rows import Item
from rlhf_jax.programs.scorer import Scorer, ScoringConfig, open_scorer


@dataclasses.dataclass(frozen=True)
class AttributesConfig:
    """Fit a reward made of attributes on the frozen states of a model."""

    model: str
    """Whose states are read: run directory, HF directory, hub id, .gguf or preset. A
    reward head is not used."""
    out: str
    """Directory for attributes.npz and attributes.json."""
    data: list[str]
    """Rated completions, SPEC of rows with prompt, completion and attributes, {name:
    number or null}; repeat to add."""
    pairs: list[str]
    """Pairs for the gate, SPEC; repeat to add."""
    verbosity: str | None = None
    """The attribute that the others must not follow; null = leave them as they are."""
    max_correlation: float = 0.03
    """Largest Spearman correlation with it."""
    held_out: float = 0.1
    """Share of the prompts that choose alpha and judge."""
    attributes: str = "attributes"
    """Name of that column."""
    overwrite: bool = False
    """Replace what is in `out`."""
    seed: int = 0
    """Seed of the gate, and of which prompts are held out."""
    gate: GateConfig = GateConfig()
    """The gate and its training."""
    columns: Columns = Columns()
    """Names of the columns."""
    scoring: ScoringConfig = ScoringConfig()
    """How texts become states."""

    def __post_init__(self) -> None:
        for name in ("data", "pairs"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one --{name} SPEC")
        for name in ("held_out", "max_correlation"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a number between 0 and 1, got "
                    f"{getattr(self, name)}"
                )


def run(config: AttributesConfig) -> dict[str, Any]:
    """Fits, writes, prints; returns what attributes.json holds."""
    out = _directory(config)
    scoring = dataclasses.replace(config.scoring, untrained_head=True)
    scorer = open_scorer(config.model, scoring, seed=config.seed)
    rated, aside = attribute_rows.read_rated(
        config.data, scorer, config.columns, config.attributes
    )
    pairs, more = attribute_rows.read_pairs(config.pairs, scorer, config.columns)
    names = sorted({name for item in rated for name in item.values})
    if not names:
        raise ValueError(f"data: {config.attributes}: no row has a value of any")
    verbosity = _verbosity(names, config.verbosity)
    held = {
        what: _held_out(what, items, config)
        for what, items in (("data", rated), ("pairs", pairs))
    }
    scored_rows.write_jsonl(out / "set_aside.jsonl", aside + more)
    reasons = Counter(line["reason"] for line in aside + more)
    progress.say(
        f"{len(rated):,} rated completions, {len(pairs):,} pairs; set aside: "
        + (", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none")
    )

    states = _states(scorer, rated)[:, 0]
    values = attribute_rows.targets(rated, names)
    fit = regressions.fit_attributes(
        states[~held["data"]],
        values[~held["data"]],
        states[held["data"]],
        values[held["data"]],
        names=names,
    )
    found = _states(scorer, pairs)
    prompts = found[:, 0]
    chosen, rejected = (found[:, side] @ fit.weights.T for side in (1, 2))
    fitted_on = np.concatenate([r[~held["pairs"]] for r in (chosen, rejected)])
    penalties = _penalties(fitted_on, names, verbosity, config)
    known = AttributeModel(
        tuple(names), fit.weights, penalties.weights, verbosity or 0, {}, config.gate
    )
    chosen, rejected = (attribute_model.clean(known, r) for r in (chosen, rejected))
    columns = (prompts, chosen, rejected, np.ones(len(pairs)))
    train, judge = (
        GateBatch(*(jnp.asarray(x[part], jnp.float32) for x in columns))
        for part in (~held["pairs"], held["pairs"])
    )
    learnt, metrics = jax.jit(gates.train_gate, static_argnums=1)(
        train, config.gate, jax.random.key(config.seed)
    )
    _check_finite(metrics)
    model = known._replace(gate=jax.device_get(learnt))
    card = {
        "schema": 1,
        "model": config.model,
        "attributes": _rows(names, values, held["data"], fit, penalties),
        "gate": {
            "pairs": len(train.weight),
            "held_out_pairs": len(judge.weight),
            **_judged(model, judge),
        },
        "set_aside": dict(reasons),
        "config": configs.to_dict(config),
    }
    attribute_model.save(out, model, card)
    _show(card, out)
    return card


def _directory(config: AttributesConfig) -> pathlib.Path:
    path = pathlib.Path(config.out).expanduser()
    if (path / "attributes.npz").exists() and not config.overwrite:
        raise ValueError(
            f"out {config.out}: holds attributes.npz; name another directory or set "
            "--overwrite true"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {config.out}: cannot write there: {error}") from None
    return path


def _verbosity(names: Sequence[str], name: str | None) -> int | None:
    if name is not None and name not in names:
        raise ValueError(
            f"verbosity {name!r}: no such attribute in the data; expected one of "
            f"{', '.join(names)}, or null"
        )
    return None if name is None else names.index(name)


def _held_out(what: str, items: Sequence[Item], config: AttributesConfig) -> np.ndarray:
    held = attribute_rows.held_out(items, config.held_out, config.seed)
    if held.all() or not held.any():
        raise ValueError(
            f"{what}: {held.sum()} of {len(held)} rows are held out; expected some on "
            "both sides: give rows of more prompts, or another held_out or seed"
        )
    return held


def _states(scorer: Scorer, items: Sequence[Item]) -> np.ndarray:
    """States after the final norm at each item's sequences, [N S D]."""
    encoded = [each for item in items for each in item.encoded]
    after = scorer.rewards_and_states(encoded, np.arange(len(encoded))).after
    return after.reshape(len(items), -1, after.shape[-1])


def _penalties(
    rewards: np.ndarray,
    names: Sequence[str],
    verbosity: int | None,
    config: AttributesConfig,
) -> regressions.Penalties:
    """Fitted on the completions of the training pairs, [N A]; 0 without verbosity."""
    if verbosity is None:
        none = np.full(len(names), np.nan)
        return regressions.Penalties(np.zeros(len(names)), none, none)
    return regressions.fit_penalties(
        rewards,
        verbosity,
        names=names,
        max_correlation=config.max_correlation,
    )


def _check_finite(metrics: Any) -> None:
    bad = np.flatnonzero(np.asarray(metrics["update/finite"]) == 0)
    if len(bad):
        raise FloatingPointError(
            f"gate, step {bad[0] + 1}: loss or gradient is not finite; lower "
            "gate.optimizer.learning_rate, or look at the attributes' values"
        )


def _judged(model: AttributeModel, pairs: GateBatch) -> dict[str, Any]:
    """Accuracy on pairs: with the gate, and with the plain mean of the attributes."""
    objective = gates.gate_objective(model.config, deterministic=True)
    loss, metrics = jax.jit(objective)(model.gate, pairs, jax.random.key(0))
    gap = np.asarray(pairs.chosen - pairs.rejected, np.float64).mean(axis=1)
    weights = jax.jit(functools.partial(gates.gate, config=model.config))(
        model.gate, pairs.prompts
    )
    mean = np.asarray(weights).mean(axis=0)
    return {
        "accuracy": float(metrics["accuracy"].value()),
        "equal_weights_accuracy": float(np.mean((gap > 0) + 0.5 * (gap == 0))),
        "loss": float(loss.value()),
        "entropy": float(metrics["gate/entropy"].value()),
        "scale": float(np.exp(model.gate["log"]["scale"])),
        "mean_weights": dict(zip(model.names, map(float, mean), strict=True)),
    }


def _rows(
    names: Sequence[str],
    values: np.ndarray,
    held: np.ndarray,
    fit: regressions.AttributeFit,
    penalties: regressions.Penalties,
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "rows": int((~np.isnan(values[~held, k])).sum()),
            "held_out_rows": int((~np.isnan(values[held, k])).sum()),
            "alpha": float(fit.alpha[k]),
            "mse": float(fit.mse[k]),
            "r2": _number(fit.r2[k]),
            "lambda": float(penalties.weights[k]),
            "spearman_before": _number(penalties.before[k]),
            "spearman_after": _number(penalties.after[k]),
        }
        for k, name in enumerate(names)
    ]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _show(card: dict[str, Any], out: pathlib.Path) -> None:
    table = Table(title="attributes, judged on prompts that were held out")
    columns = ("rows", "alpha", "mse", "r2", "lambda", "spearman_after")
    for name in ("name", *columns):
        label = name.removesuffix("_after")
        table.add_column(label, justify="left" if name == "name" else "right")
    for row in card["attributes"]:
        cells = ["-" if row[c] is None else f"{row[c]:.4g}" for c in columns]
        table.add_row(row["name"], *cells)
    console = Console(highlight=False)
    console.print(table)
    gate = card["gate"]
    console.print(
        f"accuracy on {gate['held_out_pairs']:,} pairs held out: gate "
        f"{gate['accuracy']:.3f}, equal weights {gate['equal_weights_accuracy']:.3f}"
    )
    console.print(f"next  rlhf-jax score --model attributes:{out} ...", soft_wrap=True)
