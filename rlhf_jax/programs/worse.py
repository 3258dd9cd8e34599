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
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.curation.seam import contrast, perturb
from rlhf_jax.data.encode import EncodedCompletion
from rlhf_jax.data.rows import RowError
from rlhf_jax.io import progress
from rlhf_jax.programs.adversary import AttackConfig, open_adversary
from rlhf_jax.programs.likelihood import open_pooling
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse

Estimator = Literal["contrast", "generate", "perturb", "attack", "given"]
PART = 64
"""Prompts attacked together."""


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """Neighbours of a prompt."""

    count: int = 30
    """Most neighbours of a prompt."""
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
    near = contrast.neighbours(
        embeddings,
        [prompt.key for prompt in prompts],
        count=config.count,
        max_similarity=config.max_similarity,
    )
    return contrast.contrast(
        near, [p.gold for p in prompts], [p.prompt_id for p in prompts]
    )


def _pooled_states(
    prompts: Sequence[SeamPrompt], policy: str, scoring: ScoringConfig
) -> np.ndarray:
    """Mean states of the prompts [P D], centred: uncentred states of a language model
    all point the same way. A prompt too long for the policy has none (zeros)."""
    pooling = open_pooling(policy, scoring)
    encoded, at = [], []
    for n, prompt in enumerate(prompts):
        tokens = pooling.encoder.prompt(prompt.prompt)
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
    found = encoder.encode([prompt.key for prompt in prompts], show_progress_bar=True)
    return np.asarray(found, np.float32)


def by_perturbation(
    prompts: Sequence[SeamPrompt], config: PerturbConfig, seed: int
) -> Worse:
    """Random perturbations of the gold completions, see `curation.seam.perturb`."""
    words = dict.fromkeys(w for p in prompts for w in re.findall(r"\S+", p.gold))
    vocabulary = list(words)
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
                vocabulary=vocabulary,
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
) -> Worse:
    """Edits of the gold completions that the reward model likes, see `adversary`."""
    adversary = open_adversary(reward, scoring, candidates=config.candidates)
    made: Worse = []
    with progress.counting_bar("attack", len(prompts)) as advance:
        for start in range(0, len(prompts), PART):
            some = prompts[start : start + PART]
            found = adversary.attack(
                [p.prompt for p in some], [p.gold for p in some], config
            )
            made += [each.worse for each in found]
            advance(len(some))
    return made


def given(prompts: Sequence[SeamPrompt], column: str) -> Worse:
    """The worse completions of a column: texts, or objects with "text".

    Raises:
        ValueError: a row has none, or something else; names file and line.
    """
    made: Worse = []
    for prompt in prompts:
        values = prompt.row.get(column)
        if not isinstance(values, list):
            have = ", ".join(map(repr, list(prompt.row)[:12]))
            raise RowError(
                f"{prompt.where}: estimator given: expected a list of completions in "
                f"column {column!r}; the row has {have}"
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
