"""Neighbours: the nearest others under the limit, never the prompt itself."""

import numpy as np
import pytest

from rlhf_jax.curation.seam import contrast as contrast_file
from rlhf_jax.curation.seam.contrast import contrast, neighbours

pytest.importorskip("faiss", reason="needs the seam extra")


def slow_neighbours(embeddings, keys, answers, count, limit):
    """All cosines, in float64, one prompt at a time."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = []
    for row, key, answer in zip(unit, keys, answers):
        near, seen, said = [], {key}, {answer.strip()}
        for other in np.argsort(-(unit @ row)).tolist():
            first = keys.index(keys[other])
            text = answers[first].strip()
            if keys[other] not in seen and unit[other] @ row < limit:
                if text not in said:
                    near.append(first)
                said.add(text)
            seen.add(keys[other])
        found.append(near[:count])
    return found


def different(count):
    """As many answers."""
    return [f"answer {n}" for n in range(count)]


@pytest.mark.parametrize("limit", [0.2, 0.9, 2.0])
@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("answers", [2, 12, 80])
def test_neighbours_are_those_of_a_slow_search(count, limit, answers, monkeypatch):
    monkeypatch.setattr(contrast_file, "_CELLS", 500)
    rng = np.random.default_rng(0)
    keys = [f"prompt {n % 60}" for n in range(80)]
    distinct = rng.normal(size=(60, 5)) + 0.7
    embeddings = np.stack([distinct[n % 60] for n in range(80)])
    golds = [f"{n % answers}" + " " * (n % 2) for n in range(80)]
    found = neighbours(embeddings, keys, golds, count=count, max_similarity=limit)
    expected = slow_neighbours(embeddings, keys, golds, count, limit)
    assert [near.tolist() for near in found] == expected
    assert any(len(near) for near in found)


def test_a_prompt_and_its_duplicates_are_never_its_neighbours():
    found = neighbours(
        np.ones((5, 3)), ["a", "b", "a", "a", "b"], different(5), max_similarity=2.0
    )
    assert [near.tolist() for near in found] == [[1], [0], [1], [1], [0]]


def test_neighbours_do_not_depend_on_the_order_of_the_prompts():
    rng = np.random.default_rng(0)
    embeddings, keys = rng.normal(size=(50, 4)), list(range(50))
    found = neighbours(embeddings, keys, different(50), count=5)
    order = rng.permutation(50)
    moved = neighbours(
        embeddings[order],
        [keys[n] for n in order],
        [different(50)[n] for n in order],
        count=5,
    )
    for place, near in zip(order, moved):
        assert order[near].tolist() == found[place].tolist()


def test_a_row_of_zeros_has_no_neighbours_and_is_none():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 6))
    embeddings[3] = 0.0
    found = neighbours(
        embeddings, list(range(40)), different(40), count=39, max_similarity=2.0
    )
    assert not len(found[3]) and not any(3 in near for near in found)
    assert all(len(near) == 38 for n, near in enumerate(found) if n != 3)
    assert not any(map(len, neighbours(np.zeros((2, 3)), ["a", "b"], ["x", "y"])))


def test_nothing_near_enough_and_a_single_prompt_give_no_neighbour():
    assert neighbours(np.eye(1), ["a"], ["x"])[0].tolist() == []
    same = neighbours(np.ones((2, 2)), ["a", "b"], ["x", "y"], max_similarity=0.9)
    assert [near.tolist() for near in same] == [[], []]


def test_the_next_takes_the_place_of_an_equal_answer():
    """On a line: 0 is nearest to 1, then 2 ...; 1 says what 0 says, 3 what 2 says."""
    angles = np.linspace(0, 1, 6)
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    answers = ["x", " x", "y", "y", "z", "w"]
    found = neighbours(embeddings, list(range(6)), answers, count=2, max_similarity=2.0)
    assert found[0].tolist() == [2, 4]
    made = contrast(found, answers, [f"p{n}" for n in range(6)])
    assert made[0] == [{"text": "y", "source": "p2"}, {"text": "z", "source": "p4"}]


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (np.ones((3, 2)), {}, r"expected one row for each of 2 prompts"),
        (np.ones((2, 2)), {"count": 0}, "count: expected at least 1, got 0"),
        (np.full((2, 2), np.nan), {}, "a number is not finite"),
    ],
)
def test_what_cannot_be_searched_is_said(embeddings, options, message):
    with pytest.raises(ValueError, match=message):
        neighbours(embeddings, ["a", "b"], ["x", "y"], **options)
