"""`rollouts_ahead`: a vLLM server samples the next iteration while this one is learned."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.sampled_logprobs import SampledLogprobs
from trl_apa.rollout.vllm_generation import VLLMRequest, VLLMSampler


STALENESS = "sampling/staleness"


class Sent(NamedTuple):
    """An iteration of which the server is asked.

    Args:
        iteration: its number, from 0.
        step: optimizer steps that the policy which samples it had made.
        rows: of this process.
        request: their prompts, and how they are answered.
    """

    iteration: int
    step: int
    rows: list[dict[str, Any]]
    request: VLLMRequest


class RolloutsAhead:
    """Rollouts of one iteration after the other, each asked for before the one before it is learned.

    The first iteration of a run is sampled by the policy that learns from it; every other by the policy as it was
    before the update on the iteration before. Every process calls it.

    Args:
        engine: the server.
        rows_of: this process's rows of an iteration; it fails on all processes if it fails on one.
        request_of: the rows' request, likewise.
        notes: where the log-probs that the server reports are noted.
    """

    def __init__(
        self,
        engine: VLLMSampler,
        rows_of: Callable[[int], list[dict[str, Any]]],
        request_of: Callable[[list[dict[str, Any]]], VLLMRequest],
        notes: Callable[[], SampledLogprobs],
    ):
        self.engine, self.rows_of, self.request_of, self.notes = engine, rows_of, request_of, notes
        self._sent: Sent | None = None
        self._resumed: Mapping[str, Any] | None = None

    def __call__(self, iteration: int, step: int, is_last: bool) -> tuple[list[dict[str, Any]], Episodes]:
        """Rows and rollouts of an iteration; those of the next are sent for.

        Args:
            iteration: its number, from 0.
            step: optimizer steps made so far.
            is_last: whether the run ends with it.

        Returns:
            This process's rows and their rollouts, which tell how many optimizer steps the policy that sampled them is
            behind.

        Raises:
            RuntimeError: if the server failed.
        """
        sent = self._continued(iteration) or self._sent
        if sent is None or sent.iteration != iteration:
            sent = self._send(iteration, step)
        self._sent = None
        responses: list[Tensor] = self.engine.answer_ahead(sent.request, self.notes())
        if not is_last:
            self._sent = self._send(iteration + 1, step)
        return sent.rows, Episodes(
            list(sent.request.queries), responses, statistics={STALENESS: float(step - sent.step)}
        )

    def forget(self) -> None:
        """A new run begins: what was sent for is left unread."""
        self._sent = self._resumed = None

    def state_dict(self) -> dict[str, Any] | None:
        """The iteration that was sent for, with the server's answer in the process that talks to it.

        Waits for the answer. None if nothing was sent for, or the server failed.
        """
        if self._sent is None:
            return None
        requests = self.engine.requests
        answer = None if requests is None else requests.answer()
        if requests is not None and answer is None:
            return None
        return {"iteration": self._sent.iteration, "step": self._sent.step, "answer": answer}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from what `state_dict` gave."""
        self._sent, self._resumed = None, state

    def _send(self, iteration: int, step: int) -> Sent:
        rows = self.rows_of(iteration)
        sent = Sent(iteration, step, rows, self.request_of(rows))
        self.engine.send_ahead(sent.request, step)
        return sent

    def _continued(self, iteration: int) -> Sent | None:
        """What a checkpoint holds of this iteration, as if it had been sent for here."""
        state, self._resumed = self._resumed, None
        if state is None or state["iteration"] != iteration:
            return None
        if self.engine.requests is not None:
            self.engine.requests.hold(state["answer"])
        rows = self.rows_of(iteration)
        return Sent(iteration, state["step"], rows, self.request_of(rows))
