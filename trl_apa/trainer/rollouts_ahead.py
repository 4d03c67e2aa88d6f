"""`rollouts_ahead`: a vLLM server samples the next iteration while this one is learned."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object
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
        # The newest iteration that was answered, and what a checkpoint holds, as `state_dict` has them.
        self._answered: dict[str, Any] | None = None
        self._held: list[dict[str, Any]] = []
        self._has_loaded = False

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
        self._agree_on_what_is_held()
        sent = self._take_held(iteration) or self._sent
        if sent is None or sent.iteration != iteration:
            sent = self._send(iteration, step)
        self._sent = None
        responses: list[Tensor] = self.engine.answer_ahead(sent.request, self.notes())
        requests = self.engine.requests
        self._answered = _state(sent, None if requests is None else requests.last)
        if not is_last:
            self._sent = self._take_held(iteration + 1) or self._send(iteration + 1, step)
        statistics = {STALENESS: float(step - sent.step)}
        return sent.rows, Episodes(list(sent.request.queries), responses, statistics=statistics)

    def forget(self) -> None:
        """A new run begins: what was sent for is left unread."""
        self._sent = self._answered = None
        self._held, self._has_loaded = [], False

    def state_dict(self, next_iteration: int) -> list[dict[str, Any]]:
        """What was sampled of iterations from `next_iteration` on, with the server's answers where it was asked.

        Waits for an answer that is under way; one that has failed is left out.
        """
        states = [*self._held, *([] if self._answered is None else [self._answered])]
        if self._sent is not None:
            requests = self.engine.requests
            answer = None if requests is None else requests.answer()
            if requests is None or answer is not None:
                states.append(_state(self._sent, answer))
        return [state for state in states if state["iteration"] >= next_iteration]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state_dict` gave; every process calls it."""
        self.forget()
        self._held, self._has_loaded = list(states), True

    def _agree_on_what_is_held(self) -> None:
        """Leave out iterations that not every process has: of a server that failed one process alone knew."""
        if self._has_loaded:
            of_all = gather_object([[state["iteration"] for state in self._held]])
            self._held = [state for state in self._held if all(state["iteration"] in of_one for of_one in of_all)]
        self._has_loaded = False

    def _send(self, iteration: int, step: int) -> Sent:
        rows = self.rows_of(iteration)
        sent = Sent(iteration, step, rows, self.request_of(rows))
        self.engine.send_ahead(sent.request, step)
        return sent

    def _take_held(self, iteration: int) -> Sent | None:
        """What a checkpoint holds of this iteration, as if it had been sent for here."""
        state = next((state for state in self._held if state["iteration"] == iteration), None)
        self._held = [state for state in self._held if state["iteration"] > iteration]
        if state is None:
            return None
        if self.engine.requests is not None:
            self.engine.requests.hold(state["answer"])
        rows = self.rows_of(iteration)
        return Sent(iteration, state["step"], rows, self.request_of(rows))


def _state(sent: Sent, answer: dict[str, Any] | None) -> dict[str, Any]:
    return {"iteration": sent.iteration, "step": sent.step, "answer": answer}
