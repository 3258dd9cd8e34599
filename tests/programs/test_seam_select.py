"""Selection, augmentation, rounds: what is dropped, what stays, what starts where."""

import json

import pytest

from rlhf_jax.programs.seam_augment import SeamAugmentConfig
from rlhf_jax.programs.seam_augment import run as augment
from rlhf_jax.programs.seam_rounds import SeamRoundsConfig
from rlhf_jax.programs.seam_select import SeamSelectConfig
from rlhf_jax.programs.seam_select import run as select


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def scored(tmp_path):
    """A `seam` run of 10 prompts, of which the last two have no score."""
    root = tmp_path / "seam"
    root.mkdir()
    write(root / "prompts.jsonl", [{"prompt": f"p{n}", "n": n} for n in range(10)])
    lines = [
        {
            "index": n,
            "prompt": f"p{n}",
            "gold": "g",
            "estimator": name,
            "seam": None if n == 7 else float(n if name == "given" else -n),
            "worse": [
                {"text": "w", "source": "s", "misjudged": n != 7, "logprob": -1.0,
                 "num_tokens": 1}
            ],
        }
        for name in ("given", "contrast")
        for n in range(8)
    ]  # fmt: skip
    write(root / "seam.jsonl", lines)
    return root


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def numbers(path):
    return [row["n"] for row in read(path)]


def test_the_lowest_are_dropped_and_rows_keep_columns_and_order(tmp_path, scored):
    paths = select(
        SeamSelectConfig(
            str(scored), str(tmp_path / "o"), drop=[0.25, 0.5], estimator="given"
        )
    )
    found = {path.name: numbers(path) for path in paths}
    assert found["seam-0.25.jsonl"] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found["seam-0.5.jsonl"] == [4, 5, 6, 7, 8, 9]
    for share in ("0.25", "0.5"):
        drawn = found[f"random-{share}.jsonl"]
        assert len(drawn) == len(found[f"seam-{share}.jsonl"])
        assert drawn == sorted(drawn) and drawn[-2:] == [8, 9]
    assert set(found["random-0.5.jsonl"]) < set(found["random-0.25.jsonl"])
    contrast = SeamSelectConfig(
        str(scored), str(tmp_path / "c"), estimator="contrast", control=False
    )
    (path,) = select(contrast)
    assert numbers(path) == [0, 1, 2, 3, 4, 7, 8, 9]


def test_augmentation_writes_rows_and_their_control(tmp_path, scored):
    config = SeamAugmentConfig(
        str(scored), str(tmp_path / "o"), lowest=0.25, estimator="given"
    )
    names = [path.name for path in augment(config)]
    assert names == [
        "sft.jsonl",
        "pairs.jsonl",
        "random-sft.jsonl",
        "random-pairs.jsonl",
    ]
    assert [row["prompt"] for row in read(tmp_path / "o" / "sft.jsonl")] == ["p0", "p1"]
    (pair, _) = read(tmp_path / "o" / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("g", "w")
    assert len(read(tmp_path / "o" / "random-pairs.jsonl")) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, o: SeamSelectConfig(s, o), "the run has given, contrast; expected"),
        (
            lambda s, o: SeamSelectConfig(s, o, estimator="attack"),
            "estimator attack: the",
        ),
        (lambda s, o: SeamSelectConfig("nowhere", o), "holds no seam.jsonl"),
        (lambda s, o: SeamSelectConfig(s, o, drop=[]), "drop: expected shares"),
        (lambda s, o: SeamSelectConfig(s, o, drop=[1.0]), r"got \[1.0\]"),
        (lambda s, o: SeamAugmentConfig(s, o, lowest=0.0), "lowest 0.0, pairs 4"),
        (lambda s, o: SeamAugmentConfig(s, o, control="x"), "'x': expected any or mis"),
        (
            lambda s, o: SeamAugmentConfig(s, o, lowest=0.01, estimator="given"),
            "is no prompt of 8",
        ),
    ],
)
def test_what_cannot_be_selected_is_said(tmp_path, scored, make, message):
    with pytest.raises(ValueError, match=message):
        config = make(str(scored), str(tmp_path / "o"))
        (augment if isinstance(config, SeamAugmentConfig) else select)(config)


def test_files_that_are_there_stay_unless_told(tmp_path, scored):
    config = {"run_dir": str(scored), "out": str(tmp_path / "o"), "estimator": "given"}
    first = select(SeamSelectConfig(**config))[0].read_text()
    with pytest.raises(ValueError, match=r"seam-0.2.jsonl exists; name another"):
        select(SeamSelectConfig(**config))
    again = select(SeamSelectConfig(**config, overwrite=True))
    assert again[0].read_text() == first


ANY = {
    "run_dir": "rounds",
    "policy": "sft",
    "reward": "rm",
    "data": ["prompts.jsonl"],
}


def test_each_round_scores_and_goes_on_from_the_policy_of_the_last():
    config = SeamRoundsConfig(**ANY, seed=5)
    assert config.seam_of(1).policy == config.rl_of(1).model == "sft"
    assert config.seam_of(2).policy == config.rl_of(2).model == "rounds/round-1/rloo"
    assert (
        config.rl_of(2).reference == "sft"
        and config.rl_of(2).seed == config.seed_of(2) == 5002
    )
    assert config.rl_of(2).data == ["rounds/round-2/prompts/seam-0.2.jsonl"]
    control = SeamRoundsConfig(**ANY, random=True, drop=0.4)
    assert control.rl_of(1).data == ["rounds/round-1/prompts/random-0.4.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds 0, drop 0.2: expected at least 1"),
        ({"drop": 1.0}, "a share between 0 and 1"),
        ({"rl_config": "nowhere.yaml"}, "rl_config 'nowhere.yaml': no such file"),
        ({"seam_config": "nowhere.yaml"}, "seam_config 'nowhere.yaml': no such file"),
    ],
)
def test_rounds_that_cannot_be_are_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        SeamRoundsConfig(**(ANY | change))
