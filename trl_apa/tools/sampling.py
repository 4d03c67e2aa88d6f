"""Rows of a data set to rollouts, of one turn or of several, by the policy and by pi_init."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from trl_apa.distributed.processes import Processes
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.sampled_logprobs import SampledLogprobs
from trl_apa.tools.making import Player
from trl_apa.tools.player import ToolPlayer
from trl_apa.tools.turns import Sampled


class EpisodeSampler:
    """What `train` and `evaluate` sample with. Every process calls it with equally many rows.

    Args:
        player: plays rollouts of several turns; None where the policy answers in one.
        query: a row's prompt, 1-D token ids.
        respond: prompts and options of `generate` to responses, a pair with pi_init's if `generate_ref_response`. It
            fails on all processes if it fails on one.
        of_reference: prompts and options of `generate` to responses of pi_init; it fails on all processes, too.
        notes: where the log-probs of what is sampled are noted.
        processes: of the run.
    """

    def __init__(
        self,
        player: Player | None,
        query: Callable[[dict[str, Any]], Tensor],
        respond: Callable[..., Any],
        of_reference: Callable[..., list[Tensor]],
        notes: SampledLogprobs,
        processes: Processes,
    ):
        self.player, self.query, self.respond, self.of_reference = player, query, respond, of_reference
        self.notes, self.processes = notes, processes

    def __call__(self, rows: Sequence[dict[str, Any]], **options: Any) -> Episodes:
        """One rollout of the policy to each row.

        Args:
            rows: of this process.
            options: of `generate`.
        """
        if self.player is None:
            queries = self._queries(rows)
            return Episodes(queries, self.respond(queries, **options))
        episodes = self.player(rows, partial(self._turn, **options))
        for query, response, logprobs in episodes.noted:
            self.notes.keep([query], [response], logprobs[None])
        return episodes

    def with_reference(self, rows: Sequence[dict[str, Any]]) -> tuple[Episodes, Episodes | None]:
        """Rollouts of the policy and of pi_init; None for those of pi_init where a function of the user's samples."""
        if isinstance(self.player, ToolPlayer):
            return self(rows), self.player(rows, self._turn_of_reference)
        if self.player is not None:
            return self(rows), None
        queries = self._queries(rows)
        of_policy, of_reference = self.respond(queries, generate_ref_response=True)
        return Episodes(queries, of_policy), Episodes(queries, of_reference)

    def _queries(self, rows: Sequence[dict[str, Any]]) -> list[Tensor]:
        return self.processes.together(lambda: [self.query(row) for row in rows])

    def _turn(self, contexts: list[Tensor], limits: list[int], **options: Any) -> list[Sampled]:
        responses = self.respond(contexts, **options, max_new_tokens=limits)
        known = map(self.notes.known, contexts, responses)
        return [Sampled(ids.tolist(), logprobs) for ids, logprobs in zip(responses, known, strict=True)]

    def _turn_of_reference(self, contexts: list[Tensor], limits: list[int]) -> list[Sampled]:
        responses = self.of_reference(contexts, max_new_tokens=limits)
        return [Sampled(ids.tolist()) for ids in responses]
