"""The client of HTTP scorers: what it sends, and that no wrong answer is a reward."""

import http.server
import json
import threading
from typing import Any

import pytest

from rlhf_jax.data.encode import Encoder
from rlhf_jax.programs.http_scorer import HttpScorer, check_url
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.testing import tiny_tokenizer

PROMPTS = ["Sort 3 1.", "Sort 2 1."]
COMPLETIONS = ["1 3", "1 2 2"]


def score(url, prompts=PROMPTS, completions=COMPLETIONS, rows=None, **options):
    opened = open_rewards([url], **{"timeout_s": 20, **options})
    return opened(prompts, completions, rows or [{}] * len(completions))


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers with what the test put into `server.answers`, the last one for ever."""

    server: Any

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(json.loads(body))
        answers = self.server.answers
        status, text = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(text):
            text = text(self.server.requests[-1])
        data = text if isinstance(text, bytes) else json.dumps(text).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def stub(monkeypatch):
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.requests, server.answers = [], [(200, lengths)]
    server.handle_error = lambda *args: None  # a client that gave up
    server.url = f"http://127.0.0.1:{server.server_port}/get_reward"
    monkeypatch.setattr("time.sleep", lambda seconds: server.requests.append(seconds))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody is there
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def lengths(request):
    return {"rewards": [len(text) for text in request["query"]]}


def test_a_request_is_openrlhfs_with_the_texts_apart_beside_it(stub):
    talk = [{"role": "user", "content": "Sort 2 1."}]
    prompts = ["Sort 3 1.", talk, "\n\nHuman: Hi\n\nAssistant:"]
    found = score(stub.url, prompts=prompts, completions=["1", "2", "3"])
    query = ["Sort 3 1.1", "\n\nHuman: Sort 2 1.\n\nAssistant: 2"]
    query += ["\n\nHuman: Hi\n\nAssistant: 3"]
    assert stub.requests == [
        {"query": query, "prompts": prompts, "completions": ["1", "2", "3"]}
    ]
    assert found.total.tolist() == [len(text) for text in query]


def test_with_an_encoder_the_query_is_what_the_policy_saw(stub):
    encoder = Encoder(tiny_tokenizer())
    score(stub.url, encoder=encoder)
    item = encoder.encode(PROMPTS[0], COMPLETIONS[0])
    query = stub.requests[0]["query"][0]
    assert query == encoder.decode([*item.prompt, *item.completion])
    assert query.endswith(tiny_tokenizer().eos_token)


def test_tools_of_a_row_go_along(stub):
    tools = [{"name": "calculator"}]
    score(stub.url, rows=[{"tools": tools}, {}])
    assert stub.requests[0]["tools"] == [tools, None]


def test_requests_hold_at_most_batch_size_completions_in_order(stub):
    scorer = HttpScorer(stub.url, 5, batch_size=2)
    texts = ["a" * n for n in range(5)]
    assert scorer.rewards(["p"] * 5, texts).tolist() == [1, 2, 3, 4, 5]
    assert [len(request["query"]) for request in stub.requests] == [2, 2, 1]


def test_a_busy_server_is_asked_again_and_then_an_error(stub):
    stub.answers = [(503, {"error": "busy"}), (429, b""), (200, lengths)]
    assert score(stub.url).total.tolist() == [12, 14]
    assert [r for r in stub.requests if not isinstance(r, dict)] == [0.5, 1.0]
    stub.answers = [(503, {"error": "busy"})]
    match = "no answer in 3 tries .completions 0 to 1.; the last: HTTP 503 .*: busy"
    with pytest.raises(ValueError, match=match):
        score(stub.url)


def test_an_unreachable_server_is_an_error_after_three_tries(stub):
    url = stub.url.replace(str(stub.server_port), "9")
    with pytest.raises(ValueError, match=r"reward .*:9/.*3 tries.*ConnectionRefused"):
        score(url)
    assert stub.requests == [0.5, 1.0]


def test_a_silent_server_is_an_error_after_the_timeout(stub):
    wait = threading.Event()
    stub.answers = [(200, lambda request: wait.wait(20) or {})]
    with pytest.raises(ValueError, match="no answer in 3 tries .*timed out"):
        score(stub.url, timeout_s=0.1)
    wait.set()


@pytest.mark.parametrize(
    ("status", "answer", "match"),
    [
        (400, {"error": "query[1]: too odd"}, r"HTTP 400 .*: query\[1\]: too odd"),
        (404, b"Not Found", "HTTP 404 .*: Not Found; scorers usually answer at /get_r"),
        (500, b"", "HTTP 500 .*no explanation"),
        (302, b"", "HTTP 302"),
        (200, b"<html>", "got no JSON but '<html>'"),
        (200, {"scores": [1, 2]}, "got dict {'scores'"),
        (200, [1, 2], "got list"),
        (200, {"rewards": [1]}, "got 1 of them"),
        (200, {"rewards": 0.5}, "got float 0.5"),
        (200, {"rewards": [1, None]}, "got nothing at 1"),
        (200, {"rewards": [[1], [2]]}, r"got list \[1\] at 0"),
        (200, {"rewards": [True, 1]}, "got bool True at 0"),
        (200, b'{"rewards": [1, NaN]}', "1 of 2 rewards are not finite"),
    ],
)
def test_a_wrong_answer_of_a_server_names_it_and_is_not_retried(
    stub, status, answer, match
):
    stub.answers = [(status, answer)]
    with pytest.raises(ValueError, match=match) as caught:
        score(stub.url)
    assert f"reward {stub.url}: " in str(caught.value)
    assert len(stub.requests) == 1


def test_a_prompt_that_no_text_or_json_can_hold_is_an_error(stub):
    tool = [{"role": "tool", "content": "4"}]
    with pytest.raises(ValueError, match="cannot be written as one text: role 'tool'"):
        score(stub.url, prompts=[tool, "p"])
    odd = [{"role": "user", "content": "a", "image": b"x"}]
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        score(stub.url, prompts=["p", odd])


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="not sent") as caught:
        check_url("http://me:secret@host/x")
    assert "secret" not in str(caught.value)
