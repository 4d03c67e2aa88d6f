"""What sampling gives for the rows of a data set: prompts, responses of one or several turns, and more of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Episodes:
    """Prompts and what followed each of them, row by row.

    Args:
        queries: prompts, 1-D token ids.
        responses: everything after the prompt, 1-D token ids, at least one token each.
        masks: for each response a bool tensor of its length, True = sampled by the policy, False = written by a tool
            or an environment; None if every token was sampled.
        prompts: what reward functions read as the prompt; None to read the data set's.
        completions: what reward functions read as the completion; None to decode the response.
        columns: more that reward functions read, under its name one value a row.
        logprobs: of each response, nats, float32 1-D, None where they were not noted; None if `generate` noted them.
        statistics: numbers for the log, of all processes.
        release: to be called once they are scored: environments may then be used again.
    """

    queries: list[Tensor]
    responses: list[Tensor]
    masks: list[Tensor] | None = None
    prompts: list[Any] | None = None
    completions: list[Any] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    logprobs: list[Tensor | None] | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None

    @property
    def sampled(self) -> list[Tensor]:
        """The tokens of each response that the policy sampled, 1-D."""
        if self.masks is None:
            return self.responses
        return [response[mask] for response, mask in zip(self.responses, self.masks, strict=True)]

    @property
    def noted(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Query, response and log-probs of those whose log-probs are known."""
        rows = zip(self.queries, self.responses, self.logprobs or [None] * len(self.queries), strict=True)
        return [(query, response, logprobs) for query, response, logprobs in rows if logprobs is not None]

    def __len__(self) -> int:
        return len(self.queries)
