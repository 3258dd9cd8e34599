"""Reward models under several objectives, side by side on the four disjoint scenarios.

`compare` trains one model for each objective and seed on the same pairs in the same
order and from the same weights, so that differences are paired. `scenarios` and
`contrastive` are its uses. Results are kept seed by seed: a stopped study goes on.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from rlhf_jax.algorithms.update import Objective
from rlhf_jax.evals.hidden_states import alternating, state_figures, states_summary
from rlhf_jax.studies import world as worlds
from rlhf_jax.studies.quickstart import SCENARIOS
from rlhf_jax.studies.seeds import by_seed, study_dir
from rlhf_jax.studies.statistics import interval, paired

STATE_FIGURES = (
    "state_norm_mean",
    "state_norm_std",
    "state_norm_before_mean",
    "state_norm_before_std",
    "difference_norm_before_mean",
    "difference_norm_before_skewness",
    "effective_rank",
    "effective_rank_before",
)
"""Of the hidden states, see `evals.hidden_states`."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective, the world whose model it trains, and the rows it is given."""

    world: worlds.World
    objective: Objective
    extra: Callable[[int], dict[str, Any]] = lambda seed: {}
    """Leaves that training adds to the parameters, by seed."""
    rows: Callable[[int], Sequence[Mapping[str, Any]]] | None = None
    """Training rows, by seed; None = testbed pairs by the config."""


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Sizes of a comparison."""

    run_dir: str
    """Directory of the study."""
    seeds: int = 8
    """Repetitions, each with its own pairs, heads and orders."""
    pairs: int = 8000
    """Training pairs."""
    flip_rate: float = 0.1
    """Share of the labels that are flipped."""
    steps: int = 250
    """Optimizer steps of every reward model."""
    eval_rows: int = 500
    """Pairs, and quads, of each scenario."""
    sft_steps: int = 500
    """Of the policy that all reward models start from."""


def compare(
    config: Any,
    make_methods: Callable[[pathlib.Path], Mapping[str, Method]],
) -> dict[str, list[dict[str, Any]]]:
    """Results of every method, a dict a seed.

    Args:
        config: a ComparisonConfig or a subclass.
        make_methods: directory of the study -> methods by name; called only if there is
            something to train.

    Returns:
        By method, for each seed: `tau/SCENARIO`; `accuracy`, `reward_mean`,
        `reward_std` and STATE_FIGURES by /SCENARIO and on the first training pairs,
        /train; `head_norm`; `norm_dispersion`, the standard deviation of the
        scenarios' mean |h|, and `norm_dispersion_before` the final norm.
    """
    with study_dir(config) as root:

        @functools.cache
        def tools() -> dict[str, tuple[Method, Callable[..., Any]]]:
            return {
                name: (method, worlds.trainer(method.objective, steps=config.steps))
                for name, method in make_methods(root).items()
            }

        results = by_seed(
            root,
            config.seeds,
            lambda seed: {
                name: _one(config, *method, seed) for name, method in tools().items()
            },
        )
    names = list(results[0])
    wanted = {name: _numbers() for name in names}
    for seed, result in enumerate(results):
        if {name: set(found) for name, found in result.items()} != wanted:
            raise ValueError(
                f"{root / f'seed-{seed}.json'}: its methods or numbers are those of "
                "another version of the study; remove the file to train it again, or "
                "choose another --run_dir"
            )
    return {name: [result[name] for result in results] for name in names}


def _numbers() -> set[str]:
    """Names of the results of a method."""
    by_set = ("accuracy", "reward_std", "reward_mean", *STATE_FIGURES)
    overall = {"head_norm", "norm_dispersion", "norm_dispersion_before"}
    taus = {f"tau/{name}" for name in SCENARIOS}
    return overall | taus | {f"{k}/{n}" for k in by_set for n in ("train", *SCENARIOS)}


def _one(
    config: ComparisonConfig,
    method: Method,
    train: Callable[..., Any],
    seed: int,
) -> dict[str, float]:
    world = method.world
    options = {"size": config.pairs, "seed": seed, "flip_rate": config.flip_rate}
    rows = method.rows(seed) if method.rows else worlds.rows("train", **options)
    start = world.start(seed) | method.extra(seed)
    params = train(world, start, world.pairs(rows), seed)
    params = {name: params[name] for name in ("backbone", "head")}
    result = {"head_norm": float(jax.numpy.linalg.norm(params["head"]["kernel"]))}
    size = {"size": config.eval_rows, "seed": seed}
    figures = {}
    for name in ("train", *SCENARIOS):
        judged = rows[: config.eval_rows] if name == "train" else None
        pairs = world.pairs(judged or worlds.rows(name, **size))
        scored = worlds.rewards_and_states(world, params, pairs)
        chosen, rejected = scored.rewards[0::2], scored.rewards[1::2]
        right = (chosen > rejected) + 0.5 * (chosen == rejected)
        result[f"accuracy/{name}"] = float(right.mean())
        result[f"reward_std/{name}"] = float(scored.rewards.std())
        result[f"reward_mean/{name}"] = float(scored.rewards.mean())
        figures[name] = state_figures(
            scored.before, scored.after, alternating(len(scored.after))
        )
        for key in STATE_FIGURES:
            result[f"{key}/{name}"] = figures[name].metrics[key]
    del figures["train"]
    summary = states_summary(figures, head_norm=result["head_norm"])
    for key in ("norm_dispersion", "norm_dispersion_before"):
        result[key] = summary[key]
    for name in SCENARIOS:
        quads = worlds.rows(f"quads_{name}", **size)
        result[f"tau/{name}"] = worlds.kendall_tau(world, params, quads)
    return result


def table(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    metric: str,
    title: str,
    *,
    base: str = "BT",
) -> Table:
    """`overall_table` of one metric, one column a scenario."""
    columns = {
        name: functools.partial(_number, f"{metric}/{name}") for name in SCENARIOS
    }
    return overall_table(found, columns, title, base=base)


def _number(key: str, result: Mapping[str, float]) -> float:
    return result[key]


def overall_table(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, Callable[[Mapping[str, float]], float]],
    title: str,
    *,
    base: str = "BT",
) -> Table:
    """One row a method, one column a number made of a seed's results: mean over seeds,
    and below it the paired difference from `base` with its 95 % interval."""
    shown = Table(title=title, show_lines=True)
    shown.add_column("objective")
    for name in columns:
        shown.add_column(name, justify="right")
    for method in found:
        cells = [_cell(found, method, base, value) for value in columns.values()]
        shown.add_row(method, *cells)
    return shown


def split_table(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, Callable[[str, Mapping[str, float]], float]],
    title: str,
    *,
    methods: Sequence[str],
) -> Table:
    """One row a split and method, the splits being /train and the scenarios; cells as
    in `overall_table`, whose base is the first method.

    Args:
        found: by method, see `compare`.
        columns: (split, a seed's results) -> number.
        title: of the table.
        methods: those shown.
    """
    shown = Table(title=title, show_lines=True)
    shown.add_column("split")
    shown.add_column("objective")
    for name in columns:
        shown.add_column(name, justify="right")
    for split in ("train", *SCENARIOS):
        values = [functools.partial(value, split) for value in columns.values()]
        for method in methods:
            cells = [_cell(found, method, methods[0], value) for value in values]
            shown.add_row(split, method, *cells)
    return shown


def _cell(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    method: str,
    base: str,
    value: Callable[[Mapping[str, float]], float],
) -> str:
    """Mean over seeds, and below it the paired difference from another base."""
    values = [value(r) for r in found[method]]
    before = [value(r) for r in found[base]]
    against = "" if method == base else f"\n{paired(values, before)}"
    return f"{interval(values).plain()}{against}"
