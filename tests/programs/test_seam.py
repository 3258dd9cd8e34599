"""`rlhf-jax seam`: scores that can be worked out on paper, whatever the batches; every
row accounted for; a stopped run goes on."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms.sft import logprobs_apply, sft_objective
from rlhf_jax.curation.seam import scores
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.layout import pack_conversations
from rlhf_jax.io import seam_report
from rlhf_jax.io.chat import ChatConfig
from rlhf_jax.programs import likelihood, models, rewards, seam, seam_checks
from rlhf_jax.programs.adversary import AttackConfig, open_adversary
from rlhf_jax.programs.likelihood import open_likelihood, open_pooling
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam import SeamConfig
from rlhf_jax.programs.writer import WriterConfig
from rlhf_jax.testbed.rows import rows as world

VOCABULARY = 512
GOLD = "rlhf_jax.testbed.gold:gold_rewards"


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


DATA = "testbed:worse?size=10&count=4"


def run(tmp_path, data=DATA, name="run", **changes):
    config = {
        "run_dir": str(tmp_path / name),
        "policy": "testbed",
        "reward": f"-1*{GOLD}",
        "data": [data],
        "estimators": ["given"],
    }
    root = seam.run(SeamConfig(**(config | changes)))
    return read(root / "seam.jsonl"), read(root / "set_aside.jsonl"), root


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run in parts of four prompts; tests read it, or copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam, "PART", 4)
        return run(tmp_path_factory.mktemp("base"))


@pytest.fixture
def uniform(monkeypatch):
    """A policy that gives every token of its vocabulary the same probability."""
    load = likelihood.models.load_policy

    def zeros(*args, **options):
        model, params, tokenizer = load(*args, **options)
        return model, jax.tree.map(np.zeros_like, params), tokenizer

    monkeypatch.setattr(likelihood.models, "load_policy", zeros)
    return open_likelihood("testbed", ScoringConfig())


def test_the_score_of_a_uniform_policy_on_paper(tmp_path, uniform):
    """Minus the gold reward misjudges every worse completion."""
    lines, _, _ = run(tmp_path)
    for line in lines:
        assert line["gold_reward"] == -1.0
        assert all(each["misjudged"] for each in line["worse"])
        for each in line["worse"]:
            expected = -each["num_tokens"] * math.log(VOCABULARY)
            assert each["logprob"] == pytest.approx(expected, rel=1e-5)
        assert line["risk"] == pytest.approx(1 / VOCABULARY, rel=1e-4)
        assert line["seam"] == pytest.approx(math.log(VOCABULARY), rel=1e-4)


def test_lines_are_the_formula_of_their_own_numbers(base):
    lines, left_out, _ = base
    assert len(lines) == 10 and not left_out
    for line in lines:
        risk = np.mean(
            [
                each["misjudged"] * math.exp(each["logprob"] / each["num_tokens"])
                for each in line["worse"]
            ]
        )
        assert line["risk"] == pytest.approx(risk, rel=1e-9)
        assert line["seam"] == pytest.approx(-math.log(risk), rel=1e-9)
    order = np.argsort([line["seam"] for line in lines])
    assert [lines[n]["rank"] for n in order] == list(range(1, 11))


def test_batch_size_and_order_of_the_prompts_change_nothing(tmp_path, base):
    turned = write(tmp_path, world("worse", size=10, count=4)[::-1])
    lines, _, _ = run(tmp_path, turned, scoring=ScoringConfig(tokens_per_batch=128))
    for a, b in zip(base[0], lines[::-1], strict=True):
        assert a["prompt"] == b["prompt"] and a["rank"] == b["rank"]
        assert a["seam"] == pytest.approx(b["seam"], abs=1e-4)
        for x, y in zip(a["worse"], b["worse"], strict=True):
            assert x["logprob"] == pytest.approx(y["logprob"], abs=1e-3)


def test_log_probabilities_are_those_of_each_text_alone(base):
    alone = open_likelihood("testbed", ScoringConfig())
    for line in base[0][:2]:
        for each in line["worse"][:2]:
            encoded = alone.encode(line["prompt"], each["text"])
            assert each["num_tokens"] == len(encoded.completion)
            found = alone.rewards([encoded])[0]
            assert each["logprob"] == pytest.approx(float(found), abs=1e-3)


def test_log_probabilities_are_those_that_training_raises(tmp_path, base):
    """Scored in rows with shared prompts on 8 devices, they are those of the rows that
    SFT packs, and make up its loss."""
    texts = [(line["prompt"], each) for line in base[0] for each in line["worse"]]
    rows = [{"prompt": p, "completion": each["text"]} for p, each in texts]
    model, params, tokenizer = models.load_policy("testbed")
    data, _ = prepare.prepare_conversations(
        [write(tmp_path, rows)], prepare.make_encoder(tokenizer)
    )
    conversations = [data[n] for n in range(len(rows))]
    packed = jax.device_put(pack_conversations(conversations, row_length=256))
    assert packed.segment.max() > 2  # several in a row
    apply = jax.jit(logprobs_apply(model, deterministic=True))
    logprobs = apply(params, packed, jax.random.key(0))
    loss, _ = sft_objective(lambda *_: logprobs)(params, packed, jax.random.key(0))
    expected = np.array([each["logprob"] for _, each in texts])
    assert float(-loss.total) == pytest.approx(expected.sum(), rel=1e-5)
    assert float(loss.weight) == sum(each["num_tokens"] for _, each in texts)
    counts = np.where(packed.completion_mask, np.asarray(logprobs), 0.0)
    found = [
        counts[row][segment == n].sum()
        for row, segment in enumerate(np.asarray(packed.segment))
        for n in range(1, segment.max() + 1)
    ]
    np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-3)


def test_a_stopped_run_goes_on_and_gives_the_same_lines(tmp_path, monkeypatch, base):
    monkeypatch.setattr(seam, "PART", 4)
    score, calls = seam.seam_scoring.score_part, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(seam.seam_scoring, "score_part", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    # Lines that were being written when the machine went away.
    path = tmp_path / "run" / "scores-given.jsonl"
    torn = json.dumps(base[0][4]) + '\n{"schema": 1, "prompt": "é'
    path.write_bytes(path.read_bytes() + torn.encode()[:-1])
    again, _, _ = run(tmp_path)
    assert again == base[0] and len(calls) == 2 + 2  # one part of three was there


def copy_run(source, target):
    shutil.copytree(source, target)
    config = (target / "config.yaml").read_text()
    (target / "config.yaml").write_text(config.replace(str(source), str(target)))


def test_a_run_that_goes_on_refuses_other_weights(tmp_path, monkeypatch, base):
    copy_run(base[2], tmp_path / "run")
    (tmp_path / "run" / "scores-given.jsonl").unlink()
    monkeypatch.setattr(seam_checks.models, "weights_identity", "newer {}".format)
    with pytest.raises(ValueError, match="begun with other weights of the policy test"):
        run(tmp_path)


def test_a_run_that_made_nothing_takes_corrected_settings(tmp_path, monkeypatch):
    """A misspelt reward, a missing key or package is said before a text is made."""
    monkeypatch.setattr(seam, "_worse", None)
    chat = WriterConfig(chat=ChatConfig("http://127.0.0.1:9/v1", "m", "NO_KEY"))
    for change, message in (
        ({"estimators": ["given", "generate"], "writer": chat}, "NO_KEY is not set"),
        ({"policy": "tiny-er"}, "'tiny-er': not found"),
        ({"reward": "runs/mistyped/"}, "'runs/mistyped/': not found"),
        ({"reward": "testbed"}, "no reward head"),
        ({"reward": "ensemble:nowhere"}, "nowhere is none"),
        ({"reward": f"{__name__}:by_lenght"}, "by_lenght"),
        ({"compare": ["x=nowhere"]}, "nowhere: cannot be read"),
        (
            {"estimators": ["generate"], "writer": WriterConfig(model="no/where/at")},
            "'no/where/at': not found",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **change)
    monkeypatch.setattr(seam_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="faiss, which searches the neighbours, is n"):
        run(tmp_path, estimators=["contrast"])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "config.yaml"}


def test_what_an_attempt_left_is_no_run_until_a_text_is_made(tmp_path, monkeypatch):
    """The endpoint was wrong: other data, and after that another writer, are taken."""
    given, small = seam.worse.given, "testbed:worse?size=2&count=1"

    def fails(*args, **options):
        raise ValueError("the endpoint is not there")

    monkeypatch.setattr(seam.worse, "given", fails)
    with pytest.raises(ValueError, match="not there"):
        run(tmp_path)
    assert (tmp_path / "run" / "prompts.jsonl").exists()
    monkeypatch.setattr(seam.worse, "given", given)
    monkeypatch.setattr(seam, "open_likelihood", fails)
    with pytest.raises(ValueError, match="not there"):
        run(tmp_path, data=small)
    assert len(read(tmp_path / "run" / "prompts.jsonl")) == 2
    with pytest.raises(ValueError, match="holds a run with another config:\n  seed"):
        run(tmp_path, data=small, seed=1)
    with pytest.raises(ValueError, match="the endpoint is not there"):
        # contrast has made nothing
        run(tmp_path, data=small, contrast=seam.ContrastConfig(count=2))
    with pytest.raises(ValueError, match="another config:\n  worse_column"):
        run(tmp_path, data=small, worse_column="other")


def test_a_finished_run_is_only_summarised_anew(tmp_path, monkeypatch, base):
    monkeypatch.setattr(seam, "open_likelihood", None)
    monkeypatch.setattr(seam_checks, "models", None)
    copy_run(base[2], tmp_path / "run")
    again, _, root = run(tmp_path, parquet=True)
    assert again == base[0]
    table = pytest.importorskip("pyarrow.parquet").read_table(root / "seam.parquet")
    assert [{k: row[k] for k in again[0]} for row in table.to_pylist()] == again
    summed, _, _ = run(tmp_path, formula=scores.SeamFormula(reduce="sum"))
    strict, left_out, _ = run(tmp_path, min_worse=5)
    assert not strict and len(left_out) == 10
    assert {line["reason"] for line in left_out} == {
        "given: fewer than 5 worse completions"
    }
    for a, b in zip(base[0], summed, strict=True):
        assert b["risk"] == pytest.approx(a["risk"] * len(a["worse"]), rel=1e-6)


def test_every_row_is_scored_or_set_aside_with_its_reason(tmp_path):
    good = world("worse", size=3, count=3)
    bare = {key: value for key, value in good[0].items() if key != "gold_completion"}
    data = [
        *good,
        good[0],  # a duplicate is a row of its own
        bare,
        {**good[1], "gold_completion": "  "},
        {**good[1], "gold_completion": "word " * 2000},
        {**good[2], "worse": []},
        {**good[2], "worse": [" ", "Answer: cat."]},
        {"prompt": None, "gold_completion": "x"},
        {**good[2], "worse": ["word " * 2000]},
        {**good[2], "worse": [good[2]["gold_completion"] + " "]},
    ]
    path = write(tmp_path, data)
    lines, left_out, root = run(
        tmp_path,
        path,
        reward=f"-1*{__name__}:by_length",
        scoring=ScoringConfig(max_length=512),
    )
    assert len(lines) + len(left_out) == len(data)
    number = {
        line["where"]: line["where"].rsplit(":", 1)[1] for line in lines + left_out
    }
    assert [number[line["where"]] for line in lines] == ["1", "2", "3", "4", "9"]
    reasons = {number[line["where"]]: line["reason"] for line in left_out}
    assert reasons == {
        "5": "no gold completion",
        "6": "no gold completion",
        "7": "given: gold completion cannot be scored",
        "8": "given: no worse completion",
        "10": "empty",
        "12": "given: no worse completion can be scored",
        "11": "given: no worse completion can be scored",
    }
    assert lines[-1]["refused"] == [{"text": " ", "source": "worse", "reason": "empty"}]
    rows = read(root / "prompts.jsonl")
    assert [n for n, row in enumerate(data) if row in rows] == [*range(9), 10, 11]
    assert all(rows[line["index"]]["prompt"] == line["prompt"] for line in lines)


def by_length(prompts, completions):
    return [float(len(text)) for text in completions]


def test_a_text_is_encoded_once_for_policy_and_reward_model(tmp_path, monkeypatch):
    encode_all, counts = Encoder.encode_all, []

    def counted(self, prompts, texts, tools):
        counts.append(len(texts))
        return encode_all(self, prompts, texts, tools)

    def opened(specs, *, scoring, timeout_s):
        """The policy for a reward model, opened anew: another Encoder like its own."""
        monkeypatch.setattr(rewards, "open_scorer", open_likelihood)
        return rewards.open_rewards(["testbed"], scoring=scoring, timeout_s=timeout_s)

    monkeypatch.setattr(Encoder, "encode_all", counted)
    monkeypatch.setattr(seam, "open_rewards", opened)
    lines, _, _ = run(tmp_path)
    assert counts == [10 * (1 + 4)]
    for each in (each for line in lines for each in line["worse"]):
        assert each["reward"] == pytest.approx(each["logprob"], abs=1e-4)


def test_texts_with_odd_line_ends_survive_and_pairs_serve_as_data(tmp_path):
    """U+2028 and U+0085 end lines for str.splitlines, not for JSON lines."""
    rows = [
        {
            "prompt": f"p{n}\u2028\x85",
            "chosen": [{"role": "assistant", "content": f"g{n}\u2028"}],
            "rejected": [{"role": "assistant", "content": "other"}],
            "worse": ["a\u2028b", "c\x85d"],
        }
        for n in range(3)
    ]
    config = {"gold_column": "chosen", "reward": f"{__name__}:by_length"}
    lines, left_out, root = run(tmp_path, write(tmp_path, rows), **config)
    assert [line["gold"] for line in lines] == ["g0\u2028", "g1\u2028", "g2\u2028"]
    assert not left_out and lines[0]["worse"][1]["text"] == "c\x85d"
    assert len(seam.read_scores(str(root / "seam.jsonl"))) == 3


def test_neighbours_are_other_prompts_and_their_gold_completions(tmp_path):
    rows = world("rl", size=30)
    rows += rows[:3]
    lines, _, _ = run(
        tmp_path,
        write(tmp_path, rows),
        estimators=["contrast"],
        reward=f"-1*{__name__}:by_length",
        contrast=seam.ContrastConfig(count=5, max_similarity=1.0),
    )
    golds = {line["prompt_id"]: line["gold"] for line in lines}
    for line in lines:
        assert 1 <= len(line["worse"]) <= 5
        for each in line["worse"]:
            assert each["source"] != line["prompt_id"]
            assert each["text"] == golds[each["source"]] != line["gold"]
    for again, line in zip(lines[30:], lines[:3], strict=True):
        for one, other in zip(again["worse"], line["worse"], strict=True):
            assert (one["source"], one["text"]) == (other["source"], other["text"])
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


@pytest.mark.slow
def test_a_sentence_transformers_model_finds_the_neighbours(tmp_path):
    sentences = pytest.importorskip(
        "sentence_transformers", reason="needs the seam extra"
    )
    import transformers
    from sentence_transformers.models import Pooling, Transformer

    rows = world("rl", size=20)
    words = {w.strip(".,:?") for row in rows for w in row["prompt"].lower().split()}
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words), *".,:?"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    bert = str(tmp_path / "bert")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(bert)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(bert)
    model = sentences.SentenceTransformer(modules=[Transformer(bert), Pooling(32)])
    model.save(str(tmp_path / "model"))
    lines, _, _ = run(
        tmp_path,
        write(tmp_path, rows),
        estimators=["contrast"],
        reward=f"{__name__}:by_length",
        contrast=seam.ContrastConfig(
            count=1, max_similarity=1.0, embedding=str(tmp_path / "model")
        ),
    )
    states = model.encode([row["prompt"] for row in rows], normalize_embeddings=True)
    similarity = states @ states.T - 2 * np.eye(len(rows))
    for line in lines:
        nearest = rows[int(similarity[line["index"]].argmax())]
        assert [each["text"] for each in line["worse"]] == [nearest["gold_completion"]]


def test_pooled_states_are_means_over_each_text_alone():
    pooling = open_pooling("testbed", ScoringConfig(tokens_per_batch=256))
    prompts = [row["prompt"] for row in world("rl", size=5)]
    texts = [*((prompt, "cat") for prompt in prompts), *((p, "dog") for p in prompts)]
    encoded = [pooling.encode(*text) for text in texts][:9]
    together = pooling.rewards_and_states(encoded, np.arange(9)).after
    for n, each in enumerate(encoded):
        alone = pooling.rewards_and_states([each], np.arange(1)).after[0]
        np.testing.assert_allclose(together[n], alone, atol=1e-5)
    assert np.linalg.norm(together - together.mean(axis=0), axis=1).min() > 0


@pytest.fixture(scope="module")
def attacker():
    scoring = ScoringConfig(untrained_head=True, max_length=80)
    return open_adversary("testbed", scoring, candidates=16)


def test_attacks_raise_the_reward_inside_their_budget_and_can_be_written(attacker):
    rows = world("rl", size=5)
    prompts = [row["prompt"] for row in rows]
    golds = [row["gold_completion"] for row in rows]
    config = AttackConfig(count=6, budget=0.5, max_edits=3, beam=2)
    encoder = attacker.scorer.encoder
    for prompt, gold, found in zip(
        prompts, golds, attacker.attack(prompts, golds, config), strict=True
    ):
        start = encoder.completion(prompt, gold)
        assert found.refusal is None and len(found.worse) == 6
        encoded = [attacker.scorer.encode(prompt, e["text"]) for e in found.worse]
        rewards = attacker.scorer.rewards(encoded)
        assert np.all(np.diff(rewards) <= 1e-5)
        base = attacker.scorer.rewards([attacker.scorer.encode(prompt, gold)])[0]
        failed = [each["source"].endswith(", failed") for each in found.worse]
        assert not failed[0] and failed == [bool(r <= base) for r in rewards]
        budget = min(3, max(1, round(0.5 * (len(start) - 1))))
        for each, one in zip(found.worse, encoded, strict=True):
            assert len(one.completion) == len(start)
            edits = sum(a != b for a, b in zip(one.completion, start))
            assert edits == int(each["source"].split()[0]) <= budget
            assert one.completion[-1] == start[-1]


def test_an_attack_on_a_text_that_is_too_long_is_refused_not_cut(attacker):
    prompt = world("rl", size=1)[0]["prompt"]
    config = AttackConfig(count=1, max_edits=1)
    long, short = attacker.attack([prompt] * 2, ["cat " * 90, "cat"], config)
    assert not long.worse and "longer than max_length 80" in long.refusal.reason
    assert len(short.worse) == 1


def test_runs_are_compared_by_prompt(tmp_path, base):
    _, _, root = run(
        tmp_path,
        reward=f"-1*{__name__}:by_length",
        compare=[f"base={base[2]}/seam.jsonl"],
    )
    summary = json.loads((root / "seam.json").read_text())
    (row,) = summary["overlaps"]
    assert (row["first"], row["second"]) == ("given", "base/given")
    assert row["prompts"] == 10 and 0 <= row["jaccard"] <= 1
    assert row["chance"] == pytest.approx(16 / 45 / 3 + 1 / 45)
    assert "beside what two random sets" in (root / "report.html").read_text()
    assert {"seam.png", "overlap.png"} <= {p.name for p in (root / "plots").iterdir()}


def test_equal_prompts_are_matched_by_row_whichever_of_them_have_a_score(tmp_path):
    """The first of two equal prompts has a score from one estimator alone."""
    (row,) = world("worse", size=1, count=3)
    data = [{**row, "worse": []}, row, {"prompt": row["prompt"]}, row]
    lines, left_out, _ = run(tmp_path, write(tmp_path, data))
    assert [line["index"] for line in lines] == [1, 3] and len(left_out) == 2
    assert [line["occurrence"] for line in lines] == [1, 3]
    one = [{"prompt_id": "p", "occurrence": n, "seam": float(n)} for n in (0, 1, 2)]
    other = [{**one[n], "estimator": "b", "seam": 7.0 * n} for n in (1, 2)]
    assert seam_report.by_prompt(other) == {("p", 1): 7.0, ("p", 2): 14.0}
    assert seam_report.by_prompt(one).keys() > seam_report.by_prompt(other).keys()


def test_a_run_of_an_earlier_version_is_compared_once_it_is_summarised_anew(tmp_path):
    old = write(tmp_path, [{"prompt": "p", "seam": 1.0, "estimator": "given"}])
    with pytest.raises(ValueError, match="have no `occurrence`.*run its command again"):
        run(tmp_path, compare=[f"old={old}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "data: expected at least one"),
        ({"estimators": []}, "estimators: expected one or more, each once"),
        ({"estimators": ["given", "given"]}, "each once"),
        ({"estimators": ["attack"]}, "reward -1.* is none"),
        ({"min_worse": 0}, "min_worse: expected at least 1, got 0"),
        ({"estimators": ["attack"], "reward": "-1*model"}, "weight above 0"),
        ({"estimators": ["attack"], "reward": "ensemble:d"}, "of one reward model"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    given = {"run_dir": "r", "policy": "p", "reward": f"-1*{GOLD}", "data": ["d"]}
    with pytest.raises(ValueError, match=message):
        SeamConfig(**(given | change))


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows has a prompt and a gold"):
        run(tmp_path, write(tmp_path, [{"prompt": "x"}]))
    with pytest.raises(ValueError, match="expected a list of completions in column"):
        run(tmp_path, "testbed:rl?size=2", name="no-worse")
    odd = write(tmp_path, [{"prompt": "p", "gold_completion": "g", "worse": "text"}])
    with pytest.raises(ValueError, match="worse: expected a list of completions, got"):
        run(tmp_path, odd, name="odd")
    with pytest.raises(ValueError, match="expected a line of a seam.jsonl"):
        seam.read_scores(write(tmp_path, [{"prompt": "x"}], "bad.jsonl"))
    with pytest.raises(ValueError, match="no prompt has a score; set_aside.jsonl"):
        seam.read_scores(write(tmp_path, [], "empty.jsonl"))
    with pytest.raises(ValueError, match=r"cannot be read"):
        seam.read_scores(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="follows the gradient of one reward model"):
        open_adversary("ensemble:somewhere", ScoringConfig(), candidates=1)


def test_other_prompts_in_the_same_directory_are_refused(tmp_path):
    for _ in range(2):
        seam._write_prompts(tmp_path, [{"prompt": "a"}])
    with pytest.raises(ValueError, match="holds scores of other prompts"):
        seam._write_prompts(tmp_path, [{"prompt": "b"}])
