"""`attributes`: from rated completions and pairs to weights, a gate and a card."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.__main__ import main
from rlhf_jax.algorithms.gate import GateConfig
from rlhf_jax.data.encode import Encoder
from rlhf_jax.programs import attribute_model, attribute_rows, attributes, scorer
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.testing import tiny_tokenizer
from tests.rows import read_at
from tests.states import slow_states

WORDS = ["sort", "the", "words", "by", "length", "and", "count", "each", "once"]
SHORT = ["--gate.width", "16", "--gate.layers", "1", "--gate.steps", "20"]


def text(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def rated_rows(count, seed=0):
    """Completions rated by their number of words, and by one word in them."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        completion = text(rng, 1, 12)
        found = {"words": len(completion.split()), "sorts": "sort" in completion}
        values = {"words": found["words"], "sorts": float(found["sorts"])}
        if n % 4 == 0:
            values["sorts"] = None
        if n % 5 == 0:
            del values["words"]
        prompt = f"{text(rng, 2, 6)} {n // 2}"
        rows.append({"prompt": prompt, "completion": completion, "attributes": values})
    return rows


def pair_rows(count, seed=1):
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"{text(rng, 2, 6)} {n}",
            "chosen": f"sort {text(rng, 1, 10)}",
            "rejected": text(rng, 1, 10),
        }
        for n in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(out, rated rows, pairs) of one run of the command on a random tiny model."""
    root = tmp_path_factory.mktemp("attributes")
    rated, pairs = rated_rows(120), pair_rows(80)
    main([
        "attributes", "--model", "tiny", "--out", str(root / "out"),
        "--data", write(root / "rated.jsonl", rated),
        "--pairs", write(root / "pairs.jsonl", pairs),
        "--verbosity", "words", "--held_out", "0.3", "--max_correlation", "0.1",
        "--seed", "3", *SHORT,
    ])  # fmt: skip
    return root / "out", rated, pairs


def card_of(out):
    return json.loads((out / "attributes.json").read_text())


def test_regressions_solve_the_ridge_problem_of_the_states(done):
    out, rated, _ = done
    encoder = Encoder(tiny_tokenizer())
    encoded = [encoder.encode(row["prompt"], row["completion"]) for row in rated]
    states = slow_states([[*e.prompt, *e.completion] for e in encoded])
    prompts = [json.dumps(row["prompt"]) for row in rated]
    items = [attribute_rows.Item(p, (), {}) for p in prompts]
    held = attribute_rows.held_out(items, 0.3, 3)
    model, card = attribute_model.load(out), card_of(out)
    assert model.names == ("sorts", "words")
    for k, name in enumerate(model.names):
        given = [row["attributes"].get(name) for row in rated]
        values = np.array([np.nan if v is None else v for v in given], float)
        has = ~np.isnan(values)
        x, y = states[has & ~held], values[has & ~held]
        entry = card["attributes"][k]
        assert entry["name"] == name
        assert (entry["rows"], entry["held_out_rows"]) == (len(y), (has & held).sum())
        # At the solution the gradient is 0: X'(Xw - y) + alpha w.
        weights = model.weights[k]
        slope = x.T @ (x @ weights - y) + entry["alpha"] * weights
        assert np.abs(slope).max() < 1e-3 * np.abs(x.T @ y).max()
        error = states[has & held] @ weights - values[has & held]
        assert entry["mse"] == pytest.approx(np.mean(error**2), rel=1e-3)
        variance = values[has & held].var()
        assert entry["r2"] == pytest.approx(1 - np.mean(error**2) / variance, abs=1e-3)


@pytest.mark.slow
def test_what_was_saved_scores_pairs_as_the_card_says(done):
    out, _, pairs = done
    encoder = Encoder(tiny_tokenizer())
    model, card = attribute_model.load(out), card_of(out)
    sides = {}
    for side in ("chosen", "rejected"):
        encoded = [encoder.encode(row["prompt"], row[side]) for row in pairs]
        # The state of a prompt is read at its last token, before any completion.
        prompts = slow_states([e.prompt for e in encoded])
        completions = slow_states([[*e.prompt, *e.completion] for e in encoded])
        sides[side] = attribute_model.score(model, prompts, completions)
    items = [attribute_rows.Item(json.dumps(row["prompt"]), (), {}) for row in pairs]
    held = attribute_rows.held_out(items, 0.3, 3)
    won = (sides["chosen"] > sides["rejected"])[held]
    assert card["gate"]["held_out_pairs"] == held.sum()
    assert card["gate"]["pairs"] == (~held).sum()
    assert card["gate"]["accuracy"] == pytest.approx(won.mean(), abs=1e-6)
    gap = (sides["chosen"] - sides["rejected"])[held]
    loss = np.log1p(np.exp(-np.float64(gap))).mean()
    assert card["gate"]["loss"] == pytest.approx(loss, rel=1e-3)


def test_the_card_says_what_was_taken_out(done):
    out, *_ = done
    model, card = attribute_model.load(out), card_of(out)
    sorts, words = card["attributes"]
    assert abs(sorts["spearman_after"]) <= 0.1
    assert abs(sorts["spearman_after"]) <= abs(sorts["spearman_before"])
    assert sorts["lambda"] == model.penalties[0]
    assert words["lambda"] == 1 and model.verbosity == 1
    assert model.config == GateConfig(width=16, layers=1, steps=20)
    assert sum(card["gate"]["mean_weights"].values()) == pytest.approx(1, rel=1e-5)
    assert (out / "set_aside.jsonl").read_text() == ""


def test_an_output_that_is_there_is_not_replaced(done, capsys):
    out, *_ = done
    with pytest.raises(SystemExit) as left:
        main(["attributes", "--model", "tiny", "--out", str(out),
              "--data", "rated.jsonl", "--pairs", "pairs.jsonl"])  # fmt: skip
    assert left.value.code == 2
    assert "set --overwrite true" in capsys.readouterr().err


# Without a model: states that are known numbers.


def known_states(sequences, score_at):
    """After the norm: [1, number of tokens, share of tokens that are even]."""
    after = np.zeros((*score_at.shape, 3), np.float32)
    for row in range(len(score_at)):
        for slot, at in enumerate(score_at[row]):
            mine = sequences.tokens[row][read_at(sequences, row, at)]
            after[row, slot] = [1, len(mine) / 10, np.mean(mine % 2 == 0)]
    return after[..., 0], after, after


@pytest.fixture
def fake(monkeypatch):
    """The program on `known_states`, with texts of 80 tokens at most."""
    one = scorer.Scorer(
        encoder=Encoder(tiny_tokenizer()),
        score_fn=lambda *args: known_states(*args)[0],
        max_length=80,
        tokens_per_batch=256,
        rows_multiple_of=1,
        mesh=make_mesh(MeshConfig(), devices=jax.devices()[:1]),
        states_fn=known_states,
    )
    monkeypatch.setattr(attributes, "open_scorer", lambda *args, **kwargs: one)
    return one


def config(tmp_path, rated, pairs, /, **changes):
    fields = {
        "model": "fake",
        "out": str(tmp_path / "out"),
        "data": [write(tmp_path / "rated.jsonl", rated)],
        "pairs": [write(tmp_path / "pairs.jsonl", pairs)],
        "held_out": 0.3,
        "gate": GateConfig(width=8, layers=1, steps=5, batch_size=16),
    }
    return attributes.AttributesConfig(**{**fields, **changes})


def test_an_attribute_that_is_linear_in_the_states_is_found(fake, tmp_path):
    rated = rated_rows(60)
    for row in rated:
        encoded = fake.encode(row["prompt"], row["completion"])
        tokens = len(encoded.prompt) + len(encoded.completion)
        row["attributes"] = {"tokens": tokens}
    card = attributes.run(config(tmp_path, rated, pair_rows(30)))
    model = attribute_model.load(tmp_path / "out")
    np.testing.assert_allclose(model.weights, [[0, 10, 0]], atol=1e-3)
    assert card["attributes"][0]["r2"] == pytest.approx(1)
    assert card["attributes"][0]["lambda"] == 0  # no verbosity was named
    assert card["attributes"][0]["spearman_after"] is None


def test_rows_that_cannot_be_used_are_set_aside_with_their_reason(fake, tmp_path):
    rated, pairs = rated_rows(60), pair_rows(30)
    rated += [{**rated[0], "completion": "sort " * 80}, {**rated[0], "completion": " "}]
    pairs += [{**pairs[0], "rejected": pairs[0]["chosen"]}]
    pairs += [{**pairs[0], "rejected": "sort " * 80}]
    card = attributes.run(config(tmp_path, rated, pairs))
    expected = {"longer than max_length 80": 2, "empty": 1, "identical": 1}
    assert card["set_aside"] == expected
    lines = (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()
    places = [json.loads(line)["where"] for line in lines]
    assert [place.rsplit("/")[-1] for place in places] == [
        "rated.jsonl:61", "rated.jsonl:62", "pairs.jsonl:31", "pairs.jsonl:32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"a": "4"}, r"rated.jsonl:61: attributes.a: .* number or null, got '4'"),
        ({"a": True}, "rated.jsonl:61: attributes.a: .* got True"),
        ({"a": float("nan")}, "rated.jsonl:61: "),
        ({}, "rated.jsonl:61: attributes: expected an object"),
        (None, "rated.jsonl:61: attributes: expected an object .* got null"),
        ([1.0], r"rated.jsonl:61: attributes: expected an object .* got \[1.0\]"),
    ],
)
def test_a_malformed_rating_names_file_and_line(fake, tmp_path, values, match):
    rated = rated_rows(60)
    rated.append({**rated[0], "attributes": values})
    with pytest.raises(ValueError, match=match):
        attributes.run(config(tmp_path, rated, pair_rows(30)))


def test_what_cannot_work_is_refused_with_the_way_out(fake, tmp_path):
    rated, pairs = rated_rows(60), pair_rows(30)

    def refused(match, *rows, **changes):
        with pytest.raises(ValueError, match=match):
            attributes.run(config(tmp_path, *rows, **changes))

    refused("verbosity 'length': .* one of sorts, words", rated, pairs,
            verbosity="length")  # fmt: skip
    refused("data: [04] of 4 rows are held out", rated[1:2] * 4, pairs)
    refused("rated.jsonl:1: expected prompt, completion and", pairs, pairs)
    refused("pairs.jsonl:1: expected prompt, chosen and rejected", rated, rated)
    refused("without a weight", rated, pairs,
            data=[f"0.5*{tmp_path / 'rated.jsonl'}"])  # fmt: skip
    blank = [{**row, "attributes": {"a": None}} for row in rated]
    refused("attributes: no row has a value", blank, pairs)
    refused("attribute 'sorts': no lambda brings its Spearman", [
        {**row, "attributes": {**row["attributes"], "words": 1}} for row in rated
    ], pairs, verbosity="words", max_correlation=1e-9)  # fmt: skip
    refused("held_out: expected a number between 0 and 1, got 1", rated, pairs,
            held_out=1)  # fmt: skip
    refused("pairs: expected at least one --pairs SPEC", rated, pairs, pairs=[])


def test_a_prompt_is_held_out_in_every_set_or_in_none():
    prompts = [json.dumps(f"p{n}") for n in range(2000)]
    items = [attribute_rows.Item(prompt, (), {}) for prompt in prompts]
    held = attribute_rows.held_out(items, 0.2, 0)
    order = np.random.default_rng(0).permutation(2000)
    again = attribute_rows.held_out([items[n] for n in order], 0.2, 0)
    np.testing.assert_array_equal(again, held[order])
    assert 0.17 < held.mean() < 0.23
    assert (attribute_rows.held_out(items, 0.2, 1) != held).any()
    wider = attribute_rows.held_out(items, 0.4, 0)
    assert (wider | ~held).all()  # a larger share holds the smaller one
