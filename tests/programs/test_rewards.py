"""Reward sources: every source gives one finite number a completion, or an error that
names it."""

import functools
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from rlhf_jax import testbed
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs import rewards
from rlhf_jax.programs.rewards import parse_spec
from rlhf_jax.programs.scorer import Scorer, ScoringConfig
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.testing import tiny_tokenizer
from tests.rows import read_at

PROMPTS = ["Sort 3 1.", "Sort 2 1."]
COMPLETIONS = ["1 3", "1 2 2"]
ROWS = [{"answer": "1 3", "prompt": "Sort 3 1."}, {"answer": "1 2", "prompt": "Sort."}]

open_rewards = functools.partial(rewards.open_rewards, timeout_s=20)

MODULE = """
    import time
    import numpy as np

    CALLS = []

    def exact(prompt, completion, answer):
        return completion == answer

    def length(completions):
        CALLS.append(len(completions))
        return [len(text) for text in completions]

    def everything(prompt, completion, **columns):
        return len(columns)

    def all_columns(completions, **columns):
        CALLS.append(columns)
        return np.zeros(len(completions), np.float32)

    def optional(completion, missing=7):
        return missing

    def optional_batched(completions, bonus=None):
        return [0.0 if bonus is None else 1.0] * len(completions)

    def messages(prompt, completion):
        return len(prompt)

    def raises(prompt, completion):
        raise KeyError("no such thing")

    def leaves(completion):
        raise SystemExit(3)

    def hangs(completion):
        time.sleep(600)

    def answers(completions, say):
        return say[0]

    def answer(completion, say):
        return say

    def positional(completion, /):
        return 0

    def neither(text):
        return 0

    def mixed(prompt, completions):
        return []

    async def asynchronous(completion):
        return 0
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module `mine` with reward functions."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import mine as module  # pyright: ignore[reportMissingImports]

    yield module
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def score(*specs, prompts=PROMPTS, completions=COMPLETIONS, rows=ROWS, **options):
    return open_rewards(list(specs), **options)(prompts, completions, rows)


# What comes out.


def test_sources_are_summed_with_their_weights(mine):
    result = score("mine:exact", "-0.5*mine:length")
    np.testing.assert_array_equal(result.columns["exact"], [1.0, 0.0])
    np.testing.assert_array_equal(result.columns["length"], [3.0, 5.0])
    np.testing.assert_array_equal(result.total, [-0.5, -2.5])
    assert result.total.dtype == np.float64


def test_a_weight_of_zero_is_logged_and_not_counted(mine):
    result = score("mine:exact", "0*mine:length")
    np.testing.assert_array_equal(result.total, [1.0, 0.0])
    assert "length" in result.columns


def test_batched_functions_are_called_once_with_all_completions(mine):
    score("mine:length")
    assert mine.CALLS == [2]


def test_columns_reach_functions_by_name(mine):
    rows = [{"answer": "1 3", "b": 1}, {"answer": "1 2", "b": 2}]
    result = score("mine:everything", "mine:all_columns", rows=rows)
    np.testing.assert_array_equal(result.columns["everything"], [2, 2])
    assert mine.CALLS == [
        {"prompts": PROMPTS, "answer": ["1 3", "1 2"], "b": [1, 2]},
    ]


def test_a_parameter_with_a_default_is_optional(mine):
    assert score("mine:optional").total.tolist() == [7, 7]
    rows = [{"missing": 1}, {}]
    assert score("mine:optional", rows=rows).total.tolist() == [1, 7]
    assert score("mine:optional_batched").total.tolist() == [0, 0]
    rows = [{"bonus": 1}, {"bonus": 2}]
    assert score("mine:optional_batched", rows=rows).total.tolist() == [1, 1]
    with pytest.raises(ValueError, match="it takes 'bonus', which row 1 has no"):
        score("mine:optional_batched", rows=[{"bonus": 1}, {"x": 0}])


def test_prompts_reach_functions_as_the_row_holds_them(mine):
    conversation = [{"role": "user", "content": "a"}] * 3
    assert score("mine:messages", prompts=["four", conversation]).total.tolist() == [
        4,
        3,
    ]


def test_gold_reward_is_the_same_class_with_one_source():
    gold = open_rewards(["rlhf_jax.testbed:gold_rewards"])
    prompts = [row["prompt"] for row in testbed.rows("rl", size=4)]
    texts = ["Answer: cat.", "no idea", "Answer: 3.", ""]
    found = gold(prompts, texts, [{}] * 4)
    assert found.total.tolist() == testbed.gold_rewards(prompts, texts)
    assert gold.models == []


def test_no_completions_are_no_rewards_and_no_calls(mine):
    result = score("mine:length", prompts=[], completions=[], rows=[])
    assert result.total.shape == result.columns["length"].shape == (0,)
    assert mine.CALLS == []


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1.0), (np.float32(0.5), 0.5), (np.array(2), 2.0), (np.bool_(1), 1.0)],
)
def test_what_counts_as_a_number(mine, value, number):
    rows = [{"say": value}] * 2
    assert score("mine:answer", rows=rows).total.tolist() == [number] * 2


@pytest.mark.parametrize("make", [list, tuple, np.array, jax.numpy.array])
def test_what_counts_as_a_sequence(mine, make):
    rows = [{"say": make([0.5, 1.5])}] * 2
    assert score("mine:answers", rows=rows).total.tolist() == [0.5, 1.5]


# Errors of functions.


@pytest.mark.parametrize(
    ("say", "match"),
    [
        (None, "mine:answers: expected a sequence of 2 numbers, got nothing"),
        (0.5, "expected a sequence of 2 numbers, got float 0.5"),
        ([0.5], "expected 2 numbers, one for each completion, got 1"),
        ([0.5, None], "expected a number, got nothing for completion 1 .*1 2 2"),
        ([0.5, "1"], "expected a number, got str '1' for completion 1"),
        ([0.5, float("nan")], "1 of 2 rewards are not finite, the first is nan for"),
        ([float("inf"), 0.0], "1 of 2 rewards .* inf for completion 0 .*1 3"),
        ({"rewards": [1, 2]}, "expected a sequence of 2 numbers, got dict"),
    ],
)
def test_a_wrong_answer_of_a_function_names_it(mine, say, match):
    with pytest.raises(ValueError, match=match) as caught:
        score("mine:answers", rows=[{"say": say}] * 2)
    assert "reward mine:answers: " in str(caught.value)


def test_an_exception_keeps_its_type_text_place_and_cause(mine):
    match = r"reward mine:raises: raised KeyError: 'no such thing' \(.*mine.py:\d+\) on"
    with pytest.raises(ValueError, match=match) as caught:
        score("mine:raises")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="mine:leaves: raised SystemExit: 3"):
        score("mine:leaves")


def test_a_missing_column_names_function_column_and_what_is_there(mine):
    match = "mine:exact: it takes 'answer', which row 1 .* the row has 'solution', 'x'"
    with pytest.raises(ValueError, match=match):
        score("mine:exact", rows=[ROWS[0], {"solution": "1", "x": 1}])


def test_a_function_that_hangs_is_an_error_in_time(mine):
    start = time.monotonic()
    with pytest.raises(ValueError, match="mine:hangs: did not return within 0.2 s on"):
        score("mine:hangs", timeout_s=0.2)
    assert time.monotonic() - start < 5


def test_a_function_that_hangs_does_not_keep_the_process(mine, tmp_path):
    code = (
        "import time\n"
        "from rlhf_jax.programs.reward_functions import open_function\n"
        "try: open_function('mine:hangs', 0.1)(['p'], ['c'], [{}])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "did not return within 0.1 s" in done.stdout, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            "mine:positional",
            r"expected f\(prompt, completion, ...\) or .* got positiona",
        ),
        ("mine:neither", r"got neither\(text\)"),
        ("mine:mixed", r"got mixed\(prompt, completions\)"),
        ("mine:asynchronous", "is async"),
        ("mine:nothing", "mine has no function 'nothing'"),
        ("nowhere.at_all:f", "cannot import"),
        ("broken:f", r"importing it raised ZeroDivisionError: .*broken.py:1"),
        ("no/such/model", "model 'no/such/model'|no/such/model"),
        ("nan*mine:exact", "expected SPEC or WEIGHT.SPEC with a finite number"),
        ("inf*mine:exact", "finite number"),
        ("two*mine:exact", "finite number"),
        ("2*", "finite number"),
        ("http://", "expected http://HOST"),
        ("http://host:port/x", "reward http://host:port/x"),
    ],
)
def test_a_source_that_cannot_be_opened_is_an_early_error(mine, spec, match):
    with pytest.raises(ValueError, match=match):
        open_rewards([spec])


def test_no_source_and_a_source_given_twice_are_errors(mine):
    with pytest.raises(ValueError, match="at least one"):
        open_rewards([])
    with pytest.raises(ValueError, match="reward mine:exact: given twice"):
        open_rewards(["mine:exact", "0.5*mine:exact"])
    with pytest.raises(ValueError, match="timeout_s 0: expected a positive"):
        open_rewards(["mine:exact"], timeout_s=0)


def test_counts_that_differ_and_completions_that_are_no_text_are_errors(mine):
    with pytest.raises(ValueError, match="2 prompts, 1 rows, 2 completions"):
        score("mine:length", rows=ROWS[:1])
    with pytest.raises(ValueError, match="completion 1: expected text, got int 5"):
        score("mine:length", completions=["a", 5])


def test_specs_and_weights_are_told_apart():
    assert parse_spec("runs/rm") == (1.0, "runs/rm")
    assert parse_spec("-1e-3 * http://h/x?a*b") == (-1e-3, "http://h/x?a*b")
    assert rewards.kind_of("package.module:f") == "function"
    assert rewards.kind_of("owner/name@main") == "model"
    assert rewards.kind_of("https://host/get_reward") == "http"


def test_names_are_short_and_whole_where_they_would_be_the_same(mine, monkeypatch):
    monkeypatch.setattr(rewards, "open_scorer", lambda *args: None)
    specs = ["a/rm", "b/rm", "mine:exact", "http://h:5/get_reward", "runs/gold/"]
    found = open_rewards(specs)
    names = [source.name for source in found.sources]
    assert names == ["a/rm", "b/rm", "exact", "h:5", "gold"]
    assert found.models == ["a/rm", "b/rm", "runs/gold/"]


# Reward models.


def token_sums(sequences, score_at):
    """A stand-in for a model: the sum of the ids of the scored sequence, over 1000."""
    found = np.zeros(score_at.shape, np.float32)
    for row, slot in np.ndindex(score_at.shape):
        mine = read_at(sequences, row, score_at[row, slot])
        found[row, slot] = sequences.tokens[row][mine].sum() / 1000
    return found


@pytest.fixture
def fake(monkeypatch):
    """A Scorer with a real encode path and `token_sums` for a model."""
    one = Scorer(
        encoder=Encoder(tiny_tokenizer()),
        score_fn=token_sums,
        max_length=60,
        tokens_per_batch=256,
        rows_multiple_of=1,
        mesh=make_mesh(MeshConfig(), devices=jax.devices()[:1]),
    )
    monkeypatch.setattr(rewards, "open_scorer", lambda spec, config: one)
    return one


def test_a_model_scores_text_with_its_own_encoder(fake):
    prompts = ["Sort 3 1.", [{"role": "user", "content": "Sort 2 1."}]]
    found = score("runs/rm", prompts=prompts).total
    for n, (prompt, text) in enumerate(zip(prompts, COMPLETIONS)):
        item = fake.encoder.encode(prompt, text)
        expected = (sum(item.prompt) + sum(item.completion)) / 1000
        assert found[n] == pytest.approx(expected)


def test_an_empty_completion_has_a_reward(fake):
    assert np.isfinite(score("runs/rm", completions=["", "1"]).total).all()


def test_a_text_that_a_model_refuses_is_an_error_and_never_dropped(fake):
    match = "runs/rm: refuses 1 of 2 completions; completion 1 .*longer than max_length"
    with pytest.raises(ValueError, match=match):
        score("runs/rm", completions=["1", "1 2 3 " * 60])


def test_what_is_refused_is_said_of_each_text_and_the_others_are_scored(mine, fake):
    found = open_rewards(["mine:exact", "runs/rm"])
    many = ["1 3", "1 2 3 " * 60, "\ud800", "1 2"]
    texts = Texts([PROMPTS[0]] * 4, many, [ROWS[0]] * 4)
    refusals = found.refusals(texts)
    assert [why and why.reason for why in refusals] == [
        None,
        "longer than max_length 60",
        "cannot be encoded",
        None,
    ]
    alone = [found([PROMPTS[0]], [many[n]], ROWS[:1]).total[0] for n in (0, 3)]
    assert found.score(texts.take([0, 3])).total.tolist() == pytest.approx(alone)


def test_a_model_is_loaded_once_with_the_scoring_of_the_run(fake, monkeypatch):
    opened = []
    monkeypatch.setattr(
        rewards, "open_scorer", lambda *args: opened.append(args) or fake
    )
    scoring = ScoringConfig(max_length=50)
    found = open_rewards(["2*runs/rm"], scoring=scoring)
    for _ in range(2):
        found(PROMPTS, COMPLETIONS, ROWS)
    assert opened == [("runs/rm", scoring)]
