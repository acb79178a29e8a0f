"""A judge is asked over real HTTP: a server of the test, which also errs, dawdles, hangs up, redirects and babbles."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llm_modules.evaluation import Answer, JudgeReward
from llm_modules.evaluation import judge as judge_module
from llm_modules.evaluation.rewards import RowError

KEY = "sk-very-secret"


class Endpoint:
    """An OpenAI-compatible endpoint on this machine.

    Attributes:
        reply: what to do with a request: its handler, the number of requests for the same answer so far.
        seen: the requests: path, headers, body.
    """

    def __init__(self) -> None:
        self.reply: Callable[[Any, int], None] = lambda handler, number: say(handler, "[[7]]")
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._tries: dict[str, int] = {}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.seen.append((self.path, dict(self.headers), body))
                    text = body["messages"][0]["content"]
                    number = endpoint._tries[text] = endpoint._tries.get(text, 0) + 1
                self.text = text
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                    endpoint.reply(self, number)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def send(handler: Any, status: int, data: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def say(handler: Any, text: Any) -> None:
    send(handler, 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "FIRST_WAIT", 0.02)


def answer(text: str = "four", row: int = 3, **fields: Any) -> Answer:
    return Answer(row, "2 + 2?", text, "4", fields, 1, True)


def judged(endpoint: Endpoint, *given: Answer, **options: Any) -> list[float]:
    return JudgeReward(endpoint.url, "judge-1", **{"timeout": 5.0, "retries": 2} | options)(given or [answer()])


def fails(endpoint: Endpoint, *given: Answer, **options: Any) -> str:
    """The one line that a judgement fails with."""
    with pytest.raises(ValueError, match=r"reward judge_reward: row ") as caught:
        judged(endpoint, *given, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert KEY not in message
    return message


def test_what_is_asked_and_what_comes(endpoint: Endpoint) -> None:
    assert judged(endpoint, temperature=0.5, max_tokens=9) == [7.0]
    [(path, headers, body)] = endpoint.seen
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.5, 9)
    [message] = body["messages"]
    assert message["role"] == "user"
    assert "[Question]\n2 + 2?\n" in message["content"]
    assert "[Answer]\nfour\n" in message["content"]


def test_the_template_is_filled_in_once(endpoint: Endpoint) -> None:
    """What an answer has in braces stays; JSON's own braces, too."""
    template = '{"question": "{prompt}"} {answer}|{reference}|{level}'
    judged(endpoint, answer("{reference}{level} {}", level=5), template=template)
    assert endpoint.seen[0][2]["messages"][0]["content"] == '{"question": "2 + 2?"} {reference}{level} {}|4|5'


def test_a_conversation_is_written_under_its_roles(endpoint: Endpoint) -> None:
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    judged(endpoint, Answer(0, talk, "a", "", {}, 1, True), Answer(1, talk[1:], "b", "", {}, 1, True),
           template="{prompt}/{answer}", workers=1)  # fmt: skip
    asked = [body["messages"][0]["content"] for _, _, body in endpoint.seen]
    assert asked == ["system: be short\n\nuser: hi/a", "hi/b"]


def test_many_at_once_each_gets_its_own(endpoint: Endpoint) -> None:
    """Eight requests wait for each other: with fewer at once the barrier breaks. A ninth would be open before an
    earlier one's answer leaves, which is where they are counted."""
    together, lock = threading.Barrier(8, timeout=60), threading.Lock()
    waiting = busiest = 0

    def reply(handler: Any, number: int) -> None:
        nonlocal waiting, busiest
        with lock:
            waiting += 1
            busiest = max(busiest, waiting)
        together.wait()
        time.sleep(0.1)
        with lock:  # before it is sent: who has his answer may ask again at once
            waiting -= 1
        say(handler, f"[[1]] or rather [[{int(handler.text) % 10 + 1}]]")  # the last counts

    endpoint.reply = reply
    scores = judged(endpoint, *(answer(str(i), i) for i in range(24)), template="{answer}", workers=8)
    assert scores == [i % 10 + 1 for i in range(24)]
    assert busiest == 8


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_for_a_while_is_asked_again(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda handler, number: send(handler, status, b"busy") if number < 3 else say(handler, "[[2.5]]")
    assert judged(endpoint) == [2.5]
    assert len(endpoint.seen) == 3


def test_the_endpoint_says_when_to_ask_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda h, number: send(h, 429, b"", Retry_After="1") if number < 2 else say(h, "[[2]]")
    start = time.monotonic()
    assert judged(endpoint) == [2.0]
    assert time.monotonic() - start >= 1


def test_a_failure_for_good_names_the_row(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: send(handler, 503, b"down\nfor today")
    message = fails(endpoint, answer(row=41))
    assert "row 41: judge at http://127.0.0.1" in message
    assert message.endswith("status 503 down for today (3 requests)")
    assert len(endpoint.seen) == 3


def test_a_mistake_is_not_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: send(handler, 404, b'{"error": "no model judge-1"}')
    assert 'status 404 {"error": "no model judge-1"}' in fails(endpoint)
    assert len(endpoint.seen) == 1


def test_a_failure_ends_the_waiting_of_the_others(endpoint: Endpoint) -> None:
    def reply(handler: Any, number: int) -> None:
        send(handler, *((404, b"") if handler.text == "bad" else (429, b"")), Retry_After="20")

    endpoint.reply = reply
    start = time.monotonic()
    given = [answer("bad", 0), *(answer(str(i), i) for i in range(1, 40))]
    assert "row 0: " in fails(endpoint, *given, template="{answer}", workers=4, retries=5)
    assert time.monotonic() - start < 10
    assert len(endpoint.seen) < 40


def slow(handler: Any, number: int) -> None:
    time.sleep(1.5)
    say(handler, "[[7]]")


def drips(handler: Any, number: int) -> None:
    """Never silent for long, never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def drips_an_error(handler: Any, number: int) -> None:
    handler.send_response(500)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def hangs_up(handler: Any, number: int) -> None:
    handler.close_connection = True


def breaks_off(handler: Any, number: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def floods(handler: Any, number: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 30))
    handler.end_headers()
    for _ in range(1 << 10):
        handler.wfile.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (slow, "no response in 0.5 s"),
        (drips, "no response in 0.5 s"),
        (drips_an_error, "no response in 0.5 s"),
        (hangs_up, "no response: "),
        (breaks_off, "bytes early"),
        (floods, "a response of over 4194304 bytes"),
        (lambda h, n: send(h, 200, b"<html>"), "no response of /chat/completions: '<html>'"),
        (lambda h, n: send(h, 200, b"\xff\xfe"), "no response of /chat/completions"),
        (lambda h, n: send(h, 200, b"{}"), "no response of /chat/completions: '{}'"),
        (lambda h, n: send(h, 200, b'{"choices": []}'), "no response of /chat/completions"),
        (lambda h, n: say(h, None), "a response without text"),
        (lambda h, n: say(h, "a good answer"), "no score from 1 to 10 in 'a good answer'"),
        (lambda h, n: say(h, "[[11]]"), "no score from 1 to 10 in '[[11]]'"),
        (lambda h, n: say(h, "[[nan]]"), "no score from 1 to 10"),
    ],
)
def test_no_judgement_is_an_error_never_a_score(endpoint: Endpoint, reply: Any, problem: str) -> None:
    endpoint.reply = reply
    start = time.monotonic()
    message = fails(endpoint, timeout=0.5 if "0.5" in problem else 5.0, retries=1)
    assert problem in message
    assert message.endswith("(2 requests)")
    assert time.monotonic() - start < 8


def test_nobody_listens() -> None:
    endpoint = Endpoint()
    endpoint.server.server_close()
    assert "no response: ConnectionRefusedError" in fails(endpoint, retries=0)


def test_the_key_is_sent_and_never_shown(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert judged(endpoint, key_variable="JUDGE_KEY") == [7.0]
    assert endpoint.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    endpoint.reply = lambda handler, number: send(handler, 401, f"Incorrect API key provided: {KEY}.".encode())
    assert "status 401 Incorrect API key provided: ***." in fails(endpoint, key_variable="JUDGE_KEY")
    for length in (180, 190, 199):  # where what is shown of it would be cut
        endpoint.reply = lambda handler, number, length=length: send(handler, 401, b"x" * length + KEY.encode())
        assert "sk-" not in fails(endpoint, key_variable="JUDGE_KEY")
        endpoint.reply = lambda handler, number, length=length: say(handler, KEY + "x" * (length - 80))
        assert "secret" not in fails(endpoint, key_variable="JUDGE_KEY")
    assert KEY not in caplog.text
    reward = JudgeReward(endpoint.url, "m", key_variable="JUDGE_KEY")
    assert KEY not in repr(vars(reward))


def test_the_key_goes_to_no_other_host(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = Endpoint()
    thread = threading.Thread(target=other.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        for status in (301, 302, 303, 307, 308):
            endpoint.reply = lambda h, n, status=status: send(h, status, b"", Location=f"{other.url}/chat/completions")
            assert f"status {status}" in fails(endpoint, key_variable="JUDGE_KEY")
    finally:
        other.server.shutdown()
        other.server.server_close()
        thread.join()
    assert other.seen == []


def test_a_template_names_what_is_there(endpoint: Endpoint) -> None:
    message = fails(endpoint, answer(level=1), template="{answer} {levle}")
    assert "row 3: the template names {levle}; there are: level, prompt, answer, reference" in message
    with pytest.raises(RowError, match=r"row 3: the template names \{levle\}"):
        JudgeReward(endpoint.url, "m", template="{answer} {levle}").check(answer(level=1))
    assert endpoint.seen == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: 'localhost:8000/v1' is not allowed; allowed: http(s)://"),
        ({"base_url": "file:///etc/passwd"}, "base_url: 'file:///etc/passwd' is not allowed"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "base_url: 'host/v1' is not allowed"),
        ({"template": "{prompt}"}, "template: it has no {answer}"),
        ({"score_pattern": "(a"}, "score_pattern: '(a' is no regular expression"),
        ({"score_pattern": r"\d"}, r"score_pattern: '\\d' has no group"),
        ({"lowest": 10.0}, "lowest: 10.0 is not under highest (10.0)"),
        ({"timeout": 0}, "timeout: 0 is not allowed; allowed: 0.001 or more"),
        ({"retries": -1}, "retries: -1 is not allowed"),
        ({"workers": 0}, "workers: 0 is not allowed"),
        ({"key_variable": "NOT_SET"}, "key_variable: NOT_SET is not set in the environment"),
    ],
)
def test_options_are_checked(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rewards.judge_reward.{problem}")) as caught:
        JudgeReward(**{"base_url": "http://localhost/v1", "model": "m"} | options)
    assert KEY not in str(caught.value)
