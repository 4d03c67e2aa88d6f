"""Rewards of a server on this machine: what it is sent, when it is asked again, and what is said when it fails."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.endpoint import Bytes, http
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.rollout import served_rewards
from trl_apa.rollout.served_rewards import RewardServerError, ServedReward


KEY = "sk-a-key-of-the-server"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(served_rewards, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("TRL_APA_REWARD_KEY", raising=False)


@contextmanager
def server(reply):
    """A server that answers the number of the request and its body with a status and a body."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
            status, answer, *headers = reply(len(requests), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1/rewards", requests
    finally:
        running.shutdown()
        running.server_close()


def asked(url, completions=("a", "b"), columns=None, **options):
    return asyncio.run(ServedReward(url, **options)(["p"] * len(completions), list(completions), **(columns or {})))


def by_length(number, body):
    return 200, {"scores": [float(len(completion)) for completion in body["completions"]]}


def test_prompts_completions_and_columns_go_over_as_json_and_scores_come_back(monkeypatch):
    monkeypatch.setenv("TRL_APA_REWARD_KEY", KEY)
    messages = [{"role": "assistant", "content": "half \ud83d"}]
    with server(by_length) as (url, requests):
        columns = {"level": [1, 2], "answer": ["x", None], "objects": [object(), 1], "nan": [float("nan"), 1.0]}
        assert asked(url, ["abc", messages], columns) == [3.0, 1.0]
    assert requests == [
        {
            "path": "/v1/rewards",
            "key": f"Bearer {KEY}",
            "prompts": ["p", "p"],
            "completions": ["abc", messages],
            "columns": {"level": [1, 2], "answer": ["x", None]},
        }
    ]


def test_a_bare_list_of_scores_is_an_answer_too():
    with server(lambda number, body: (200, [1, None])) as (url, requests):
        assert asked(url) == [1, None]
    assert requests[0]["key"] is None


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_it_asks_again_where_that_may_help(status):
    with server(lambda number, body: (status, "busy") if number < 3 else by_length(number, body)) as (url, requests):
        assert asked(url) == [1.0, 1.0]
    assert len(requests) == 3


def test_it_waits_as_long_as_the_server_says():
    def reply(number, body):
        return (429, "slow down", ("Retry-After", "0.3")) if number == 1 else by_length(number, body)

    start = time.monotonic()
    with server(reply) as (url, _):
        asked(url)
    assert 0.3 <= time.monotonic() - start < 5


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_it_does_not_ask_again_where_that_cannot_help(status):
    with server(lambda number, body: (status, "no such thing", ("Location", "/other"))) as (url, requests):
        with pytest.raises(RewardServerError, match=rf"127\.0\.0\.1:\d+/v1/rewards: HTTP {status}: .no such thing"):
            asked(url)
    assert len(requests) == 1


def test_it_gives_up_after_its_retries():
    with server(lambda number, body: (503, "busy")) as (url, requests):
        with pytest.raises(RewardServerError, match=r"HTTP 503: .busy. \(asked 3 times\)"):
            asked(url, max_retries=2)
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (http("no json"), "an answer that is no JSON: no json"),
        (http(b"\xff\xfe"), "no JSON"),
        (http(""), "no JSON: an empty answer"),
        (http({"rewards": [1]}), 'without a list of "scores"'),
        (http('"text"'), 'without a list of "scores"'),
        (http({"scores": 3}), 'without a list of "scores"'),
    ],
)
def test_an_answer_that_holds_no_scores_is_shown(answer, problem):
    sender = Bytes(answer)
    try:
        with pytest.raises(RewardServerError, match=problem):
            asked(sender.url)
    finally:
        sender.close()


def test_lost_connections_are_tried_again_and_told():
    sender = Bytes(b"", b"HTTP/1.1 200", http([1.0, 2.0]))
    try:
        assert asked(sender.url) == [1.0, 2.0]
    finally:
        sender.close()
    with pytest.raises(RewardServerError, match=r"Connect\w+: .*asked 2 times"):
        asked("http://127.0.0.1:9/", max_retries=1)


@pytest.mark.parametrize("answer", [(http([1.0, 2.0]), 0.05), (b"H" * 1000, 0.05)])
def test_a_server_that_sends_a_byte_at_a_time_meets_the_time_limit(answer):
    sender, start = Bytes(answer), time.monotonic()
    try:
        with pytest.raises(RewardServerError, match=r"no scores within 0\.3 seconds"):
            asked(sender.url, timeout=0.3)
    finally:
        sender.close()
    assert time.monotonic() - start < 5


def test_the_time_limit_is_for_all_tries_and_the_last_problem_is_told():
    with server(lambda number, body: (503, "busy", ("Retry-After", "60"))) as (url, _):
        with pytest.raises(RewardServerError, match=r"within 0\.3 seconds; the last try: HTTP 503: .busy"):
            asked(url, timeout=0.3)


def test_no_key_is_in_an_error(monkeypatch):
    monkeypatch.setenv("TRL_APA_REWARD_KEY", KEY)

    def repeat(number, body):
        return 401, f"the key {KEY} and hunter2-password are refused"

    with server(repeat) as (url, _):
        with pytest.raises(RewardServerError) as raised:
            asked(url.replace("http://", "http://me:hunter2-password@"))
        error = raised.value
        shown = repr(error) + repr(error.__cause__) + repr(error.__context__)
    assert KEY not in shown and "hunter2" not in shown and "401" in shown


def test_a_name_holds_no_key():
    assert ServedReward("https://me:secret@host:81/a/b/?api_key=sk-1").__name__ == "host:81/a/b"


@pytest.mark.parametrize("url", ["http://", "https://:80/x", "http://host:99999/", "http://[::1/"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="it should be http://HOST"):
        ServedReward(url)


def trainer(tmp_path, rewards, **options):
    rows = [{"prompt": "w3 w4", "level": level} for level in range(4)]
    config = tiny_config(tmp_path, **{"max_steps": 1, "max_completion_length": 4, "logging_steps": 1, **options})
    return APATrainer(
        config, tiny_model(), processing_class=tiny_tokenizer(), train_dataset=rows, reward_funcs=rewards
    )


def test_train_learns_from_a_server_s_scores_beside_a_function_s(tmp_path):
    def one(completions, **_):
        return [1.0] * len(completions)

    with server(lambda number, body: (200, {"scores": body["columns"]["level"]})) as (url, requests):
        made = trainer(tmp_path, [url, one], reward_weights=[2.0, 1.0])
        made.train()
    [request] = requests
    assert len(request["completions"]) == 4 and request["prompts"] == ["w3 w4"] * 4
    [log] = [log for log in made.state.log_history if "apa/mean_scores" in log]
    assert log["apa/mean_scores"] == pytest.approx(2 * 1.5 + 1)
    assert made.scorer.names[0].startswith("127.0.0.1:")


def test_what_the_server_said_is_in_the_error_where_reward_timeout_ends_the_waiting(tmp_path):
    async def other(completions, **_):
        return [0.0] * len(completions)

    for _ in range(3):  # the limits of the function and of the run are the same: which ends first is chance
        with server(lambda number, body: (503, "overloaded")) as (url, _):
            made = trainer(tmp_path, [other, url], reward_timeout=0.3)
            made.scorer.functions[1].max_retries = 1000
            with pytest.raises(
                RuntimeError, match=r"no scores within 0\.3 seconds; the last try: HTTP 503: .overloaded"
            ):
                made.train()


def test_a_function_beside_a_server_is_limited_too(tmp_path):
    def slow(completions, **_):
        time.sleep(20)

    with server(by_length) as (url, _):
        with pytest.raises(TimeoutError, match=r"slow gave no answer within reward_timeout=0\.3 seconds"):
            trainer(tmp_path, [slow, url], reward_timeout=0.3).train()


@pytest.mark.parametrize(
    ("reply", "error", "problem"),
    [
        (lambda number, body: (200, [1.0]), ValueError, "gave 1 values for 4 responses"),
        (lambda number, body: (200, ["a"] * 4), ValueError, "'a' for row 0"),
        (lambda number, body: (403, "not you"), RuntimeError, "HTTP 403: .not you"),
    ],
)
def test_train_ends_with_one_error_that_names_the_server(tmp_path, reply, error, problem):
    with server(reply) as (url, _):
        with pytest.raises(error, match=rf"reward function 127\.0\.0\.1:\d+/v1/rewards .*{problem}"):
            trainer(tmp_path, url, reward_timeout=20.0).train()
