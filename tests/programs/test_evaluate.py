"""`evaluate`: subsets labelled, numbers that follow from the rows written beside
them."""

import gzip
import itertools
import json
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.data.encode import Encoder
from rlhf_jax.evals import suite
from rlhf_jax.programs import evaluate, scorer
from rlhf_jax.programs.evaluate import EvaluateConfig
from rlhf_jax.programs.rewards import Rewards, Source
from rlhf_jax.programs.scorer import Refusal
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.testing import tiny_tokenizer
from tests.rows import read_at

WRITE_REPORT = evaluate.report.write_report


def lengths(sequences, score_at):
    """A stand-in for a model: reward = tokens of the scored sequence."""
    rewards = np.zeros(score_at.shape, np.float32)
    for row in range(len(score_at)):
        for slot, at in enumerate(score_at[row]):
            rewards[row, slot] = read_at(sequences, row, at).sum()
    return rewards


@pytest.fixture
def fake(monkeypatch):
    one = scorer.Scorer(
        encoder=Encoder(tiny_tokenizer()),
        score_fn=lengths,
        max_length=20_000,
        tokens_per_batch=4096,
        rows_multiple_of=1,
        mesh=make_mesh(MeshConfig(), devices=jax.devices()[:1]),
    )
    monkeypatch.setattr(evaluate, "open_scorer", lambda *args, **kwargs: one)
    monkeypatch.setattr(evaluate.report, "write_report", lambda out: out)
    return one


@pytest.fixture
def with_report(monkeypatch, fake):
    """`fake`, but the report is drawn, which takes a while."""
    monkeypatch.setattr(evaluate.report, "write_report", WRITE_REPORT)
    return fake


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(n=40):
    return [
        {
            "prompt": f"Sort {i // 2} 1.",
            "chosen": "1 2 3 4"[: 1 + 2 * (i % 4)],
            "rejected": "1 2",
        }
        for i in range(n)
    ]


def quads(n=10):
    texts = ("1", "1 2", "1 2 3", "1 2 3 4")
    return [
        {
            "prompt": f"Sort {i}.",
            "responses": [{"text": t, "score": s} for s, t in enumerate(texts)],
        }
        for i in range(n)
    ]


def run(tmp_path, **changes):
    return evaluate.run(
        EvaluateConfig(
            **{"model": "m", "out": str(tmp_path / "out"), "bootstrap_samples": 50}
            | changes
        )
    )


def test_numbers_follow_from_the_rows_written_beside_them(tmp_path, fake):
    spec = write(tmp_path / "p.jsonl", pairs())
    found = run(tmp_path, eval_data=[f"val={spec}"])["sets"][0]
    rows = read(tmp_path / "out" / "scores" / "val.jsonl")
    chosen = np.array([row["chosen_reward"] for row in rows])
    rejected = np.array([row["rejected_reward"] for row in rows])
    again = suite.evaluate_pairs(chosen, rejected, rows, samples=50)
    assert found["metrics"] == pytest.approx(again)
    assert found["interval"] == "95 % bootstrap over prompts"
    assert not found["subset"]
    # "1" loses, "1 2" ties, the longer ones win.
    assert found["metrics"]["accuracy"] == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found["metrics"]["ties"] == 10
    assert found["metrics"]["longer_is_chosen"] == found["metrics"]["accuracy"]


def test_a_subset_is_seeded_and_labelled_with_n(tmp_path, fake, capsys):
    spec = write(tmp_path / "p.jsonl", pairs())
    first = run(tmp_path, eval_data=[f"val={spec}"], limit=12, seed=3)
    rows = read(tmp_path / "out" / "scores" / "val.jsonl")
    again = run(tmp_path, eval_data=[f"val={spec}"], limit=12, seed=3)
    assert first == again
    assert first["sets"][0]["subset"]
    assert (first["sets"][0]["n"], first["sets"][0]["available"]) == (12, 40)
    assert "a seeded subset, 12 of 40 rows (seed 3)" in capsys.readouterr().out
    assert [rows.index(row) for row in rows] == list(range(12))
    other = run(tmp_path, eval_data=[f"val={spec}"], limit=12, seed=4)
    assert read(tmp_path / "out" / "scores" / "val.jsonl") != rows
    assert other["sets"][0]["n"] == 12


def test_kwise_rows_get_tau_and_the_length_baseline(tmp_path, fake):
    spec = write(tmp_path / "q.jsonl", quads())
    found = run(tmp_path, eval_data=[f"quads={spec}"])["sets"][0]
    assert found["kind"] == "kwise"
    assert found["metrics"]["kendall_tau"] == pytest.approx(1.0)
    assert found["metrics"]["kendall_tau_of_length"] == pytest.approx(1.0)
    assert found["metrics"]["n_pairs"] == 60


def test_every_file_is_written_and_json_is_strict(tmp_path, with_report):
    spec = write(tmp_path / "p.jsonl", pairs())
    run(tmp_path, eval_data=[f"val={spec}"])

    def refuse(name):
        raise AssertionError(name)

    out = tmp_path / "out"
    text = (out / "evaluate.json").read_text()
    assert json.loads(text, parse_constant=refuse)["schema"] == 1
    assert (out / "report.html").exists()
    assert (out / "plots" / "accuracy.png").exists()
    assert all(row["schema"] == 1 for row in read(out / "scores" / "val.jsonl"))
    assert read(out / "set_aside.jsonl") == []


def test_rows_set_aside_are_counted_in_the_result_and_written(tmp_path, fake, capsys):
    rows = [*pairs(4), {"prompt": "p", "chosen": "", "rejected": "1"}, {"x": 1}]
    spec = write(tmp_path / "p.jsonl", rows)
    found = run(tmp_path, eval_data=[f"val={spec}"])["sets"][0]
    assert found["n"] == 4
    assert found["set_aside"] == {"empty": 1, "malformed": 1}
    aside = read(tmp_path / "out" / "set_aside.jsonl")
    assert [line["where"] for line in aside] == [f"{spec}:5", f"{spec}:6"]
    assert "val: 1 rows set aside: empty" in capsys.readouterr().out


def rmbench_items(domains):
    return [
        {
            "id": n,
            "prompt": f"Sort {n}.",
            "domain": domain,
            "chosen": ["1", "1 2", "1 2 3"],
            "rejected": json.dumps(["2", "2 2", "2 2 2"]),
        }
        for n, domain in enumerate(domains)
    ]


def test_rmbench_of_a_length_model_is_easy_right_and_hard_wrong(tmp_path, fake):
    items = rmbench_items(["chat", "safety-refuse", "safety-response"])
    (tmp_path / "rm.json").write_text(json.dumps(items))
    found = run(tmp_path, rmbench=str(tmp_path / "rm.json"))["rmbench"]
    overall = found["table"]["overall"]
    assert (overall["hard"], overall["normal"], overall["easy"]) == (0, 0, 1)
    assert found["table"]["missing"] == ["math", "code"]
    assert found["n"] == 3
    rows = read(tmp_path / "out" / "scores" / "rmbench.jsonl")
    assert len(rows[0]["chosen_rewards"]) == len(rows[0]["rejected_rewards"]) == 3


def test_rewardbench_uses_subset_or_source(tmp_path, fake):
    rows = [
        {"prompt": "p", "chosen": "1 2", "rejected": "1", "source": "llmbar-natural"},
        {"prompt": "p", "chosen": "1", "rejected": "1 2", "subset": "mine"},
    ]
    spec = write(tmp_path / "rb.jsonl", rows)
    table = run(tmp_path, rewardbench=spec)["rewardbench"]["table"]
    assert table["sections"]["Chat-Hard"]["accuracy"] == 1.0
    assert table["unmapped"] == ["mine"]


def test_a_set_of_two_kinds_is_an_error(tmp_path, fake):
    spec = write(tmp_path / "x.jsonl", [*pairs(2), *quads(2)])
    with pytest.raises(ValueError, match="val: the rows are pairs and kwise"):
        run(tmp_path, eval_data=[f"val={spec}"])


def test_a_set_without_a_usable_row_says_why(tmp_path, fake):
    spec = write(tmp_path / "x.jsonl", [{"prompt": "p", "chosen": "a"}])
    with pytest.raises(
        ValueError, match=r"val: none of 1 rows .*x.jsonl:1: .*rejected"
    ):
        run(tmp_path, eval_data=[f"val={spec}"])


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        EvaluateConfig(model="m", out="o")


def test_the_names_of_the_benchmarks_are_taken(tmp_path, fake):
    spec = write(tmp_path / "p.jsonl", pairs(4))
    with pytest.raises(ValueError, match="names rmbench and rewardbench"):
        run(tmp_path, eval_data=[f"rewardbench={spec}"], rewardbench=spec)


def test_a_random_head_is_said_in_the_notes(tmp_path, with_report, capsys):
    object.__setattr__(with_report, "random_head", True)
    spec = write(tmp_path / "p.jsonl", pairs(4))
    run(tmp_path, eval_data=[f"val={spec}"])
    assert "no trained reward head" in capsys.readouterr().out
    assert "no trained reward head" in (tmp_path / "out" / "report.html").read_text()


def contrasts(n=6):
    """A reward that is length prefers the query's longer response, whatever I is."""
    return [
        {
            "query": f"Sort {i}.",
            "retrieval": f"Sort {i} 1 2.",
            "query_response_k": "1 2 3",
            "query_response_j": "1",
            "retrieval_response_k": "1",
            "retrieval_response_j": "2",
        }
        for i in range(n)
    ]


def test_contrast_instructions_of_a_length_model(tmp_path, with_report, capsys):
    (tmp_path / "c.json").write_text(json.dumps([*contrasts(), {"query": "x"}]))
    found = run(
        tmp_path,
        contrast_instructions=[f"sorts={tmp_path / 'c.json'}"],
        contrast_prefix=["sorts=Do: "],
    )["contrast_instructions"][0]
    assert (found["name"], found["prefix"], found["n"]) == ("sorts", "Do: ", 6)
    assert found["set_aside"] == {"malformed": 1}
    query, retrieval = found["table"]["query"], found["table"]["retrieval"]
    assert query["response"]["value"] == 1.0
    assert query["instruction"]["value"] == 0.0
    assert retrieval["response"]["value"] == 0.0
    assert retrieval["instruction"]["value"] == 1.0
    row = read(tmp_path / "out" / "scores" / "sorts.jsonl")[0]
    assert row["query_own_reward"] > row["query_other_reward"]
    assert row["retrieval_own_reward"] < row["retrieval_other_reward"]
    assert row["retrieval_other_reward"] > row["query_own_reward"]
    assert "Contrast Instructions" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Contrast Instructions" in page
    assert "sorts: 1 rows set aside: malformed" in page


def test_the_prefix_reaches_the_model(tmp_path, fake):
    (tmp_path / "c.json").write_text(json.dumps(contrasts(1)))
    spec = [f"c={tmp_path / 'c.json'}"]
    scores = []
    for prefix in ([], ["c=Sort 1 1 1. "]):
        run(tmp_path, contrast_instructions=spec, contrast_prefix=prefix)
        row = read(tmp_path / "out" / "scores" / "c.jsonl")[0]
        scores.append(row["query_own_reward"])
    assert scores[1] > scores[0]


def test_names_and_prefixes_of_contrast_sets_are_checked(tmp_path, fake):
    spec = write(tmp_path / "p.jsonl", pairs(4))
    with pytest.raises(ValueError, match="the name 'a' is a set of --eval_data"):
        run(tmp_path, eval_data=[f"a={spec}"], contrast_instructions=[f"a={spec}"])
    with pytest.raises(ValueError, match=r"--contrast_prefix 'b': expected .*\['a'\]"):
        run(tmp_path, contrast_instructions=[f"a={spec}"], contrast_prefix=["b=x"])


def test_states_are_refused_where_there_are_only_rewards(tmp_path, fake):
    spec = write(tmp_path / "p.jsonl", pairs(4))
    with pytest.raises(ValueError, match="states: this scorer gives rewards alone"):
        run(tmp_path, eval_data=[f"val={spec}"], states=True)


def longest(prompts, completions):
    """A gold reward: shorter is better."""
    return [-float(len(text)) for text in completions]


def test_gold_scores_sampled_completions_and_their_own_scores_are_not_read(
    tmp_path, fake
):
    samples = [{"prompt": "Sort 2 1.", "responses": ["1", "1 2 3"]}] * 3
    samples.append(
        {"prompt": "Sort 3.", "responses": [{"text": "1", "score": "bad"}] * 2}
    )
    spec = write(tmp_path / "samples.jsonl", samples)
    gold = f"{__name__}:longest"
    found = run(tmp_path, eval_data=[f"policy={spec}"], gold=gold)["sets"][0]
    # The model prefers longer texts, the gold reward shorter ones; equal texts have no
    # order.
    assert found["metrics"]["mismatch_rate"] == 1.0
    assert found["metrics"]["gold_tied"] == 1 and found["set_aside"] == {}
    rows = read(tmp_path / "out" / "scores" / "policy.jsonl")
    assert rows[0]["gold_rewards"] == [-1.0, -5.0] and len(rows) == 4


def test_mismatch_is_what_accuracy_leaves(tmp_path, fake):
    spec = write(tmp_path / "quads.jsonl", quads())
    metrics = run(tmp_path, eval_data=[f"quads={spec}"])["sets"][0]["metrics"]
    assert metrics["mismatch_rate"] == 1.0 - metrics["accuracy"] == 0.0


def test_pairs_are_judged_by_gold_too_whatever_their_label(tmp_path, fake):
    rows = [
        {"prompt": "p", "chosen": "1 2 3", "rejected": "1"},
        {"prompt": "q", "chosen": "1", "rejected": "1 2 3"},
        {"prompt": "r", "chosen": "1", "rejected": "1"},
    ]
    spec = write(tmp_path / "pairs.jsonl", rows)
    gold = f"{__name__}:longest"
    found = run(tmp_path, eval_data=[f"val={spec}"], gold=gold)["sets"][0]
    assert found["kind"] == "kwise" and found["metrics"]["n_pairs"] == 2
    assert found["metrics"]["mismatch_rate"] == 1.0


def test_a_text_that_gold_cannot_take_is_set_aside(tmp_path, fake, monkeypatch):
    gold = Rewards(
        (
            Source(
                "short",
                "m",
                "model",
                1.0,
                lambda texts: np.zeros(len(texts.completions)),
                lambda texts: [
                    Refusal("longer", text) if len(text) > 4 else None
                    for text in texts.completions
                ],
            ),
        )
    )
    monkeypatch.setattr(evaluate, "open_rewards", lambda *args, **kwargs: gold)
    spec = write(
        tmp_path / "q.jsonl", quads(2) + [{"prompt": "p", "responses": ["1", "2"]}]
    )
    found = run(tmp_path, eval_data=[f"q={spec}"], gold="m")["sets"][0]
    assert found["n"] == 1 and found["set_aside"] == {"gold: longer": 2}


def test_gold_without_eval_data_is_an_error():
    with pytest.raises(ValueError, match="gold: measured on eval_data"):
        EvaluateConfig(model="m", out="o", rmbench="r.json", gold="a:b")


def test_a_row_that_has_gold_rewards_already_is_set_aside(tmp_path, fake):
    rows = quads(3)
    rows[1]["gold_rewards"] = [0.0]
    spec = write(tmp_path / "quads.jsonl", rows)
    found = run(tmp_path, eval_data=[f"q={spec}"], gold=f"{__name__}:longest")
    assert found["sets"][0]["n"] == 2
    assert found["sets"][0]["set_aside"] == {"malformed": 1}


def test_states_without_eval_data_are_an_error():
    with pytest.raises(ValueError, match="states: measured on eval_data"):
        EvaluateConfig(model="m", out="o", rmbench="r.json", states=True)


def figures_alone(one, rows):
    """(before, after) of every pair's texts, each scored in a call of its own."""
    states: list = [[], []]
    for row in rows:
        for text in (row["chosen"], row["rejected"]):
            encoded = one.encode(row["prompt"], text)
            found = one.rewards_and_states([encoded], np.arange(1))
            states[0].append(found.before[0])
            states[1].append(found.after[0])
    return np.array(states[0], np.float64), np.array(states[1], np.float64)


def test_states_of_a_tiny_model_flow_into_every_output(tmp_path, capsys, monkeypatch):
    options = scorer.ScoringConfig(untrained_head=True, tokens_per_batch=512)
    rows = pairs(10)
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", quads(3))
    common = {"model": "tiny", "scoring": options, "bootstrap_samples": 20}
    specs = [f"val={a}", f"quads={b}"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.report, "write_report", lambda out: out)
        plain = run(tmp_path, eval_data=specs, **common)
    found = run(tmp_path, eval_data=specs, states=True, **common)
    assert "states" not in plain
    assert "state_norm_mean" not in plain["sets"][0]["metrics"]
    # The rewards are those of a run without states.
    first, second = (entry["metrics"] for entry in found["sets"])
    for key, value in plain["sets"][0]["metrics"].items():
        assert first[key] == pytest.approx(value, abs=1e-4), key
    one = scorer.open_scorer("tiny", options)
    before, after = figures_alone(one, rows)
    assert first["states_n"] == 20
    for key, states in (("state_norm_before", before), ("state_norm", after)):
        norms = np.sqrt((states**2).sum(1))
        assert first[f"{key}_mean"] == pytest.approx(norms.mean(), rel=1e-4)
        assert first[f"{key}_p99"] == pytest.approx(np.quantile(norms, 0.99), rel=1e-4)
    apart = np.sqrt(((after[0::2] - after[1::2]) ** 2).sum(1))
    assert first["difference_norm_mean"] == pytest.approx(apart.mean(), rel=1e-3)
    s = np.linalg.svd(after, compute_uv=False)
    p = s[s > 1e-6 * s[0]] / s.sum()
    rank = np.exp(-(p * np.log(p)).sum())
    assert first["effective_rank"] == pytest.approx(rank, rel=1e-3)
    assert second["states_n"] == 12
    # Of K-wise rows: over the pairs that the gold scores order, here as the texts come.
    spread = []
    for row in quads(3):
        texts = [response["text"] for response in row["responses"]]
        halves = [
            {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
            for chosen, rejected in zip(texts[0::2], texts[1::2], strict=True)
        ]
        inside = itertools.combinations(figures_alone(one, halves)[1], 2)
        spread += [np.linalg.norm(worse - better) for worse, better in inside]
    assert second["n_pairs"] == len(spread)
    assert second["difference_norm_mean"] == pytest.approx(np.mean(spread), rel=1e-3)
    means = [first["state_norm_before_mean"], second["state_norm_before_mean"]]
    summary = found["states"]
    assert summary["norm_dispersion_before"] == pytest.approx(np.std(means))
    assert summary["head_norm"] == one.head_norm
    assert "Norm of the head" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Hidden states" in page
    assert (tmp_path / "out" / "plots" / "state_norms.png").exists()


@pytest.fixture
def data_dir():
    folder = os.environ.get("RLHF_JAX_TEST_DATA")
    if not folder:
        pytest.skip("RLHF_JAX_TEST_DATA is not set")
    return pathlib.Path(folder) / "data"


@pytest.mark.slow
def test_the_real_benchmark_files_are_read_whole(tmp_path, fake, data_dir):
    found = run(
        tmp_path,
        rmbench=str(data_dir / "rmbench.json"),
        rewardbench=str(data_dir / "rewardbench_like.jsonl.gz"),
    )
    rm = found["rmbench"]
    assert rm["n"] == rm["available"] == 395
    counts = {name: f["n"] for name, f in rm["table"]["domains"].items()}
    assert counts["safety"] == 142 + 79
    # A reward that is length prefers the elaborate style.
    assert rm["table"]["overall"]["easy"] > 0.8 > 0.3 > rm["table"]["overall"]["hard"]
    with gzip.open(data_dir / "rewardbench_like.jsonl.gz", "rt") as file:
        names = [json.loads(line)["source"] for line in file]
    subsets = found["rewardbench"]["table"]["subsets"]
    assert {n: s["n"] for n, s in subsets.items()} == {
        n: names.count(n) for n in set(names)
    }
    assert math.isclose(
        sum(s["n"] for s in subsets.values()), found["rewardbench"]["n"]
    )
