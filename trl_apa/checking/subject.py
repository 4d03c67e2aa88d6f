"""What is checked: a trainer's networks, and rows of text that they read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model
from trl_apa.models import PolicyAndValue
from trl_apa.models.layouts import layout_trial
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.trials import Difference, LayoutTrial, allowed_difference, alone, difference, in_layout, is_precise
from trl_apa.rollout.batch import Layout, lay_out, longest_row, response_mask
from trl_apa.rollout.vllm_generation import VLLMSampler


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
    reference: Callable[[Network], AbstractContextManager[Network]]
    tokenizer: PreTrainedTokenizerBase
    args: Any
    layout_of: Callable[[int], Layout]
    around: Callable[[], AbstractContextManager[Any]]
    queries: list[Tensor]
    responses: list[Tensor]
    pad_token_id: int
    decoder_start_token_id: int | None
    end_token_ids: Sequence[int]
    has_learned: bool
    vllm: VLLMSampler | None = None
    step: int = 0

    @property
    def policy(self) -> Network:
        return self.module.policy

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response of the run; of the rows where the options do not say."""
        rows = longest_row(self.queries, self.responses, self.decoder_start_token_id)
        prompt: int = self.args.max_prompt_length or max(len(query) for query in self.queries)
        response: int = self.args.max_completion_length
        if self.decoder_start_token_id is not None:
            return max(rows, prompt, 1 + response)
        return max(rows, prompt + response)

    @property
    def layout(self) -> Layout:
        """How the trainer reads the rows."""
        return self.layout_of(longest_row(self.queries, self.responses, self.decoder_start_token_id))

    @property
    def allowed(self) -> float:
        """The largest relative difference that counts as rounding, which may be more in a deep network."""
        with self.around():
            trial = layout_trial(self.policy, self.longest)
            together = trial.together if isinstance(trial, LayoutTrial) else None
            return allowed_difference(inner_model(self.policy), together)

    def each_alone(self, network: Network | None = None) -> list[Tensor]:
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

    @torch.no_grad()
    def values(self) -> Tensor | None:
        """Values of the response tokens, `(B, R)`, 0 behind the end of each, on the CPU, if there is a value model."""
        if self.module.value_model is None:
            return None
        rows = (self.queries, self.responses, self.pad_token_id, self.decoder_start_token_id)
        mask_BR = response_mask(self.responses, device=self.queries[0].device)
        with self.around():
            outputs = self.module(**lay_out(self.layout, *rows), response_width=mask_BR.shape[1], with_policy=False)
        values_BR: Tensor = outputs["values"]
        return (values_BR.float() * mask_BR).cpu()

    def difference(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Difference:
        """Between logits of the responses."""
        with self.around():
            exact = is_precise(inner_model(self.policy))
        return difference(expected, actual, self.responses, exact)


# Rows of each weight that are changed, and whose gradients are compared: a layer that is forgotten shows in any.
ROWS = 64


def part(tensor: Tensor) -> Tensor:
    """A view of the first rows of a weight."""
    return tensor[:ROWS] if tensor.dim() else tensor


@contextmanager
def moved(module: PolicyAndValue, seed: int = 0) -> Iterator[dict[Tensor, Tensor]]:
    """Inside, a part of each trained weight has moved by chance, as an update moves it; afterwards all weights that a
    checkpoint holds are back to the bit. Gives what these were, each by its weight.

    A new adapter changes nothing, so that one that is not saved, or merged wrongly, would not be seen.
    """
    saved = {tensor: tensor.detach().cpu().clone() for tensor in _of_a_checkpoint(module)}
    trained = [parameter for parameters in module.trainable_parameters().values() for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained:
            noise = torch.randn(part(parameter).shape, generator=generator) * 0.02
            part(parameter).add_(noise.to(parameter))
    try:
        yield saved
    finally:
        restore(saved)


def _of_a_checkpoint(module: PolicyAndValue) -> list[Tensor]:
    """What is overwritten when a checkpoint is loaded: of networks with adapters these, of others all."""
    tensors: dict[int, Tensor] = {}
    for network in module.networks():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.requires_grad or not is_peft_model(network):
                tensors.setdefault(id(tensor), tensor)
    for parameter in () if module.value_model is None else module.value_model.parameters():
        if parameter.requires_grad:
            tensors.setdefault(id(parameter), parameter)
    return list(tensors.values())


@torch.no_grad()
def restore(saved: dict[Tensor, Tensor]) -> None:
    for tensor, before in saved.items():
        tensor.copy_(before)
