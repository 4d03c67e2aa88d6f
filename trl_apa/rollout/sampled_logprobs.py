"""Log-probs of tokens under the policy that sampled them: noted while `generate` has the logits in hand."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from trl_apa.models.logprobs import token_logprobs
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.rollout.shared_prompts import token_keys


# Options under which a call of `generate` gives more tokens than one a forward pass, or its forward is compiled.
UNUSUAL = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "assistant_early_exit")


class LogprobNoter(StoppingCriteria):
    """Reads the logits of each forward pass of `generate`, then which token was taken of each row; ends no row.

    Logits are the model's own, before processors change them (a top-k, a repetition penalty): `step` takes its
    log-probs from the same distribution. Unless it is a forward hook of the model, it sees and notes nothing.

    Args:
        temperature: at which the update takes its log-probs.
    """

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature
        # Which rows of how many are asked, where rows that have ended are left out.
        self.rows: tuple[Tensor, int] | None = None
        # Of the newest forward pass, of which no token was taken yet.
        self.logits_BV: Tensor | None = None
        self._columns: list[Tensor] = []

    def see(self, module: Any, args: Any, output: Any) -> None:
        """A forward hook of the model."""
        logits_BTV = getattr(output, "logits", None)
        if logits_BTV is None:
            return
        logits_BV = logits_BTV[:, -1]
        # A view would keep the logits of the complete prompt.
        self.logits_BV = logits_BV.clone() if logits_BTV.shape[1] > 1 else logits_BV

    def repeat(self, rows: Tensor) -> None:
        """Take the logits of these rows, where several rows have come from one of the forward pass."""
        if self.logits_BV is not None:
            self.logits_BV = self.logits_BV[rows.to(self.logits_BV.device)]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.logits_BV is not None and len(self.logits_BV) == len(input_ids):
            logits_BV = self.logits_BV.float()
            tokens_B = input_ids[:, -1].to(logits_BV.device)
            column_B = token_logprobs(logits_BV / self.temperature, tokens_B, with_entropy=False)[0]
            if self.rows is not None:
                rows, num_rows = self.rows
                column_B = column_B.new_zeros(num_rows).index_copy(0, rows.to(column_B.device), column_B)
            self._columns.append(column_B)
        self.logits_BV = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def take(self) -> Tensor | None:
        """Of the tokens that were sampled since the last call, nats, float32 `(B, tokens)`; None if none was seen."""
        columns, self._columns = self._columns, []
        return torch.stack(columns, dim=1) if columns else None

    def logprobs(self, num_tokens: int) -> Tensor | None:
        """Of each sampled token, nats, float32 `(B, num_tokens)`; None unless every token was seen."""
        if len(self._columns) < num_tokens:
            return None
        return torch.stack(self._columns[:num_tokens], dim=1)


class SampledLogprobs:
    """The log-probs of the newest responses, found again by the tokens of query and response."""

    def __init__(self) -> None:
        self._temperature, self._capacity = 1.0, 0
        self._kept: OrderedDict[tuple[bytes, bytes], Tensor] = OrderedDict()
        # Of those that `take` gave last, and of those that are kept.
        self.of_engine = self._some_of_engine = False

    @property
    def temperature(self) -> float:
        """At which the update takes its log-probs."""
        return self._temperature

    def at(self, temperature: float, capacity: int) -> "SampledLogprobs":
        """Itself, for responses that are sampled from now on.

        Args:
            temperature: at which the update takes its log-probs; those of another are forgotten.
            capacity: responses that are kept.
        """
        if temperature != self._temperature:
            self._kept.clear()
        self._temperature, self._capacity = temperature, capacity
        return self

    @contextmanager
    def noting(
        self, model: Network, generation_config: GenerationConfig, model_inputs: dict[str, Any]
    ) -> Iterator[LogprobNoter]:
        """Inside, the noter sees each forward pass of `model`; it has to be among the stopping criteria."""
        noter = LogprobNoter(self._temperature)
        options = {**generation_config.to_diff_dict(), **model_inputs}
        compiled = options.get("cache_implementation") not in (None, "dynamic")
        if compiled or any(options.get(name) is not None for name in UNUSUAL):
            yield noter
            return
        handle = inner_model(model).register_forward_hook(noter.see)
        try:
            yield noter
        finally:
            handle.remove()

    def keep(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        logprobs_BR: Tensor | None,
        of_engine: bool = False,
    ) -> None:
        """Note the log-probs of a batch, `(B, R)` or None; each response has its own length.

        Args:
            queries, responses: `B` 1-D tensors of token ids each.
            logprobs_BR: nats.
            of_engine: whether an engine reports them, and not the policy itself.
        """
        if logprobs_BR is None:
            return
        self._some_of_engine = self._some_of_engine or of_engine
        for key, response, logprobs_R in zip(_keys(queries, responses), responses, logprobs_BR, strict=True):
            self._kept[key] = logprobs_R[: len(response)].clone()
            self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def known(self, query: Tensor, response: Tensor) -> Tensor | None:
        """The log-probs of one response, nats, 1-D; None if they were not noted."""
        return self._kept.get(_keys([query], [response])[0])

    def take(self, queries: Sequence[Tensor], responses: Sequence[Tensor], like_BR: Tensor) -> Tensor | None:
        """The log-probs of these responses, nats, `(B, R)`, 0 behind a response; None unless all are known.

        A response may be the beginning of one that was sampled. What was noted is forgotten: the policy moves on.

        Args:
            queries, responses: `B` 1-D tensors of token ids each.
            like_BR: of the shape and on the device of the result.
        """
        kept, self._kept = self._kept, OrderedDict()
        self.of_engine, self._some_of_engine = self._some_of_engine, False
        if not kept:
            return None
        by_query: dict[bytes, list[tuple[bytes, Tensor]]] = {}
        for (query, response), logprobs_R in kept.items():
            by_query.setdefault(query, []).append((response, logprobs_R))
        logprobs_BR = torch.zeros_like(like_BR, dtype=torch.float32)
        for row, (query, response) in enumerate(_keys(queries, responses)):
            known = kept.get((query, response))
            if known is None:
                known = next((p for sampled, p in by_query.get(query, ()) if sampled.startswith(response)), None)
            if known is None:
                return None
            length = len(responses[row])
            logprobs_BR[row, :length] = known[:length].to(logprobs_BR.device)
        return logprobs_BR


def _keys(queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[tuple[bytes, bytes]]:
    keys = token_keys([*queries, *responses])
    return list(zip(keys[: len(queries)], keys[len(queries) :], strict=True))
