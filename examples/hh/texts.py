"""Texts to tokens and back, in one way for every stage."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trl_apa.data import HUMAN_TURN, STOP_STRINGS


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> list[int]:
    """The last turns of a dialogue that fit into `max_length` tokens.

    Whole turns are dropped from the front; where even the last human turn is too long, its last tokens are kept. A
    tokenizer's BOS stays in front.
    """
    bos = tokenizer("")["input_ids"][:1]
    bos = bos if bos and bos[0] == tokenizer.bos_token_id and not prompt.startswith(tokenizer.bos_token) else []
    room = max_length - len(bos)
    start = 0
    ids = plain_ids(tokenizer, prompt)
    while len(ids) > room:
        start = prompt.find(HUMAN_TURN, start + 1)
        if start < 0:
            ids = ids[-room:]
        else:
            ids = plain_ids(tokenizer, prompt[start:])
    return bos + ids


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, max_length: int, end: bool = False
) -> list[int]:
    """A response as at most `max_length` tokens, EOS among them if the response is whole.

    Args:
        end: end with EOS also where the response had to be cut, as a reward model reads its score there.
    """
    ids = [*plain_ids(tokenizer, response), tokenizer.eos_token_id]
    if len(ids) <= max_length:
        return ids
    return [*ids[: max_length - 1], tokenizer.eos_token_id] if end else ids[:max_length]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of `text` and nothing else."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str] = STOP_STRINGS) -> str:
    """What a sampled response says: without special tokens and without the marker of the next turn, if it wrote one.

    The marker's tokens stay part of the response that is trained on: writing them is how the policy ended its turn.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
