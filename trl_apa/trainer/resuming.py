"""Writing checkpoints, and the checks when a run is resumed from one."""

import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from trl_apa._trl import _BaseTrainer
from trl_apa.redaction import without_secrets
from trl_apa.trainer.checkpoints import (
    PROCESS_STATE,
    IncompleteCheckpoint,
    checkpoints_in,
    clean_up,
    delete_folder,
    delete_surplus,
    newest_checkpoint,
    problem_with,
    put_in_place,
    read_manifest,
    record_run,
    run_of,
    staging_folder,
    write_manifest,
)
from trl_apa.trainer.optimization import (
    group_options,
    optimizer_name,
    use_new_group_options,
)
from trl_apa.trainer.run_identity import (
    DATA,
    NEVER_OVERRIDDEN,
    REFERENCE,
    REWARDS,
    Run,
    comparable,
    data_fingerprint,
    describe_networks,
    differences,
    say,
)


T = TypeVar("T")
logger = logging.getLogger(__name__)


def _to_cpu_with_index(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# In several processes on CPUs the Trainer may load an optimizer to "cpu:0", "cpu:1", ..., which torch does not know.
torch.serialization.register_package(99, lambda storage: None, _to_cpu_with_index)
# What a checkpoint of 0.1.0 does not say.
UNVERIFIED = "sizes and checksums of its files, its data, rewards, reference and most options"


def problem_resuming(folder: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed: the problem of `problem_with`, or inconsistent process states."""
    if (problem := problem_with(folder)) is not None:
        return problem
    step = _step_of(folder)
    for path in sorted(Path(folder).glob(PROCESS_STATE.format(process="*"))):
        try:
            problem = problem_with_state(torch.load(path, map_location="cpu", weights_only=True), step)
        except Exception as error:
            problem = f"it cannot be read: {type(error).__name__}: {error}"
        if problem is not None:
            return f"{path.name}: {problem}"
    return None


def problem_with_state(state: dict[str, Any], step: int) -> str | None:
    """An inconsistency between a process's state and the optimizer steps of its checkpoint, or None."""
    if (own := state.get("global_step", step)) != step:
        return f"it is of step {own}, {TRAINER_STATE_NAME} of step {step}"
    if (iteration := state.get("iteration")) is None:
        return None
    plan, position = iteration["plan"], iteration["position"]
    steps, rest = divmod(position, -(-len(plan[0]) // iteration["micro_batch_size"]))
    began_at = state.get("iteration_began_at", step - steps)
    if rest or not 0 <= steps < len(plan) or began_at + steps != step:
        return (
            f"micro-batch {position} of an iteration of {len(plan)} optimizer steps that began at step {began_at} "
            f"does not fit step {step}"
        )
    return None


def _step_of(folder: str | os.PathLike[str]) -> int:
    step: int = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).global_step
    return step


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint can be resumed: it is complete and unchanged."""
    return problem_resuming(checkpoint) is None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest complete checkpoint of the most recent run in `output_dir`; warns of newer incomplete ones.

    Raises:
        ValueError: if there is none.
    """
    newest = newest_checkpoint(output_dir, problem_resuming)
    if newest is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir={os.fspath(output_dir)!r} has no complete checkpoint"
        )
    return os.fspath(newest)


def load_process_state(folder: str | os.PathLike[str], process_index: int) -> dict[str, Any]:
    """The state of one process in a checkpoint, in addition to weights and optimizer.

    Raises:
        ValueError: if there is none, or if it does not fit the checkpoint.
    """
    path, where = Path(folder) / PROCESS_STATE.format(process=process_index), repr(os.fspath(folder))
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={where} has no {path.name}: it is not a checkpoint of train(), or has fewer "
            "processes, or was written with save_only_model"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if (problem := problem_with_state(state, _step_of(folder))) is not None:
        raise IncompleteCheckpoint(f"resume_from_checkpoint={where}: {path.name}: {problem}")
    return state


class ResumableRuns(_BaseTrainer):
    """The part of the trainers that writes checkpoints and resumes runs; see `docs/resuming.md`.

    A subclass defines the state of a process (`_process_state`, `_restore_process_state`) and the reasons that end a
    run in addition to the number of steps (`_why_finished`).
    """

    run: Run | None = None
    _description: dict[str, Any]
    _initial_policy: str | None = None
    _optimizer_as_made: list[dict[str, Any]] | None = None
    _resumed_manifest: dict[str, Any] | None = None
    _resumed_state: dict[str, Any] | None = None
    # Differences to the resumed checkpoint that resume_anyway has named.
    _overridden: dict[str, tuple[Any, Any]]
    _finished: str | None = None
    _last_saved_step: int | None = None

    # ---- the run ----

    def _begin_run(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None, resume_anyway: Sequence[str] | None
    ) -> str | None:
        """Set this run's id and find the checkpoint to resume, checked before anything is loaded.

        Raises:
            ValueError: if there is no checkpoint to resume, if it is incomplete, or if it is of another run.
        """
        self._description = self._describe_run()
        self._resumed_manifest = self._resumed_state = self._finished = self._last_saved_step = None
        self._overridden = {}
        if not resume_from_checkpoint:
            self._begin_new_run()
            return None
        self.processes.together(lambda: self._name_complete_checkpoints(resume_from_checkpoint))
        checkpoint = self._agreed(lambda: self._find_checkpoint(resume_from_checkpoint))
        self.processes.together(lambda: self._verify(checkpoint))
        step, state = self.processes.together(lambda: self._compare(checkpoint, resume_anyway))
        self._check_agreement(checkpoint, step, state)
        self.run = self._agreed(lambda: self._run_that_goes_on(self._resumed_manifest))
        if self._resumed_manifest is not None:
            self._record_run(self.run)
        self._announce(checkpoint)
        return checkpoint

    def _begin_new_run(self) -> None:
        output_dir = self.args.output_dir
        others = checkpoints_in(output_dir)
        self.run = self._agreed(lambda: Run.new(other.run for other in others if other.run is not None))
        self._record_run(self.run)
        if others and self.is_world_process_zero():
            names = ", ".join(sorted({other.path.name for other in others}))
            logger.warning(
                "output_dir=%r holds checkpoints of another run (%s): this new run keeps them, and save_total_limit "
                "does not count them. To continue that run: train(resume_from_checkpoint=True)",
                output_dir,
                names,
            )

    def _describe_run(self) -> dict[str, Any]:
        """The inputs that define a run; a checkpoint with another description belongs to another run."""
        args = self.args
        options = {name: getattr(args, name) for name in args.defines_run}
        module = self.accelerator.unwrap_model(self.model)
        # Before an engine shards them: the numbers of weights are those of the complete networks.
        networks = getattr(self, "_description", {}).get("networks") or describe_networks(module)
        return comparable(
            {
                **without_secrets(options),
                "world_size": args.world_size,
                "networks": networks,
                DATA: self._fingerprint_of_data(),
                REWARDS: self._names_of_rewards(),
                REFERENCE: self._initial_policy,
                "tools": self._names_of_tools(),
            }
        )

    def _names_of_rewards(self) -> list[str] | None:
        """Names of the reward functions; None if there are none."""
        scorer = getattr(self, "scorer", None)
        return None if scorer is None else scorer.names

    def _names_of_tools(self) -> list[str]:
        """Names of what answers the policy between its turns."""
        return []

    def _fingerprint_of_data(self) -> str | None:
        return data_fingerprint(self.train_dataset)

    def _agreed(self, choose: Callable[[], T]) -> T:
        """The main process's result of `choose`, on all processes; if it fails there, all raise."""
        chosen = [self.processes.together(lambda: choose() if self.is_world_process_zero() else None)]
        agreed: T = broadcast_object_list(chosen)[0] if self.accelerator.num_processes > 1 else chosen[0]
        return agreed

    # ---- resuming ----

    def _find_checkpoint(self, resume: str | os.PathLike[str] | Literal[True]) -> str:
        """The main process searches, so that all resume the same checkpoint."""
        return last_complete_checkpoint(self.args.output_dir) if resume is True else os.fspath(resume)

    def _name_complete_checkpoints(self, resume: str | os.PathLike[str] | Literal[True]) -> None:
        """A killed process may have left a complete checkpoint under its temporary name, on any node."""
        if self.args.should_save and (resume is True or not Path(resume).exists()):
            clean_up(self.args.output_dir if resume is True else Path(resume).parent)

    def _verify(self, checkpoint: str) -> None:
        if self.args.should_save and (problem := problem_resuming(checkpoint)) is not None:
            raise IncompleteCheckpoint(
                f"resume_from_checkpoint={checkpoint!r} is incomplete, or not a checkpoint: {problem}"
            )

    def _compare(self, checkpoint: str, resume_anyway: Sequence[str] | None) -> tuple[int, dict[str, Any]]:
        """Reject another run's checkpoint, and find out whether this one's run has finished.

        Returns:
            The checkpoint's optimizer steps, and this process's state in it.
        """
        self._resumed_manifest = manifest = read_manifest(checkpoint)
        step = _step_of(checkpoint)
        self._resumed_state = state = load_process_state(checkpoint, self.accelerator.process_index)
        # A checkpoint of 0.1.0 describes its run in each process's state.
        then = state.get("options", {}) if manifest is None else manifest["learns_from"]
        differing = differences(then, self._description)
        allowed = {*self._named(self.args.resume_anyway), *self._named(resume_anyway)}
        if unknown := allowed - self._description.keys():
            raise ValueError(
                f"resume_anyway names {', '.join(sorted(unknown))}, which is not compared on resume; it can name "
                f"{', '.join(sorted(self._description.keys() - set(NEVER_OVERRIDDEN)))}"
            )
        allowed -= set(NEVER_OVERRIDDEN)
        if refused := {name: pair for name, pair in differing.items() if name not in allowed}:
            names = sorted(refused.keys() - set(NEVER_OVERRIDDEN))
            advice = f"; resume_anyway={names} resumes it with the current values" if names else ""
            raise ValueError(f"resume_from_checkpoint={checkpoint!r} is of another run: {say(refused)}{advice}")
        self._check_optimizer(checkpoint, manifest)
        self._overridden = differing
        self._finished = self._why_finished(step, state)
        self._last_saved_step = step
        return step, state

    def _run_that_goes_on(self, manifest: dict[str, Any] | None) -> Run:
        others = [c.run for c in checkpoints_in(self.args.output_dir) if c.run is not None]
        return Run.new(others) if manifest is None else Run(**manifest["run"]).resumed(others)

    def _record_run(self, run: Run) -> None:
        if not self.args.should_save:
            return
        try:
            record_run(self.args.output_dir, run)
        except OSError as error:  # a run that saves nothing may do so
            logger.warning("output_dir=%r cannot be written to: %s", self.args.output_dir, error)

    def _named(self, names: str | Sequence[str] | None) -> list[str]:
        """The options of `resume_anyway`, by their own names."""
        aliases = getattr(self.args, "aliases", {})
        return [aliases.get(name, name) for name in ([names] if isinstance(names, str) else names or ())]

    def _check_optimizer(self, checkpoint: str, manifest: dict[str, Any] | None) -> None:
        if manifest is None or self.optimizer is None or self.is_deepspeed_enabled:
            return
        then, now = manifest["optimizer"], optimizer_name(self.optimizer)
        if then["name"] != now:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r}: optim was {manifest['options'].get('optim')!r} "
                f"({then['name']}), is {str(self.args.optim.value)!r} ({now}); their states are incompatible"
            )
        if len(then["groups"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r}: its optimizer has {len(then['groups'])} groups of "
                f"parameters, this one has {len(self.optimizer.param_groups)}; check value_learning_rate and which "
                "parameters are trained"
            )

    def _check_agreement(self, checkpoint: str, step: int, state: dict[str, Any]) -> None:
        """Reject a checkpoint whose processes wrote their parts at different steps."""
        numbers = torch.tensor([self._numbers_to_agree(step, state)], device=self.accelerator.device)
        everywhere = self.accelerator.gather(numbers)
        if (everywhere != everywhere[0]).any():
            raise IncompleteCheckpoint(
                f"resume_from_checkpoint={checkpoint!r}: its processes wrote their parts at different steps: "
                f"{everywhere.tolist()}"
            )

    def _numbers_to_agree(self, step: int, state: dict[str, Any]) -> list[int]:
        """What all processes of a checkpoint should have in common: its optimizer steps, and more of their states."""
        return [step]

    def _why_finished(self, step: int, state: dict[str, Any]) -> str | None:
        """Why a run with this many optimizer steps is finished under the present options; None if it is not.

        Args:
            step: optimizer steps.
            state: of this process in the checkpoint.
        """
        planned = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if step >= planned:
            return f"it has made its {planned} optimizer steps; set more to continue (max_steps, num_train_epochs)"
        stopped = (self._resumed_manifest or {}).get("early_stopping_patience")
        patience = [c.early_stopping_patience for c in self._early_stopping()]
        if stopped is not None and patience and max(patience) <= stopped:
            return f"EarlyStoppingCallback ended it after {stopped} evaluations; set a larger patience to continue"
        return None

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _announce(self, checkpoint: str) -> None:
        if self.args.should_save:
            clean_up(self.args.output_dir, self.run)
        if not self.is_world_process_zero():
            return
        logger.warning("resuming run %s from %s", self.run, checkpoint)
        if self._resumed_manifest is None:
            logger.warning("%s was written by version 0.1.0: %s cannot be verified", checkpoint, UNVERIFIED)
        changed = {**differences((self._resumed_manifest or {}).get("options", {}), self._options())}
        changed = {name: pair for name, pair in changed.items() if name not in self._description} | self._overridden
        if changed:
            logger.warning("changed since %s was written: %s", checkpoint, say(changed))
        if self._finished is not None:
            logger.warning("run %s is finished: %s. Nothing is trained", self.run, self._finished)

    def _options(self) -> dict[str, Any]:
        aliases = getattr(self.args, "aliases", ())
        return {name: value for name, value in comparable(self.args.to_dict()).items() if name not in aliases}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does, but a finished run makes no step."""
        if self._finished is not None:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, but restores the counter of an `EarlyStoppingCallback`."""
        initial = super()._init_training_state(*args, **kwargs)
        if self._resumed_manifest is not None:
            state = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
            states = state if isinstance(state, list) else [state] * (state is not None)
            for callback, kept in zip(self._early_stopping(), states, strict=False):
                callback.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
            best = self.state.best_model_checkpoint
            if best is not None and not self._is_of_this_run(best):
                self.state.best_model_checkpoint = None
        return initial

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called when the resumed loop starts: restores random numbers and the state of each process."""
        super()._load_rng_state(checkpoint)
        self._restore_resumed_state()

    def _restore_resumed_state(self) -> None:
        if self._resumed_state is not None:
            self._restore_process_state(self._resumed_state)
            self._resumed_state = None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As the Trainer does; records the options of the optimizer's groups before a checkpoint replaces them."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        made = optimizer or self.optimizer
        self._optimizer_as_made = group_options(made) if hasattr(made, "param_groups") else None
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does; then a learning rate, weight decay, ... that was changed since is used."""
        as_made, manifest = self._optimizer_as_made, self._resumed_manifest
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or as_made is None:
            return
        then = None if manifest is None else manifest["optimizer"]["groups"]
        changed = use_new_group_options(self.optimizer, self.lr_scheduler, then, as_made)
        self._optimizer_as_made = as_made
        if changed and self.is_world_process_zero():
            logger.warning("the optimizer continues with %s", say(changed))

    def _refuse_while_training(self, method: str) -> None:
        if self.is_in_train:
            raise RuntimeError(f"{method}() was called while train() runs, which makes its own updates")

    # ---- writing ----

    def _process_state(self) -> dict[str, Any]:
        """A process's state besides weights, optimizer and random numbers: tensors, numbers, lists, dicts."""
        return {}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        """The counterpart of `_process_state`."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a temporary folder, and rename it when it is complete and on disk.

        A checkpoint of that name, and the earlier ones, stay complete until then.

        Raises:
            RuntimeError: if it cannot be written, for example because the disk is full.
        """
        run = self.run = self.run or self._agreed(lambda: Run.new(()))
        step, output_dir = self.state.global_step, self._get_output_dir(trial)
        folder = staging_folder(output_dir, step, run)
        place = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        self._note_best_checkpoint(place)
        writes = self.args.should_save
        try:
            self.processes.together(lambda: delete_folder(folder) if writes else None)
            for write in self._parts_of_a_checkpoint(folder):
                self.processes.together(write)
            self.processes.together(lambda: self._complete(folder, step, run) if writes else None)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            if writes:
                delete_folder(folder)
            raise RuntimeError(
                f"{place} could not be written: {error}. Checkpoints before it are complete: make room and continue "
                "with train(resume_from_checkpoint=True)"
            ) from error
        self._last_saved_step = step
        self._after_saving(place, run)

    def _after_saving(self, place: Path, run: Run) -> None:
        """The upload and deleting old checkpoints, whose failure loses nothing."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        try:
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.fspath(place))
            if self.args.should_save:
                delete_surplus(place.parent, run, limit, best)
        except Exception as error:
            logger.warning(
                "%s is complete, but pushing it or deleting older checkpoints failed: %s: %s",
                place,
                type(error).__name__,
                error,
            )

    def _note_best_checkpoint(self, place: Path) -> None:
        state = self.state
        if self.args.save_strategy == SaveStrategy.NO or not state.best_global_step:
            return
        best = place.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best == place or self._is_of_this_run(best):
            state.best_model_checkpoint = os.fspath(best)

    def _is_of_this_run(self, checkpoint: str | os.PathLike[str]) -> bool:
        owner = run_of(checkpoint)
        return owner is not None and self.run is not None and owner.id == self.run.id

    def _parts_of_a_checkpoint(self, folder: Path) -> Iterator[Callable[[], None]]:
        """All processes finish each write before the next, so that none waits for one that failed."""
        path = os.fspath(folder)
        yield lambda: folder.mkdir(parents=True, exist_ok=True)
        yield lambda: self.save_model(path, _internal_call=True)
        if not self.args.save_only_model:
            yield lambda: self._save_optimizer_and_scheduler(path)
            yield lambda: self._save_small_files(folder)
        yield lambda: self._save_trainer_state(folder)

    def _save_small_files(self, folder: Path) -> None:
        self._save_scaler(os.fspath(folder))
        self._save_rng_state(os.fspath(folder))
        state = {"global_step": self.state.global_step, **self._process_state()}
        torch.save(state, folder / PROCESS_STATE.format(process=self.accelerator.process_index))

    def _save_trainer_state(self, folder: Path) -> None:
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _export_callbacks(self) -> None:
        """The state of the callbacks that have one, for `restore_callback_states_from_checkpoint`."""
        states: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__].append(callback.state())
        self.state.stateful_callbacks = {name: of[0] if len(of) == 1 else of for name, of in states.items()}

    def _complete(self, folder: Path, step: int, run: Run) -> None:
        stopped = [c for c in self._early_stopping() if c.early_stopping_patience_counter >= c.early_stopping_patience]
        content = {
            "version": version("trl-apa"),
            "step": step,
            "resumable": not self.args.save_only_model,
            "value_model": self.accelerator.unwrap_model(self.model).value_model is not None,
            "run": run.as_dict(),
            "learns_from": self._description if self.is_in_train else self._describe_run(),
            "options": self._options(),
            "optimizer": {
                "name": optimizer_name(self.optimizer),
                "groups": comparable_groups(self._optimizer_as_made),
            },
            "early_stopping_patience": max((c.early_stopping_patience for c in stopped), default=None),
        }
        write_manifest(folder, content)
        put_in_place(folder, step, run)

    def _save_what_was_learned(self) -> None:
        """Save a checkpoint before an error is raised between two optimizer steps, unless this step has one."""
        step = self.state.global_step
        if not self.is_in_train or step == 0 or self.processes.stop_on_signal.at_once:
            return
        if step == self._last_saved_step:
            logger.warning(
                "the run failed; its progress is saved in the checkpoint of step %d: resume from there", step
            )
            return
        try:
            self._save_checkpoint(self.model, trial=None)
        except RuntimeError as error:  # the run's own error is the one to raise
            logger.error("the run failed, and its progress since the last checkpoint is lost: %s", error)
            return
        advice = "only weights (save_only_model)" if self.args.save_only_model else "resume from there"
        logger.warning("the run failed; its progress is saved in %s: %s", self._checkpoint_place(), advice)

    def _checkpoint_place(self) -> str:
        return os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, which with `save_total_limit=1` would delete other runs' checkpoints, and the last."""
        asked = self.args.save_strategy != SaveStrategy.NO or self.processes.stop_on_signal.received
        if asked and self._finished is None and self.state.global_step not in (0, self._last_saved_step):
            # A callback ended the run between two checkpoints; or save_strategy="best" took back what was asked for.
            self._save_checkpoint(self.model, trial=None)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit


def comparable_groups(groups: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [comparable(group) for group in groups or []]


@contextmanager
def random_state_restored_on_error() -> Iterator[None]:
    """If the inside fails, the generators of Python, NumPy and torch are restored."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    except BaseException:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        raise
