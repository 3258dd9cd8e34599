"""Contrast: the gold completions of the most similar other prompts, as worse ones.

An answer to a nearby question is fluent, on topic and wrong here. Neighbours that are
almost the same question are left out: their answers may be right. So is one whose
answer is the prompt's own, or that of a nearer neighbour: the next one takes its place.

Source: arXiv:2406.07971 (SEAM), whose code takes the 30 nearest under a cosine of 0.9
in an embedding of all questions. Where fewer are left it falls back to the 30 nearest
of any similarity, which brings back what the limit leaves out; here fewer are taken.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

ROOM = 16
"""Neighbours asked for beyond those that are wanted; more where they do not do."""
_CELLS = 1 << 23
"""Similarities in memory at a time."""


def neighbours(
    embeddings: np.ndarray,
    keys: Sequence[Hashable],
    answers: Sequence[str],
    *,
    count: int = 30,
    max_similarity: float = 0.9,
) -> list[np.ndarray]:
    """For each prompt the indices of its nearest others, the most similar first.

    Args:
        embeddings: [P D], of any length; a row of zeros has no neighbours and is none.
        keys: [P], what makes two prompts the same: itself and its duplicates are no
            neighbours, and of several equal neighbours the first stands for all.
        answers: [P] gold completions; neighbours have different ones, none of them the
            prompt's own, white space around them aside.
        count: most neighbours of a prompt; fewer where no more qualify.
        max_similarity: cosine that neighbours stay below.

    Raises:
        ValueError: lengths differ, count below 1, an embedding that is not finite, or
            faiss is not installed.
    """
    unit = _unit(embeddings, len(keys))
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    same = _first(keys)
    said = _first([answer.strip() for answer in answers])
    some = unit.any(axis=1)
    distinct = np.unique(same[some])
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(keys)
    if not len(distinct):
        return found
    index = _index(unit[distinct])
    # No row can have more neighbours than there are answers other than its own.
    possible = np.isin(said, said[distinct])
    most = len(np.unique(said[distinct])) - possible
    waiting, asked = np.flatnonzero(some), min(count + ROOM, len(distinct))
    while len(waiting):
        late = []
        for start in range(0, len(waiting), max(_CELLS // asked, 1)):
            part = waiting[start : start + max(_CELLS // asked, 1)]
            similarity, nearest = index.search(unit[part], asked)
            nearest = distinct[nearest]
            keep = (nearest != same[part, None]) & (similarity < max_similarity)
            keep &= said[nearest] != said[part, None]
            for row, n in enumerate(part.tolist()):
                near = nearest[row][keep[row]]
                near = near[np.sort(np.unique(said[near], return_index=True)[1])]
                if len(near) >= min(count, most[n]) or asked == len(distinct):
                    found[n] = near[:count]
                else:
                    late.append(n)
        waiting, asked = np.array(late, np.int64), min(2 * asked, len(distinct))
    return found


def _first(values: Sequence[Hashable]) -> np.ndarray:
    """For each value the place where it stands first."""
    first: dict[Hashable, int] = {}
    places = [first.setdefault(value, n) for n, value in enumerate(values)]
    return np.array(places, np.int64)


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

    Args:
        near: from `neighbours`.
        golds: gold completion of each prompt.
        names: of the prompts, written as `source`, to say where a text came from.
    """
    return [
        [{"text": golds[n], "source": names[n]} for n in others.tolist()]
        for others in near
    ]
