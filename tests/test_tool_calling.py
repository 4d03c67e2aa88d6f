"""Calls of tools: their order, their time, and everything that can come back from them."""

import asyncio
import threading
import time

import pytest

from trl_apa.tools.calling import MOST_AT_ONCE, Call, ToolCaller


def one(function, timeout=None, **arguments):
    [[outcome]] = ToolCaller()([[Call(getattr(function, "__name__", "f"), function, arguments)]], timeout)
    return outcome


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("yes", "yes"),
        (42, "42"),
        (None, "None"),
        ([], "[]"),
        ([1, "a"], "[1, 'a']"),
        ({"a": 1}, "{'a': 1}"),
        ([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}], "two parts"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_a_result_is_told_as_its_text(result, text):
    outcome = one(lambda: result)
    assert (outcome.text, outcome.failed, outcome.timed_out) == (text, False, False)


class Untold(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Unprintable:
    def __str__(self):
        raise ValueError("cannot be printed")


ERRORS = [
    ValueError("bad"),
    KeyError("k"),
    SystemExit(3),
    KeyboardInterrupt("x"),
    StopIteration("s"),
    GeneratorExit("g"),
]
ERRORS += [asyncio.CancelledError("c"), RecursionError("r"), Untold(), ExceptionGroup("several", [ValueError("v")])]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_tool_raises_comes_back_as_text(error, is_async):
    def fails():
        raise error

    async def fails_later():
        await asyncio.sleep(0)
        raise error

    outcome = one(fails_later if is_async else fails, timeout=5)
    assert outcome.failed and outcome.text.startswith("{'error': ")
    if not isinstance(error, Untold) and not (is_async and isinstance(error, asyncio.CancelledError)):
        assert str(error).strip("'") in outcome.text


def test_results_and_arguments_that_cannot_be_used_are_failures():
    assert "cannot be printed" in one(Unprintable).text
    assert "'image'" in one(lambda: [{"type": "image", "image": 0}]).text
    assert "unexpected keyword" in one(lambda: 1, extra=2).text
    caller = ToolCaller()
    for arguments in (None, "text", [1], 3):
        [[outcome]] = caller([[Call("f", lambda: 1, arguments)]])
        assert outcome.failed and "no JSON object" in outcome.text
    [[outcome]] = caller([[Call("g", None, {})]])
    assert outcome.failed and outcome.text == "{'error': 'Tool g not found.'}"


def test_a_tool_that_edits_its_arguments_does_not_edit_the_message():
    arguments = {"items": [1]}

    def clear(items):
        items.clear()

    ToolCaller()([[Call("clear", clear, arguments)]])
    assert arguments == {"items": [1]}


def test_calls_of_one_rollout_run_in_order_and_rollouts_in_parallel():
    meeting, order = threading.Barrier(MOST_AT_ONCE, timeout=10), []

    def meet(number):
        meeting.wait()
        return number

    outcomes = ToolCaller()([[Call("meet", meet, {"number": number})] for number in range(2 * MOST_AT_ONCE)], 20)
    assert [outcome.text for [outcome] in outcomes] == [str(number) for number in range(2 * MOST_AT_ONCE)]

    def note(number):
        time.sleep(0.01 * (3 - number))
        order.append(number)

    ToolCaller()([[Call("note", note, {"number": number}) for number in range(3)]])
    assert order == [0, 1, 2]


def test_coroutine_functions_run_together_on_one_loop_and_answers_stay_in_place():
    loops = []

    async def wait(number):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        return number

    caller = ToolCaller()
    lanes = [[Call("wait", wait, {"number": 0}), Call("f", lambda: "f", {}), Call("wait", wait, {"number": 2})]] * 4
    start = time.monotonic()
    outcomes = caller(lanes, 10) + caller(lanes[:1], 10)
    assert time.monotonic() - start < 1.5
    assert [[outcome.text for outcome in lane] for lane in outcomes] == [["0", "f", "2"]] * 5
    assert len(set(map(id, loops))) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_hangs_is_abandoned_and_the_others_answer(is_async):
    release = threading.Event()

    def hang():
        release.wait(20)

    async def hang_later():
        await asyncio.sleep(20)

    hanging = Call("hang", hang_later if is_async else hang, {})
    start = time.monotonic()
    lanes = [[hanging, Call("f", lambda: "f", {})], [Call("f", lambda: "f", {})]]
    [[stuck, after], [other]] = ToolCaller()(lanes, 0.2)
    release.set()
    assert time.monotonic() - start < 5
    assert stuck.timed_out and stuck.failed and "hang gave no answer within 0.2 seconds" in stuck.text
    assert after.text == other.text == "f" and not after.failed


def test_a_coroutine_that_blocks_its_loop_does_not_block_later_calls():
    release = threading.Event()

    async def block():
        release.wait(20)

    async def answer():
        return "here"

    caller = ToolCaller()
    [[blocked]] = caller([[Call("block", block, {})]], 0.2)
    [[later]] = caller([[Call("answer", answer, {})]], 5)
    release.set()
    assert blocked.timed_out and later.text == "here"


def test_many_hanging_tools_keep_no_other_rollout_waiting():
    release = threading.Event()
    lanes = [[Call("hang", lambda: release.wait(20), {})] for _ in range(MOST_AT_ONCE)] + [[Call("f", lambda: 1, {})]]
    outcomes = ToolCaller()(lanes, 0.1)
    release.set()
    assert [lane[0].timed_out for lane in outcomes] == [True] * MOST_AT_ONCE + [False]
