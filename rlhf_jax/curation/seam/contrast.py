"""Contrast: the gold completions of the most similar other prompts, as worse ones.

An answer to a nearby question is fluent, on topic and wrong here. Neighbours that are
almost the same question are left out: their answers may be right.

Source: arXiv:2406.07971 (SEAM), whose code takes the 30 nearest under a cosine of 0.9
in an embedding of all questions. Where fewer are left it falls back to the 30 nearest
of any similarity, which brings back what the limit leaves out; here fewer are taken.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

ROOM = 16
"""Neighbours asked for beyond those that are wanted; more where they do not do."""


def neighbours(
    embeddings: np.ndarray,
    keys: Sequence[Hashable],
    *,
    count: int = 30,
    max_similarity: float = 0.9,
) -> list[np.ndarray]:
    """For each prompt the indices of its nearest others, the most similar first.

    Args:
        embeddings: [P D], of any length; a row of zeros has no neighbours and is none.
        keys: [P], what makes two prompts the same: itself and its duplicates are no
            neighbours, and of several equal neighbours the first stands for all.
        count: most neighbours of a prompt; fewer where no more qualify.
        max_similarity: cosine that neighbours stay below.

    Raises:
        ValueError: lengths differ, count below 1, an embedding that is not finite, or
            faiss is not installed.
    """
    unit = _unit(embeddings, len(keys))
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    first: dict[Hashable, int] = {}
    same = np.array([first.setdefault(key, n) for n, key in enumerate(keys)], np.int64)
    some = unit.any(axis=1)
    distinct = np.unique(same[some])
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(keys)
    if not len(distinct):
        return found
    index = _index(unit[distinct])
    waiting, asked = np.flatnonzero(some), min(count + ROOM, len(distinct))
    while len(waiting):
        similarity, nearest = index.search(unit[waiting], asked)
        nearest = distinct[nearest]
        keep = (nearest != same[waiting, None]) & (similarity < max_similarity)
        enough = (keep.sum(axis=1) >= count) | (asked == len(distinct))
        for row in np.flatnonzero(enough).tolist():
            found[waiting[row]] = nearest[row][keep[row]][:count]
        waiting, asked = waiting[~enough], min(2 * asked, len(distinct))
    return found


def _unit(embeddings: np.ndarray, count: int) -> np.ndarray:
    """Rows of length 1, or 0."""
    rows = np.ascontiguousarray(embeddings, np.float32)
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(
            f"embeddings: expected one row for each of {count} prompts, got shape "
            f"{rows.shape}"
        )
    if not np.isfinite(rows).all():
        raise ValueError("embeddings: a number is not finite")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _index(unit: np.ndarray) -> Any:
    """Exact search by inner product."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "estimator contrast: its neighbours are searched by faiss, which is not "
            'installed; pip install "rlhf-jax[seam]"'
        ) from None
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return index


def contrast(
    near: Sequence[np.ndarray], golds: Sequence[str], names: Sequence[Any]
) -> list[list[dict[str, Any]]]:
    """The worse completions of each prompt: texts of its neighbours' gold completions.

    A neighbour with the very same answer gives none, and no text is taken twice.

    Args:
        near: from `neighbours`.
        golds: gold completion of each prompt.
        names: of the prompts, written as `source`, to say where a text came from.
    """
    made = []
    for index, others in enumerate(near):
        texts: dict[str, Any] = {}
        for other in map(int, others):
            if golds[other] != golds[index]:
                texts.setdefault(golds[other], names[other])
        made.append([{"text": text, "source": name} for text, name in texts.items()])
    return made
