"""Texts as token ids: no second beginning where a chat template has written one, and no end before an answer."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase


class TextIds(NamedTuple):
    """Token ids of a text and of the special tokens that a tokenizer adds around it.

    Args:
        before: what belongs before the text, BOS say; empty where the text begins with it already.
        own: of the text alone.
        after: what the tokenizer puts behind a text, EOS say.
        left_out: the prefix that it would have added, but that the text has already.
    """

    before: list[int]
    own: list[int]
    after: list[int]
    left_out: list[int]


def prompt_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
    for_encoder: bool = False,
) -> list[int]:
    """A prompt's text as token ids, in the form that chat messages get.

    A text that a chat template has rendered gets no second BOS, and what the tokenizer puts behind a text (EOS) is
    left out, because a decoder would answer after it. A warning says so, once for each tokenizer.

    Args:
        text: a prompt.
        tokenizer: the policy's.
        chat_template_kwargs: more for the chat template.
        for_encoder: keep what the tokenizer puts behind a text, which an encoder was trained with.
    """
    before, own, after, left_out = text_ids(text, tokenizer, chat_template_kwargs)
    if left_out:
        warn_once(
            tokenizer,
            "prompts begin with BOS, or are rendered by the chat template: the tokenizer's prefix "
            f"{tokenizer.decode(left_out)!r} is not added again",
        )
    if for_encoder:
        return [*before, *own, *after]
    if after:
        warn_once(
            tokenizer,
            f"the tokenizer appends {tokenizer.decode(after)!r} to a text: it is removed from prompts, so that the "
            "policy does not answer after EOS",
        )
    return [*before, *own]


def text_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> TextIds:
    """A text as token ids, apart from what the tokenizer puts around it, none of it twice."""
    parts = _parts(text, tokenizer)
    if parts.before and _has_its_beginning(text, tokenizer, parts.before, chat_template_kwargs or {}):
        return parts._replace(before=[], left_out=parts.before)
    return parts


def _parts(text: str, tokenizer: PreTrainedTokenizerBase) -> TextIds:
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not own and text != "a":  # nothing tells where between before and after the text would be
        return _parts("a", tokenizer)._replace(own=[])
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(own), -1, -1):
        end = start + len(own)
        if whole[start:end] == own:
            return TextIds(whole[:start], own, whole[end:], left_out=[])
    return TextIds([], whole, [], left_out=[])


def _has_its_beginning(
    text: str, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], chat_template_kwargs: dict[str, Any]
) -> bool:
    """Whether chat messages rendered as this text would be tokenised without `before`."""
    beginnings = tuple(
        token for token in (tokenizer.bos_token, tokenizer.convert_ids_to_tokens(before[0])) if token is not None
    )
    text = text.lstrip()
    if text.startswith(beginnings):
        return True
    rendering = _rendering(tokenizer, chat_template_kwargs)
    return not rendering.openings_start_with(beginnings) and rendering.could_be(text)


@dataclass(frozen=True)
class _Rendering:
    """What texts look like that a chat template has rendered.

    Args:
        openings: the text that it writes before the first message.
        header: the text that it writes before the assistant's answer.
        tokens: tokens of their own, special ones say, that it writes.
    """

    openings: tuple[str, ...]
    header: str
    tokens: tuple[str, ...]

    def openings_start_with(self, beginnings: tuple[str, ...]) -> bool:
        return all(opening.startswith(beginnings) for opening in self.openings)

    def could_be(self, text: str) -> bool:
        """Whether a text begins with such a token; or, where the template writes plain words, with these."""
        return text.startswith(self.tokens) or (text.startswith(self.openings) and self.header in text)


_RENDERINGS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, _Rendering]] = WeakKeyDictionary()


def _rendering(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> _Rendering:
    """Found out by rendering a short conversation, once for each tokenizer, template and options of it."""
    known = _RENDERINGS.setdefault(tokenizer, {})
    key = repr((tokenizer.chat_template, chat_template_kwargs))
    if key not in known:
        known[key] = _try_template(tokenizer, chat_template_kwargs)
    return known[key]


def _try_template(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> _Rendering:
    said = "What is it?"
    user, system = ({"role": role, "content": said} for role in ("user", "system"))

    def rendered(messages: list[dict[str, str]], **options: Any) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **{**options, **chat_template_kwargs})
        except Exception:  # no template, or one that refuses these messages
            return ""
        return str(text).lstrip()

    texts = [rendered(messages, add_generation_prompt=True) for messages in ([user], [system, user])]
    openings = [text.partition(said)[0] for text in texts if said in text]
    own_tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return _Rendering(
        openings=tuple(opening for opening in openings if opening.strip()),
        header=texts[0].removeprefix(rendered([user])).strip(),
        tokens=tuple(token for token in own_tokens if token.strip() and any(token in text for text in texts)),
    )


_SAID: WeakKeyDictionary[PreTrainedTokenizerBase, set[str]] = WeakKeyDictionary()


def warn_once(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """A warning that comes once for each tokenizer in a run."""
    said = _SAID.setdefault(tokenizer, set())
    if text not in said:
        said.add(text)
        warnings.warn(text, UserWarning, stacklevel=2)


def warn_again(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let warnings about this tokenizer come once more, in a new run."""
    _SAID.pop(tokenizer, None)
