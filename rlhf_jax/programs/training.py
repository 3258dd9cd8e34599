"""What the programs that learn from rows share around the loop: model, data, jit.

`setting` opens all that a run needs; `train` compiles the update once, on the mesh, and
hands everything to `supervise`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rlhf_jax import config as configs
from rlhf_jax.algorithms.diagnostics import DiagnosedEvaluate, make_diagnosed_evaluate
from rlhf_jax.algorithms.optimizer import make_optimizer, make_schedule
from rlhf_jax.algorithms.reward_model import (
    reward_apply,
    reward_objective,
    reward_states_apply,
)
from rlhf_jax.algorithms.update import Objective, Update, make_evaluate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.prepare import PrepareReport, make_encoder
from rlhf_jax.io import progress
from rlhf_jax.io.metrics import metrics_writer
from rlhf_jax.models import lora
from rlhf_jax.models.flops import train_flops
from rlhf_jax.programs import held_out, runs, sharded
from rlhf_jax.programs.runs import Data
from rlhf_jax.programs.supervised import Evaluate, supervise
from rlhf_jax.sharding import batch_devices
from rlhf_jax.types import Sequences, TrainState

REFERENCE = "reference"
"""Where an objective finds the parameters of a frozen reference model."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """All that a run needs before it knows its objective."""

    run_dir: pathlib.Path
    mesh: Mesh
    model: Any
    """The Linen module."""
    params: Any
    """Its parameters; the training uses them up."""
    tokenizer: Any
    encoder: Encoder
    data: Data


def check_common(config: Any) -> None:
    """Refuses sizes that cannot be; shared by the configs of training programs."""
    if not config.data:
        raise ValueError("data: expected at least one --data SPEC")
    for name in ("batch_size", "accum_steps"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"{name}: expected at least 1, got {getattr(config, name)}"
            )
    if config.batch_size % config.accum_steps:
        raise ValueError(
            f"batch_size {config.batch_size}: expected a multiple of accum_steps "
            f"{config.accum_steps}"
        )
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps: expected at least 1, got {config.steps}")
    if (config.loop.best or config.loop.patience) and not config.eval_data:
        raise ValueError(
            "loop.best and loop.patience need an evaluation set; give --eval_data "
            "NAME=SPEC"
        )
    best = (config.loop.best or "").split("/")
    names = [spec.partition("=")[0] for spec in config.eval_data]
    if config.loop.best and (
        len(best) < 3 or best[0] != "eval" or best[1] not in names
    ):
        raise ValueError(
            f"loop.best {config.loop.best!r}: expected eval/NAME/METRIC with NAME one "
            f"of {', '.join(names)}"
        )
    if config.epochs <= 0 or not math.isfinite(config.epochs):
        raise ValueError(f"epochs: expected a number above 0, got {config.epochs}")


@contextlib.contextmanager
def setting(
    config: Any,
    *,
    load: Callable[..., Any],
    prepare: Callable[..., tuple[Any, PrepareReport]],
    prepare_train: Callable[..., tuple[Any, PrepareReport]] | None = None,
    seed: int | None = None,
) -> Iterator[Setting]:
    """The Setting of a run; its directory is locked and its mesh set inside the `with`.

    Args:
        config: of the program; model, compute, lora, mesh, data, eval_data and rows are
            read.
        load: `models.load_policy` or `load_reward_model`.
        prepare: see `runs.prepare_sets`.
        prepare_train: see `runs.prepare_sets`.
        seed: of weights that the source lacks; None = the config's.
    """
    sets = configs.parse_named(config.eval_data, "--eval_data")
    with runs.opened(config) as (run_dir, mesh):
        model, params, tokenizer = load(
            config.model,
            compute=config.compute,
            lora=config.lora,
            mesh=mesh,
            key=jax.random.key(config.seed if seed is None else seed),
        )
        encoder = make_encoder(tokenizer, config.rows)
        data = runs.prepare_sets(
            prepare, config, sets, encoder, run_dir, prepare_train=prepare_train
        )
        yield Setting(run_dir, mesh, model, params, tokenizer, encoder, data)


def train(
    config: Any,
    setting: Setting,
    *,
    kind: str,
    trainable: str,
    make_objective: Callable[[bool], Objective],
    headline: str,
    coupled: Callable[[bool], Objective] | None = None,
    evaluated: Objective | None = None,
    diagnosed: DiagnosedEvaluate | None = None,
    batches: Callable[[int], Any] | None = None,
    also_read: Any = None,
    reference: Any = None,
) -> None:
    """Compiles, trains, evaluates, saves and reports.

    Args:
        config: of the program; its optimizer, loop, rows, sizes and seed are read.
        setting: see there.
        kind: "reward" or "causal", for architecture.json.
        trainable: which leaves are trained, see `models.lora.split_params`.
        make_objective: deterministic -> objective.
        headline: metric of the first evaluation set that names the best checkpoint.
        coupled: deterministic -> objective over stacked micro-batches, in place of
            accumulating: for objectives that couple the examples of a batch.
        evaluated: objective of the evaluation sets; None = `make_objective(True)`.
        diagnosed: evaluates them in its place, with rewards and hidden states.
        batches: start row -> iterator of (host batch, next row); None = `stream` of the
            training rows.
        also_read: another dataset that `batches` takes from.
        reference: parameters that the objective reads at REFERENCE and that are neither
            trained nor saved; None = none.
    """
    run_dir, mesh, model, data = (
        setting.run_dir,
        setting.mesh,
        setting.model,
        setting.data,
    )
    trained, frozen = lora.split_params(setting.params, trainable)
    steps = config.steps or math.ceil(
        config.epochs * len(data.train) / config.batch_size
    )
    schedule = make_schedule(config.optimizer, steps)
    tx = make_optimizer(config.optimizer, schedule)
    read = frozen if reference is None else frozen | {REFERENCE: reference}
    state = sharded.create_state(trained, tx, mesh, frozen=read)
    update = _compile_update(config, tx, state, make_objective, coupled)
    evaluate = _evaluation(
        config, setting, state, evaluated or make_objective(True), diagnosed
    )
    runs.save_architecture(
        run_dir, config, kind, model, setting.tokenizer, complete=not frozen
    )
    first = next(iter(data.evals), None)
    best = config.loop.best or (first and f"eval/{first}/{headline}")
    progress.say(
        f"{len(data.train):,} rows, {steps:,} steps of {config.batch_size}, "
        f"{count(trained):,} of {count(setting.params):,} parameters trained, "
        f"{mesh.size} device(s)"
    )
    with metrics_writer(
        run_dir,
        resume_step=runs.latest_step(run_dir),
        wandb_project=config.loop.wandb_project,
        config=configs.to_dict(config),
    ) as write:
        supervise(
            config.loop,
            run_dir=run_dir,
            state=state,
            update=update,
            evaluate=evaluate,
            batches=batches
            or (lambda start: stream(config, data.train, mesh, start_row=start)),
            put=sharded.make_put(mesh, accum_steps=config.accum_steps),
            steps=steps,
            best=best,
            key=jax.random.key(config.seed),
            data_digest=digest(data.train, also_read),
            write=write,
            learning_rate=lambda step: float(np.asarray(schedule(step))),
            flops=lambda sequences: flops(model.config, sequences),
            title=pathlib.Path(run_dir).name,
        )
    runs.finish(run_dir)


def _compile_update(
    config: Any,
    tx: optax.GradientTransformation,
    state: TrainState,
    make_objective: Callable[[bool], Objective],
    coupled: Callable[[bool], Objective] | None,
) -> Update:
    """The jitted update; for `coupled` see `train`."""
    deterministic = not (config.compute.dropout or config.lora.dropout)
    if coupled is not None and config.accum_steps > 1:
        return sharded.compile_update(coupled(deterministic), tx, state)
    return sharded.compile_update(
        make_objective(deterministic), tx, state, accum_steps=config.accum_steps
    )


def pair_evaluation(
    model: Any, terms: dict[str, Any], *, states: bool
) -> dict[str, Any]:
    """How `train` evaluates the pairs of a reward model, its keyword arguments.

    Args:
        model: a RewardModel.
        terms: loss and regularizers, see `objectives.parts_of_evaluation`.
        states: with the figures of rewards and hidden states, see `held_out`.
    """
    if states:
        apply = reward_states_apply(model, deterministic=True)
        return {"diagnosed": make_diagnosed_evaluate(apply, **terms)}
    apply = reward_apply(model, deterministic=True)
    return {"evaluated": reward_objective(apply, **terms)}


def _evaluation(
    config: Any,
    setting: Setting,
    state: TrainState,
    objective: Objective,
    diagnosed: DiagnosedEvaluate | None,
) -> Evaluate:
    """state -> eval/NAME/METRIC of every set; for `diagnosed` see `train`."""
    mesh, evals = setting.mesh, setting.data.evals
    common = {
        "eval_sets": {n: eval_batches(config, d, mesh) for n, d in evals.items()},
        "put": sharded.make_put(mesh),
    }
    if diagnosed is None:
        evaluate = sharded.compile_evaluate(make_evaluate(objective), state)
        return functools.partial(held_out.mean_figures, evaluate=evaluate, **common)
    return functools.partial(
        held_out.pair_figures,
        evaluate=sharded.compile_evaluate(diagnosed, state),
        sizes={name: len(dataset) for name, dataset in evals.items()},
        **common,
    )


def stream(config: Any, dataset: Any, mesh: Mesh, *, start_row: int) -> Batches:
    """The endless training stream from a global row on."""
    return Batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        start_row=start_row,
        accum_steps=config.accum_steps,
        layout=config.rows.layout,
        row_length=config.rows.row_length,
        num_shapes=config.rows.num_shapes,
        rows_multiple_of=batch_devices(mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def eval_batches(config: Any, dataset: Any, mesh: Mesh) -> list[Any]:
    """One pass over an evaluation set, in its order, as host batches."""
    batches = Batches(
        dataset,
        min(config.batch_size // config.accum_steps, len(dataset)),
        shuffle=False,
        epochs=1,
        layout=config.rows.layout,
        row_length=config.rows.row_length,
        num_shapes=config.rows.num_shapes,
        rows_multiple_of=batch_devices(mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=0,
    )
    return [batch for batch, _ in batches]


def flops(config: Any, sequences: Sequences) -> float:
    """FLOPs of a training step over these rows; the last two axes are [B T]."""
    real = np.asarray(sequences.segment) != 0
    visible = np.sum(np.where(real, np.asarray(sequences.positions) + 1.0, 0.0))
    return train_flops(config, tokens=float(real.sum()), visible=float(visible))


def digest(*datasets: Any) -> str:
    """What a resumed run must find again: the number and the lengths of its rows."""
    found = hashlib.sha256()
    for dataset in datasets:
        if dataset is not None:
            found.update(dataset.lengths.tobytes())
    return found.hexdigest()


def count(params: Any) -> int:
    """Elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
