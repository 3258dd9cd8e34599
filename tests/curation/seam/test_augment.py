"""Augmentation: gold over what was misjudged, likeliest first; a control as large."""

from rlhf_jax.curation.seam.augment import augment, random_control


def line(number, misjudged, worse=5):
    return {
        "prompt": f"p{number}",
        "gold": f"g{number}",
        "worse": [
            {
                "text": f"w{number}.{k}",
                "source": "s",
                "misjudged": k < misjudged,
                "logprob": float(-10 + k),
                "num_tokens": 2,
            }
            for k in range(worse)
        ],
    }


LINES = [line(n, misjudged=n % 4) for n in range(40)]


def test_pairs_prefer_gold_to_the_likeliest_misjudged_completions():
    sft, pairs = augment(LINES, [3, 4, 2], pairs=2)
    assert sft == [{"prompt": f"p{n}", "completion": f"g{n}"} for n in (3, 4, 2)]
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]
    assert found == [
        ("p3", "g3", "w3.2"),
        ("p3", "g3", "w3.1"),
        ("p2", "g2", "w2.1"),
        ("p2", "g2", "w2.0"),
    ]


def test_a_control_of_misjudged_completions_is_as_large_however_few_there_are():
    scarce = [line(n, misjudged=4 if n in (1, 5) else n in (2, 8)) for n in range(40)]
    texts = set()
    for lines, chosen in ((LINES, [3, 6, 11, 13]), (scarce, [1, 2, 5, 8, 9])):
        _, pairs = augment(lines, chosen, pairs=4)
        bad = {each["text"] for row in lines for each in row["worse"]
               if each["misjudged"]}  # fmt: skip
        for seed in range(30):
            _, drawn = random_control(lines, chosen, pairs=4, seed=seed, misjudged=True)
            rejected = [row["rejected"] for row in drawn]
            assert len(set(rejected)) == len(rejected) == len(pairs)
            assert bad.issuperset(rejected)
            texts |= set(rejected)
    assert len(texts) > 30


def test_the_control_has_as_many_rows_of_random_prompts():
    chosen = [3, 6, 11, 13]
    sft, pairs = augment(LINES, chosen, pairs=3)
    seen = set()
    for seed in range(30):
        random_sft, random_pairs = random_control(LINES, chosen, pairs=3, seed=seed)
        assert (len(random_sft), len(random_pairs)) == (len(sft), len(pairs))
        assert len({row["prompt"] for row in random_sft}) == len(random_sft)
        texts = [(row["prompt"], row["rejected"]) for row in random_pairs]
        assert len(set(texts)) == len(texts)
        assert len({row["prompt"] for row in random_pairs}) == len(chosen)
        for row in random_pairs:
            assert row["chosen"] == "g" + row["prompt"][1:]
            assert row["rejected"].startswith("w" + row["prompt"][1:] + ".")
        seen |= {row["prompt"] for row in random_sft}
    assert len(seen) > 30
