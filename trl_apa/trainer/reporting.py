"""From statistics, rewards and texts to the Trainer's reporters (W&B, TensorBoard, Trackio, Comet, ...)."""

import io
import random
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, NamedTuple, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, integrations
from transformers.integrations import get_reporting_integration_callbacks

from trl_apa._trl import print_prompt_completions_sample
from trl_apa.models.network_parts import Network
from trl_apa.redaction import without_secrets
from trl_apa.redaction.trackers import options_to_open
from trl_apa.trainer.statistics import unbiased_std
from trl_apa.trainer.tracker_failures import is_disabled, may_fail, tracker_of, warn_if_report_fails


# Trackers that take `tracker_kwargs` -> what their reporter calls to open a run, and the argument of it, if any, that
# names the project. TensorBoard's is an attribute of the reporter, the others are functions of the library.
OPENERS = {
    "wandb": ("init", "project"),
    "trackio": ("init", "project"),
    "comet_ml": ("start", "project_name"),
    "tensorboard": ("_SummaryWriter", None),
}
TABLE_NAME = "game_log"
TENSORBOARD_ROWS = 10
# Whole numbers up to this size are exact as float64, so that they can stand in one column with fractions.
LARGEST_EXACT = 2**53


class Table(NamedTuple):
    """Texts beside their rewards."""

    columns: list[str]
    rows: list[list[Any]]


# ---- options ----


def check_trackers(report_to: Sequence[str], tracker_kwargs: Mapping[str, Any], project_name: str | None) -> None:
    """
    Refuse trackers that cannot be used, and warn of options that reach none.

    Args:
        report_to: names of trackers, as transformers knows them.
        tracker_kwargs: for each tracker the arguments that open its run.
        project_name: what the project is to be called.

    Raises:
        ImportError: if a tracker is not installed.
        ValueError: if transformers has no reporter of that name, or `tracker_kwargs` is not a dict of dicts.
    """
    get_reporting_integration_callbacks(list(report_to))
    for tracker in report_to:
        if not _is_installed(tracker):
            raise ImportError(f"report_to (or log_with) names {tracker!r}, which is not installed")
    if not isinstance(tracker_kwargs, Mapping) or not all(isinstance(v, Mapping) for v in tracker_kwargs.values()):
        raise ValueError("tracker_kwargs should be a dict that holds a dict for each tracker")
    for tracker in tracker_kwargs:
        if tracker not in report_to:
            _warn(f"tracker_kwargs[{tracker!r}] has no effect: report_to does not name that tracker")
        elif tracker not in OPENERS:
            _warn(f"tracker_kwargs[{tracker!r}] has no effect: its reporter reads the environment alone")
    if project_name is not None and report_to and not any(OPENERS.get(name, (None, None))[1] for name in report_to):
        _warn(f"tracker_project_name={project_name!r} has no effect: {', '.join(report_to)} cannot be given a project")


def _is_installed(tracker: str) -> bool:
    if tracker == "comet_ml":
        # transformers' own check also wants an API key, which an offline experiment does without.
        return find_spec(tracker) is not None
    library = {"azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
    return bool(getattr(integrations, f"is_{library}_available")())


def _warn(message: str) -> None:
    # The caller of the config: above check_trackers, the config's method, __post_init__ and __init__.
    warnings.warn(without_secrets(message), UserWarning, stacklevel=6)


# ---- runs ----


def start_reporters(
    trackers: Collection[str],
    callbacks: Iterable[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    model: Network,
) -> None:
    """Tell those of `callbacks` that report to one of `trackers` that training begins; the classic loop never does.

    They open their runs then, with `args.tracker_project_name` and `args.tracker_kwargs` over their own choices. A run
    that is open already stays as it is; a warning says so where it should have had options.
    """
    for callback in callbacks:
        tracker = tracker_of(callback)
        if tracker is not None and tracker in trackers and not is_disabled(callback):
            with (
                may_fail(callback, "opening its run"),
                _run_options(tracker, callback, args, state.is_world_process_zero),
            ):
                callback.on_train_begin(args, state, control, model=model)


@contextmanager
def _run_options(tracker: str, callback: TrainerCallback, args: TrainingArguments, is_main: bool) -> Iterator[None]:
    """Meanwhile, what opens a run of the tracker gets our options on top of what the reporter gives it."""
    options = _options_for(tracker, args) if is_main else {}
    if not options:
        yield
        return
    owner = callback if tracker == "tensorboard" else import_module(tracker)
    name = OPENERS[tracker][0]
    open_run, opened = getattr(owner, name), []

    def open_with_options(**given: Any) -> Any:
        opened.append(True)
        return open_run(**{**given, **options})

    setattr(owner, name, open_with_options)
    try:
        yield
    finally:
        setattr(owner, name, open_run)
    if not opened:
        warnings.warn(
            f"a run of {tracker} is open already, so these options are not applied: {', '.join(options)}", stacklevel=6
        )


def _options_for(tracker: str, args: TrainingArguments) -> dict[str, Any]:
    if tracker not in OPENERS:
        return {}
    options, project = dict(args.tracker_kwargs.get(tracker, {})), OPENERS[tracker][1]
    if args.tracker_project_name is not None and project is not None:
        options.setdefault(project, args.tracker_project_name)
    is_config = isinstance(options.get("experiment_config"), Mapping)
    if is_config:
        options["experiment_config"] = {"name": args.run_name, **options["experiment_config"]}
    options = options_to_open(options, vars(args))
    if is_config:
        # Comet takes an object, which JSON cannot express.
        options["experiment_config"] = import_module(tracker).ExperimentConfig(**options["experiment_config"])
    return options


# ---- what is logged ----


def reward_statistics(rewards: Sequence[Any], accelerator: Accelerator) -> dict[str, Any]:
    """`env/reward_mean`, `env/reward_std` (unbiased; 0 of a single reward) and `env/reward_dist`, of all processes.

    Args:
        rewards: those of this process, on each process as many; numbers or tensors of one element, reward units.
        accelerator: knows the processes.
    """
    rewards_B = torch.stack([torch.as_tensor(reward, dtype=torch.float32).reshape(()) for reward in rewards])
    rewards_B = accelerator.gather(rewards_B.to(accelerator.device))
    return {
        "env/reward_mean": float(rewards_B.mean()),
        "env/reward_std": float(unbiased_std(rewards_B)),
        "env/reward_dist": rewards_B.cpu().numpy(),
    }


def split_statistics(stats: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers among the statistics, as floats, and the vectors, as float64 NumPy arrays; the rest is left out.

    Args:
        stats: numbers, arrays or tensors. Elements that are not finite, which no histogram can show, leave a vector.
    """
    numbers, vectors = {}, {}
    for name, value in stats.items():
        # What says that it is one and cannot be read as numbers (an array of texts, a tensor without data) is none.
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            if isinstance(value, Real) or getattr(value, "ndim", None) == 0:
                numbers[name] = float(value)
            elif getattr(value, "ndim", None) == 1:
                values = torch.as_tensor(value).detach().cpu().double()
                values = values[values.isfinite()]
                if len(values):
                    vectors[name] = values.numpy()
    return numbers, vectors


def gather_table(
    batch: Mapping[str, Any], columns: Sequence[str], rewards: Sequence[Any], accelerator: Accelerator
) -> Table | None:
    """The columns of all processes with the rewards as the last one; None if no column is there.

    Args:
        batch: under each name in `columns` one value for each reward: texts and numbers as they are, anything else as
            it prints. A column that is missing, has another length or cannot be read is left out, with a warning.
        columns: names, in the order of the table.
        rewards: those of this process.
        accelerator: knows the processes; their rows follow each other in order.
    """
    missing = [name for name in columns if name not in batch]
    if missing:
        warnings.warn(f"batch has no {', '.join(map(repr, missing))} to log with the rewards", stacklevel=3)
    cells: dict[str, list[Any]] = {}
    for name in [name for name in columns if name in batch and name != "reward"]:
        # Nothing raises before the processes meet, so that none waits for the others.
        try:
            cells[name] = [_cell(value) for value in batch[name]]
        except Exception as error:
            warnings.warn(f"batch[{name!r}] cannot be logged: {type(error).__name__}: {error}", stacklevel=3)
            continue
        if len(cells[name]) != len(rewards):
            count = len(cells.pop(name))
            warnings.warn(f"batch[{name!r}] has {count} entries for {len(rewards)} rewards", stacklevel=3)
    rows = [
        {"reward": float(reward), **{name: cells[name][row] for name in cells}} for row, reward in enumerate(rewards)
    ]
    rows = gather_object(rows)
    names = [name for name in columns if name != "reward" and any(name in row for row in rows)]
    by_column = {name: _of_one_type([row.get(name) for row in rows]) for name in [*names, "reward"]}
    if not names:
        return None
    return Table([_cell(name) for name in by_column], [list(row) for row in zip(*by_column.values(), strict=True)])


def show_table(table: Table, step: int, num_rows: int) -> None:
    """Print some rows, chosen at random, of a table that has the columns `prompt` and `completion`.

    Needs the library rich; without it nothing is printed. Does not change the state of Python's random numbers.

    Raises:
        OSError: if the pipe is closed.
    """
    if not table.rows or find_spec("rich") is None:
        return
    columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    state = random.getstate()
    try:
        with _printable(sys.stdout):
            print_prompt_completions_sample(prompts, completions, columns, None, step, min(num_rows, len(table.rows)))
    except SystemExit as ended:
        # How rich answers a pipe that is closed at its other end.
        raise BrokenPipeError("nobody reads what is printed") from ended
    finally:
        random.setstate(state)


@contextmanager
def _printable(stream: TextIO | None) -> Iterator[None]:
    """Inside, a character that the stream's encoding lacks is written as its escape (`\\xe9`)."""
    if not isinstance(stream, io.TextIOWrapper) or stream.errors is None:
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):
            stream.reconfigure(errors=errors)


def save_table(table: Table, path: Path) -> None:
    """Write a table as parquet, creating missing folders; never leaves an incomplete file."""
    columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
    content = io.BytesIO()  # a writer on a file would try to end it on a full disk too
    with _no_progress_bars():
        Dataset.from_dict(columns).to_parquet(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content.getvalue())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Inside, `datasets` draws none: one a table would be in the way, and needs a terminal that works."""
    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def _cell(value: Any) -> Any:
    """A text, a number or None: what every tracker and every file can hold; anything else as it prints."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return float(value)
    # A lone surrogate, half of a character, has no place in UTF-8.
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _of_one_type(cells: list[Any]) -> list[Any]:
    """The cells of a column as they are if all are numbers or booleans, or None; otherwise all as texts."""
    kinds = {type(cell) for cell in cells} - {NoneType}
    exact = all(abs(cell) <= LARGEST_EXACT for cell in cells if type(cell) is int)
    is_one = len(kinds) == 1 or (kinds == {int, float} and exact)
    return cells if is_one and str not in kinds else [str(cell) for cell in cells]


def log_media(
    callbacks: Iterable[TrainerCallback], step: int, vectors: Mapping[str, Any], table: Table | None
) -> None:
    """Histograms of the vectors, and the table under `TABLE_NAME`, to the trackers that have such things.

    W&B, Trackio and Comet get both. TensorBoard has no tables: it gets the first `TENSORBOARD_ROWS` rows as a text.
    The other trackers get neither, nor does one whose run is closed, as `train` leaves some of them. A histogram or a
    table that a tracker refuses is left out, with a warning the first time. To be called on the main process, before
    the numbers are logged.
    """
    histograms = {f"train/{name}": vector for name, vector in vectors.items()}
    for callback in callbacks:
        if not is_disabled(callback):
            with may_fail(callback, "log_media"):
                _log_media_to(callback, step, histograms, table)


def _log_media_to(callback: TrainerCallback, step: int, histograms: Mapping[str, Any], table: Table | None) -> None:
    tracker = tracker_of(callback)
    if tracker == "wandb":
        wandb = import_module(tracker)
        if wandb.run is not None and (objects := _objects(callback, wandb, histograms, table)):
            # Not a row of its own: the reporter's call with the numbers completes it.
            wandb.log(objects, commit=False)
    elif tracker == "trackio":
        trackio = import_module(tracker)
        is_open = trackio.context_vars.current_run.get() is not None
        if is_open and (objects := _objects(callback, trackio, histograms, table)):
            trackio.log({**objects, "train/global_step": step})
    elif tracker == "tensorboard" and callback.tb_writer is not None:
        _log_to_tensorboard(callback, callback.tb_writer, step, histograms, table)
    elif tracker == "comet_ml":
        experiment = import_module(tracker).get_running_experiment()
        if experiment is not None:
            _log_to_comet(callback, experiment, step, histograms, table)


def _objects(
    callback: TrainerCallback, library: ModuleType, histograms: Mapping[str, Any], table: Table | None
) -> dict[str, Any]:
    """W&B's histograms and table, or Trackio's, which have the same interface."""
    objects = {}
    for name, vector in histograms.items():
        with _left_out_if_refused(callback, name):
            objects[name] = library.Histogram(vector)
    if table is not None:
        with _left_out_if_refused(callback, TABLE_NAME):
            objects[TABLE_NAME] = library.Table(columns=table.columns, data=table.rows)
    return objects


def _log_to_tensorboard(
    callback: TrainerCallback, writer: Any, step: int, histograms: Mapping[str, Any], table: Table | None
) -> None:
    for name, vector in histograms.items():
        with _left_out_if_refused(callback, name):
            writer.add_histogram(name, vector, step)
    if table is not None:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows[:TENSORBOARD_ROWS]]
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
        with _left_out_if_refused(callback, TABLE_NAME):
            writer.add_text(TABLE_NAME, "\n".join(f"| {' | '.join(row)} |" for row in cells), step)


def _log_to_comet(
    callback: TrainerCallback, experiment: Any, step: int, histograms: Mapping[str, Any], table: Table | None
) -> None:
    for name, vector in histograms.items():
        with _left_out_if_refused(callback, name):
            experiment.log_histogram_3d(vector, name=name, step=step)
    if table is not None:
        with _left_out_if_refused(callback, TABLE_NAME):
            name = f"{TABLE_NAME}_{step}.csv"
            experiment.log_table(name, tabular_data=table.rows, headers=table.columns)


def _left_out_if_refused(callback: TrainerCallback, name: str) -> AbstractContextManager[None]:
    return warn_if_report_fails(callback, f"logging {name} to {tracker_of(callback)}", kind="media")
