"""Random perturbations: distinct, different, of the share that was asked for."""

import re

import numpy as np
import pytest

from rlhf_jax.curation.seam.perturb import KINDS, STOP_WORDS, changeable, perturb

TEXT = "In 1969 Neil Armstrong walked on the Moon for 2.5 hours, said Houston."
WORDS = ["London", "quickly", "Paris", "red", "Buzz", "7"]


def of(kind, count=20, text=TEXT, seed=0, **options):
    rng = np.random.default_rng(seed)
    others = changeable(WORDS).get(kind, [])
    return perturb(text, kind, count, rng, others=others, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_distinct_differ_and_repeat_with_the_seed(kind):
    found = of(kind)
    assert 2 <= len(found) == len(set(found)) <= 20
    assert TEXT not in found and all(text.strip() == text for text in found)
    assert found == of(kind) != of(kind, seed=1)


@pytest.mark.parametrize("kind", ["characters", "names", "numbers"])
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_only_words_it_can_change_change_and_no_more_than_the_share(kind, share):
    before = TEXT.split()
    can = [KINDS[kind].can_change(word) for word in before]
    most = max(1, round(share * sum(can)))
    for text in of(kind, share=share):
        after = text.split()
        changed = [a != b for a, b in zip(before, after, strict=True)]
        assert 1 <= sum(changed) <= most
        assert all(c for c, is_changed in zip(can, changed) if is_changed)


def test_stop_words_stay():
    text = " ".join(sorted(STOP_WORDS))
    assert all(not of(kind, text=text) for kind in KINDS)


def test_names_come_from_names_and_numbers_stay_near():
    for text in of("names", text="Rome fell."):
        assert text.split()[0] in {"London", "Paris", "Buzz"}
    for text in of("numbers", text="about 100 to 2.50"):
        whole, part = re.findall(r"\d+(?:\.\d+)?", text)
        assert 91 <= int(whole) <= 109 and 2.41 <= float(part) <= 2.59
        assert len(part) == 4


def test_words_change_their_number_by_one_at_a_time():
    for text in of("words", text="red green blue", share=0.3):
        assert abs(len(text.split()) - 3) <= 1 and "  " not in text


def test_white_space_around_a_text_does_not_bring_the_text_back():
    for kind in ("names", "numbers", "characters"):
        found = of(kind, text=" Paris has 12 \n", count=50)
        assert found and "Paris has 12" not in found


def test_a_text_that_a_kind_cannot_change_gives_none():
    assert of("numbers", text="no digits here") == []
    assert of("names", text="no names here") == []
    assert of("characters", text="") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "synonyms"}, "kind 'synonyms': expected one of characters, words"),
        ({"share": 0.0}, r"share: expected a number in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share: expected a number in \(0, 1\], got 1.5"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        of(**({"kind": "words"} | options))
