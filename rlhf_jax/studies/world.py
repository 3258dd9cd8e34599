"""What the studies on the embedded testbed share: one SFT policy, many small reward
models trained in this process, and their accuracy on the four disjoint scenarios.

    world = open_world("runs/denoise/sft", sft_steps=500)
    train = trainer(world, reward_objective(world.apply()), steps=300)
    params = train(world.start(seed), world.pairs(rows("train", seed=seed)), seed)
    accuracy(world, params, world.pairs(rows("val_id")))

All models begin with the policy's weights and a head of their own, as the papers' do.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.reward_model import reward_apply
from rlhf_jax.algorithms.update import Objective
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.prepare import make_encoder
from rlhf_jax.data.shapes import Shapes
from rlhf_jax.data.store import PairDataset
from rlhf_jax.evals import scoring
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.models.heads import RewardModel, init_head
from rlhf_jax.programs import members, sft
from rlhf_jax.programs.models import load_reward_model
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import once
from rlhf_jax.testbed.rows import rows as testbed_rows

BATCH_SIZE = 64
"""Pairs in a step of every reward model."""
LEARNING_RATE = 2e-3
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The testbed, ready for training reward models."""

    model: RewardModel
    backbone: Any
    """Parameters of the SFT policy."""
    encoder: Encoder
    shapes: Shapes
    """Of every training batch: they compile once."""
    rewards: Callable[..., tuple[np.ndarray, np.ndarray]]
    """See `members.make_pair_rewards`."""
    score: Callable[..., Any]
    """Jitted (params, sequences, score_at) -> rewards."""
    states: Callable[..., Any]
    """Jitted (params, sequences, score_at) -> (rewards, states before the final norm,
    after it)."""

    def start(self, seed: int) -> Any:
        """The policy's weights and a head drawn from the seed."""
        head = init_head(self.model.config, jax.random.key(seed))
        return {"backbone": self.backbone, "head": head}

    def apply(self, *, deterministic: bool = True) -> Callable[..., jax.Array]:
        """See `reward_model.reward_apply`."""
        return reward_apply(self.model, deterministic=deterministic)

    def pairs(self, rows: Sequence[Row]) -> PairDataset:
        """Rows as a dataset; margin, soft_label and weight are used where they are."""
        columns = ("margin", "soft_label", "weight")
        return PairDataset.of(
            self.encoder.pair(
                row["prompt"],
                row["chosen"],
                row["rejected"],
                **{name: row[name] for name in columns if name in row},
            )
            for row in rows
        )


def open_world(
    run_dir: str | pathlib.Path, *, sft_steps: int = 500, dropout: float = 0.0
) -> World:
    """The world around the SFT policy of a run, which is trained if it is not there.

    Args:
        run_dir: of the SFT run.
        sft_steps: its optimizer steps.
        dropout: of the reward models.
    """
    folder = pathlib.Path(run_dir)
    base = QuickstartConfig(run_dir=str(folder.parent), sft_steps=sft_steps)
    once(sft.run, dataclasses.replace(sft_config(base), run_dir=str(folder)))
    compute = ComputeConfig(scan_layers=False, dropout=dropout)
    model, params, tokenizer = load_reward_model(str(folder), compute=compute)
    encoder = make_encoder(tokenizer)

    def apply(method: str, params: Any, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs, method=method)

    world = World(
        model,
        params["backbone"],
        encoder,
        Shapes(),
        members.make_pair_rewards(model),
        jax.jit(functools.partial(apply, "__call__")),
        jax.jit(functools.partial(apply, "rewards_and_states")),
    )
    sample = world.pairs(testbed_rows("train", size=1000, seed=12345))
    found = Batches(sample, BATCH_SIZE, num_shapes=1, row_length=96).shapes
    # A little room: an unlucky batch of another seed must not compile anew.
    roomy = dataclasses.replace(found, rows=tuple(r + 2 for r in found.rows))
    return dataclasses.replace(world, shapes=roomy)


def trainer(
    objective: Objective, *, steps: int, optimizer: OptimizerConfig | None = None
) -> Callable[..., Any]:
    """train(world, params, dataset, seed) -> trained parameters; compiles once."""
    config = optimizer or OptimizerConfig(
        learning_rate=LEARNING_RATE,
        schedule="cosine",
        weight_decay=0.01,
        final_scale=0.05,
    )
    tx: optax.GradientTransformation = make_optimizer(
        config, make_schedule(config, steps)
    )
    train = members.make_trainer(objective, tx)

    def one(world: World, params: Any, dataset: PairDataset, seed: int) -> Any:
        return train(
            [params],
            [dataset],
            seeds=[seed],
            steps=steps,
            batch_size=BATCH_SIZE,
            shapes=world.shapes,
        )[0]

    return one


@functools.lru_cache(maxsize=64)
def _cached(name: str, options: tuple[tuple[str, Any], ...]) -> list[dict[str, Any]]:
    return testbed_rows(name, **dict(options))


def rows(name: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of a testbed set; the same call gives the same list."""
    return _cached(name, tuple(sorted(options.items())))


def gaps(world: World, params: Any, dataset: PairDataset) -> np.ndarray:
    """r_chosen - r_rejected of one model, [Q]."""
    chosen, rejected = world.rewards([params], dataset)
    return (chosen - rejected)[:, 0]


def accuracy(world: World, params: Any, dataset: PairDataset) -> float:
    """Share of the pairs that the model orders as labelled; a tie counts half."""
    found = gaps(world, params, dataset)
    return float(np.mean((found > 0) + 0.5 * (found == 0)))


def rewards_and_states(
    world: World, params: Any, dataset: PairDataset
) -> scoring.ScoredStates:
    """Of chosen, rejected, chosen, rejected ... of the pairs."""
    encoded = list(members.completions(dataset))
    return scoring.score_with_states(
        functools.partial(world.states, params), encoded, np.arange(len(encoded))
    )


def kendall_tau(world: World, params: Any, quads: Sequence[Row]) -> float:
    """Mean Kendall tau over prompts with four responses each."""
    encoded: list[EncodedCompletion] = []
    for row in quads:
        prompt = world.encoder.prompt(row["prompt"])
        for response in row["responses"]:
            answer = world.encoder.completion(row["prompt"], response["text"])
            encoded.append(EncodedCompletion(prompt, answer))
    score = functools.partial(world.score, params)
    rewards = scoring.score(score, encoded).reshape(len(quads), -1)
    gold = [np.array([r["score"] for r in row["responses"]]) for row in quads]
    return float(evaluate_ranking(list(rewards), gold, samples=2)["kendall_tau"])
