"""Where `seam` gets worse completions from: one function an estimator.

    contrast   gold completions of the nearest other prompts
    generate   written to be worse, by a local policy or an endpoint, see `writer`
    perturb    the gold completion, randomly perturbed
    attack     the gold completion, edited until the reward model likes it
    given      a column of the data, such as the testbed's known corruptions

Each takes all prompts and gives for each a list of {"text", "source"}; fewer than asked
for, or none, where there are no more. Models that only an estimator needs are loaded in
its function and gone with it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.curation.seam import contrast, perturb
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.rows import RowError
from rlhf_jax.io import progress
from rlhf_jax.programs.adversary import AttackConfig, open_adversary
from rlhf_jax.programs.likelihood import open_pooling
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse, as_text

Estimator = Literal["contrast", "generate", "perturb", "attack", "given"]
PART = 64
"""Prompts attacked together."""


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """Neighbours of a prompt."""

    count: int = 30
    """Most neighbours of a prompt, each with another answer."""
    max_similarity: float = 0.9
    """Cosine that neighbours stay below: nearer prompts may share their answer."""
    embedding: str | None = None
    """sentence-transformers model, such as multi-qa-distilbert-cos-v1; null = the
    policy's own hidden states, mean over the prompt, centred over the prompts."""

    def __post_init__(self) -> None:
        if self.count < 1 or not -1 < self.max_similarity <= 1:
            raise ValueError(
                f"contrast: count {self.count}, max_similarity {self.max_similarity}: "
                "expected at least 1, and a cosine in (-1, 1]"
            )


@dataclasses.dataclass(frozen=True)
class PerturbConfig:
    """Random perturbations."""

    count: int = 8
    """Completions of each kind."""
    share: float = 0.3
    """Of the words that a kind can change."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"perturb: count {self.count}, share {self.share}: expected at least "
                "1, and a share in (0, 1]"
            )


def by_contrast(
    prompts: Sequence[SeamPrompt],
    config: ContrastConfig,
    policy: str,
    scoring: ScoringConfig,
) -> Worse:
    """Gold completions of the nearest other prompts, see `curation.seam.contrast`."""
    if config.embedding is None:
        embeddings = _pooled_states(prompts, policy, scoring)
    else:
        embeddings = _sentence_embeddings(prompts, config.embedding)
    golds = [prompt.gold for prompt in prompts]
    near = contrast.neighbours(
        embeddings,
        [prompt.key for prompt in prompts],
        golds,
        count=config.count,
        max_similarity=config.max_similarity,
    )
    return contrast.contrast(near, golds, [prompt.prompt_id for prompt in prompts])


def _pooled_states(
    prompts: Sequence[SeamPrompt], policy: str, scoring: ScoringConfig
) -> np.ndarray:
    """Mean states of the prompts [P D], centred: uncentred states of a language model
    all point the same way. A prompt that the policy cannot take has none (zeros)."""
    pooling = open_pooling(policy, scoring)
    encoded, at = [], []
    for n, prompt in enumerate(prompts):
        try:
            tokens = pooling.encoder.prompt(prompt.prompt, tools=prompt.tools)
        except ValueError:
            continue  # the template refuses it: set aside with this reason when scored
        if len(tokens) <= pooling.max_length:
            encoded.append(EncodedCompletion([], tokens))
            at.append(n)
    with progress.counting_bar("embedding", len(encoded)) as advance:
        every = np.arange(len(encoded))
        states = pooling.rewards_and_states(encoded, every, advance).after
    found = np.zeros((len(prompts), states.shape[1]), np.float32)
    found[at] = states - states.mean(axis=0)
    return found


def _sentence_embeddings(prompts: Sequence[SeamPrompt], model: str) -> np.ndarray:
    try:
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )
    except ImportError:
        raise ValueError(
            f"contrast.embedding {model}: sentence-transformers is not installed; pip "
            'install "rlhf-jax[seam]", or leave it out for the policy\'s own states'
        ) from None
    try:
        encoder = SentenceTransformer(model)
    except Exception as error:  # whatever the hub or torch raises
        raise ValueError(
            f"contrast.embedding {model}: cannot be loaded: {error}"
        ) from None
    found = encoder.encode(
        [as_text(prompt.prompt) for prompt in prompts], show_progress_bar=True
    )
    return np.asarray(found, np.float32)


def by_perturbation(
    prompts: Sequence[SeamPrompt], config: PerturbConfig, seed: int
) -> Worse:
    """Random perturbations of the gold completions, see `curation.seam.perturb`."""
    words = [word for prompt in prompts for word in prompt.gold.split()]
    others = perturb.changeable(words)
    made = []
    for n, prompt in enumerate(prompts):
        rng = np.random.default_rng([seed, n])
        texts: dict[str, str] = {}
        for kind in perturb.KINDS:
            for text in perturb.perturb(
                prompt.gold,
                kind,
                config.count,
                rng,
                others=others[kind],
                share=config.share,
            ):
                texts.setdefault(text, kind)
        made.append([{"text": t, "source": kind} for t, kind in texts.items()])
    return made


def by_attack(
    prompts: Sequence[SeamPrompt],
    config: AttackConfig,
    reward: str,
    scoring: ScoringConfig,
    *,
    start: int,
) -> Iterator[Worse]:
    """Edits of the gold completions that the reward model likes, PART prompts at a time
    from prompt `start` on; see `adversary`."""
    adversary = open_adversary(reward, scoring, candidates=config.candidates)
    with progress.counting_bar("attack", len(prompts)) as advance:
        advance(start)
        for first in range(start, len(prompts), PART):
            some = prompts[first : first + PART]
            found = adversary.attack(
                [prompt.prompt for prompt in some],
                [prompt.gold for prompt in some],
                config,
                [prompt.tools for prompt in some],
            )
            yield [each.worse for each in found]
            advance(len(some))


def given(prompts: Sequence[SeamPrompt], column: str) -> Worse:
    """The worse completions of a column: texts, or objects with "text". A row without
    the column has none.

    Raises:
        ValueError: no row has the column, or one has something else in it; names file
            and line.
    """
    if not any(column in prompt.row for prompt in prompts):
        have = ", ".join(map(repr, list(prompts[0].row)[:12]))
        raise RowError(
            f"{prompts[0].where}: estimator given: expected a list of completions in "
            f"column {column!r}; the row has {have}: name the right one with "
            "worse_column"
        )
    made: Worse = []
    for prompt in prompts:
        values = prompt.row.get(column) or []
        if not isinstance(values, list):
            raise RowError(
                f"{prompt.where}: {column}: expected a list of completions, got "
                f"{values!r}"
            )
        made.append([_given(value, prompt, column) for value in values])
    return made


def _given(value: Any, prompt: SeamPrompt, column: str) -> dict[str, Any]:
    found = {"text": value} if isinstance(value, str) else value
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise RowError(
            f"{prompt.where}: {column}: expected texts, or objects with a text, got "
            f"{value!r}"
        )
    return {"text": found["text"], "source": str(found.get("source", column))}
