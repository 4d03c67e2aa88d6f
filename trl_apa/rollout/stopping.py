"""What ends a response, and after how many tokens it did."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria


class ResponseLengths(StoppingCriteria):
    """Stops each row on EOS or a stop string and remembers after how many tokens it did.

    Our criteria see generated tokens alone: what begins in the prompt is no stop string. `generate` fills the rest of
    a finished row with the pad token. Where pad equals EOS, or a stop string ended the row, the tokens alone do not
    tell where the response ended; this does.

    Args:
        prompt_width: tokens before the first generated one, in every row.
        criteria: what ends a row.
        limits_B: most tokens of each row's response, int64; none by default.
        given: criteria of the caller's, which see what transformers shows them: the prompts too, one answer for every
            row or for all.
    """

    def __init__(
        self,
        prompt_width: int,
        criteria: list[StoppingCriteria],
        limits_B: Tensor | None = None,
        given: Sequence[StoppingCriteria] = (),
    ):
        self.prompt_width = prompt_width
        self.criteria = criteria
        self.limits_B = limits_B
        self.given = given
        self.lengths_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        generated_BR = input_ids[:, self.prompt_width :]
        generated = generated_BR.shape[1]
        done_B = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done_B |= criterion(generated_BR, scores, **kwargs).to(done_B.device)
        for criterion in self.given:
            done_B |= torch.as_tensor(criterion(input_ids, scores, **kwargs), device=done_B.device).bool()
        if self.limits_B is not None:
            done_B |= self.limits_B <= generated
        if self.lengths_B is None:
            self.lengths_B = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        self.lengths_B = torch.where(done_B & (self.lengths_B == 0), generated, self.lengths_B)
        return self.lengths_B > 0

    def of_rows(self, rows: Tensor) -> "ResponseLengths":
        """The same for some rows, none of which has ended."""
        limits_A = None if self.limits_B is None else self.limits_B[rows]
        return ResponseLengths(self.prompt_width, self.criteria, limits_A, self.given)

    def cut(self, tokens_BT: Tensor) -> list[Tensor]:
        """The generated tokens of each row up to the one that ended it; the complete row if none did."""
        generated_BR = tokens_BT[:, self.prompt_width :]
        lengths = [0] * len(generated_BR) if self.lengths_B is None else self.lengths_B.tolist()
        return [row[: length or len(row)] for row, length in zip(generated_BR, lengths, strict=True)]

    def padded(self, tokens_BT: Tensor, pad_token_id: int) -> Tensor:
        """The generated tokens of all rows, with the pad after the token that ended a row."""
        generated_BR = tokens_BT[:, self.prompt_width :]
        if self.lengths_B is None:
            return generated_BR
        lengths_B1 = self.lengths_B[:, None]
        number_R = torch.arange(generated_BR.shape[1], device=generated_BR.device)
        return generated_BR.masked_fill((lengths_B1 > 0) & (number_R >= lengths_B1), pad_token_id)


class DecodedTextCriteria(StoppingCriteria):
    """Ends a row whose text holds a stop string: slower than transformers' own, for any tokenizer that decodes.

    Args:
        tokenizer: decodes the row.
        stop_strings: texts that end it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: list[str] | str):
        self.tokenizer = tokenizer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Behind another token, since some tokenizers lose the space before the first of a text.
        before = self.tokenizer.batch_decode(input_ids[:, :1])
        texts = self.tokenizer.batch_decode(torch.cat([input_ids[:, :1], input_ids], dim=1))
        generated = [text[len(first) :] for first, text in zip(before, texts, strict=True)]
        done = [any(stop in text for stop in self.stop_strings) for text in generated]
        return torch.tensor(done, device=input_ids.device)


def row_criteria(
    eos_token_id: int | list[int] | None, stop_strings: list[str] | str | None, tokenizer: PreTrainedTokenizerBase
) -> list[StoppingCriteria]:
    """What ends a response before its length limit."""
    criteria: list[StoppingCriteria] = []
    if eos_token_id is not None:
        criteria.append(EosTokenCriteria(eos_token_id=eos_token_id))
    if stop_strings:
        try:
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        except ValueError:  # it wants a tokenizer that can spell any text
            criteria.append(DecodedTextCriteria(tokenizer, stop_strings))
    return criteria
