"""Prompts and responses as texts, and both together as the token ids that a reward model was trained to read."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from trl_apa.rollout.prompts import prompt_of
from trl_apa.rollout.tokenizing import text_ids


# Prompts and completions: texts, or lists of chat messages.
Texts = tuple[list[Any], list[Any]]


def prompts_and_completions(
    rows: Sequence[dict[str, Any]],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> Texts:
    """What reward functions read of sampled responses: texts, or chat messages where the prompts are chat messages.

    Args:
        rows: each with a prompt; where it has token ids alone, they are decoded.
        queries, responses: their token ids, 1-D.
        tokenizer: the policy's.

    Raises:
        ValueError: if a row has no prompt.
    """
    pairs = []
    for row, query, response in zip(rows, queries, responses, strict=True):
        prompt = prompt_of(row)
        if prompt is None:
            prompt = tokenizer.decode(query, skip_special_tokens=True)
        if _is_chat(prompt):
            pairs.append(as_completion(prompt, answer_text(tokenizer, query, response, prompt)))
        else:
            pairs.append((prompt, tokenizer.decode(response, skip_special_tokens=True)))
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def as_completion(prompt: Any, answer: str) -> tuple[Any, Any]:
    """A prompt and its answer: both texts, or both lists of messages.

    What the assistant was made to begin with belongs to its answer.
    """
    if not _is_chat(prompt):
        return prompt, answer
    if prompt[-1]["role"] == "assistant":
        prompt, answer = prompt[:-1], prompt[-1]["content"] + answer
    return prompt, [{"role": "assistant", "content": answer}]


def answer_text(tokenizer: PreTrainedTokenizerBase, query: Tensor, response: Tensor, prompt: Any = None) -> str:
    """The text of a response as it follows its prompt.

    Decoded by itself it would lose the space before its first word with some tokenizers. It has none where it is a
    message of its own, behind a chat template's header.

    Args:
        tokenizer: the policy's.
        query, response: token ids, 1-D.
        prompt: the query as text or chat messages, if it is known.
    """
    begun = prompt
    if _is_chat(prompt):
        begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else None
        if begun is None:
            message: str = tokenizer.decode(response, skip_special_tokens=True)
            return message
    before = tokenizer.decode(query, skip_special_tokens=True)
    whole: str = tokenizer.decode([*query.tolist(), *response.tolist()], skip_special_tokens=True)
    if not whole.startswith(before):
        alone: str = tokenizer.decode(response, skip_special_tokens=True)
        return alone
    answer = whole[len(before) :]
    # The space at the end of the prompt may have been lost with its tokens.
    lost = isinstance(begun, str) and begun[-1:].isspace() and not before[-1:].isspace()
    return answer.removeprefix(" ") if lost else answer


def as_read(prompt: str, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt's text, or of one that was shortened the end that the policy has read."""
    own = text_ids(prompt, tokenizer).own
    was_shortened = len(own) > len(prompt_ids) and own[-len(prompt_ids) :] == prompt_ids
    return tokenizer.decode(prompt_ids) if was_shortened else prompt


def end_ids(given: Collection[int] | None, tokenizer: PreTrainedTokenizerBase | None) -> Collection[int]:
    """Ids that end a response: those given, or the tokenizer's EOS."""
    if given is None and tokenizer is not None and tokenizer.eos_token_id is not None:
        return (tokenizer.eos_token_id,)
    return given or ()


def is_ended(response: Sequence[int] | Tensor, end_token_ids: Collection[int]) -> bool:
    """Whether a response has an end: its last token is one of `end_token_ids`. One that met a limit has none."""
    return len(response) > 0 and int(response[-1]) in end_token_ids


def scored_ids(
    prompt: Any, answer: str, ended: bool, tokenizer: PreTrainedTokenizerBase, needs_frame: bool = False
) -> list[int]:
    """Prompt and answer as the token ids that a reward model was trained to read.

    Chat messages go through the chat template; an answer without an end stays open, without the template's end of
    turn. A text ends with one EOS, whether the tokenizer puts it there by itself or not, as TRL's RewardTrainer trains
    it; without an end, with none.

    Args:
        prompt: text or chat messages; the last of these may begin the answer.
        answer: as it follows the prompt.
        ended: whether the answer has an end.
        tokenizer: the reward model's.
        needs_frame: keep what the tokenizer appends to every text (such as [SEP]) even if the answer has no end: for
            networks that do not read their score at the last token.
    """
    if _is_chat(prompt):
        prompt, completion = as_completion(prompt, answer)
        return _chat_ids([*prompt, *completion], ended, tokenizer)
    before, own, after, _ = text_ids(prompt + answer, tokenizer)
    eos = tokenizer.eos_token_id
    if ended and eos is not None and eos not in (*own[-1:], *after):
        own = [*own, eos]
    return [*before, *own, *(after if ended or needs_frame else [])]


def scored_conversation_ids(
    messages: list[dict[str, Any]], ended: bool, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The same for a prompt and a completion of several messages, the calls and the answers of tools among them."""
    return _chat_ids(messages, ended, tokenizer)


def _chat_ids(messages: list[dict[str, Any]], ended: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    options = {"tokenize": True, "return_dict": False}
    if ended:
        return list(tokenizer.apply_chat_template(messages, **options))
    try:
        return list(tokenizer.apply_chat_template(messages, continue_final_message=True, **options))
    except ValueError:  # the template changes the message, for example drops its thoughts
        header = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        return list(tokenizer(header + messages[-1]["content"], add_special_tokens=False)["input_ids"])


def sampled_ids(
    prompt: Any,
    prompt_ids: list[int],
    completion_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
) -> list[int]:
    """The same for a reward model that reads the policy's token ids: as they were sampled.

    A chat message that ended is followed by what the chat template writes after the end of a turn, a line feed say.
    """
    sequence = [*prompt_ids, *completion_ids]
    if _is_chat(prompt) and is_ended(completion_ids, end_token_ids):
        sequence += _after_end_of_turn(tokenizer, completion_ids[-1])
    return sequence


def _after_end_of_turn(tokenizer: PreTrainedTokenizerBase, end: int) -> list[int]:
    """What the chat template writes after an answer's end; nothing if its answers do not end with this token."""
    question, answer = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is so."}
    try:
        options = {"tokenize": True, "return_dict": False}
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, **options)
        ids = list(tokenizer.apply_chat_template([question, answer], **options))
    except Exception:  # no template, or one that refuses these messages
        return []
    answered = ids[len(asked) :]
    return answered[len(answered) - answered[::-1].index(end) :] if end in answered else []


def _is_chat(prompt: Any) -> bool:
    return bool(is_conversational({"prompt": prompt}))
