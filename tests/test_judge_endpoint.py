"""A judge behind an endpoint: what it is asked, how its replies are read, what is said of answers that are none."""

import asyncio
import json
import logging
import threading
import time

import pytest

from tests.endpoint import KEY, Bytes, Endpoint, completion, http, prefers_longer, section, servers
from trl_apa.winrate import JudgeError, OpenAIJudge, Pair, VerdictCache, compare
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.prompting import IN_WORDS
from trl_apa.winrate.replies import NotACompletion, read_completion, read_verdict


QUESTION = Question("p", "a", "b")


@pytest.fixture
def serving(monkeypatch):
    with servers(monkeypatch) as keep:
        yield keep


@pytest.fixture
def endpoint(serving):
    return lambda reply: serving(Endpoint(reply))


# ---- what it is asked ----


def test_an_endpoint_is_asked_in_both_orders_with_the_reference(endpoint):
    server = endpoint(prefers_longer)
    pairs = [Pair("Why?", "because so", "so", "as it is"), Pair("How?", "well", "well", None)]
    judge = OpenAIJudge(
        "judge-1", server.url, request={"temperature": None, "max_tokens": 64, "top_k": 5, "n": 1}, workers=2
    )
    assert [judgement.verdicts for judgement in compare(pairs, judge)] == [("first", "second"), ("tie", "tie")]
    asked = {request["messages"][0]["content"]: request for request in server.requests}
    assert len(server.requests) == len(asked) == 3
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["authorization"] == f"Bearer {KEY}"
        assert request["model"] == "judge-1" and request["max_tokens"] == 64 and "temperature" not in request
        # a field that OpenAI does not have
        assert request["top_k"] == 5
    with_reference = [text for text in asked if section(text, "request") == "Why?"]
    assert {section(text, "answer A") for text in with_reference} == {"because so", "so"}
    assert {section(text, "reference answer") for text in with_reference} == {"as it is"}
    (without,) = asked.keys() - set(with_reference)
    assert "reference" not in without and without.endswith(IN_WORDS)


def test_as_many_requests_are_under_way_as_there_are_workers(endpoint):
    together = threading.Barrier(3, timeout=20)

    def reply(text):
        together.wait()
        return "[[A]]"

    judge = OpenAIJudge("m", endpoint(reply).url, workers=3)
    verdicts = list(judge([Question(str(number), "a", "b") for number in range(6)]))
    assert sorted(verdicts) == [(number, "first") for number in range(6)]


def test_a_judge_can_be_asked_from_a_notebook_and_left_early(endpoint):
    judge = OpenAIJudge("m", endpoint(lambda text: "[[A]]").url, workers=2)

    async def in_a_loop():
        return list(judge([QUESTION]))

    assert asyncio.run(in_a_loop()) == [(0, "first")]
    verdicts = judge([QUESTION] * 5)
    assert next(verdicts)[1] == "first"
    verdicts.close()
    assert "requests" not in {thread.name for thread in threading.enumerate()}


def test_the_key_comes_from_the_environment_alone(endpoint, monkeypatch):
    server = endpoint(lambda text: "[[A]]")
    monkeypatch.setenv("MY_KEY", "sk-mine\n")
    list(OpenAIJudge("m", server.url, api_key_env="MY_KEY")([QUESTION]))
    monkeypatch.delenv("OPENAI_API_KEY")
    list(OpenAIJudge("m", server.url)([QUESTION]))
    assert [request["authorization"] for request in server.requests] == ["Bearer sk-mine", "Bearer none"]
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        OpenAIJudge("m")
    for key in ("sk-\nmine", "sk-mïne", "sk-\x1bmine"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ValueError, match="MY_KEY should hold a key") as raised:
            OpenAIJudge("m", server.url, api_key_env="MY_KEY")
        assert "mine" not in str(raised.value) and "mïne" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"workers": 0}, "workers=0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.0}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"base_url": "127.0.0.1:8000/v1"}, "base_url='127.0.0.1:8000/v1': it should be http://HOST"),
        ({"base_url": "ftp://host/v1"}, "base_url='ftp://host/v1'"),
        ({"base_url": "http://"}, "base_url='http://'"),
        ({"base_url": "http://host:99999/v1"}, "base_url='http://host:99999/v1'"),
        ({"base_url": "http://host:port/v1"}, "base_url='http://host:port/v1'"),
        ({"base_url": "http://[::1/v1"}, r"base_url='http://\[::1/v1'"),
        ({"request": {"stream": True}}, "request has stream=True"),
        ({"request": {"n": 2}}, "request has n=2"),
        ({"request": {"model": "other"}}, "request has model='other'"),
        ({"request": {"messages": []}}, r"request has messages=\[\]"),
        ({"request": {"temperature": float("nan")}}, "cannot be sent as JSON"),
        ({"request": {"stop": {"a"}}}, "cannot be sent as JSON"),
    ],
)
def test_options_that_no_request_can_have_are_refused(options, problem, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match=problem):
        OpenAIJudge("m", **options)


# ---- how its replies are read ----


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "first"),
        ("B is weaker.\n\n[[A]]", "first"),
        ("[[C]]", "tie"),
        ("**[[B]]**", "second"),
        ("My verdict: [[B]].", "second"),
        ("[[B]], that is [[B]]", "second"),
        ("[[ a ]]", "first"),
        ("\\[\\[A\\]\\]", "first"),
        # both
        ("[[A]] [[B]]", None),
        ("[[A]]\n[[B]]", None),
        ("not [[A]] but [[B]].", None),
        ("[[A]] is more polite.\n\n[[B]]", None),
        ("[[A]], [[B]] or [[C]]?\n[[A]]", None),
        # a tie and a winner
        ("I could say [[C]], but:\n[[B]]", "second"),
        ("[[A]] was my first thought.\n\n> **[[C]]**\n", "tie"),
        ("[[C]] or [[B]]", None),
        ("[[C]]\n[[B]]", None),
        # neither
        ("A", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[A/B]]", None),
        ("[[AB]]", None),
        ("Answer A is better.", None),
        ("", None),
        # thoughts
        ("<think>[[A]]? No.</think>\n[[B]]", "second"),
        ("[[A]]? No.</think>[[B]]", "second"),
        ("<think>[[A]]", None),
        ("<think>[[A]]</think> I cannot tell.", None),
    ],
)
def test_the_verdict_of_a_reply(reply, verdict):
    assert read_verdict(reply) == verdict


def body(content, finish_reason="stop", **message):
    return json.dumps(completion(content, finish_reason, **message)).encode()


@pytest.mark.parametrize(
    ("reply", "verdict", "reason"),
    [
        (body("[[A]]"), "first", ""),
        (body("[[A]]", None), "first", ""),
        (body("[[A]]", "STOP"), "first", ""),
        (body("[[A]]", "eos_token"), "first", ""),
        (body([{"type": "text", "text": "So:\n"}, {"type": "text", "text": "[[B]]"}]), "second", ""),
        (body([{"type": "thinking", "thinking": "[[A]]"}, {"type": "text", "text": "[[B]]"}]), "second", ""),
        (body("[[A]]", "length"), None, "cut by length"),
        (body("[[A]]", "LENGTH"), None, "cut by length"),
        (body("[[A]]", "content_filter"), None, "content_filter"),
        (body("[[A]]", "max_tokens"), None, "max_tokens"),
        (body("[[A]]", "abort"), None, "abort"),
        (body("[[A]]", "tool_calls"), None, "tool_calls"),
        (body("[[A]]", {"type": "length"}), None, "type"),
        (body("[[A]]", refusal="I would rather not."), None, "a refusal"),
        (body(None), None, "no text"),
        (body(""), None, "no text"),
        (body(" \n"), None, "no text"),
        (body([]), None, "no text"),
        (body(None, reasoning_content="[[A]]"), None, "no text"),
        (body("[[A]] [[B]]"), None, "several verdicts"),
        (body("Neither."), None, "none of"),
    ],
)
def test_a_reply_that_did_not_end_by_itself_has_no_verdict(reply, verdict, reason):
    reading = read_completion(reply)
    assert reading.verdict == verdict and reason in reading.reason and bool(reading.reason) == (verdict is None)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"<html></html>", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"data: {}\n\ndata: [DONE]\n", "not JSON"),
        (b"null", "no JSON object"),
        (b"[]", "no JSON object"),
        (b'"[[A]]"', "no JSON object"),
        (b"{}", "no choices"),
        (b'{"choices": []}', "no choices"),
        (b'{"choices": null}', "no choices"),
        (b'{"choices": {"message": {"content": "[[A]]"}}}', "no choices"),
        (b'{"error": {"message": "no such model"}}', "an error"),
        (b'{"choices": ["[[A]]"]}', "no message"),
        (b'{"choices": [{"text": "[[A]]"}]}', "no message"),
        (b'{"choices": [{"message": "[[A]]"}]}', "no message"),
        (b'{"choices": [{"message": {"content": 1}}]}', "no text"),
        (b'{"choices": [{"message": {"content": {"text": "[[A]]"}}}]}', "no text"),
        (b'{"choices": [{"message": {"content": [{"type": "text", "text": 1}]}}]}', "no text"),
    ],
)
def test_what_is_no_chat_completion_is_told_apart(reply, problem):
    with pytest.raises(NotACompletion, match=problem):
        read_completion(reply)


# ---- answers that are none ----


def test_busy_and_failing_servers_are_asked_again(endpoint):
    answers = iter([429, 500, 503, "[[A]]"])
    server = endpoint(lambda text: next(answers))
    judge = OpenAIJudge("m", server.url, max_retries=3, workers=1)
    assert list(judge([QUESTION])) == [(0, "first")]
    assert len(server.requests) == 4


def test_a_refusal_comes_after_the_verdicts_that_were_given_and_does_not_tell_the_key(endpoint, tmp_path, caplog):
    server = endpoint(lambda text: 401 if section(text, "request") == "second" else "[[B]]")
    judge = OpenAIJudge("m", server.url, workers=1)
    cache = VerdictCache(tmp_path / "cache.jsonl")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(JudgeError, match=r"gave no answer: AuthenticationError: .* answered HTTP 401") as raised,
    ):
        compare([Pair("first", "a", "b"), Pair("second", "a", "b"), Pair("third", "a", "b")], judge, cache)
    # 401 is not asked again, and what waits is not asked at all
    assert len(server.requests) == 3 and len(cache) == 2
    assert "<secret>" in str(raised.value) and raised.value.__context__ is None
    for told in (str(raised.value), caplog.text, cache.path.read_text(), repr(judge.identity)):
        assert KEY not in told


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation", "context_length_exceeded"])
def test_an_error_about_one_question_ends_nothing(code, serving):
    refusal = http({"error": {"message": "no", "type": "invalid_request_error", "code": code}}, "400 Bad Request")
    judge = OpenAIJudge("m", serving(Bytes(refusal, http(completion("[[A]]")))).url, workers=1)
    assert list(judge([QUESTION, QUESTION])) == [(0, None), (1, "first")]
    assert judge.without_verdict == {f"refused by the endpoint ({code})": 1}


def test_requests_that_were_under_way_when_another_failed_are_waited_for(endpoint):
    refused = threading.Event()

    def reply(text):
        if section(text, "request") == "bad":
            refused.set()
            return 403
        refused.wait(20)
        time.sleep(0.1)
        return "[[B]]"

    server = endpoint(reply)
    verdicts = OpenAIJudge("m", server.url, workers=2)([Question(p, "a", "b") for p in ("good", "bad", "late")])
    assert next(verdicts) == (0, "second")
    with pytest.raises(JudgeError, match="403"):
        next(verdicts)
    assert len(server.requests) == 2


PAGE = "<html>\n<head><title>Sign in</title></head>\x1b[31m" + "<p>x</p>" * 500
ANSWERS = {
    "an HTML page": (http(PAGE, kind="text/html"), r"HTTP 200, .* \(it is not JSON\): <html> <head><title>Sign in"),
    "an HTML page that is called JSON": (http(PAGE), r"HTTP 200, .* \(it is not JSON\): <html>"),
    "an error": (http({"error": {"message": "no model m"}}), r'HTTP 200, .* \(it is an error\): .*"no model m"'),
    "no choices": (http({"choices": []}), r'HTTP 200, .* \(it has no choices\): {"choices": \[\]}'),
    "another shape": (http(["[[A]]"]), r"HTTP 200, .* \(it is no JSON object\)"),
    "no body": (http(""), r"HTTP 200, .* \(the body is empty\)$"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", r"HTTP 204, .* \(the body is empty\)$"),
    "a stream": (http('data: {"x": 1}\n\n', kind="text/event-stream"), r"\(it is not JSON\): data: {"),
    "no text": (http(b"\xff\xfe\x00"), r"\(it is not JSON\)"),
    "nesting": (http("[" * 100_000), r"\(it is not JSON\): \[\["),
    "a gateway's page": (http(PAGE, "502 Bad Gateway", "text/html"), "answered HTTP 502: <html> <head>"),
    "a refusal in JSON": (http({"error": "busy"}, "418 Teapot"), 'answered HTTP 418: {"error": "busy"}'),
    "a redirect to nowhere": (http("moved", "302 Found"), "answered HTTP 302: moved"),
    "a redirect to itself": (http("", "302 Found", headers="Location: /v1\r\n"), "Exceeded maximum allowed redirects"),
    "a redirect to no address": (http("", "302 Found", headers="Location: http://[::1\r\n"), "location header"),
    "a redirect to no port": (
        http("", "302 Found", headers="Location: http://127.0.0.1:99999/\r\n"),
        "RemoteProtocolError",
    ),
    "a redirect to no name": (
        http("", "302 Found", headers=f"Location: http://{'a' * 300}.b/\r\n"),
        "RemoteProtocolError|ConnectError",
    ),
    "a redirect to no web page": (http("", "302 Found", headers="Location: ftp://a/b\r\n"), "unsupported protocol"),
    "a false encoding": (http("nonsense", headers="Content-Encoding: gzip\r\n"), "decompressing"),
    "half a body": (http(completion("[[A]]"))[:-5], "without sending complete message body"),
    "no HTTP": (b"hello\r\n\r\n", "RemoteProtocolError"),
    "nothing": (b"", "without sending a response"),
}


@pytest.mark.parametrize(("answer", "said"), ANSWERS.values(), ids=ANSWERS)
def test_what_the_endpoint_answered_is_said_in_one_line(answer, said, serving):
    server = serving(Bytes(answer))
    with pytest.raises(JudgeError, match=f"^m gave no answer: .*{server.url}.*{said}") as raised:
        list(OpenAIJudge("m", server.url, max_retries=0)([QUESTION]))
    message = str(raised.value)
    assert message.isprintable() and len(message) < 400
    assert raised.value.__context__ is None


def test_a_completion_counts_whatever_kind_of_text_it_is_called(serving):
    for kind in ("text/plain", "text/html; charset=klingon", "application/json; charset=utf-8"):
        server = serving(Bytes(http(completion("[[A]]"), kind=kind)))
        assert list(OpenAIJudge("m", server.url)([QUESTION])) == [(0, "first")]


def test_a_redirect_is_followed_and_named(serving):
    target = serving(Bytes(http(PAGE, kind="text/html")))
    server = serving(Bytes(http("", "307 Temporary Redirect", headers=f"Location: {target.url}/login\r\n")))
    said = f"{target.url}/login, to which {server.url}/chat/completions redirects, answered HTTP 200"
    with pytest.raises(JudgeError, match=said):
        list(OpenAIJudge("m", server.url, max_retries=0)([QUESTION]))
    target.answers = [http(completion("[[B]]"))]
    assert list(OpenAIJudge("m", server.url, max_retries=0)([QUESTION])) == [(0, "second")]


def test_no_answer_tells_the_key_not_even_half_of_it_where_the_excerpt_ends(serving):
    server = serving(Bytes(b""))
    for filling in range(180, 300, len(KEY) // 2):
        server.answers = [http({"error": "x" * filling + KEY}, "400 Bad")]
        with pytest.raises(JudgeError) as raised:
            list(OpenAIJudge("m", server.url, max_retries=0)([QUESTION]))
        assert KEY[:4] not in str(raised.value)


def test_a_server_that_is_not_there_is_named(serving):
    server = Bytes(b"")
    server.close()
    with pytest.raises(JudgeError, match=rf"m gave no answer: APIConnectionError: {server.url}.*\(asked 1 times\)"):
        list(OpenAIJudge("m", server.url, max_retries=0)([QUESTION]))


SLOW = 0.05  # seconds a byte, far less than any limit on single reads
ANSWER = http(completion("[[A]]" + " " * 500))
HEAD = ANSWER.partition(b"{")[0]
SLOW_ANSWERS = {
    "headers": (ANSWER, SLOW),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + b" " * 999, SLOW),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 999, SLOW),
    "an error's body": (b"HTTP/1.1 400 Bad\r\nContent-Length: 999\r\n\r\n" + b" " * 999, SLOW),
    "nothing": (b"HTTP", 30),
}


@pytest.mark.parametrize("answer", SLOW_ANSWERS.values(), ids=SLOW_ANSWERS)
def test_the_time_limit_is_on_the_whole_request(answer, serving):
    server = serving(Bytes(answer))
    begun = time.monotonic()
    with pytest.raises(JudgeError, match=r"no complete answer within 0.3 s \(asked 1 times\)"):
        list(OpenAIJudge("m", server.url, max_retries=0, timeout=0.3)([QUESTION]))
    assert time.monotonic() - begun < 5


def test_a_request_that_took_too_long_is_made_again(serving):
    server = serving(Bytes((ANSWER, SLOW), ANSWER))
    assert list(OpenAIJudge("m", server.url, max_retries=1, timeout=0.5)([QUESTION])) == [(0, "first")]
    assert server.connections == 2
