"""Chat messages as token ids, in a chat template that stays complete where the messages are too long."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_apa.rollout.tokenizing import warn_once


Messages = Sequence[dict[str, Any]]
INSTRUCTIONS = ("system", "developer")


def conversation_ids(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Chat messages through the tokenizer's chat template, up to where the assistant answers.

    If the last message is the assistant's own, it is continued. Where the result is longer than `max_length`, complete
    turns are dropped from the front: a message of the user with the answers to it, so that what is left begins as a
    conversation does. System messages stay. The last turn is not dropped; if it is too long by itself, the beginning
    of the user's text is left out, as `max_prompt_length` does with prompts that are texts. A warning says so, once
    for each tokenizer.

    Args:
        messages: at least one.
        tokenizer: has a chat template.
        max_length: tokens; None: any number.
        chat_template_kwargs: more for the chat template.

    Raises:
        ValueError: if the system message, the template and the assistant's part of the last turn are too long alone.
    """

    def rendered(kept: Messages) -> list[int]:
        goes_on = kept[-1]["role"] == "assistant"
        ids: list[int] = tokenizer.apply_chat_template(
            kept,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **(chat_template_kwargs or {}),
        )
        return ids

    ids = rendered(messages)
    if max_length is None or len(ids) <= max_length:
        return ids
    instructions, turns = _turns(messages)
    if len(turns) > 1:
        _say_once(tokenizer, max_length, "drops complete turns from their front, after the system message")
    while len(turns) > 1:
        turns = turns[1:]
        ids = rendered([*instructions, *(message for turn in turns for message in turn)])
        if len(ids) <= max_length:
            return ids
    _say_once(tokenizer, max_length, "drops the beginning of a message that is too long by itself")
    return _with_shorter_text(instructions, turns[-1] if turns else [], rendered, max_length)


def _say_once(tokenizer: PreTrainedTokenizerBase, max_length: int, what: str) -> None:
    warn_once(tokenizer, f"chat messages are longer than max_prompt_length={max_length}, which {what}")


def _turns(messages: Messages) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The system messages in front, and the turns: each begins with a message of the user."""
    first = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTIONS), len(messages))
    turns: list[list[dict[str, Any]]] = []
    for message in messages[first:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:first]), turns


def _with_shorter_text(
    instructions: list[dict[str, Any]],
    turn: list[dict[str, Any]],
    rendered: Callable[[Messages], list[int]],
    max_length: int,
) -> list[int]:
    """The last turn with as much of the end of its first text as fits."""
    text = _text_of(turn[0]) if turn else ""

    def with_last(characters: int) -> list[int]:
        shortened = [{**turn[0], "content": text[len(text) - characters :]}, *turn[1:]] if turn else []
        return rendered([*instructions, *shortened])

    fits, too_many = 0, len(text)
    ids = with_last(0)
    if len(ids) > max_length or not text:
        raise ValueError(
            f"max_prompt_length={max_length}, but a prompt has {len(ids)} tokens that cannot be dropped: its system "
            "message, the chat template and everything after the user's last message; raise max_prompt_length"
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        longer = with_last(middle)
        if len(longer) <= max_length:
            fits, ids = middle, longer
        else:
            too_many = middle
    return ids


def _text_of(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
