"""What is checked: a trainer's networks, and rows of text that they read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl_apa.logprobs import inner_model
from trl_apa.models import PolicyAndValue
from trl_apa.rollouts import Layout, longest_row
from trl_apa.trials import Difference, allowed_difference, alone, difference, in_layout, is_precise
from trl_apa.vllm_generation import VLLMSampler


@dataclass
class Subject:
    """The networks of a trainer and rows to read.

    Args:
        module: policy and value model.
        reference: a context in which pi_init is, given the policy.
        tokenizer: the policy's.
        args: the options of the run.
        layout_of: the layout of rows of so many tokens.
        around: entered around each pass; autocast, say.
        queries, responses: token ids of each row, 1-D, on the networks' device.
        pad_token_id: what batches are filled with.
        decoder_start_token_id: of an encoder-decoder.
        end_token_ids: what ends a response.
        has_learned: whether the policy has moved from pi_init.
        vllm: what samples, if vLLM does.
        step: optimizer steps made so far.
    """

    module: PolicyAndValue
    reference: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    tokenizer: PreTrainedTokenizerBase
    args: Any
    layout_of: Callable[[int], Layout]
    around: Callable[[], AbstractContextManager]
    queries: list[Tensor]
    responses: list[Tensor]
    pad_token_id: int
    decoder_start_token_id: int | None
    end_token_ids: Sequence[int]
    has_learned: bool
    vllm: VLLMSampler | None = None
    step: int = 0

    @property
    def policy(self) -> nn.Module:
        return self.module.policy

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response of the run; of the rows where the options do not say."""
        rows = longest_row(self.queries, self.responses, self.decoder_start_token_id)
        prompt = self.args.max_prompt_length or max(len(query) for query in self.queries)
        response = self.args.max_completion_length
        if self.decoder_start_token_id is not None:
            return max(rows, prompt, 1 + response)
        return max(rows, prompt + response)

    @property
    def layout(self) -> Layout:
        """How the trainer reads the rows."""
        return self.layout_of(longest_row(self.queries, self.responses, self.decoder_start_token_id))

    @property
    def allowed(self) -> float:
        """The largest relative difference that counts as rounding."""
        with self.around():
            return allowed_difference(inner_model(self.policy))

    def each_alone(self, network: nn.Module | None = None) -> list[Tensor]:
        """Logits `(tokens, V)` of each response by the plain forward of a network, by default the policy."""
        network = self.policy if network is None else network
        with self.around():
            rows = zip(self.queries, self.responses, strict=True)
            return [alone(network, query, response, self.decoder_start_token_id) for query, response in rows]

    def as_trained(self) -> list[Tensor]:
        """The policy's logits of each response as the trainer reads them."""
        with self.around():
            rows = (self.queries, self.responses, self.pad_token_id, self.decoder_start_token_id)
            return in_layout(self.policy, self.layout, *rows)

    def difference(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Difference:
        """Between logits of the responses."""
        with self.around():
            exact = is_precise(inner_model(self.policy))
        return difference(expected, actual, self.responses, exact)


# Elements of weights that are changed, or whose gradients are compared, at a time.
ELEMENTS = 2**27


def some_of(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The first and the last of `parameters`, of at most `ELEMENTS` elements together, and one at least."""
    chosen: list[nn.Parameter] = []
    ends = [parameter for pair in zip(parameters, reversed(parameters), strict=True) for parameter in pair]
    for parameter in {id(parameter): parameter for parameter in ends}.values():
        if not chosen or sum(one.numel() for one in chosen) + parameter.numel() <= ELEMENTS:
            chosen.append(parameter)
    return chosen


@contextmanager
def moved(module: PolicyAndValue, seed: int = 0) -> Iterator[None]:
    """Inside, trained weights have moved by chance, as an update moves them; afterwards they are back to the bit.

    A new adapter changes nothing, so that one that is not saved, or merged wrongly, would not be seen.
    """
    trained = [parameter for parameters in module.trainable_parameters().values() for parameter in parameters]
    saved = {parameter: parameter.detach().cpu().clone() for parameter in some_of(trained)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in saved:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(parameter))
    try:
        yield
    finally:
        restore(saved)


@torch.no_grad()
def restore(saved: dict[nn.Parameter, Tensor]) -> None:
    for parameter, before in saved.items():
        parameter.copy_(before)
