"""Human preferences in the Anthropic HH or the prompt/chosen/rejected layout, as prompts and pairs of responses."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trl_apa.data.pairs import Preference, Preferences, checked_pair, read_pairs
from trl_apa.data.sources import Row, text_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"
STOP_STRINGS = (HUMAN_TURN, ASSISTANT_TURN)


class HasPrompt(Protocol):
    """A row of any kind, with the text before its responses."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=HasPrompt)
_TURNS = {"user": HUMAN_TURN, "assistant": ASSISTANT_TURN, "system": "\n\nSystem:"}


def read_preferences(
    source: str | Path,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    limit: int | None = None,
    chat_tokenizer: "PreTrainedTokenizerBase | None" = None,
    strict: bool = False,
) -> Preferences:
    """Read a local file or a hub data set of human preferences.

    Understood, row by row: `chosen` and `rejected` as whole dialogues (`Anthropic/hh-rlhf`); `prompt`, `chosen` and
    `rejected` as strings (`Dahoas/static-hh`, `Dahoas/rm-static`); TRL's chat messages, with the prompt in its own
    column or in front of both responses.

    Args:
        source (`str` or `Path`): see [`~trl_apa.data.sources.iter_rows`], as for `name`, `data_dir` and `split`.
        limit (`int`, *optional*): stop after this many rows.
        chat_tokenizer (`PreTrainedTokenizerBase`, *optional*): chat messages are written with its chat template;
            without one, as HH turns. Strings are taken as they are.
        strict (`bool`, *optional*, defaults to `False`): raise at the first bad row instead of listing it.

    Returns:
        [`Preferences`]: the pairs, and the bad rows with their numbers and reasons.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row is a preference pair or, with `strict`, some row is not.
    """

    def parse(row: Row) -> list[Preference]:
        return [parse_row(row, chat_tokenizer)]

    return read_pairs(source, parse, name=name, data_dir=data_dir, split=split, limit=limit, strict=strict)


def parse_row(row: Row, chat_tokenizer: "PreTrainedTokenizerBase | None" = None) -> Preference:
    """One row as a preference pair.

    Raises:
        ValueError: the row is none; the message is the reason.
    """
    if row.problem is not None:
        raise ValueError(row.problem)
    columns = {column: row.fields.get(column) for column in ("prompt", "chosen", "rejected")}
    for column in ("chosen", "rejected"):
        if columns[column] is None:
            raise ValueError(f"has no {column!r} column")
    if isinstance(columns["chosen"], list) and isinstance(columns["rejected"], list):
        prompt, chosen, rejected = _from_messages(columns, chat_tokenizer)
    elif columns["prompt"] is None:
        prompt, chosen, rejected = _from_dialogues(columns)
    else:
        prompt, chosen, rejected = (text_of(column, value) for column, value in columns.items())
    return checked_pair(prompt, chosen, rejected, row.number)


def split_dialogue(text: str) -> tuple[str, str]:
    """A dialogue in the HH layout as its prompt, marker of the last assistant turn included, and the response."""
    start = text.rfind(ASSISTANT_TURN)
    if start < 0:
        raise ValueError(f"has no {ASSISTANT_TURN!r} turn")
    start += len(ASSISTANT_TURN)
    if HUMAN_TURN in text[start:]:
        raise ValueError("ends with a human turn")
    return text[:start], text[start:]


def _from_dialogues(columns: Mapping[str, Any]) -> tuple[str, str, str]:
    halves = []
    for column in ("chosen", "rejected"):
        try:
            halves.append(split_dialogue(text_of(column, columns[column])))
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error
    (prompt, chosen), (other_prompt, rejected) = halves
    if prompt != other_prompt:
        raise ValueError("the prompts of chosen and rejected differ")
    return prompt, chosen, rejected


def _from_messages(
    columns: Mapping[str, Any], chat_tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[str, str, str]:
    context = columns["prompt"] or []
    if isinstance(context, str):
        # A text prompt in a row with complete conversations repeats their first message.
        alone = len(columns["chosen"]) == 1
        context = [{"role": "user", "content": context}] if alone else []
    if not isinstance(context, list):
        raise ValueError(f"prompt is a {type(context).__name__}, expected a text or a list of messages")
    chosen = _messages("chosen", [*context, *columns["chosen"]])
    rejected = _messages("rejected", [*context, *columns["rejected"]])
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the prompts of chosen and rejected differ")
    prompt = _render(chosen[:-1], chat_tokenizer)
    # The HH layout has a space after the marker; a chat template puts its own separator at the end of the prompt.
    has_template = chat_tokenizer is not None and chat_tokenizer.chat_template is not None
    space = "" if has_template else " "
    responses = [messages[-1]["content"] for messages in (chosen, rejected)]
    first, second = (space + response if response.strip() else "" for response in responses)
    return prompt, first, second


def _messages(column: str, messages: list[Any]) -> list[dict[str, str]]:
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{column}: a message is no object with a text 'content'")
        if message.get("role") not in _TURNS:
            raise ValueError(f"{column}: the role {message.get('role')!r} is none of {', '.join(_TURNS)}")
        checked.append({"role": message["role"], "content": message["content"]})
    if len(checked) < 2 or checked[-1]["role"] != "assistant":
        raise ValueError(f"{column}: expected a conversation that ends with an assistant message")
    return checked


def _render(messages: list[dict[str, str]], chat_tokenizer: "PreTrainedTokenizerBase | None") -> str:
    if chat_tokenizer is None or chat_tokenizer.chat_template is None:
        turns = [f"{_TURNS[message['role']]} {message['content']}" for message in messages]
        return "".join(turns) + ASSISTANT_TURN
    from jinja2 import TemplateError

    try:
        return str(chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the prompt: {error}") from error


def opening(prompt: str) -> str:
    """What a dialogue begins with: its text before the first assistant turn, the whole prompt in other layouts."""
    return prompt.split(ASSISTANT_TURN, 1)[0]


def split_by_prompt(pairs: Sequence[P], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[P]]:
    """Divide pairs, or other rows with a prompt, at random so that no dialogue is in two parts.

    HH has several rows that grew out of one dialogue; all rows with the same [`opening`] stay together, so the parts
    hold about, not exactly, their shares.

    Args:
        pairs: what to divide.
        shares: name of each part and its share of the rows, larger than 0; they add up to 1.
        seed: the same seed and pairs give the same parts.

    Raises:
        ValueError: the shares are not as above, or a part stays empty.
    """
    if not shares or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={dict(shares)}: expected positive numbers that add up to 1")
    groups: dict[str, list[P]] = {}
    for pair in pairs:
        groups.setdefault(opening(pair.prompt), []).append(pair)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    parts: dict[str, list[P]] = {name: [] for name in shares}
    names = list(shares)
    for group in order:
        # A part that has its share is closed; the last one takes what is left.
        while len(names) > 1 and len(parts[names[0]]) >= shares[names[0]] * len(pairs):
            names.pop(0)
        parts[names[0]].extend(group)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise ValueError(f"{len(pairs)} pairs with {len(groups)} openings are too few: nothing for {', '.join(empty)}")
    return parts
