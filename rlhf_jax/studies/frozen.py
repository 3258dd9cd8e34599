"""Reward heads on the states of a frozen model: what the studies on real data share.

The states after the final norm at each completion's last token are computed once and
kept on disk, in parts, so that a stopped study goes on; a head on them is what `reward`
with `train_only: head` trains, in seconds.

    model = open_frozen("smollm2.gguf", "runs/states")
    pairs = model.pairs("pairs.jsonl.gz?split=train&sample=2000")
    kernels = train_heads(head_objective(), pairs, seeds=8, steps=400, ...)
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.data import prepare, sources, specs
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.rows import KwiseRow, kwise_row
from rlhf_jax.io import progress
from rlhf_jax.programs import members, sft
from rlhf_jax.programs.models import weights_identity
from rlhf_jax.programs.scorer import Scorer, ScoringConfig, open_scorer
from rlhf_jax.studies.quickstart import QuickstartConfig, sft_config
from rlhf_jax.studies.seeds import once
from rlhf_jax.studies.world import BATCH_SIZE
from rlhf_jax.types import PreferenceBatch

PART = 256
"""Completions in a file of states."""


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    """What the studies on frozen states have in common."""

    run_dir: str
    """Directory of the study."""
    seeds: int = 5
    """Heads: each has its own start, order and four fifths of the pairs."""
    model: str | None = None
    """Whose states are read: HF directory, hub id, .gguf, run; null = an SFT policy
    trained on the testbed."""
    states_dir: str | None = None
    """Where states are kept; null = inside run_dir. Studies may share it."""
    steps: int = 400
    """Optimizer steps of every head, of 64 pairs."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3, schedule="cosine", weight_decay=0.01
    )
    """Of every head."""
    rows: DataConfig = DataConfig()
    """How rows are read."""
    sft_steps: int = 500
    """Of the testbed's policy."""


class PairStates(NamedTuple):
    """States of pairs, [Q D] each."""

    chosen: np.ndarray
    rejected: np.ndarray
    prompt: np.ndarray
    """[Q] which prompt each pair has, by number."""

    def take(self, index: Any) -> "PairStates":
        """Some of the pairs."""
        return PairStates(*(column[index] for column in self))


class KwiseStates(NamedTuple):
    """States of the completions of each prompt, and what they are."""

    states: list[np.ndarray]
    """[K D] a row."""
    rows: list[KwiseRow]


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model whose states are read, and where they are kept."""

    scorer: Scorer
    identity: str
    """Names the weights: states of others are not taken for its own."""
    folder: pathlib.Path
    rows: DataConfig

    def pairs(self, spec: str) -> PairStates:
        """The states of a spec's pairs."""
        dataset, account = prepare.prepare_pairs([spec], self.scorer.encoder, self.rows)
        progress.say(f"{spec}: {account.summary()}")
        found = self._states(list(members.completions(dataset)))
        prompts = [bytes(_int32(dataset[n].prompt)) for n in range(len(dataset))]
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
        index = np.array([number[prompt] for prompt in prompts])
        return PairStates(found[::2], found[1::2], index)

    def kwise(self, spec: str) -> KwiseStates:
        """The states of a spec's prompts with several completions."""
        dataset, account = prepare.prepare_kwise([spec], self.scorer.encoder, self.rows)
        progress.say(f"{spec}: {account.summary()}")
        items = [dataset[n] for n in range(len(dataset))]
        found = self._states(
            [EncodedCompletion(i.prompt, c) for i in items for c in i.completions]
        )
        ends = np.cumsum([len(item.completions) for item in items])
        source = sources.open_source(specs.parse(spec), streams=False)
        return KwiseStates(
            np.split(found, ends[:-1].tolist()),
            [
                kwise_row(source[int(n)][0], self.rows.columns)
                for n in dataset.source_row
            ],
        )

    def _states(self, encoded: Sequence[EncodedCompletion]) -> np.ndarray:
        """[N D]; every distinct completion is computed once."""
        keys = [(bytes(_int32(e.prompt)), bytes(_int32(e.completion))) for e in encoded]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        where = {number[key]: n for n, key in enumerate(keys)}
        distinct = [encoded[where[n]] for n in range(len(number))]
        parts = [
            self._part(distinct[n : n + PART]) for n in range(0, len(distinct), PART)
        ]
        return np.concatenate(parts)[[number[key] for key in keys]]

    def _part(self, encoded: Sequence[EncodedCompletion]) -> np.ndarray:
        digest = hashlib.sha256(self.identity.encode())
        for each in encoded:
            for ids in (each.prompt, each.completion):
                digest.update(len(ids).to_bytes(4) + bytes(_int32(ids)))
        path = self.folder / f"{digest.hexdigest()[:24]}.npy"
        if not path.exists():
            every = np.arange(len(encoded))
            found = self.scorer.rewards_and_states(encoded, every).after
            partial = path.with_suffix(f".{os.getpid()}.npy")
            np.save(partial, found)
            partial.replace(path)
        return np.load(path)


def _identity(spec: str, config: ScoringConfig) -> str:
    """What states depend on besides the tokens: weights and dtype."""
    return f"{weights_identity(spec)} {config.compute.dtype}"


def _int32(ids: Any) -> np.ndarray:
    return np.ascontiguousarray(ids, np.int32)


def open_frozen(
    model: str, folder: str | pathlib.Path, rows: DataConfig = DataConfig()
) -> FrozenModel:
    """The model of a --model SPEC, whose states are kept in `folder`.

    Args:
        model: a policy or a reward model, whose head is not used.
        folder: may serve several studies and models.
        rows: template, lengths and columns of what is read.
    """
    scoring = ScoringConfig(
        template=rows.template, max_length=rows.max_length, untrained_head=True
    )
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return FrozenModel(
        scorer=open_scorer(model, scoring),
        identity=_identity(model, scoring),
        folder=path,
        rows=rows,
    )


def open_policy(root: pathlib.Path, sft_steps: int) -> str:
    """The SFT policy of a testbed study in `root`, trained if it is not there."""
    base = QuickstartConfig(run_dir=str(root), sft_steps=sft_steps)
    return str(once(sft.run, sft_config(base)))


def head_objective(**terms: Any) -> Any:
    """`reward_objective` of a head on states: batches hold states [B 2 D] where others
    hold sequences.

    Args:
        terms: loss, regularizers, hyper-parameters.
    """
    return reward_objective(_apply, **terms)


def _apply(params: Any, states: jax.Array, score_at: Any, key: Any) -> jax.Array:
    return states @ params["kernel"]


@functools.lru_cache(maxsize=64)
def _trainer(objective: Any, optimizer: OptimizerConfig, steps: int) -> Callable:
    """Jitted (pairs [Q 2 D], drawn [S N], seeds [S]) -> (kernels [S D], finite [S])."""
    tx = make_optimizer(optimizer, make_schedule(optimizer, steps))
    update = make_update(objective, tx)

    def one(
        pairs: jax.Array, share: jax.Array, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        start, shuffle, key = jax.random.split(jax.random.key(seed), 3)
        count, width = len(share), pairs.shape[-1]
        params = {"kernel": jax.random.normal(start, (width,)) * (width + 1) ** -0.5}
        epochs = jax.random.split(shuffle, -(-steps * BATCH_SIZE // count))
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(epochs)
        order = order.reshape(-1)[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)

        def step(state: Any, drawn: jax.Array) -> tuple[Any, jax.Array]:
            first = 2 * jnp.arange(BATCH_SIZE)
            batch = PreferenceBatch(
                sequences=pairs[share[drawn]],  # type: ignore[arg-type]
                score_at=first,
                chosen=first,
                rejected=first + 1,
                weight=jnp.ones(BATCH_SIZE),
            )
            state, metrics = update(state, batch, key)
            return state, metrics["update/finite"] > 0

        state, finite = jax.lax.scan(step, init_state(params, tx), order)
        return state.params["kernel"], finite.all()

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))


def train_heads(
    objective: Any,
    pairs: PairStates,
    *,
    seeds: int,
    steps: int,
    optimizer: OptimizerConfig,
    share: float = 0.8,
) -> np.ndarray:
    """Heads [S D], one a seed: each with its own start, order, and share of the pairs.

    Args:
        objective: from `head_objective`.
        pairs: to train on.
        seeds: S.
        steps: of 64 pairs.
        optimizer: of all heads.
        share: of the pairs, drawn without replacement by each seed.

    Raises:
        ValueError: fewer pairs than a batch has.
        FloatingPointError: a head did not learn.
    """
    count = int(share * len(pairs.chosen))
    if count < BATCH_SIZE:
        raise ValueError(
            f"{len(pairs.chosen)} pairs, of which a seed draws {count}: expected at "
            f"least {BATCH_SIZE}, a batch"
        )
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    both = np.stack([pairs.chosen, pairs.rejected], axis=1)
    drawn = [
        np.random.default_rng(seed).permutation(len(both))[:count]
        for seed in range(seeds)
    ]
    train = _trainer(objective, optimizer, steps)
    kernels, finite = train(jnp.asarray(both), np.stack(drawn), jnp.arange(seeds))
    if not finite.all():
        raise FloatingPointError(
            "heads: a loss or a gradient was not finite; lower the learning rate"
        )
    return np.asarray(kernels)
