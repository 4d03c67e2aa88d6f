"""Judges on this machine: a reward model, and a language model that says which answer it would call better."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_apa.algorithms.masking import keep_counted
from trl_apa.models.layouts import Layouts
from trl_apa.models.logprobs import response_logprobs
from trl_apa.models.modes import make_repeatable
from trl_apa.rollout.batch import lay_out, longest_row, response_mask
from trl_apa.rollout.scoring import RewardModel
from trl_apa.rollout.tokenizing import prompt_ids
from trl_apa.trainer.validation import check_positions
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.prompting import IN_ONE_LETTER, VERDICTS, judging_text
from trl_apa.winrate.verdicts import FIRST, SECOND, TIE


class RewardModelJudge:
    """The answer with the higher score wins; equal answers tie. The reference answer is not read.

    Args:
        model: a classifier with one label.
        tokenizer: its tokenizer. Prompt and answer are read as `scoring.RewardModel` reads them in training.
        name: where the model came from.
        tie_margin: a difference in scores that counts as none, reward units.
        batch_size: answers a forward pass.

    Raises:
        ValueError: if the classifier has several labels, or the margin is negative.
    """

    sees_order = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        tie_margin: float = 0.0,
        batch_size: int = 8,
    ):
        if tie_margin < 0:
            raise ValueError(f"tie_margin={tie_margin}: it should not be negative")
        self.tie_margin, self.batch_size = tie_margin, batch_size
        self.score = RewardModel(model, tokenizer, batch_size=batch_size)
        self.identity = {"judge": "reward model", "model": name, "tie_margin": tie_margin}

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            firsts = self._scores([(asked.prompt, asked.first, asked.first_ended) for asked in batch])
            seconds = self._scores([(asked.prompt, asked.second, asked.second_ended) for asked in batch])
            for number, (first, second) in enumerate(zip(firsts, seconds, strict=True), start=start):
                # Equal answers may stand beside different padding, which can move the last bit of a score.
                asked = questions[number]
                same = (asked.first, asked.first_ended) == (asked.second, asked.second_ended)
                yield number, TIE if same else self._verdict(first - second)

    def _verdict(self, difference: float) -> str | None:
        """None if a score is not a number."""
        if math.isnan(difference):
            return None
        return TIE if abs(difference) <= self.tie_margin else (FIRST if difference > 0 else SECOND)

    def _scores(self, answers: list[tuple[Any, str, bool]]) -> list[float]:
        return self.score.score_ids([self.score.text_ids(*answer) for answer in answers])


class LanguageModelJudge:
    """Reads both answers and the reference; the verdict is the letter that it holds most probable.

    No text is sampled: the log-probs of the three letters are compared, so that every question has a verdict, unless
    they are not numbers.

    Args:
        model: a language model.
        tokenizer: its tokenizer; its chat template is used if it has one.
        name: where the model came from.
        batch_size: questions a forward pass.
    """

    sees_order = True

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int = 8):
        self.model = model.requires_grad_(False)
        make_repeatable(model)
        self._layouts = Layouts([model], padding_free=False)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        text = judging_text(Question("", "", "", ""), IN_ONE_LETTER)
        self.identity = {"judge": "language model", "model": name, "text": text}
        # After a chat template's header the letter stands alone; after text a space goes before it.
        space = "" if tokenizer.chat_template else " "
        letters = [tokenizer(space + letter, add_special_tokens=False)["input_ids"] for letter in VERDICTS]
        self._letters = [torch.tensor(ids, dtype=torch.long) for ids in letters]

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Raises ValueError, naming the row, if a question is longer than the model's positions."""
        names = list(VERDICTS.values())
        queries = [self._query(question) for question in questions]
        longest = max(len(letter) for letter in self._letters)
        check_positions(queries, [longest] * len(queries), self.model, "the judge's questions")
        for start in range(0, len(questions), self.batch_size):
            logprobs_B3 = self._logprobs(queries[start : start + self.batch_size])
            for number, logprobs in enumerate(logprobs_B3.tolist(), start=start):
                yield number, None if any(map(math.isnan, logprobs)) else names[logprobs.index(max(logprobs))]

    def _query(self, question: Question) -> Tensor:
        text = judging_text(question, IN_ONE_LETTER)
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=True
            )
        else:
            ids = prompt_ids(f"{text}\n\nVerdict:", self.tokenizer)
        return torch.tensor(ids, dtype=torch.long)

    @torch.no_grad()
    def _logprobs(self, queries: list[Tensor]) -> Tensor:
        """log p of each letter, nats, `(B, 3)`."""
        device = next(self.model.parameters()).device
        columns = []
        for letter in self._letters:
            asked, responses = send_to_device([queries, [letter] * len(queries)], device)
            tokens = lay_out(self._layouts(longest_row(asked, responses)), asked, responses, pad_token_id=0)
            logprobs_BR, _ = response_logprobs(self.model, tokens, len(letter))
            columns.append(keep_counted(logprobs_BR, response_mask(responses, device=device)).sum(dim=1))
        return torch.stack(columns, dim=1)
