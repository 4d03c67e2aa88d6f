"""Classic's `BestOfNSampler`: of several responses to a query, those that score best."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed


class BestOfNSampler:
    """Samples several responses to each query and keeps the best by a score.

    Args:
        model: a language model, with or without a value-head wrapper; anything that has `generate`.
        tokenizer (`PreTrainedTokenizerBase`): decodes queries with their responses.
        queries_to_scores (`Callable`): texts, each a query with its response, to one score each.
        length_sampler (`Callable`): draws `max_new_tokens` for each query.
        sample_size (`int`, *optional*, defaults to `4`): responses to each query.
        seed (`int`, *optional*): of all random numbers, set here, once.
        n_candidates (`int`, *optional*, defaults to `1`): how many of the best are returned.
        generation_config (`GenerationConfig`, *optional*): of `model.generate`.

    Raises:
        ValueError: if `model`, `tokenizer` or a number is of the wrong kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float] | Tensor],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
    ):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; it should be a transformers tokenizer")
        if not callable(getattr(model, "generate", None)):
            raise ValueError(f"model is a {type(model).__name__}; it should be a language model, which has generate")
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(f"n_candidates is {n_candidates}, it should be 1 to sample_size, {sample_size}")
        if seed is not None:
            set_seed(seed)
        self.model, self.tokenizer = model, tokenizer
        self.queries_to_scores, self.length_sampler = queries_to_scores, length_sampler
        self.gen_config = generation_config
        self.sample_size, self.n_candidates = sample_size, n_candidates

    def generate(
        self,
        tokenized_query: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        device: str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best of `sample_size` responses to each query.

        Args:
            tokenized_query: one query, 1-D token ids, or several.
            skip_special_tokens: leave special tokens out of the texts that are scored and returned.
            device: where the model is; found out by default.
            generation_kwargs: options of `model.generate`, such as `do_sample=True`: greedy responses are all alike.

        Returns:
            For each query the texts, query included, of its `n_candidates` best responses, the best first.

        Raises:
            ValueError: if there is no query, or one is not 1-D, or `queries_to_scores` gives another number of scores.
        """
        best = []
        for query in _queries(tokenized_query):
            queries = query.repeat(self.sample_size, 1).to(self.model.device if device is None else device)
            sampled = self.model.generate(
                queries,
                **{
                    "attention_mask": torch.ones_like(queries),
                    "max_new_tokens": self.length_sampler(),
                    "generation_config": self.gen_config,
                    "pad_token_id": self.tokenizer.pad_token_id,
                    **generation_kwargs,
                },
            )
            texts = self.tokenizer.batch_decode(sampled, skip_special_tokens=skip_special_tokens)
            scores = torch.as_tensor(self.queries_to_scores(texts), dtype=torch.float32)
            if scores.shape != (self.sample_size,):
                raise ValueError(
                    f"queries_to_scores gave scores of shape {tuple(scores.shape)} for {self.sample_size} texts; it "
                    "should give one number a text"
                )
            best.append([texts[index] for index in scores.topk(self.n_candidates).indices.tolist()])
        return best


def _queries(tokenized_query: Any) -> list[Tensor]:
    """The queries, each 1-D."""
    if len(tokenized_query) == 0:
        raise ValueError("tokenized_query is empty; it should hold at least one query")
    one = isinstance(tokenized_query[0], int) or (isinstance(tokenized_query, Tensor) and tokenized_query.dim() == 1)
    queries = [torch.as_tensor(query) for query in ([tokenized_query] if one else tokenized_query)]
    # Classic also took queries of shape (1, P).
    queries = [query[0] if query.dim() == 2 and len(query) == 1 else query for query in queries]
    for row, query in enumerate(queries):
        if query.dim() != 1 or not len(query):
            raise ValueError(f"tokenized_query[{row}] has shape {tuple(query.shape)}; it should be 1-D token ids")
    return queries
