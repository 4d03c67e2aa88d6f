"""What a judge behind an endpoint replied: a verdict, or why there is none."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from trl_apa.winrate.prompting import VERDICTS


# What servers of the chat protocol say when a reply ended by itself; some say nothing.
FINISHED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "")
# Some models escape the brackets, as Markdown, or write spaces or small letters in them.
VERDICT = r"\\?\[\\?\[\s*([ABC])\s*\\?\]\\?\]"
SCORE = r"\\?\[\\?\[\s*([+-]?\d+(?:\.\d+)?)\s*\\?\]\\?\]"
# With only punctuation around it, which Markdown uses too.
VERDICT_LINE = rf"^[^\w\n]*_*{VERDICT}_*[^\w\n]*$"


class NotACompletion(Exception):
    """A body that is not a chat completion, though the status was that of a success; its text is what it lacks."""


class Reading(NamedTuple):
    """What a reply says.

    Args:
        verdict: as in `VERDICTS`; None if it has none.
        reason: why it has none.
    """

    verdict: str | None
    reason: str = ""


def read_completion(body: bytes) -> Reading:
    """The verdict of the first choice of a chat completion, as `read_text` finds it."""
    return read_reply(body, read_text)


def read_reply(body: bytes, read: Callable[[str], Reading]) -> Reading:
    """What `read` says of the text of the first choice of a chat completion.

    Nothing of a reply that did not end by itself (cut by length, a content filter, a call of a tool), a refusal, and
    one without text.

    Raises:
        NotACompletion: if `body` is not a chat completion.
    """
    choice = _first_choice(body)
    message = choice["message"]
    ended_by = str(choice.get("finish_reason") or "")
    if ended_by.lower() == "length":
        return Reading(None, "cut by length (finish_reason 'length')")
    if ended_by.lower() not in FINISHED:
        return Reading(None, f"ended by {ended_by[:40]!r}, not by itself")
    if message.get("refusal"):
        return Reading(None, "a refusal")
    text = _text(message.get("content"))
    return read(text) if text.strip() else Reading(None, "no text")


def read_text(text: str) -> Reading:
    """The verdict of a reply, which is `[[A]]`, `[[B]]` or `[[C]]`.

    A reply with both `[[A]]` and `[[B]]` has none. Of a tie and a winner counts what stands on a line of its own, as
    it was asked for. What a reasoning model thought before `</think>` is not read.
    """
    answer = spoken(text)
    letters = _letters(VERDICT, answer)
    if len(letters) == 2 and "C" in letters:
        letters = _letters(VERDICT_LINE, answer) or letters
    if len(letters) == 1:
        return Reading(VERDICTS[letters.pop()])
    if letters:
        return Reading(None, "several verdicts: " + ", ".join(f"[[{letter}]]" for letter in sorted(letters)))
    return Reading(None, "none of [[A]], [[B]] and [[C]]")


def read_score(text: str, lowest: float, highest: float) -> Reading:
    """The score of a reply, `[[7]]` say, as `verdict`; None if it has none, several, or one out of range.

    What a reasoning model thought before `</think>` is not read.
    """
    numbers = {float(number) for number in re.findall(SCORE, spoken(text))}
    if len(numbers) > 1:
        return Reading(None, "several scores")
    if not numbers:
        return Reading(None, "no score in double brackets")
    score = numbers.pop()
    if not lowest <= score <= highest:
        return Reading(None, f"a score out of range: {score:g}")
    return Reading(repr(score))


def spoken(text: str) -> str:
    """A reply without what a reasoning model thought."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _letters(pattern: str, text: str) -> set[str]:
    return {letter.upper() for letter in re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)}


def read_verdict(reply: str) -> str | None:
    """The verdict of a reply, None if it has none: see `read_text`."""
    return read_text(reply).verdict


def _first_choice(body: bytes) -> dict[str, Any]:
    """Its `message` is a dict."""
    if not body.strip():
        raise NotACompletion("the body is empty")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotACompletion("it is not JSON") from error
    if not isinstance(value, dict):
        raise NotACompletion("it is no JSON object")
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        raise NotACompletion("it is an error" if value.get("error") else "it has no choices")
    if not isinstance(choices[0], dict) or not isinstance(choices[0].get("message"), dict):
        raise NotACompletion("its first choice has no message")
    return choices[0]


def _text(content: Any) -> str:
    """The text of a message, which some servers send in parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[str] = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            if not isinstance(text := part.get("text"), str):
                raise NotACompletion("the content of its message is no text")
            texts.append(text)
    return "".join(texts)
