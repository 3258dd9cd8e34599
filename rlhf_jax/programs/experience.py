"""From prompts to experience: sampled completions, their rewards, and the two-way road
between arrays over completions [M C] on the host and packed rows on the device.

`collect` samples and scores. `Completions` is what a step learns from, ragged arrays
in padded [M C] form: NumPy, so that it can be saved in a checkpoint, cut into
minibatches and packed anew in every epoch. `batches` packs them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.groups import (
    Group,
    PackedGroups,
    pack_groups,
    to_completions,
    to_rows,
)
from rlhf_jax.data.plan import Layout, row_bucket
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs.rewards import Rewards
from rlhf_jax.rl import shaping
from rlhf_jax.types import Experience, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
    """What happens to scores before they are learnt from."""

    truncated: Literal["keep", "penalise", "mask"] = "keep"
    """Completions cut at the maximum length: as they are (the papers'), with
    missing_eos_penalty, or out of loss, mean and baseline."""
    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion that was cut, if truncated is penalise."""
    length_penalty: float = 0.0
    """Taken off the score for each token beyond free_length."""
    free_length: int = 0
    """Tokens without length penalty."""
    timeout_s: float = 60.0
    """Longest time of one call of a reward function or HTTP scorer."""

    def __post_init__(self) -> None:
        for name in ("missing_eos_penalty", "length_penalty", "free_length"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"shaping.{name}: expected at least 0, got {getattr(self, name)}"
                )
        if not self.timeout_s > 0:
            raise ValueError(
                f"shaping.timeout_s: expected a number above 0, got {self.timeout_s}"
            )


@dataclasses.dataclass(eq=False)
class Completions:
    """M = B G completions of B prompts; every array is NumPy."""

    prompt_tokens: np.ndarray
    """All prompt ids, one after the other."""
    prompt_lengths: np.ndarray
    """[B]"""
    tokens: np.ndarray
    """[M C]"""
    mask: np.ndarray
    """[M C]"""
    stopped: np.ndarray
    """[M] bool, ended by itself."""
    old_logprobs: np.ndarray
    """[M C] at the sampling temperature."""
    ref_logprobs: np.ndarray
    """[M C]"""
    scores: np.ndarray
    """[M] rewards after penalties, float32."""
    counts: np.ndarray
    """[M] bool, False = no weight in the loss, and no part in a baseline."""
    advantages: np.ndarray
    """[M] or [M C]; see types.Experience."""
    values: np.ndarray
    """[M C]; zeros without a critic."""
    returns: np.ndarray
    """[M C]; zeros without a critic."""

    @property
    def num_samples(self) -> int:
        """G"""
        return len(self.tokens) // len(self.prompt_lengths)

    @property
    def kl(self) -> np.ndarray:
        """[M C] k1 estimate of the KL to the reference, in nats; 0 outside the mask."""
        return np.where(self.mask, self.old_logprobs - self.ref_logprobs, 0.0)

    def prompt(self, n: int) -> np.ndarray:
        """Ids of prompt n."""
        stop = int(self.prompt_lengths[: n + 1].sum())
        return self.prompt_tokens[stop - int(self.prompt_lengths[n]) : stop]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def prompt_batch(prompts: Sequence[EncodedPrompt], *, pad_id: int) -> PromptBatch:
    """Prompts padded on the right to a bucket of the longest.

    Raises:
        ValueError: a prompt without tokens.
    """
    for n, prompt in enumerate(prompts):
        if not len(prompt.tokens):
            raise ValueError(f"prompt {n}: expected at least one token, got none")
    length = row_bucket(max(len(p.tokens) for p in prompts))
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask: Any = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        mask[row, : len(prompt.tokens)] = True
    return PromptBatch(tokens=tokens, mask=mask)  # type: ignore[arg-type]


def as_texts(
    prompts: Sequence[EncodedPrompt], rollout: Rollout, encoder: Encoder
) -> Texts:
    """The texts of host-side completions, G after G."""
    samples = len(rollout.tokens) // len(prompts)
    tokens = np.asarray(rollout.tokens)
    # The token that stopped a completion is no part of its text.
    lengths = np.asarray(rollout.mask).sum(axis=1) - np.asarray(rollout.stopped)
    return Texts(
        prompts=[p.prompt for p in prompts for _ in range(samples)],
        completions=[
            encoder.completion_text(
                prompts[m // samples].tokens, tokens[m, : lengths[m]]
            )
            for m in range(len(lengths))
        ],
        rows=[p.row for p in prompts for _ in range(samples)],
    )


def shape_scores(
    raw: np.ndarray, stopped: np.ndarray, mask: np.ndarray, config: ShapingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(scores after penalties [M], which completions count [M])."""
    scores = jnp.asarray(raw, jnp.float32)
    if config.truncated == "penalise":
        scores = shaping.missing_eos_penalty(
            scores, jnp.asarray(stopped), penalty=config.missing_eos_penalty
        )
    if config.length_penalty:
        scores = shaping.length_penalty(
            scores,
            jnp.asarray(mask.sum(axis=1), jnp.int32),
            coef=config.length_penalty,
            free_length=config.free_length,
        )
    counts = stopped if config.truncated == "mask" else np.ones_like(stopped)
    return np.asarray(scores), counts


def collect(
    prompts: Sequence[EncodedPrompt],
    rollout: Rollout,
    raw_scores: np.ndarray,
    config: ShapingConfig,
) -> Completions:
    """Completions with scores; reference, values and targets are still zero.

    Args:
        prompts: B of them.
        rollout: on the host.
        raw_scores: [M] rewards before penalties.
        config: penalties.
    """
    mask, stopped = np.asarray(rollout.mask), np.asarray(rollout.stopped)
    scores, counts = shape_scores(raw_scores, stopped, mask, config)
    zeros = np.zeros(mask.shape, np.float32)
    return Completions(
        prompt_tokens=np.concatenate([np.asarray(p.tokens) for p in prompts]),
        prompt_lengths=np.array([len(p.tokens) for p in prompts], np.int64),
        tokens=np.asarray(rollout.tokens),
        mask=mask,
        stopped=stopped,
        old_logprobs=np.asarray(rollout.logprobs),
        ref_logprobs=zeros,
        scores=scores,
        counts=counts,
        advantages=zeros[:, 0],
        values=zeros,
        returns=zeros,
    )


@dataclasses.dataclass(frozen=True)
class Packing:
    """How completions become rows; the same for every batch of a run."""

    layout: Layout
    row_length: int
    rows_multiple_of: int
    pad_id: int


def pack(
    completions: Completions, members: np.ndarray, packing: Packing, *, rows: int | None
) -> PackedGroups:
    """Some of the completions in rows; those of one prompt stay together.

    Args:
        completions: of the step.
        members: their numbers; they become 0, 1, ... in the batch.
        packing: of the run.
        rows: number of rows; None = a bucket of those needed.
    """
    samples = completions.num_samples
    owners = members // samples
    groups = [
        Group(completions.prompt(int(n)), np.flatnonzero(owners == n).tolist())
        for n in dict.fromkeys(owners.tolist())
    ]
    return pack_groups(
        groups,
        completions.tokens[members],
        completions.mask[members],
        layout=packing.layout,
        row_length=packing.row_length,
        rows_multiple_of=packing.rows_multiple_of,
        rows=rows,
        pad_id=packing.pad_id,
    )


def pack_alike(
    completions: Completions, parts: Sequence[np.ndarray], packing: Packing
) -> list[PackedGroups]:
    """Each part in rows, the number of rows the same for all.

    Args:
        completions: of the step.
        parts: members of each micro-batch.
        packing: of the run.
    """
    packed = [pack(completions, part, packing, rows=None) for part in parts]
    rows = max(len(part.sample) for part in packed)
    return [
        have
        if len(have.sample) == rows
        else pack(completions, members, packing, rows=rows)
        for members, have in zip(parts, packed, strict=True)
    ]


def experience(
    completions: Completions, members: np.ndarray, packed: PackedGroups
) -> Experience:
    """A batch of some of the completions, as NumPy arrays."""
    advantages: Any = completions.advantages[members].astype(np.float32)
    weight: Any = completions.counts[members].astype(np.float32)
    fields: dict[str, Any] = {
        name: to_rows(packed, getattr(completions, name)[members].astype(np.float32))
        for name in ("old_logprobs", "ref_logprobs", "values", "returns")
    }
    if advantages.ndim == 2:
        advantages = to_rows(packed, advantages)
    return Experience(
        sequences=packed.sequences,
        sample=packed.sample,  # type: ignore[arg-type]
        weight=weight,
        advantages=advantages,
        old_values=fields.pop("values"),
        **fields,
    )


def minibatches(
    completions: Completions,
    packing: Packing,
    *,
    count: int,
    accum_steps: int,
    rng: np.random.Generator,
) -> Iterator[Experience]:
    """One epoch: `count` batches of whole groups in a random order.

    Args:
        completions: of the step.
        packing: of the run.
        count: minibatches.
        accum_steps: micro-batches in each: if above 1, every leaf has that leading
            axis.
        rng: decides the order; from `epoch_rng`.
    """
    for parts in epoch_parts(
        completions, count=count, accum_steps=accum_steps, rng=rng
    ):
        micro = [
            experience(completions, members, packed)
            for members, packed in zip(parts, pack_alike(completions, parts, packing))
        ]
        if accum_steps == 1:
            yield micro[0]
        else:
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *micro)


def epoch_rng(seed: int, step: int, epoch: int) -> np.random.Generator:
    """What decides the order of one epoch; a resumed run finds it again."""
    return np.random.default_rng((seed, step, epoch))


def epoch_parts(
    completions: Completions, *, count: int, accum_steps: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Members of each micro-batch of each minibatch of one epoch."""
    samples = completions.num_samples
    order = rng.permutation(len(completions.prompt_lengths))
    return [
        [
            (part[:, None] * samples + np.arange(samples)).reshape(-1)
            for part in np.split(groups, accum_steps)
        ]
        for groups in np.split(order, count)
    ]


def forward(
    function: Callable[[Any], Any],
    completions: Completions,
    packing: Packing,
    *,
    chunk: int,
    parts: Sequence[Sequence[np.ndarray]] | None = None,
) -> np.ndarray:
    """function(Sequences) -> [B T], read at the completion tokens: [M C] float32.

    Args:
        function: jitted, with its parameters; takes host rows.
        completions: of the step.
        packing: of the run.
        chunk: completions in one call.
        parts: from `epoch_parts`: the calls get the very rows of that epoch instead,
            as sums over other rows would round otherwise.
    """
    out = np.zeros(completions.mask.shape, np.float32)
    waiting: list[tuple[np.ndarray, PackedGroups, Any]] = []
    if parts is None:
        cuts = range(chunk, len(out), chunk)
        parts = [[members] for members in np.split(np.arange(len(out)), cuts)]
    for micro in parts:
        for members, packed in zip(micro, pack_alike(completions, micro, packing)):
            waiting.append((members, packed, function(packed.sequences)))
    for members, packed, rows in waiting:
        out[members] = to_completions(packed, jax.device_get(rows))
    return out


def score(rewards: Rewards, texts: Texts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(total rewards [M], each source's)."""
    result = rewards.score(texts)
    return result.total, result.columns
