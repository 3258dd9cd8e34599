"""`serve`: the same rewards as `score`, in any company, and an answer to every wrong
request."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
import uvicorn

from rlhf_jax.data import tokenizers
from rlhf_jax.data.encode import Encoder
from rlhf_jax.models import hf, tensors
from rlhf_jax.programs import rewards, score, serve
from rlhf_jax.programs.http_scorer import HttpScorer
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.score_requests import Item, encode_query, read_request
from rlhf_jax.programs.score_service import ScoreService, ScoringFailed
from rlhf_jax.programs.scorer import Refusal, ScoringConfig, open_scorer
from rlhf_jax.testing import tiny_config, tiny_tokenizer

MAX_LENGTH = 64
SCORING = ScoringConfig(max_length=MAX_LENGTH, tokens_per_batch=512)
CONFIG = serve.ServeConfig(model="rm", max_request_bytes=20_000, max_waiting=2)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
PROMPTS = ["Sort 3 1 2.", TALK, "\n\nHuman: Count 1 1.\n\nAssistant:", "Sort 9 4."]
COMPLETIONS = ["1 2 3", "Hello.", "2", "4 9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The SPEC of a tiny reward model with random weights."""
    path, rng, params = (
        tmp_path_factory.mktemp("models") / "rm",
        np.random.default_rng(0),
        {},
    )
    for leaf in tensors.leaves(hf.table(tiny_config(), "reward"), tiny_config(), True):
        value = 0.1 * rng.normal(size=leaf.shape) + (leaf.path[-1] == "scale")
        tensors.insert(params, leaf.path, value.astype(np.float32))
    hf.export_hf(path, tiny_config(), params, kind="reward")
    tokenizers.save_tokenizer(tiny_tokenizer(), path)
    return str(path)


@pytest.fixture(scope="module")
def scorer(model):
    return open_scorer(model, SCORING)


@contextlib.contextmanager
def serving(scorer, config=CONFIG):
    """A real server in a thread; gives its URL and its service."""
    service = ScoreService(scorer, max_batch=8, batch_wait_s=0, max_waiting=2)
    with service, socket.create_server(("127.0.0.1", 0)) as listener:
        app = serve.make_app(service, config)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{serve.PATH}", service
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(scorer):
    with serving(scorer) as (url, _):
        yield url


def ask(url, body, method="POST", path=None) -> tuple[int, Any]:
    """(status, answer) of one request."""
    host, _, own = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    connection.request(method, path or f"/{own}", data)
    with connection.getresponse() as answer:
        text = answer.read()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, json.loads(text) if is_json else text.decode()


# The same rewards everywhere.


def test_http_score_program_and_scorer_agree(tmp_path, monkeypatch, model, scorer, url):
    rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score.run(
        score.ScoreConfig(model=model, data=str(data), out=str(out), scoring=SCORING)
    )
    program = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    direct = scorer.rewards([scorer.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)])
    body = {"prompts": PROMPTS, "completions": COMPLETIONS}
    status, answer = ask(url, body)
    assert status == 200
    remote = open_rewards([url], timeout_s=60)(PROMPTS, COMPLETIONS, [{}] * 4).total
    monkeypatch.setattr(rewards, "open_scorer", lambda *args: scorer)
    local = open_rewards([model], scoring=SCORING, timeout_s=60)
    inside = local(PROMPTS, COMPLETIONS, [{}] * 4).total
    for found in (answer["rewards"], remote, inside, program):
        np.testing.assert_allclose(found, direct, rtol=0, atol=1e-6)
    assert len(set(np.round(direct, 4))) == 4


def test_company_does_not_change_a_score(scorer, url):
    body = {"prompts": PROMPTS, "completions": COMPLETIONS}
    together = ask(url, body)[1]["rewards"]
    alone = [
        ask(url, {"prompts": [p], "completions": [c]})[1]["rewards"][0]
        for p, c in zip(PROMPTS, COMPLETIONS)
    ]
    crowd = {"prompts": PROMPTS * 10, "completions": COMPLETIONS * 10}
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    many = ask(url, crowd)[1]["rewards"]
    np.testing.assert_allclose(many, together * 10, rtol=0, atol=1e-5)


def test_openrlhfs_request_of_templated_text_gives_the_same_rewards(scorer, url):
    policy = HttpScorer(url, 60, encoder=scorer.encoder)
    query = [policy.query(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    structured = ask(url, {"prompts": PROMPTS, "completions": COMPLETIONS})[1]
    other = {"prompts": ["templated"] * 4, "labels": [None] * 4}
    assert ask(url, {"query": query, **other}) == (200, structured)


def test_structured_texts_win_over_query(url):
    body = {"prompts": ["Sort 3 1."], "completions": ["1 3"]}
    assert ask(url, {**body, "query": ["something else"]}) == ask(url, body)


# One text.


def test_one_text_in_the_template_has_the_ids_of_prompt_and_completion(scorer):
    encoder = scorer.encoder
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        item = encoder.encode(prompt, completion)
        ids = [*item.prompt, *item.completion]
        text = encoder.decode(ids)
        bare = text.removesuffix("<eos>")
        for padded in (text, bare, f"<pad><pad>{text}", f"{text}\n<pad>\n<eos> <pad>"):
            found: Any = encode_query(padded, scorer)
            assert [*found.prompt, *found.completion] == ids


def test_hh_text_is_a_conversation_in_one_text_too(scorer):
    found: Any = encode_query(
        "<bos>\n\nHuman: Sort 2 1.\n\nAssistant: 1 2<eos>", scorer
    )
    assert found == scorer.encoder.encode("Sort 2 1.", "1 2")
    open_ended = encode_query("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", scorer)
    assert isinstance(open_ended, Refusal)


def test_plain_text_is_encoded_as_it_is_between_bos_and_end_token(scorer):
    plain = dataclasses.replace(
        scorer, encoder=Encoder(tiny_tokenizer(), template="plain")
    )
    found: Any = encode_query("Sort 2 1. 1 2", plain)
    whole = plain.encoder.encode("Sort 2 1. 1 2", "")
    assert found.completion == [*whole.prompt, *whole.completion]
    assert found.completion[0] == plain.encoder.bos_id


# Wrong requests.


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b'{"query":', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ([1], "expected a JSON object, got list"),
        ({}, "expected query, or prompts and completions; got no field"),
        ({"prompts": ["a"]}, "got 'prompts'"),
        ({"query": "text"}, "query: expected a list, got str 'text'"),
        ({"query": []}, "query: the list is empty"),
        ({"query": ["a", 5]}, r"query\[1\]: expected text, got int 5"),
        ({"query": ["a", " "]}, r"query\[1\]: the text is empty"),
        ({"query": ["a", "\ud800"]}, r"query\[1\]: lone surrogate U\+D800"),
        ({"completions": ["a"]}, "prompts: expected a list, got nothing"),
        ({"prompts": [], "completions": []}, "completions: the list is empty"),
        ({"prompts": ["a"], "completions": ["b", "c"]}, "prompts: expected 2 entries"),
        ({"prompts": ["a"], "completions": [None]}, r"completions\[0\]: expected text"),
        ({"prompts": ["a"], "completions": ["\udc00"]}, r"completions\[0\]: lone"),
        ({"prompts": ["\udc00"], "completions": ["b"]}, r"prompts\[0\]: lone surr"),
        ({"prompts": [{}], "completions": ["b"]}, r"prompts\[0\]: expected text or"),
        ({"prompts": [[]], "completions": ["b"]}, r"prompts\[0\]: expected at least"),
        ({"prompts": [[{}]], "completions": ["b"]}, r"prompts\[0\], message 1: exp"),
        (
            {"prompts": ["a"], "completions": ["b"], "query": ["c", "d"]},
            "query: expected 1 entries",
        ),
        (
            {"prompts": ["a"], "completions": ["b"], "tools": [[3]]},
            r"tools\[0\]: expected a list of objects or null",
        ),
    ],
)
def test_a_malformed_request_names_field_and_index(body, match):
    with pytest.raises(ValueError, match=match):
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        (b"nonsense", 400, "the body is not valid JSON"),
        ({"query": ["fine", 5]}, 400, r"query\[1\]: expected text"),
        ({"query": ["fine", "1 2 " * 50]}, 422, r"query\[1\]: longer than max_l"),
        (
            {"prompts": ["a", "a"], "completions": ["b", "1 2 " * 50]},
            422,
            r"completions\[1\]: longer than max_length 64: \d+ tokens",
        ),
        ({"query": ["<eos>"]}, 422, r"query\[0\]: .*nothing but special tokens"),
        (
            {"prompts": [[{"role": "alien", "content": "x"}]], "completions": [""]},
            422,
            r"completions\[0\]: cannot be encoded: .*unknown role alien",
        ),
        ({"query": ["x" * 30_000]}, 413, r"longer than 20,000 bytes"),
    ],
)  # fmt: skip
def test_a_wrong_request_has_a_status_and_a_reason(url, body, status, match):
    found, answer = ask(url, body)
    assert found == status
    assert re.search(match, answer["error"])


def test_a_body_of_unknown_length_is_limited_too(url):
    chunks = (b"x" * 5_000 for _ in range(5))
    status, answer = ask(url, chunks)
    assert status == 413
    assert "20,000 bytes" in answer["error"]


def test_other_paths_and_methods(url):
    status, answer = ask(url, None, "GET")
    assert status == 405 and "Method Not Allowed; POST /get_reward" in answer["error"]
    status, answer = ask(url, {}, path="/nothing")
    assert status == 404 and "POST /nothing: Not Found" in answer["error"]
    status, health = ask(url, None, "GET", "/health")
    assert status == 200
    assert health["model"] == "rm"
    assert health["max_length"] == MAX_LENGTH
    assert "chat template" in health["template"]


# Company, load and failure.


class Gate:
    """A scorer that counts its calls and waits for `open`."""

    max_length, random_head = MAX_LENGTH, False

    def __init__(self, scorer):
        self.encoder, self.encode = scorer.encoder, scorer.encode
        self.encode_all = scorer.encode_all
        self.sizes, self.open, self.entered = [], threading.Event(), queue.Queue()
        self.answer = lambda encoded: np.arange(len(encoded), dtype=np.float32)

    def rewards(self, encoded):
        self.sizes.append(len(encoded))
        self.entered.put(None)
        assert self.open.wait(30)
        return self.answer(encoded)


def items(count):
    return [Item(f"query[{n}]", None, f"text {n}") for n in range(count)]


def test_requests_that_wait_together_are_scored_together(scorer):
    gate: Any = Gate(scorer)
    with ScoreService(gate, max_batch=8, batch_wait_s=0, max_waiting=9) as service:
        first = service.submit(items(1))
        gate.entered.get(timeout=30)
        later = [service.submit(items(n)) for n in (2, 3, 4)]
        gate.open.set()
        assert first.result(30) == [0.0]
        assert [f.result(30) for f in later] == [[0, 1], [2, 3, 4], [5, 6, 7, 0]]
    assert gate.sizes == [1, 8, 1]


def test_a_batch_waits_for_company_no_longer_than_told(scorer):
    gate: Any = Gate(scorer)
    gate.open.set()
    with ScoreService(gate, max_batch=3, batch_wait_s=20, max_waiting=9) as service:
        futures = [service.submit(items(1)) for _ in range(3)]
        assert [f.result(10) for f in futures] == [[0.0], [1.0], [2.0]]
    assert gate.sizes == [3]


def test_a_refused_request_does_not_fail_its_company(scorer):
    gate: Any = Gate(scorer)
    gate.open.set()
    with ScoreService(gate, max_batch=3, batch_wait_s=20, max_waiting=9) as service:
        bad = service.submit([Item("query[0]", None, "1 2 " * 50)])
        good = service.submit(items(2))
        assert good.result(10) == [0.0, 1.0]
        with pytest.raises(ValueError, match="query.0.: longer than"):
            bad.result(10)


def test_a_full_queue_is_status_503_and_all_accepted_are_answered(scorer):
    gate: Any = Gate(scorer)
    with (
        serving(gate) as (url, service),
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        waiting = [pool.submit(ask, url, {"query": ["a"]})]
        gate.entered.get(timeout=30)
        waiting += [pool.submit(ask, url, {"query": ["a"]}) for _ in range(2)]
        while service.waiting < 2:
            pass
        status, answer = ask(url, {"query": ["a"]})
        assert (status, answer["error"]) == (503, "2 requests are waiting; try again")
        gate.open.set()
        assert all(future.result(30)[0] == 200 for future in waiting)


def test_a_failing_model_is_status_500_and_the_server_lives_on(scorer):
    gate: Any = Gate(scorer)
    gate.open.set()
    good = gate.answer
    with serving(gate) as (url, _):
        gate.answer = lambda encoded: 1 / 0
        status, answer = ask(url, {"query": ["a"]})
        assert (status, answer) == (
            500,
            {"error": "ZeroDivisionError: division by zero"},
        )
        gate.answer = lambda encoded: np.array([1, np.nan], np.float32)
        status, answer = ask(url, {"query": ["a", "b"]})
        assert (status, answer) == (
            500,
            {"error": "query[1]: the reward is not finite"},
        )
        gate.answer = good
        assert ask(url, {"query": ["a"]}) == (200, {"rewards": [0.0]})


def test_an_error_in_encoding_does_not_end_the_thread(scorer):
    gate: Any = Gate(scorer)
    gate.open.set()
    gate.encode_all = lambda texts: [1 / 0 for _ in texts.completions]
    with ScoreService(gate, max_batch=3, batch_wait_s=0, max_waiting=9) as service:
        with pytest.raises(ScoringFailed, match="ZeroDivisionError"):
            service.submit([Item("completions[0]", "a", "b")]).result(10)
        assert service.submit(items(1)).result(10) == [0.0]


# The program.


@pytest.mark.slow
def test_the_program_serves_until_sigterm(tmp_path, model):
    settings = {"XDG_CACHE_HOME": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", "serve", "--model", model, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    assert process.stderr is not None
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        line = process.stderr.readline()
        url = re.search(r"serving .* at (http://127.0.0.1:\d+/get_reward);", line)
        assert url, line + process.stderr.read()
        assert ask(url[1], {"query": ["Sort 2 1. 1 2"]})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"install the extra serve"):
        serve.run(CONFIG)


def test_an_address_that_is_taken_is_an_error_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(serve, "open_scorer", lambda *args, **options: pytest.fail())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}: cannot listen there"):
            serve.run(dataclasses.replace(CONFIG, port=port))


def test_listening_beyond_this_machine_is_said_aloud(scorer, capsys):
    scorer = dataclasses.replace(scorer, random_head=True)
    service = ScoreService(scorer, max_batch=1, batch_wait_s=0, max_waiting=1)
    for address, loud in (("127.0.0.1", False), ("0.0.0.0", True), ("::1", False)):
        listener = types.SimpleNamespace(getsockname=lambda a=address: (a, 5000))
        serve._announce(CONFIG, service, listener)  # pyright: ignore
        said = capsys.readouterr().err
        assert ("no authentication" in said) == loud
        assert "scores mean nothing" in said


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70_000}, {"max_batch": 0}, {"max_waiting": 0}, {"batch_wait_ms": -1}],
)
def test_settings_out_of_range_are_errors_that_name_them(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        serve.ServeConfig(model="tiny", **wrong)
