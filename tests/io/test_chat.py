"""The chat client against a server that misbehaves: nothing lost, paid once."""

import datetime
import email.utils
import time

import pytest

from rlhf_jax.io import retries
from rlhf_jax.io.chat import ChatClient, ChatConfig, Question
from tests.chat_server import Server

pytest.importorskip("openai", reason="needs the seam extra")


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", "word")
    opened = []

    def make(script=(), **options):
        server = Server(script)
        config = {
            "base_url": server.url,
            "model": "m",
            "key_variable": "CHAT_KEY",
            "cache": str(tmp_path / "cache"),
            "retries": 2,
        }
        chat = ChatClient(ChatConfig(**(config | options)))
        opened.append((chat, server))
        return chat, server

    yield make
    for chat, server in opened:
        chat.__exit__()
        server.close()


def ask(*texts, **options):
    return [Question([{"role": "user", "content": text}], **options) for text in texts]


def test_replies_are_in_order_and_the_request_is_as_configured(client):
    chat, server = client(max_tokens=7)
    names = [str(n) for n in range(20)]
    done = []
    replies = chat.ask(ask(*names, temperature=0.5), done.append)
    assert [reply.text for reply in replies] == [f"re: {name}" for name in names]
    assert sum(done) == 20 and all(reply.error is None for reply in replies)
    _, body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 7)


def test_models_that_reason_get_their_own_parameters(client):
    chat, server = client(
        max_tokens=9, length_parameter="max_completion_tokens", send_temperature=False
    )
    chat.ask(ask("a", temperature=0.5))
    _, body = server.requests[0]
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body and "temperature" not in body


@pytest.mark.parametrize(
    ("parameter", "option"),
    [("max_tokens", "length_parameter"), ("temperature", "send_temperature")],
)
def test_a_refused_parameter_stops_and_names_the_option_that_helps(
    client, parameter, option
):
    said = {"error": {"message": f"Unsupported parameter: '{parameter}'"}}
    chat, _ = client(script=[(400, said)])
    with pytest.raises(ValueError, match=f"Unsupported.*chat.{option}"):
        chat.ask(ask("a"))


def test_a_model_that_reasoned_to_the_limit_was_cut_off(client):
    message = {"role": "assistant", "content": ""}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    chat, _ = client(script=[(200, {"choices": [choice]})], max_tokens=5)
    (reply,) = chat.ask(ask("a"))
    assert reply.error is not None and "cut off at max_tokens 5" in reply.error


def test_what_was_answered_is_not_asked_again(client):
    chat, server = client()
    assert [reply.text for reply in chat.ask(ask("a", "b", "a"))] == [
        "re: a",
        "re: b",
        "re: a",
    ]
    assert chat.ask(ask("b", "c"))[0].text == "re: b"
    assert len(server.requests) == 3
    chat.ask([*ask("a", sample=1), *ask("a", temperature=0.0)])
    assert len(server.requests) == 5  # another sample and temperature are other replies


def test_the_estimate_counts_what_is_not_in_the_cache(client):
    chat, server = client(max_tokens=100, price_in=2.0, price_out=10.0)
    chat.ask(ask("a" * 40))
    found = chat.estimate(ask("a" * 40, "b" * 400, "c" * 400))
    assert (found.asked, found.cached) == (2, 1)
    assert (found.tokens_in, found.tokens_out) == (200, 200)
    assert found.price == pytest.approx((200 * 2.0 + 200 * 10.0) / 1e6)
    assert "at most 200 out, about 0.00 at the prices given" in found.describe()
    assert len(server.requests) == 1


def test_without_prices_the_estimate_has_none(client):
    found = client()[0].estimate(ask("a" * 40))
    assert found.price is None and found.describe().endswith("prices not given")


def test_too_many_requests_and_server_errors_are_tried_again(client):
    chat, server = client([(429, {}), (500, {}), (200, None)])
    assert chat.ask(ask("a"))[0].text == "re: a"
    assert len(server.requests) == 3


def test_attempts_after_the_first_keep_to_the_rate_limit(client, monkeypatch):
    chat, server = client([(429, {}), (500, {}), (429, {})], retries=3)
    waits = []
    monkeypatch.setattr(chat, "_wait", lambda: waits.append(len(server.requests)))
    chat.ask(ask("a"))
    assert waits == [0, 1, 2, 3]


def test_an_endpoint_is_left_alone_for_as_long_as_it_asks(client):
    chat, server = client([(429, {}, {"Retry-After": "0.3"})])
    chat.ask(ask("a"))
    (first, _), (second, _) = server.requests
    assert second - first >= 0.3


@pytest.mark.parametrize(
    "headers", [{"x-should-retry": "false"}, {"Retry-After": "36000"}]
)
def test_an_endpoint_that_wants_no_other_attempt_gets_none(client, headers):
    chat, server = client([(429, {}, headers)])
    assert "RateLimitError" in chat.ask(ask("a"))[0].error
    assert len(server.requests) == 1


def test_a_refusal_ends_the_attempts_of_the_others_too(client):
    refused = (401, {"error": {"message": "no"}})
    chat, _ = client([(429, {}, {"Retry-After": "60"}), refused], concurrent=2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="model m"):
        chat.ask(ask("a", "b"))
    assert time.monotonic() - start < 20


class Response:
    def __init__(self, status, **headers):
        self.status_code, self.headers = status, headers


def test_pauses_double_unless_the_server_says():
    pauses = [retries.pause_s(None, attempt) for attempt in range(20)]
    limits = [min(0.5 * 2.0**attempt, 16.0) for attempt in range(20)]
    assert all(0.75 * b <= a <= b for a, b in zip(pauses, limits, strict=True))
    assert retries.pause_s(Response(400), 0) is None
    assert retries.pause_s(Response(500), 0) <= 0.5
    now = datetime.datetime.now(datetime.UTC)
    soon = email.utils.format_datetime(now + datetime.timedelta(seconds=60), True)
    for value, seconds in (("7", 7), (soon, 60), ("odd", 0.5), ("nan", 0.5)):
        found = retries.pause_s(Response(429, **{"retry-after": value}), 0)
        assert found == pytest.approx(seconds, abs=2 if seconds == 60 else 0.13)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([(429, {})] * 3, "RateLimitError"),
        ([(503, {})] * 3, "InternalServerError"),
        ([(400, {"error": {"message": "too long"}})], "too long"),
        ([(200, {"choices": []})], "malformed reply"),
        ([(200, {"other": 1})], "malformed reply"),
        ([(200, {"choices": [{"message": {"content": " "}}]})], "malformed reply: no"),
        ([(200, b"<html>")], "malformed reply"),
        ([(403, {"error": {"message": "moderated"}})], "moderated"),
        (
            [
                (
                    200,
                    {
                        "choices": [
                            {
                                "message": {"content": "half a"},
                                "finish_reason": "length",
                            }
                        ]
                    },
                )
            ],
            "cut off at max_tokens",
        ),
    ],
)
def test_a_failure_is_a_reply_with_its_reason_and_is_not_cached(
    client, script, message
):
    chat, _ = client(script)
    failed, fine = chat.ask(ask("a"))[0], chat.ask(ask("b"))[0]
    assert message in failed.error and failed.text == ""
    assert fine.text == "re: b"
    assert chat.ask(ask("a"))[0].text == "re: a"


def test_a_reply_that_does_not_come_in_time_is_given_up(client):
    chat, _ = client([(200, 3.0)], timeout_s=0.2, retries=0)
    assert "no reply within 1 times 0.2 s" in chat.ask(ask("a"))[0].error


def test_the_rate_limit_spaces_the_questions(client):
    chat, server = client(per_minute=600)
    chat.ask(ask(*"abcd"))
    times = sorted(at for at, _ in server.requests)
    assert times[-1] - times[0] >= 0.25


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_model_ends_the_run_at_once(client, status):
    chat, _ = client([(status, {"error": {"message": "no"}})] * 50)
    with pytest.raises(ValueError, match=r"chat: http://127.0.0.1:\d+/v1, model m"):
        chat.ask(ask("a", "b"))


def test_nothing_is_asked_above_the_price_that_was_set(client):
    chat, server = client(price_out=1e6, max_tokens=10, max_price=15.0)
    chat.ask(ask("a"))
    with pytest.raises(ValueError, match=r"may cost 20.00, and max_price is 15"):
        chat.ask(ask("b", "c"))
    chat.ask(ask("a", "b"))  # one of them is there already
    assert len(server.requests) == 2


def test_settings_that_cannot_be_are_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set; put the endpoint"):
        ChatClient(ChatConfig(base_url="http://x/v1", model="m"))
    with pytest.raises(ValueError, match="chat.base_url: expected an endpoint"):
        ChatClient(ChatConfig())
    for options, message in (
        ({"base_url": "u"}, "expected base_url and model, or neither"),
        ({"concurrent": 0}, "concurrent 0"),
        ({"timeout_s": 0.0}, "timeout_s 0.0"),
        ({"price_in": -1.0}, "price_in -1.0: expected at least 0"),
        ({"max_price": 5.0}, "max_price 5: expected chat.price_in and chat.price_out"),
    ):
        with pytest.raises(ValueError, match=message):
            ChatConfig(**options)


def test_an_endpoint_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", "word")
    config = ChatConfig(
        "http://127.0.0.1:9/v1", "m", "CHAT_KEY", str(tmp_path), retries=0
    )
    with ChatClient(config) as chat, pytest.raises(ValueError, match="127.0.0.1:9/v1"):
        chat.ask(ask("a"))
