"""What changes from one iteration to the next: its one owner, and what of it a checkpoint holds for each process."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_apa.algorithms.kl import AdaptiveKLController, FixedKLController
from trl_apa.algorithms.learned_normalizers import LearnedNormalizer
from trl_apa.algorithms.rewards import RunningMoments
from trl_apa.trainer.iteration import Iteration


@dataclass
class RunState:
    """The current iteration, earlier counts and measurements, and adaptive state.

    Args:
        kl_ctl: the coefficient of the KL penalty, or lambda.
        running_scores: mean and standard deviation of all scores so far.
        responses_per_iteration: of all processes.
        iteration: rollouts and plan of the current iteration, or of the last one that was finished.
        num_iterations_done: iterations whose optimizer steps are all made.
        unlogged: statistics of iterations that are not logged yet.
        last_kl: of the iteration that ended last, nats a response.
        iteration_began_at: optimizer steps that were made when the iteration began.
        best_mean_score: highest mean score of an iteration so far, reward units.
        ref_rewards: rewards of responses of pi_init, by prompt: see `reference_rewards.find_ref_rewards`.
        ref_rewards_options: what these depend on, by name.
        normalizer: with `normalizer="learned"`, what earlier iterations say of log Z(s).
        first_iteration, episodes_before: where the counting of this run began, and the rollouts that were counted
            before.
    """

    kl_ctl: AdaptiveKLController | FixedKLController
    running_scores: RunningMoments
    responses_per_iteration: int
    iteration: Iteration | None = None
    num_iterations_done: int = 0
    unlogged: list[dict[str, float]] = field(default_factory=list)
    last_kl: float | None = None
    iteration_began_at: int = 0
    best_mean_score: float = -math.inf
    ref_rewards: dict[str, list[float]] = field(default_factory=dict)
    ref_rewards_options: dict[str, Any] = field(default_factory=dict)
    normalizer: LearnedNormalizer = field(default_factory=LearnedNormalizer)
    first_iteration: int = 0
    episodes_before: int = 0

    @property
    def current(self) -> Iteration:
        """The current iteration; RuntimeError before the first."""
        if self.iteration is None:
            raise RuntimeError("no iteration has begun")
        return self.iteration

    @property
    def episodes_done(self) -> int:
        """Rollouts of all processes since the run began, those before it was resumed included."""
        return self.episodes_before + (self.num_iterations_done - self.first_iteration) * self.responses_per_iteration

    def begin_run(self) -> None:
        """Start a new run of `train`; adaptive state and the number of iterations are kept."""
        self.iteration, self.unlogged, self.last_kl, self.ref_rewards = None, [], None, {}
        self.first_iteration, self.episodes_before = self.num_iterations_done, 0

    def ref_rewards_made_with(self, options: dict[str, Any]) -> dict[str, list[float]]:
        """Rewards of pi_init's responses that are known, to be added to; dropped if they were made with others."""
        if options != self.ref_rewards_options:
            self.ref_rewards, self.ref_rewards_options = {}, deepcopy(options)
        return self.ref_rewards

    def begin_iteration(self, iteration: Iteration, global_step: int) -> None:
        """The next iteration, planned after `global_step` optimizer steps."""
        self.iteration, self.iteration_began_at = iteration, global_step

    def end_iteration(self, kl: float) -> None:
        """The current iteration's optimizer steps are made; the controller learns of its KL, nats a response."""
        self.kl_ctl.update(kl, self.responses_per_iteration)
        self.num_iterations_done += 1

    def note_for_log(self, numbers: dict[str, float]) -> None:
        """The statistics of an iteration that has ended, for the next log."""
        self.unlogged.append(numbers)
        self.last_kl = float(numbers["objective/kl"])

    def take_unlogged(self) -> list[dict[str, float]]:
        """Return the statistics recorded for the log, and clear them."""
        unlogged, self.unlogged = self.unlogged, []
        return unlogged

    def is_best(self, mean_score: float) -> bool:
        """Whether no iteration has had so high a mean score before."""
        best, self.best_mean_score = self.best_mean_score, max(self.best_mean_score, mean_score)
        return mean_score > best

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as tensors, numbers and containers of these."""
        iteration = self.iteration
        return {
            "iteration": None if iteration is None or iteration.finished else iteration.state_dict(),
            "num_iterations_done": self.num_iterations_done,
            "episodes_done": self.episodes_done,
            "iteration_began_at": self.iteration_began_at,
            "last_kl": self.last_kl,
            "running_scores": self.running_scores.state_dict(),
            "kl_ctl": self.kl_ctl.state_dict(),
            "unlogged": self.unlogged,
            "ref_rewards": self.ref_rewards,
            "ref_rewards_options": self.ref_rewards_options,
            "normalizer": self.normalizer.state_dict(),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        device: torch.device,
        global_step: int,
        with_controller: bool = True,
        with_iteration: bool = True,
    ) -> None:
        """Continue from what `state_dict` gave.

        Args:
            state: of a checkpoint; 0.1.0 wrote less into it.
            device: of the iteration's tensors.
            global_step: optimizer steps that the checkpoint's run had made.
            with_controller, with_iteration: whether these continue too; otherwise the controller stays as it is, and
                what was left of the iteration, the rewards of pi_init's responses and a learned log Z(s) are left out.
        """
        self.num_iterations_done, self.unlogged = state["num_iterations_done"], state["unlogged"]
        self.first_iteration, self.episodes_before = self.num_iterations_done, self.episodes_in(state)
        self.last_kl = state.get("last_kl")
        self.iteration_began_at = state.get("iteration_began_at", global_step)
        self.running_scores.load_state_dict(state["running_scores"])
        if with_controller:
            self.kl_ctl.load_state_dict(state["kl_ctl"])
        if with_iteration:
            self.ref_rewards = state.get("ref_rewards", {})
            self.ref_rewards_options = state.get("ref_rewards_options", {})
            self.normalizer = LearnedNormalizer()
            if "normalizer" in state:
                self.normalizer.load_state_dict(state["normalizer"], device)
        if state["iteration"] is not None and with_iteration:
            self.iteration = Iteration.from_state_dict(state["iteration"], device)

    def episodes_in(self, state: Mapping[str, Any]) -> int:
        """Rollouts before a checkpoint; 0.1.0 did not count them."""
        return int(state.get("episodes_done", state["num_iterations_done"] * self.responses_per_iteration))
