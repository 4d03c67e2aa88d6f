"""accelerate's trackers: objects in `log_with`, and what a script reaches by `trainer.accelerator`."""

from importlib import import_module
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import ProjectConfiguration
from transformers import TrainerCallback

from trl_apa.config.trackers import tracker_objects
from trl_apa.trainer.tracker_failures import Report, is_disabled, may_fail, tracker_of


# Trackers with a class in accelerate that can take over a run which is open -> the attribute in which it keeps it.
RUN_OF = {"wandb": "run", "trackio": "run", "comet_ml": "writer", "tensorboard": "writer"}
# Where the Trainer's reporters of W&B and Trackio write the step of a row.
STEP = "train/global_step"


class TrackerObject(Report):
    """Sends what is logged to a tracker object of the script's, under the names that the numbers have in `stats`.

    Its run is the script's: `trainer.accelerator.end_training()` ends it.
    """

    def __init__(self, tracker: GeneralTracker):
        self.tracker, self.name = tracker, tracker.name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero or not self.tracker.main_process_only:
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float | str)}
            self.tracker.log(numbers, step=state.global_step)


class ReporterTracker(GeneralTracker):
    """A reporter of the Trainer's as a tracker of accelerate's; its run is opened when it is first asked for.

    Args:
        callback: the reporter.
        trainer: whose numbers it reports.
    """

    requires_logging_directory = False

    def __init__(self, callback: TrainerCallback, trainer: Any):
        self.name = tracker_of(callback)
        self.callback, self.trainer = callback, trainer
        super().__init__()

    @property
    def tracker(self) -> Any:
        """W&B's or Trackio's run, Comet's experiment, TensorBoard's writer; None of other trackers."""
        self.start()
        return self._run()

    def start(self) -> None:
        """Open the runs of all reporters, as the config says; those that are open stay as they are."""
        self.trainer._start_reporters()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Values under their own names, at the optimizer step `step`, the current one by default.

        Trackers without a run that can be reached get them as the Trainer's reporter names them (`train/...`).
        """
        trainer, callback = self.trainer, self.callback
        if not trainer.is_world_process_zero() or is_disabled(callback):
            return
        if callback not in trainer.callback_handler.callbacks:
            return
        step = trainer.state.global_step if step is None else step
        with may_fail(callback, "accelerator.log"):
            self.start()
            run, accelerates = self._run(), self._as_accelerate_has_it()
            if run is not None and self.name in ("wandb", "trackio"):
                run.log({STEP: step, **values}, **kwargs)  # W&B drops rows whose own step is not the newest
            elif accelerates is not None:
                accelerates.log(values, step=step, **kwargs)
            else:
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(values))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Add to what the run says of itself, where accelerate knows how."""
        self.start()
        if (accelerates := self._as_accelerate_has_it()) is not None:
            with may_fail(self.callback, "accelerator.init_trackers"):
                accelerates.store_init_configuration(values)

    def finish(self) -> None:
        """End the run, if it is open."""
        callback, trainer = self.callback, self.trainer
        if not trainer._reporters_started or not trainer.is_world_process_zero() or is_disabled(callback):
            return
        accelerates = None if self.name == "tensorboard" else self._as_accelerate_has_it()
        with may_fail(callback, "accelerator.end_training"):
            if accelerates is not None:
                accelerates.finish()
            else:
                callback.on_train_end(trainer.args, trainer.state, trainer.control)

    def __getattr__(self, name: str) -> Any:
        """What accelerate's own tracker of that kind has beside: `log_images`, `log_table`, `writer`, ..."""
        if name in ("callback", "trainer", "name") or (accelerates := self._as_accelerate_has_it()) is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(accelerates, name)

    def _run(self) -> Any:
        if self.name == "wandb":
            return import_module("wandb").run
        if self.name == "trackio":
            return import_module("trackio").context_vars.current_run.get()
        if self.name == "comet_ml":
            return import_module("comet_ml").get_running_experiment()
        return getattr(self.callback, "tb_writer", None)

    def _as_accelerate_has_it(self) -> Any:
        run, kind = self._run(), LOGGER_TYPE_TO_CLASS.get(self.name or "")
        if run is None or kind is None or self.name not in RUN_OF:
            return None
        tracker: Any = object.__new__(kind)
        setattr(tracker, RUN_OF[self.name], run)
        if self.name == "tensorboard":
            tracker.logging_dir = run.log_dir
        return tracker


def connect_reporters(trainer: Any) -> None:
    """Let `accelerator.log`, `get_tracker` and `end_training` reach the reporters that they do not know yet."""
    trackers = trainer.accelerator.trackers
    known = [tracker.callback for tracker in trackers if isinstance(tracker, ReporterTracker)]
    project = _project_configuration(trainer.args)
    for callback in trainer.callback_handler.callbacks:
        if tracker_of(callback) is not None and callback not in known:
            trackers.append(ReporterTracker(callback, trainer))
            if tracker_of(callback) == "tensorboard" and project is not None and project.logging_dir is not None:
                callback.logging_dir = project.logging_dir


def connect_tracker_objects(trainer: Any) -> None:
    """Begin the runs of the objects in `args.log_with`, and send them what is logged from then on.

    An object that fails here is left out, with a warning.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if (project := _project_configuration(args)) is not None:
        accelerator.project_configuration = project
    for tracker in tracker_objects(args.log_with):
        callback = TrackerObject(tracker)
        trainer.add_callback(callback)
        if accelerator.is_main_process or not tracker.main_process_only:
            with may_fail(callback, "opening its run"):
                tracker.start()
                tracker.store_init_configuration({name: _plain(value) for name, value in args.to_dict().items()})
        if not is_disabled(callback):
            accelerator.trackers.append(tracker)


def _project_configuration(args: Any) -> ProjectConfiguration | None:
    """What `project_kwargs` says, if it says something."""
    return ProjectConfiguration(**args.project_kwargs) if args.project_kwargs else None


def _plain(value: Any) -> Any:
    """What accelerate's trackers take: numbers, texts, booleans and None; anything else as it prints."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
