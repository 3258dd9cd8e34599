"""What `encode` makes of a row and `layout` packs: ids, with what a batch needs."""

import dataclasses
from typing import Any, TypeAlias

import numpy as np

from rlhf_jax.data.turns import Prompt

Ids: TypeAlias = list[int] | np.ndarray


@dataclasses.dataclass
class EncodedCompletion:
    """A prompt and one answer; `completion` ends with the end token."""

    prompt: Ids
    completion: Ids


@dataclasses.dataclass
class EncodedPair:
    """A prompt and two answers; ids are lists or int32 arrays (views of a store)."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    margin: float | None = None
    soft_label: float | None = None
    gap_bound: float | None = None
    weight: float = 1.0
    where: str = ""


@dataclasses.dataclass
class EncodedPrompt:
    """A prompt to be continued."""

    tokens: Ids
    prompt: Prompt
    """As text or messages: what a reward reads."""
    row: dict[str, Any]
    """The data row; its other columns reach reward functions."""
    where: str = ""


@dataclasses.dataclass
class EncodedConversation:
    """A conversation to train on: True in the mask = a token the assistant wrote."""

    tokens: Ids
    completion_mask: list[bool] | np.ndarray
    where: str = ""
