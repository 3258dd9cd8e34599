"""The judge: verdicts in both orders; agreement and bias as they were planted."""

import json

import pytest

from rlhf_jax.data.rows import Columns
from rlhf_jax.io.chat import ChatConfig
from rlhf_jax.programs import seam, writer
from rlhf_jax.programs.judge import JudgeConfig, _verdict, run
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam import SeamConfig
from rlhf_jax.programs.seam_prompts import read_prompts
from rlhf_jax.programs.writer import WriterConfig
from rlhf_jax.sharding import MeshConfig
from tests.chat_server import Server

pytest.importorskip("openai", reason="needs the seam extra")
ROWS = [
    {"prompt": f"p{n}", "chosen": "long answer", "rejected": "short", "n": n}
    for n in range(12)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    opened = []

    def make(reply, **options):
        server = Server(reply=reply)
        opened.append(server)
        return ChatConfig(
            base_url=server.url, model="m", cache=str(tmp_path / "c"), **options
        )

    yield make
    for server in opened:
        server.close()


def sides(text):
    """The two answers of a question, in the order they are shown."""
    before, second = text.split("Answer B:\n")
    return before.split("Answer A:\n")[1].strip(), second.split("\n\nEnd with")[0]


def longer(text):
    first, second = sides(text)
    return "Because.\n**A**" if len(first) > len(second) else "Because.\nAnswer: B."


def judged(data, tmp_path, **options):
    result = run(JudgeConfig(data, str(tmp_path / "out"), **options))
    lines = (tmp_path / "out" / "judged.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def test_a_judge_that_reads_agrees_and_has_no_bias(data, tmp_path, endpoint):
    result, rows = judged(data, tmp_path, chat=endpoint(longer))
    assert result["agreement"][0] == result["consistency"][0] == 1.0
    assert result["first"][0] == 0.5
    assert [row["n"] for row in rows] == list(range(12))
    assert all(row["verdicts"] == [1.0, 1.0] for row in rows)


def test_a_judge_that_takes_the_first_is_found_out(data, tmp_path, endpoint):
    result, rows = judged(data, tmp_path, chat=endpoint(lambda text: "A"))
    assert result["agreement"][0] == 0.5 and result["consistency"][0] == 0.0
    assert result["first"][0] == 1.0
    assert all(row["verdicts"] == [1.0, 0.0] for row in rows)


def test_a_small_bias_is_not_hidden_by_the_interval_of_a_coin(tmp_path, endpoint):
    rows = [{"prompt": f"p{n}", "chosen": "long answer", "rejected": "b"} for n in
            range(60)]  # fmt: skip
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(text):
        return "A" if "0\n\nAnswer A" in text else longer(text)

    result, _ = judged(str(path), tmp_path, chat=endpoint(reply))
    value, low, high = result["first"]
    assert value == pytest.approx(0.55) and 0.5 < low < value < high < 0.6


def test_a_reward_judges_each_completion_alone(data, tmp_path):
    result, rows = judged(data, tmp_path, reward=f"{__name__}:shortness")
    assert result["agreement"][0] == 0.0 and "consistency" not in result
    assert all(row["verdicts"] == [0.0] for row in rows)


def shortness(prompts, completions):
    return [-float(len(text)) for text in completions]


def test_pairs_without_a_verdict_are_set_aside_with_the_reply(data, tmp_path, endpoint):
    def reply(text):
        return "I cannot say which." if "\np3\n" in text else longer(text)

    result, rows = judged(data, tmp_path, chat=endpoint(reply))
    assert (result["pairs"], result["set_aside"]) == (11, {"no verdict": 1})
    (line,) = (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no verdict"
    assert "cannot say" in json.loads(line)["detail"]
    assert [row["n"] for row in rows] == [n for n in range(12) if n != 3]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("First this.\n\n**TIE**", 0.5),
        ("A is better than B.\nAnswer: B", 0.0),
        ("Answer A.\n", 1.0),
        ("Verdict: A", 1.0),
        ("**Final answer: B**", 0.0),
        ("The better answer is B.", 0.0),
        ("A is better than B.", None),
        ("", None),
        ("A or B", None),
    ],
)
def test_the_verdict_is_a_last_line_that_is_nothing_else(text, verdict):
    assert _verdict(text) == verdict


def test_what_stands_in_a_text_is_not_filled_in(data, tmp_path, endpoint):
    row = {"prompt": "{first}", "chosen": "{second}", "rejected": "b"}
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n")
    seen = []

    def reply(text):
        seen.append(text)
        return "A"

    judged(str(path), tmp_path, chat=endpoint(reply))
    assert any("Request:\n{first}\n\nAnswer A:\n{second}" in text for text in seen)


def test_what_cannot_be_judged_is_said(data, tmp_path):
    for options, message in (
        ({}, "expected --reward, or --chat.base_url"),
        (
            {"reward": "a:b", "chat": ChatConfig("http://x", "m")},
            "expected --reward, or --chat.base_url",
        ),
        ({"reward": "a:b", "instruction": "{prompt}"}, r"expected {first} in it"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeConfig(data, "out", **options)
    judged(data, tmp_path, reward=f"{__name__}:shortness")
    with pytest.raises(ValueError, match="holds a judgement; name another"):
        judged(data, tmp_path, reward=f"{__name__}:shortness")


def prompts_of(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"p{n}", "gold_completion": f"g{n}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts([str(path)], Columns(), "gold_completion")[0]


def test_a_writer_gives_each_prompt_its_different_texts(tmp_path, endpoint):
    """Gold completions, repeats and empty replies are no worse completions."""
    count = iter(range(100))

    def reply(text):
        number = text.strip()[-1]
        return f"g{number}" if next(count) % 2 else f"worse {number}"

    config = WriterConfig(chat=endpoint(reply, concurrent=1), count=3)
    made = writer.by_endpoint(prompts_of(tmp_path), config)
    assert made == [[{"text": f"worse {n}", "source": "m"}] for n in range(4)]


def test_a_writer_that_only_fails_is_an_error(tmp_path, endpoint):
    config = WriterConfig(chat=endpoint(lambda text: " "), count=1)
    with pytest.raises(ValueError, match="4 of 4 questions failed, the first: malfor"):
        writer.by_endpoint(prompts_of(tmp_path), config)


def test_failed_questions_are_asked_again_or_accepted(tmp_path, endpoint):
    fails = {"p1"}

    def reply(text):
        number = text.strip()[-2:]
        return " " if number in fails else f"worse {number}"

    chat, prompts = endpoint(reply), prompts_of(tmp_path)
    config = WriterConfig(chat=chat, count=1)
    with pytest.raises(ValueError, match="1 of 4 questions failed.*run again"):
        writer.by_endpoint(prompts, config)
    accepted = WriterConfig(chat=chat, count=1, max_failed=0.3)
    made = writer.by_endpoint(prompts, accepted)
    assert [len(texts) for texts in made] == [1, 0, 1, 1]
    fails.clear()
    made = writer.by_endpoint(prompts, config)
    assert [texts[0]["text"] for texts in made] == [f"worse p{n}" for n in range(4)]


def by_policy(prompts, config, start=0, **scoring):
    made = writer.by_policy(prompts, config, ScoringConfig(**scoring), 0, start=start)
    return list(made)


@pytest.mark.slow
def test_a_local_writer_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_PART", 2)
    asked, encode = [], writer._instruct
    monkeypatch.setattr(
        writer, "_instruct", lambda *args: asked.append(encode(*args)) or asked[-1]
    )
    rows = [{"prompt": f"p{n}", "gold_completion": "g"} for n in range(5)]
    rows[1]["prompt"] = "word " * 600  # longer than the policy takes
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts([str(path)], Columns(), "gold_completion")[0]
    config = WriterConfig(model="testbed", count=60, max_new_tokens=6, batch_size=1)
    scoring = {"mesh": MeshConfig(data=2), "max_length": 600}
    samplers, opens = [], writer.open_sampler
    monkeypatch.setattr(
        writer,
        "open_sampler",
        lambda *args: samplers.append(opens(*args)) or samplers[-1],
    )
    parts = by_policy(prompts, config, **scoring)
    assert samplers[0].mesh.shape["data"] == 2 and samplers[0].together == 8
    assert [len(part) for part in parts] == [2, 2, 1] and parts[0][1] == []
    assert all(text.endswith(f"Request: {row['prompt']}") for text, row in
               zip(asked, rows))  # fmt: skip
    assert by_policy(prompts, config, start=2, **scoring) == parts[1:]
    made = [each for part in parts for each in part]
    assert any(made)  # an untrained policy ends few of its completions
    for texts in made:
        assert len({each["text"] for each in texts}) == len(texts) <= 60
        assert all(each["source"] == "testbed" for each in texts)


@pytest.mark.parametrize(
    "options",
    [
        {"estimators": ["generate"]},
        {"estimators": ["given"], "writer": WriterConfig(model="m")},
    ],
)
def test_generation_and_its_writer_come_together(options):
    with pytest.raises(ValueError, match="generate needs a writer"):
        SeamConfig("r", "p", "rm", ["d"], **options)
    assert seam.SeamConfig("r", "p", "rm", ["d"]).estimators == ["contrast"]
