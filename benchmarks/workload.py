"""What the speed benchmark measures on, made from a seed. Both environments run this file: it imports neither TRL."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


PAD, EOS = 0, 1
NEW_TOKENS = 32
SIZES = {
    "32 x 2": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2},
    "128 x 4": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256, "num_attention_heads": 2},
    "256 x 4": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4},
    "512 x 6": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 8},
    "2048 x 16": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 5632, "num_attention_heads": 16},
}
# Shortest and longest query and response, tokens, and how lengths lie between them.
SPREADS = {
    "equal": ((35, 35), (27, 27), "uniform"),
    "ragged": ((8, 96), (8, 64), "log-uniform"),
    "long tail": ((8, 96), (8, 64), "one in eight longest"),
}


# Probability of EOS at each token, by what it makes of the lengths of responses.
ENDS = {"long tail": 1 / 28, "short": 1 / 8, "equal": 0.0}


def end_with(probability: float, network: Any) -> Any:
    """Let every response of a language model end with this probability at each token; returns the hook's handle."""

    def replace(head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits[..., EOS] = torch.tensor(probability).log()
        return logits

    return network.lm_head.register_forward_hook(replace)


@dataclass
class Workload:
    """A model, and rollouts for it.

    Args:
        size: of `SIZES`.
        spread: of `SPREADS`. All have about the same number of tokens.
        vocabulary: tokens.
        batch_size, mini_batch_size, epochs: of `step`.
        length: what all lengths are multiplied by.
        generation_batch_size: queries a call of `generate`.
        rows_per_prompt: neighbours that have the same query.
        prompt, response: tokens of each query and of each response, instead of those of the spread.
        shuffle: what `step` draws into mini-batches, "rows" or "groups" of one query.
        limit: most tokens that `generate` samples for a query.
        ends: probability with which a sampled response ends at each token; None leaves that to the weights.
        seed: of weights, tokens and lengths.
    """

    size: str = "256 x 4"
    spread: str = "ragged"
    vocabulary: int = 8192
    batch_size: int = 64
    mini_batch_size: int = 8
    epochs: int = 2
    length: float = 1.0
    generation_batch_size: int = 16
    rows_per_prompt: int = 1
    prompt: int | None = None
    response: int | None = None
    shuffle: str = "rows"
    limit: int = NEW_TOKENS
    ends: float | None = None
    seed: int = 1

    @property
    def new_tokens(self) -> int:
        """What `generate` samples for all queries; an end of sequence is one word among thousands."""
        return self.batch_size * self.limit

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Tokens of each query and of each response, where they do not follow from the spread."""
        return self.prompt, self.response

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        return cls(**json.loads(text))

    def model(self) -> Any:
        torch.manual_seed(self.seed)
        ids = {"vocab_size": self.vocabulary, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
        positions = max(512, int(512 * self.length), (self.prompt or 0) + (self.response or 0))
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**ids, **SIZES[self.size], max_position_embeddings=positions)
        )
        if self.ends is not None:
            end_with(self.ends, model)
        return model

    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, self.vocabulary)}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

    def sampling(self) -> dict[str, Any]:
        """Options of transformers' `generate`, and of TRL 0.11.4's: no token is left out for being unlikely."""
        options = {"do_sample": True, "max_new_tokens": self.limit, "top_k": 0}
        return {**options, "pad_token_id": PAD, "eos_token_id": EOS}

    def rollouts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, responses and scores: the arguments of `step`."""
        generator = torch.Generator().manual_seed(self.seed)
        *ranges, kind = SPREADS[self.spread]

        def tokens(row: int, shortest: int, longest: int) -> Tensor:
            if kind == "one in eight longest":
                shortest, longest = (longest, longest) if row % 8 == 7 else (shortest, longest // 2)
            share = float(torch.rand((), generator=generator))
            length = (
                shortest * (longest / shortest) ** share
                if kind == "log-uniform"
                else shortest + share * (longest - shortest)
            )
            return torch.randint(2, self.vocabulary, (round(length * self.length),), generator=generator)

        given = [bounds if size is None else (size, size) for bounds, size in zip(ranges, self.lengths, strict=True)]
        queries = [tokens(row, *given[0]) for row in range(0, self.batch_size, self.rows_per_prompt)]
        queries = [query for query in queries for _ in range(self.rows_per_prompt)]
        responses = [tokens(row, *given[1]) for row in range(self.batch_size)]
        return queries, responses, list(torch.randn(self.batch_size, generator=generator).unbind())
