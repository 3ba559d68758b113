"""The judge against a real server on loopback that is slow, drops connections, refuses, and talks nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from glimpseprune import config, judge, rewards
from glimpseprune.config import MISSING, UserError
from glimpseprune.judge import Judge, Prompt, parse_score
from glimpseprune.options import JudgeOptions


def completion(text, finish_reason="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


class Server(ThreadingHTTPServer):
    """Answers what ``respond(graded, attempt)`` says: (status, body[, headers]), or None to drop the connection.

    ``graded`` is the JSON of question, references and prediction in the prompt, ``attempt`` counts from 0 per
    prediction. Keeps the requests and how many were under way at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, respond):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.requests, self.headers, self.attempts = [], [], {}
        self.busy = self.peak = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has hung up is part of the play


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        graded = json.loads(request["messages"][0]["content"].rpartition("\n")[2])
        with server.lock:
            server.requests.append((self.path, request))
            server.headers.append(self.headers)
            attempt = server.attempts[graded["prediction"]] = server.attempts.get(graded["prediction"], -1) + 1
            server.busy += 1
            server.peak = max(server.peak, server.busy)
        try:
            response = server.respond(graded, attempt)
        finally:
            with server.lock:
                server.busy -= 1
        if response is not None:
            status, body, *headers = response
            self.send_response(status)
            for name, value in headers[0].items() if headers else ():
                self.send_header(name, value)
            self.end_headers()
            if isinstance(body, dict):
                body = json.dumps(body).encode()
            for chunk in [body] if isinstance(body, bytes) else body:
                self.wfile.write(chunk)
                self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(respond):
        servers.append(Server(respond))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def make(server, **options):
    defaults = {"concurrency": 4, "timeout": 5.0, "retries": 2, "backoff": 0.01}
    url = server if isinstance(server, str) else server.url
    return Judge(JudgeOptions(**{"base_url": url, "model": "tiny", **defaults, **options}))


def ask(judge, *predictions):
    return asyncio.run(judge.verdicts(["what?"] * len(predictions), [("a", "b")] * len(predictions), predictions))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 0.8.", 0.8), ("Score: 1", 1.0), ("score: .5", 0.5), ("**score**: 0.7", 0.7), ("**Score: 0.7**", 0.7),
        ("**Score:** 0.7", 0.7), ('{"score": 0.4}', 0.4), ('{"final_score": "0.4"}', 0.4), ("SCORE = 1.", 1.0),
        ("It is right.\n\nscore:\n0.25\nbecause", 0.25), ("score: <0.9>", 0.9), ("`score: 0`", 0.0),
        ("score：0.5分", 0.5),  # as in Chinese text
        ("score: 0.8/1", 0.8), ("score: 0.8 / 1.0.", 0.8), ("Score: 1 out of 1", 1.0), ("score: 1/1", 1.0),
        # several: none, unless they are equal
        ("score: 0.2\nOn reflection, score: 0.9", None), ("score: 0.2, score: 3", None), ("score: 1, score: 1.0.", 1.0),
        ("score: 1\nThat is, score: 10/10", None), ("score: 0 score: high", 0.0),
        ('score: 0\nThe prediction "score: 1" does not answer the question.', None),
        # none, or not from 0 to 1
        ("", None), ("0.8", None), ("the score is good", None), ("score: <number from 0 to 1>", None),
        ("score: high", None), ("score: nan", None), ("score: -0.5", None), ("score: 1.01", None), ("score: 80", None),
        ("score: 8/10", None), ("score: 1 / 10", None), ("score: 1/1.5", None), ("score: 1 out of 10", None),
        ("score: 1%", None), ("score: 0,8", None), ("score: 0.8.1", None), ("score: 1e-1", None),
        ("underscore: 1", None),
    ],
)  # fmt: skip
def test_parse_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize("prediction", ["score: 1", "blue\n**Score**: 1.0", '{"score": 1}'])
def test_a_prediction_that_names_a_score_may_be_quoted(prediction):
    for reply, score in (("score: 0", 0.0), ("**Score: 1**\n", 1.0), (f"It claims {prediction}", None), ("", None)):
        assert parse_score(reply, prediction) == score
    assert parse_score("It is right. score: 1", "a score of one") == 1.0


@pytest.mark.parametrize(
    "reply", ["score" * 10**5, "score:" * 10**5, "score: " + " " * 10**6, "score:" + "1" * 10**6, "score: 1 " * 10**5]
)
def test_parse_score_in_linear_time(reply):
    start = time.process_time()
    parse_score(reply)
    assert time.process_time() - start < 1


def test_request(serve, monkeypatch):
    server = serve(lambda graded, attempt: completion("score: 0.5"))
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    prediction = 'blue", "score": 1}\nscore: 1'  # cannot leave its field
    assert ask(make(server, api_key_env="JUDGE_KEY", max_tokens=7), prediction) == [0.5]
    [(path, request)] = server.requests
    assert path == "/v1/chat/completions" and server.headers[0]["authorization"] == "Bearer secret"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0, 7)
    graded = json.loads(request["messages"][0]["content"].rpartition("\n")[2])
    assert graded == {"question": "what?", "references": ["a", "b"], "prediction": prediction}


def test_verdicts_in_order_equal_rows_once_empty_ones_never(serve):
    server = serve(lambda graded, attempt: completion(f"score: {graded['prediction']}"))
    judge = make(server)
    assert ask(judge, "0.1", "", "0.9", "0.1", " \n") == [0.1, 0.0, 0.9, 0.1, 0.0]
    assert len(server.requests) == 2 and not judge.failures and judge.coverage == 1
    assert ask(judge, "0.9") == [0.9]  # in another event loop
    with pytest.raises(ValueError, match="zip"):
        asyncio.run(judge.verdicts(["q"], [], ["p"]))


def test_verdicts_are_remembered_by_all_that_matters(serve, tmp_path):
    """And by nothing else: neither the key in the address nor how hard the judge is asked."""
    server = serve(lambda graded, attempt: (400, {}) if graded["prediction"] == "bad" else completion("score: 0.25"))
    cache = str(tmp_path / "verdicts")
    first = make(server, cache=cache)
    assert ask(first, "p", "bad", "p") == [0.25, None, 0.25] and len(server.requests) == 2
    again = make(f"{server.url}?api_key=s3same", cache=cache, concurrency=1, retries=0, timeout=1)
    assert ask(again, "p") == [0.25] and len(server.requests) == 2
    assert (again.remembered, again.asked, again.coverage) == (1, 1, 1)
    assert ask(make(server, cache=cache), "p", "bad") == [0.25, None] and len(server.requests) == 3  # what was missing
    others = [
        (make(server, cache=cache, model="other"), "what?", ("a", "b"), "p"),
        (make(server, cache=cache, max_tokens=9), "what?", ("a", "b"), "p"),
        (make(server.url.replace("/v1", "/v2"), cache=cache), "what?", ("a", "b"), "p"),
        (Judge(first.options, Prompt("other\n{row}")), "what?", ("a", "b"), "p"),
        (make(server, cache=cache), "why?", ("a", "b"), "p"),
        (make(server, cache=cache), "what?", ("b", "a"), "p"),
        (make(server, cache=cache), "what?", ("a", "b"), "p."),
    ]
    for number, (other, question, answers, prediction) in enumerate(others, 4):
        assert asyncio.run(other.verdicts([question], [answers], [prediction])) == [0.25]
        assert len(server.requests) == number
    assert "s3same" not in "".join(file.read_text() for file in tmp_path.rglob("*.jsonl"))


def test_a_damaged_memory_costs_a_request(serve, tmp_path):
    server = serve(lambda graded, attempt: completion("score: 1"))
    assert ask(make(server, cache=str(tmp_path)), "a", "b") == [1.0, 1.0]
    (file,) = tmp_path.glob("*.jsonl")
    text = file.read_bytes()
    file.write_bytes(b'\xff\n[]\n{"key": 1, "score": 1}\n{"key": "x", "score": 7}\n' + text[:-9])
    assert ask(make(server, cache=str(tmp_path)), "a", "b") == [1.0, 1.0] and len(server.requests) == 3


def test_a_busy_server_is_left_alone_by_all_rows(serve):
    """One is told to wait a second; those that come after it wait as well."""
    times = []

    def respond(graded, attempt):
        times.append(time.monotonic())
        if graded["prediction"] == "0" and not attempt:
            return 429, {}, {"retry-after": "1"}
        time.sleep(0.02)
        return completion("score: 1")

    server = serve(respond)
    assert ask(make(server, concurrency=2), *map(str, range(20))) == [1.0] * 20
    pauses = sorted(after - before for before, after in zip(times, times[1:]))
    assert pauses[-1] > 0.8 and pauses[-2] < 0.8 and len(times) == 21


def test_a_judge_that_fails_on_everything_is_given_up(serve):
    """An error about a text is that text's affair; one about the server ends a call after some requests, not all."""
    server = serve(lambda graded, attempt: completion("score: 1") if graded["prediction"] == "0" else (500, {}))
    judge = make(server, retries=0)
    assert ask(judge, *map(str, range(400))).count(None) == 399
    assert len(server.requests) < 30 and judge.failures["judge down"] > 300
    texts = serve(lambda graded, attempt: completion("score: 1") if graded["prediction"] == "0" else (400, {}))
    judge = make(texts, retries=0)
    assert ask(judge, *map(str, range(100))).count(None) == 99 and judge.failures == {"HTTP 400": 99}


def test_a_prompt_of_ones_own():
    prompt = Prompt("q: {question}\na: {references}\np: {prediction} {other}", system="be kind")
    system, user = prompt.messages(("{prediction}?", ("a", "b"), "{row}"))
    assert system == {"role": "system", "content": "be kind"}
    assert user == {"role": "user", "content": "q: {prediction}?\na: a or b\np: {row} {other}"}


def test_as_a_reward(serve):
    server = serve(lambda graded, attempt: (400, {}) if graded["prediction"] == "bad" else completion("score: 0.5"))
    score = rewards.build({"judge": 2.0}, make(server).options)

    async def within_a_loop():
        return score(["good", "bad"], questions=["q"] * 2, answers=[("a",)] * 2)

    for scores in (asyncio.run(within_a_loop()), score(["good", "bad"], questions=["q"] * 2, answers=[("a",)] * 2)):
        assert scores.total[0] == 1.0 and scores.valid.tolist() == [True, False]
    assert score.judge.failures == {"HTTP 400": 2} and score.judge.coverage == 0.5


def test_concurrency_is_bounded(serve):
    def respond(graded, attempt):
        time.sleep(0.05)
        return completion("score: 1") if attempt else (500, {})  # retries count, too

    server = serve(respond)
    start = time.perf_counter()
    assert ask(make(server, concurrency=4), *map(str, range(12))) == [1.0] * 12
    assert server.peak == 4 and len(server.requests) == 24
    assert time.perf_counter() - start < 24 * 0.05


@pytest.mark.parametrize("trouble", [(429, {}), (500, {}), (503, {}), (408, {}), None, "half", "slow"])
def test_retries_until_it_recovers(serve, trouble):
    def respond(graded, attempt):
        if attempt == 2:
            return completion("score: 0.5")
        if trouble == "slow":
            time.sleep(0.3)
        return (200, b'{"choices', {"content-length": "100"}) if trouble in ("half", "slow") else trouble

    server = serve(respond)
    judge = make(server, timeout=0.2 if trouble == "slow" else 5.0)
    assert ask(judge, "p") == [0.5] and len(server.requests) == 3 and not judge.failures


def test_waits_as_long_as_it_is_told(serve):
    server = serve(lambda graded, attempt: completion("score: 1") if attempt else (429, {}, {"retry-after": "1"}))
    for timeout, least, most in ((5.0, 1.0, 4.0), (0.2, 0.2, 0.9)):  # but never longer than a request may take
        server.attempts.clear()
        start = time.perf_counter()
        assert ask(make(server, timeout=timeout), "p") == [1.0]
        assert least <= time.perf_counter() - start < most


def trickle():
    while True:
        yield b" "
        time.sleep(0.02)


def flood():
    while True:
        yield b" " * 65536


@pytest.mark.parametrize(
    ("response", "reason", "attempts"),
    [
        (lambda: (429, {}), "HTTP 429", 3),
        (lambda: (500, b"<html>"), "HTTP 500", 3),
        (lambda: None, "no connection", 3),
        (lambda: (200, b"{", {"content-length": "9"}), "no connection", 3),
        (lambda: time.sleep(0.3), "timeout", 3),
        (lambda: (200, trickle()), "timeout", 3),
        (lambda: (400, {"error": {"message": "too long"}}), "HTTP 400", 1),
        (lambda: (404, {}), "HTTP 404", 1),
        (lambda: (200, b"<html>score: 1</html>"), "not a chat completion", 1),
        (lambda: (200, b""), "not a chat completion", 1),
        (lambda: (200, b"\xff"), "not a chat completion", 1),
        (lambda: (200, b"[" * 100_000), "not a chat completion", 1),
        (lambda: (200, {"error": "score: 1"}), "not a chat completion", 1),
        (lambda: (200, {"choices": []}), "not a chat completion", 1),
        (lambda: completion({"score": 1}), "not a chat completion", 1),
        (lambda: (200, flood()), "reply too long", 1),
        (lambda: completion("I like it"), "no score", 1),
        (lambda: completion(None), "no score", 1),
        (lambda: completion("score: 7"), "no score", 1),
        (lambda: completion("score: 0", finish_reason="length"), "cut off at max_tokens", 1),
    ],
)
def test_missing_verdicts_are_none_and_counted(serve, response, reason, attempts):
    server = serve(lambda graded, attempt: completion("score: 1") if graded["prediction"] == "good" else response())
    judge = make(server, timeout=0.2)
    start = time.perf_counter()
    assert ask(judge, "bad", "good", "bad", "") == [None, 1.0, None, 0.0]
    assert time.perf_counter() - start < attempts * 0.2 + 1.0
    assert judge.failures == {reason: 2} and judge.asked == 4 and judge.coverage == 0.5
    assert len(server.requests) == 1 + attempts


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((401, {"error": {"message": "bad\nkey"}}), r"HTTP 401 \(.*bad.*is the key in \$OPENAI_API_KEY the right one"),
        ((404, {}), "HTTP 404 .*base_url mostly ends in /v1"),
        ((500, b"x" * 10_000), "HTTP 500 .{0,250}$"),
        ((200, b"<html>"), r"not a chat completion \(<html>\): its base_url mostly"),
        (None, "no connection .*is the server running"),
    ],
)
def test_a_judge_that_never_answered_is_a_mistake(serve, response, message):
    server = serve(lambda graded, attempt: response)
    judge = make(server, retries=0)
    assert ask(judge, "") == [0.0]  # nothing was sent
    with pytest.raises(UserError, match=rf"^no answer from the judge 'tiny' at {server.url}: {message}") as caught:
        ask(judge, "p", "q")
    assert "\n" not in str(caught.value)


def test_nobody_listens():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"{url}: no connection .*is the server running"):
            ask(make(url), "p")


def test_nonsense_is_an_answer(serve):
    assert ask(make(serve(lambda graded, attempt: completion("hm"))), "p") == [None]


def test_a_judge_that_dies_costs_one_request_per_call_until_it_is_back(serve):
    alive = True
    server = serve(lambda graded, attempt: completion("score: 1") if alive else (500, {}))
    judge = make(server, retries=0)
    assert ask(judge, *"abc") == [1.0] * 3
    alive = False
    assert ask(judge, *"abc") == [None] * 3 and len(server.requests) == 6
    assert ask(judge, *"abc") == [None] * 3 and len(server.requests) == 7
    assert judge.failures == {"HTTP 500": 4, "judge down": 2} and judge.coverage == pytest.approx(1 / 3)
    alive = True
    assert ask(judge, *"abc") == [1.0] * 3 and len(server.requests) == 10
    assert ask(judge, *"abc") == [1.0] * 3 and len(server.requests) == 13


@pytest.mark.parametrize("every", [0, 9], ids=["hangs", "mostly hangs"])
def test_a_judge_that_hangs_is_given_up_by_all_rows_together(serve, every):
    """Not row by row: 400 of them, 4 at a time, three times .25 s each, would be more than a minute."""
    release, alive = threading.Event(), True

    def respond(graded, attempt):
        if not alive and not (every and int(graded["prediction"]) % every == 0):
            release.wait(20)
        return completion("score: 1")

    server = serve(respond)
    judge = make(server, timeout=0.25)
    assert ask(judge, "0") == [1.0]
    alive = False
    start = time.perf_counter()
    verdicts = ask(judge, *map(str, range(400)))
    assert time.perf_counter() - start < 5
    assert len(verdicts) == 400 and verdicts.count(None) >= 380 and judge.failures["judge down"] > 300
    assert sum(judge.failures.values()) == verdicts.count(None) and judge.failures["timeout"] >= 4
    if not every:
        judge.failures.clear()
        assert ask(judge, *map(str, range(1, 9))) == [None] * 8
        assert judge.failures == {"timeout": 1, "judge down": 7}
    alive = True
    release.set()
    assert ask(judge, *map(str, range(8))) == [1.0] * 8


def test_a_judge_that_hangs_from_the_start_is_a_mistake(serve):
    release = threading.Event()
    server = serve(lambda graded, attempt: release.wait(20) and None)
    start = time.perf_counter()
    with pytest.raises(UserError, match="timeout .no reply within 0.1 s"):
        ask(make(server, timeout=0.1), *map(str, range(400)))
    assert time.perf_counter() - start < 3
    release.set()


SECRET = "http://someone:s3same@127.0.0.1:{}/v1?api_key=0pen&api-version=2&token=f00bar"


def test_secrets_in_a_url_are_sent_and_not_told(serve, monkeypatch):
    """Nor those that the server repeats."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-barabas")
    alive = True

    def respond(graded, attempt):
        told = {"error": {"message": "no s3same 0pen f00bar api_key sk-barabas"}}
        return completion("score: 1") if alive else (401, told)

    server = serve(respond)
    url = SECRET.format(server.server_port)
    assert ask(make(url), "p") == [1.0]
    assert server.requests[0][0] == "/v1/chat/completions?api_key=0pen&api-version=2&token=f00bar"
    assert server.headers[0]["authorization"].startswith("Basic")
    alive = False
    with pytest.raises(UserError) as caught:
        ask(make(url), "p")
    assert not any(secret in str(caught.value) for secret in ("s3same", "0pen", "f00bar", "barabas"))
    assert f"at http://127.0.0.1:{server.server_port}/v1?api-version=2: HTTP 401" in str(caught.value)


def test_secrets_in_a_url_are_not_saved(tmp_path):
    options = JudgeOptions(base_url=SECRET.format(1), model="m")
    config.save(options, tmp_path / "config.yaml")
    assert config.read(JudgeOptions, tmp_path / "config.yaml").base_url == "http://127.0.0.1:1/v1?api-version=2"
    assert options.base_url == SECRET.format(1)  # still used
    for wrong in (SECRET.replace("http", "htp"), SECRET.removeprefix("http://")):
        with pytest.raises(UserError, match="base_url: give an address that begins with http") as caught:
            config.merge_options(JudgeOptions, {"base_url": wrong, "model": "m"}, "rewards.judge")
        assert "s3same" not in str(caught.value) and "0pen" not in str(caught.value)
    with pytest.raises(UserError, match="name of an environment variable") as caught:
        JudgeOptions(base_url="http://x/v1", model="m", api_key_env="sk-barabas")
    assert "barabas" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("base_url=localhost:8000", "base_url: give an address that begins with http"),
        ("modle=x", "unknown key 'modle'"),
    ],
)
def test_options(option, message):
    good = ["base_url=http://x/v1", "model=m"]
    assert config.load(JudgeOptions, good).api_key_env == "OPENAI_API_KEY"
    with pytest.raises(UserError, match=message):
        config.load(JudgeOptions, [*good, option])
    with pytest.raises(UserError, match="missing mandatory key 'model'"):
        config.load(JudgeOptions, good[:1])
    assert JudgeOptions().base_url == MISSING


def test_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModuleNotFoundError, match="openai"):
        make("http://x")
    assert "openai" not in vars(judge)  # imported only when a judge is made
