"""Prompts to responses with transformers' `generate`, one response a prompt, each cut where it ended."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from trl_apa._trl import is_peft_model


class ResponseLengths(StoppingCriteria):
    """Stops each row on EOS or a stop string and remembers after how many tokens it did.

    `generate` fills the rest of a finished row with the pad token. Where pad equals EOS, or a stop string ended the
    row, the tokens alone do not tell where the response ended; this does.

    Args:
        prompt_width: tokens before the first generated one, in every row.
        criteria: what ends a row.
    """

    def __init__(self, prompt_width: int, criteria: list[StoppingCriteria]):
        self.prompt_width = prompt_width
        self.criteria = criteria
        self.lengths_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        generated = input_ids.shape[1] - self.prompt_width
        done_B = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done_B |= criterion(input_ids, scores, **kwargs).to(done_B.device)
        if self.lengths_B is None:
            self.lengths_B = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        self.lengths_B = torch.where(done_B & (self.lengths_B == 0), generated, self.lengths_B)
        return self.lengths_B > 0

    def cut(self, tokens_BT: Tensor) -> list[Tensor]:
        """The generated tokens of each row up to the one that ended it; the whole row if none did."""
        generated_BR = tokens_BT[:, self.prompt_width :]
        lengths = [0] * len(generated_BR) if self.lengths_B is None else self.lengths_B.tolist()
        return [row[: length or len(row)] for row, length in zip(generated_BR, lengths, strict=True)]


def generate_responses(
    model: nn.Module,
    queries: Sequence[Tensor],
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: list[str] | str | None = None,
    batch_size: int = 4,
    length_sampler: Callable[[], int] | None = None,
    pad_to_multiple_of: int | None = None,
    **model_inputs: Any,
) -> list[Tensor]:
    """Sample one response to each query.

    Queries are batched by length, so that short ones do not wait behind the padding of long ones, and left-padded
    inside; the answers come back in the callers' order. The model's own generation config (a top_k of 50, say) has no
    influence: what `generation_config` leaves unset is off.

    Args:
        model: a decoder language model in which dropout is off.
        queries: 1-D tensors of token ids, at least one token each.
        generation_config: sampling options, `pad_token_id` and `eos_token_id` (one or several).
        tokenizer: decodes for `stop_strings`.
        stop_strings: texts that end a response; the tokens that spell them belong to it.
        batch_size: queries a call of `generate`.
        length_sampler: if given, draws `max_new_tokens` for each batch.
        pad_to_multiple_of: round the prompt width up to a multiple of it.
        model_inputs: passed on to `generate` (a logits processor, say).

    Returns:
        1-D int64 tensors on the queries' devices: the generated tokens up to and with the one that ended the response.
    """
    responses: list[Tensor | None] = [None] * len(queries)
    by_length = sorted(range(len(queries)), key=lambda row: len(queries[row]))
    device = next(model.parameters()).device
    for start in range(0, len(queries), batch_size):
        rows = by_length[start : start + batch_size]
        inputs = left_pad([queries[row] for row in rows], generation_config.pad_token_id, pad_to_multiple_of)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        if length_sampler is not None:
            generation_config.max_new_tokens = length_sampler()
        lengths = ResponseLengths(
            inputs["input_ids"].shape[1], row_criteria(generation_config.eos_token_id, stop_strings, tokenizer)
        )
        with torch.no_grad(), neutral_generation_config(model):
            tokens_BT = model.generate(
                **inputs,
                generation_config=generation_config,
                stopping_criteria=StoppingCriteriaList([lengths]),
                **model_inputs,
            )
        for row, response in zip(rows, lengths.cut(tokens_BT), strict=True):
            responses[row] = response.to(queries[row].device)
    return responses


def generation_options(
    defaults: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[GenerationConfig, list[str] | str | None, dict[str, Any]]:
    """What the caller of `generate` asked for, on top of `defaults`.

    Args:
        defaults: `temperature`, `top_p`, `top_k` (read when sampling), `max_new_tokens` (unless the caller gives
            `max_length`), `pad_token_id`, `eos_token_id`.
        kwargs: the caller's; a `generation_config` among them counts for what it sets.

    Returns:
        the generation config, the stop strings, and what is left for the model. Warns if the caller samples at another
        temperature than the default, at which the update takes its log-probs.
    """
    kwargs, options = dict(kwargs), {"do_sample": True, "use_cache": True, **defaults}
    if (given := kwargs.pop("generation_config", None)) is not None:
        kwargs = {**given.to_diff_dict(), **kwargs}
    if not kwargs.get("do_sample", True):
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name)
    elif kwargs.get("temperature", defaults["temperature"]) != defaults["temperature"]:
        warnings.warn(
            f"generate samples at temperature={kwargs['temperature']}, but the update takes log-probs at "
            f"config.temperature={defaults['temperature']}; set the option in the config instead",
            UserWarning,
            stacklevel=3,
        )
    if "max_length" in kwargs:
        options.pop("max_new_tokens")
    stop_strings = kwargs.pop("stop_strings", None)
    generation_config = GenerationConfig(**options)
    return generation_config, stop_strings, generation_config.update(**kwargs)


def row_criteria(
    eos_token_id: int | list[int] | None, stop_strings: list[str] | str | None, tokenizer: PreTrainedTokenizerBase
) -> list[StoppingCriteria]:
    """What ends a response before its length limit."""
    criteria: list[StoppingCriteria] = []
    if eos_token_id is not None:
        criteria.append(EosTokenCriteria(eos_token_id=eos_token_id))
    if stop_strings:
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    return criteria


def left_pad(queries: Sequence[Tensor], pad_token_id: int, pad_to_multiple_of: int | None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 `(B, P)`, padded on the left; the mask comes from lengths."""
    input_ids = pad_sequence(list(queries), batch_first=True, padding_value=pad_token_id, padding_side="left")
    attention_mask = pad_sequence([torch.ones_like(q) for q in queries], batch_first=True, padding_side="left")
    if pad_to_multiple_of:
        extra = -input_ids.shape[1] % pad_to_multiple_of
        input_ids = nn.functional.pad(input_ids, (extra, 0), value=pad_token_id)
        attention_mask = nn.functional.pad(attention_mask, (extra, 0))
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@contextmanager
def neutral_generation_config(model: nn.Module) -> Iterator[None]:
    """Inside, `model` has no generation defaults of its own for `generate` to fall back on."""
    owners = [model, model.get_base_model()] if is_peft_model(model) else [model]
    saved = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, saved, strict=True):
            owner.generation_config = config


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})
