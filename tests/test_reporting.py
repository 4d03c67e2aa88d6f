"""What reaches the trackers, read back from the trackers themselves, and the options that open their runs."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import HfArgumentParser, TrainerCallback
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    integration_utils,
)

from tests._engines import announce_rank
from tests._two_processes import WORLD_SIZE, run_in_two_processes
from tests.test_training import logged, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import tiny_rollouts, tiny_trainer
from trl_apa import APAConfig
from trl_apa.trainer.reporting import (
    TENSORBOARD_ROWS,
    Table,
    _is_installed,
    gather_table,
    log_media,
    reward_statistics,
    split_statistics,
)
from trl_apa.trainer.tracker_failures import is_disabled


ROOT = Path(__file__).resolve().parents[1]


def config(**kwargs):
    return APAConfig(**{"use_cpu": True, **kwargs})


def texts(num_rows=4, start=0):
    rows = range(start, start + num_rows)
    return {"query": [f"question {row}" for row in rows], "response": [f"answer | {row}\nend" for row in rows]}


def report_twice(trainer, batch=None, **log_kwargs):
    """Two iterations of the classic loop; what the last one reported, and its scores."""
    queries, responses, scores = tiny_rollouts()
    for _ in range(2):
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, texts() if batch is None else batch, scores, **log_kwargs)
    return stats, [float(score) for score in scores]


# ---- options ----


@pytest.mark.parametrize("option", ["report_to", "log_with"])
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "flyte"])
def test_a_tracker_that_is_not_installed_is_an_import_error_that_names_it(monkeypatch, option, tracker):
    library = {"flyte": "flytekit"}.get(tracker, tracker)
    monkeypatch.setattr(f"transformers.integrations.is_{library}_available", lambda: False)
    with pytest.raises(ImportError, match=f"'{tracker}', which is not installed"):
        config(**{option: tracker})


def test_comet_without_an_api_key_is_not_taken_for_missing(monkeypatch):
    monkeypatch.setattr("trl_apa.trainer.reporting.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'comet_ml', which is not installed"):
        config(report_to="comet_ml")
    monkeypatch.setattr("trl_apa.trainer.reporting.find_spec", lambda name: ModuleSpec(name, None))
    assert config(report_to="comet_ml").report_to == ["comet_ml"]


def test_of_every_tracker_of_transformers_it_is_known_whether_it_is_installed():
    assert {type(_is_installed(tracker)) for tracker in INTEGRATION_TO_CALLBACK} == {bool}


def test_no_tracker_one_or_all_of_them():
    assert [config(report_to=choice).report_to for choice in ("none", None, [], ["none"])] == [[]] * 4
    assert config(log_with=None).report_to == []
    assert config(log_with="wandb").report_to == config(report_to="wandb").report_to == ["wandb"]
    assert {"wandb", "tensorboard"} <= set(config(report_to="all").report_to)
    with pytest.raises(ValueError, match="wandbb is not supported"):
        config(report_to="wandbb")


def test_options_of_trackers_come_as_dict_or_json():
    given = {"wandb": {"entity": "x", "name": "run"}}
    assert config(report_to="wandb", tracker_kwargs=given).tracker_kwargs == given
    assert config().tracker_kwargs == {}
    line = ["--use_cpu", "True", "--log_with", "wandb", "--tracker_kwargs", json.dumps(given)]
    (made,) = HfArgumentParser(APAConfig).parse_args_into_dataclasses([*line, "--tracker_project_name", "trl"])
    assert (made.tracker_kwargs, made.tracker_project_name, made.project) == (given, "trl", "trl")
    assert config().project == "huggingface"
    with pytest.raises(ValueError, match=r"tracker_kwargs is not JSON"):
        config(tracker_kwargs="{wandb}")
    for wrong in ({"entity": "x"}, ["wandb"]):
        with pytest.raises(ValueError, match="tracker_kwargs should be a dict that holds a dict for each tracker"):
            config(report_to="wandb", tracker_kwargs=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracker_kwargs": {"wandb": {"name": "run"}}}, r"tracker_kwargs\['wandb'\] .*report_to does not name"),
        (
            {"report_to": "mlflow", "tracker_kwargs": {"mlflow": {"run": 1}}},
            r"tracker_kwargs\['mlflow'\] .*environment alone",
        ),
        ({"report_to": "tensorboard", "tracker_project_name": "x"}, "tracker_project_name='x' has no effect: tensor"),
    ],
)
def test_options_that_reach_no_tracker_warn_once(monkeypatch, options, message):
    monkeypatch.setattr("transformers.integrations.is_mlflow_available", lambda: True)
    with pytest.warns(UserWarning, match=message) as caught:
        config(**options)
    (warning,) = [w for w in caught if "has no effect" in str(w.message)]
    assert warning.filename == __file__


# ---- what is logged ----


def test_numbers_and_vectors_are_told_apart():
    stats = {
        "float": 1.5,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(2),
        "empty": np.array([]),
        "list": [1.0, 2.0],
        "text": "x",
        "matrix": np.zeros((2, 2)),
        "lengths": np.array([3, 4]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        "holes": np.array([1.0, np.nan, np.inf, 2.0]),
    }
    numbers, vectors = split_statistics(stats)
    assert numbers == {"float": 1.5, "numpy": 0.5, "tensor": 2.0}
    assert {type(number) for number in numbers.values()} == {float}
    assert {name: vector.tolist() for name, vector in vectors.items()} == {
        "lengths": [3, 4],
        "half": [1, 2],
        "holes": [1, 2],
    }
    assert all(isinstance(vector, np.ndarray) for vector in vectors.values())


def test_statistics_of_the_rewards_by_hand():
    stats = reward_statistics([torch.tensor(1), torch.tensor([3.0]), 8], Accelerator(cpu=True))
    assert (stats["env/reward_mean"], stats["env/reward_dist"].tolist()) == (4.0, [1.0, 3.0, 8.0])
    assert stats["env/reward_std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert reward_statistics([torch.tensor(2.0)], Accelerator(cpu=True))["env/reward_std"] == 0.0


def test_the_table_has_the_columns_that_are_there_and_the_rewards():
    accelerator, rewards = Accelerator(cpu=True), [torch.tensor(0.5), 2]
    batch = {"query": ["a", "b"], "score": torch.tensor([1.0, 2.0]), "tokens": [torch.arange(2), None]}
    table = gather_table(batch, ("query", "score", "tokens"), rewards, accelerator)
    assert table.columns == ["query", "score", "tokens", "reward"]
    assert table.rows == [["a", 1.0, "tensor([0, 1])", 0.5], ["b", 2.0, "None", 2.0]]
    with pytest.warns(UserWarning, match="batch has no 'response'"):
        table = gather_table(batch, ("query", "response"), rewards, accelerator)
    assert table.columns == ["query", "reward"]
    with pytest.warns(UserWarning, match=r"batch\['query'\] has 2 entries for 1 rewards"):
        assert gather_table(batch, ("query",), rewards[:1], accelerator) is None


def test_missing_texts_warn_and_the_numbers_are_logged_all_the_same(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.warns(UserWarning, match="batch has no 'query', 'response'"):
        stats, scores = report_twice(trainer, batch={})
    logged = trainer.state.log_history[-1]
    assert logged["objective/kl"] == stats["objective/kl"]
    assert logged["env/reward_mean"] == pytest.approx(np.mean(scores))
    # The history is written to disk as JSON, which knows no arrays.
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history


class Silent(TrainerCallback):
    """Not a reporter."""

    def on_train_begin(self, *args, **kwargs):
        raise AssertionError("this is not a training")


class Recorder(WandbCallback):
    """A reporter that notes what it is told and touches no library."""

    def __init__(self):
        self.events = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(dict(logs))


def test_reporters_are_started_once_and_other_callbacks_never(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.log", lambda *args, **kwargs: None)
    recorder = Recorder()
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"callbacks": [Silent(), recorder]})
    stats, _ = report_twice(trainer)
    begin, first, second = recorder.events
    assert begin == "begin"
    assert second["objective/kl"] == stats["objective/kl"] != first["objective/kl"]


# ---- a tracker that goes away ----


class Unreachable(Recorder):
    """A reporter that fails in one event, from the second time on if that is a log, and notes what it is asked."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def happens(self, event):
        self.events.append(event)
        if event == self.where and not (event == "on_log" and self.events.count(event) == 1):
            raise ConnectionError("the network is down")

    def on_init_end(self, *args, **kwargs):
        self.happens("on_init_end")

    def on_train_begin(self, *args, **kwargs):
        self.happens("on_train_begin")

    def on_log(self, *args, **kwargs):
        self.happens("on_log")

    def on_train_end(self, *args, **kwargs):
        self.happens("on_train_end")


def failures(caught):
    return [str(warning.message) for warning in caught if "the run continues without it" in str(warning.message)]


@pytest.mark.parametrize(
    ("where", "asked"),
    [
        ("on_init_end", ["on_init_end", "on_train_end"]),
        ("on_train_begin", ["on_init_end", "on_train_begin", "on_train_end"]),
        ("on_log", ["on_init_end", *["on_train_begin"] * 2, "on_log", "on_log", "on_train_end"]),
        ("on_train_end", ["on_init_end", *["on_train_begin"] * 2, *["on_log"] * 9, "on_train_end"]),
    ],
)
def test_training_goes_on_without_a_tracker_that_fails(tmp_path, monkeypatch, where, asked):
    """Whatever it fails in: one warning, the same parameters and logs, and it is asked no more but to close its run.

    Its run is begun twice: by us, with the options of the config, and by the Trainer, which finds it open.
    """
    monkeypatch.setattr("wandb.log", lambda *args, **kwargs: None)
    plain = trainer_for(tmp_path / "plain", max_steps=8)
    plain.train()
    tracker = Unreachable(where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for(tmp_path / "run", max_steps=8, callbacks=[tracker])
        trainer.train()
    assert failures(caught) == [
        f"wandb failed in {where}, and the run continues without it: ConnectionError: the network is down"
    ]
    assert tracker.events == asked
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)
    assert logged(trainer) == logged(plain)


@pytest.mark.parametrize("what", ["tables", "numbers"])
def test_the_classic_loop_goes_on_without_a_tracker_that_fails(wandb_offline, monkeypatch, what):
    trainer = tiny_trainer(wandb_offline, report_to=["wandb", "tensorboard"])
    report_twice(trainer)

    def fail(*args, commit=True, **kwargs):
        raise OSError("no such host")

    reporter = next(c for c in trainer.callback_handler.callbacks if isinstance(c, WandbCallback))
    if what == "tables":
        monkeypatch.setattr(wandb, "log", fail)
    else:
        monkeypatch.setattr(reporter, "_wandb", SimpleNamespace(log=fail, run=wandb.run))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats, _ = report_twice(trainer)
    where = "log_media" if what == "tables" else "on_log"
    assert failures(caught) == [f"wandb failed in {where}, and the run continues without it: OSError: no such host"]
    # The other tracker and the log have it all.
    assert trainer.state.log_history[-1]["objective/kl"] == stats["objective/kl"]
    (path,) = (wandb_offline / "runs").glob("*/events*")
    assert len(EventAccumulator(str(path)).Reload().Scalars("train/objective/kl")) == 4


# ---- the trackers ----


def test_tensorboard_gets_numbers_histograms_and_a_few_texts(tmp_path):
    options = {"log_dir": str(tmp_path / "events"), "filename_suffix": ".apa"}
    trainer = tiny_trainer(tmp_path, report_to="tensorboard", tracker_kwargs={"tensorboard": options})
    stats, scores = report_twice(trainer)
    (path,) = (tmp_path / "events").iterdir()
    assert path.name.endswith(".apa")
    events = EventAccumulator(str(path), size_guidance={"histograms": 0}).Reload()
    first, second = events.Scalars("train/objective/kl")
    assert (first.step, second.step) == (1, 2)
    assert second.value == pytest.approx(stats["objective/kl"], rel=1e-6)
    assert events.Scalars("train/env/reward_mean")[0].value == pytest.approx(np.mean(scores), abs=1e-6)
    histogram = events.Histograms("train/env/reward_dist")[-1].histogram_value
    assert histogram.num == 4 and histogram.max == pytest.approx(max(scores))
    assert histogram.sum == pytest.approx(sum(scores), abs=1e-5)
    assert len(events.Histograms("train/objective/kl_dist")) == 2
    text = events.Tensors("game_log/text_summary")[-1].tensor_proto.string_val[0].decode()
    head, _, *rows = text.splitlines()
    assert head == "| query | response | reward |"
    assert len(rows) == 4 and rows[3] == rf"| question 3 | answer \| 3<br>end | {scores[3]} |"


def test_tensorboard_keeps_its_own_folder_and_shows_no_more_than_a_few_rows(tmp_path):
    trainer = tiny_trainer(tmp_path, batch_size=12, report_to="tensorboard")
    queries, responses, scores = tiny_rollouts(12)
    trainer.log_stats(trainer.step(queries, responses, scores), texts(12), scores)
    (path,) = (tmp_path / "runs").glob("*/events*")
    text = EventAccumulator(str(path)).Reload().Tensors("game_log/text_summary")[0].tensor_proto.string_val[0]
    assert len(text.decode().splitlines()) == 2 + TENSORBOARD_ROWS == 12


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.finish()


def table_of(run):
    """Columns and rows that W&B has last written as `game_log`; ends the run, which waits until all is written."""
    path = Path(run.dir) / run.summary["game_log"]["path"]
    run.finish()
    written = json.loads(path.read_text())
    return written["columns"], written["data"]


def test_wandb_gets_numbers_histograms_and_the_table(wandb_offline):
    kwargs = {"name": "first", "group": "tests", "tags": ["tiny"]}
    options = {"tracker_project_name": "alignment", "tracker_kwargs": {"wandb": kwargs}}
    trainer = tiny_trainer(wandb_offline, report_to="wandb", **options)
    stats, scores = report_twice(trainer)
    run = wandb.run
    assert (run.project, run.name, run.group, run.tags) == ("alignment", "first", "tests", ("tiny",))
    assert run.config["loss_type"] == "apa"
    assert run.summary["train/objective/kl"] == stats["objective/kl"]
    # Numbers, histograms and table of one iteration are one row of the history: rows 0 and 1.
    assert (run.summary["_step"], run.summary["train/global_step"]) == (1, 2)
    histogram = run.summary["train/env/reward_dist"]
    assert sum(histogram["values"]) == 4
    assert (histogram["bins"][0], histogram["bins"][-1]) == pytest.approx((min(scores), max(scores)))
    assert sum(run.summary["train/apa/policy/advantages"]["values"]) == stats["tokens/counted"]
    columns, rows = table_of(run)
    assert columns == ["query", "response", "reward"]
    batch = texts()
    assert rows == [list(row) for row in zip(batch["query"], batch["response"], scores, strict=True)]


def test_wandb_without_options_is_opened_by_the_trainers_reporter_alone(wandb_offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    report_twice(tiny_trainer(wandb_offline, report_to="wandb", exp_name="run7"))
    assert (wandb.run.project, wandb.run.name) == ("from-the-environment", "run7")


def test_train_opens_the_run_with_the_same_options(wandb_offline):
    prompts = datasets.Dataset.from_list([{"prompt": f"w{i}"} for i in range(2, 10)])
    options = {"tracker_project_name": "alignment", "tracker_kwargs": {"wandb": {"name": "first"}}}
    options |= {"max_steps": 2, "logging_steps": 1, "max_completion_length": 4, "save_strategy": "no"}
    options["log_completions"] = True
    arguments = {"dataset": prompts, "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    tiny_trainer(wandb_offline, report_to="wandb", trainer_kwargs=arguments, **options).train()
    assert (wandb.run.project, wandb.run.name) == ("alignment", "first")
    assert wandb.run.summary["train/apa/mean_scores"] > 0
    columns, rows = table_of(wandb.run)
    assert columns == ["prompt", "completion", "rewards/<lambda>", "reward"]
    assert [row[2] for row in rows] == [row[3] for row in rows] == [float(len(row[1])) for row in rows]


def test_a_wandb_run_of_the_scripts_own_is_left_as_it_is_with_a_warning(wandb_offline):
    run = wandb.init(project="mine")
    trainer = tiny_trainer(wandb_offline, report_to="wandb", tracker_project_name="other")
    with pytest.warns(
        UserWarning, match="a run of wandb is open already, so these options are not applied: project"
    ) as caught:
        stats, _ = report_twice(trainer)
    assert [w.filename for w in caught if "is open already" in str(w.message)] == [__file__]
    assert wandb.run is run and run.project == "mine"
    assert run.summary["train/objective/kl"] == stats["objective/kl"]


def use_trackio(rank, folder):
    """Each process logs its own texts; the main one reads back what the local store has."""
    announce_rank(rank)
    os.environ.update(TRACKIO_DIR=str(folder / "store"), TRACKIO_DISABLE_TELEMETRY="1")
    kwargs = {"trackio": {"name": "first", "group": "tests", "auto_log_cpu": False}}
    options = {"report_to": "trackio", "tracker_project_name": "alignment", "tracker_kwargs": kwargs}
    trainer = tiny_trainer(folder / f"out{rank}", **options)
    queries, responses, scores = tiny_rollouts(4, seed=rank)
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, texts(start=4 * rank), scores)
    if rank > 0:
        return [float(score) for score in scores], stats, None, None
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    trackio.finish()
    logs = SQLiteStorage.get_logs("alignment", "first")
    return [float(score) for score in scores], stats, logs, SQLiteStorage.get_run_config("alignment", "first")


@pytest.mark.slow
def test_trackio_gets_the_rows_of_both_processes_once(tmp_path):
    (scores, stats, logs, run_config), (others, *_) = run_in_two_processes(use_trackio, tmp_path)
    media, numbers = logs
    batch = texts(4 * WORLD_SIZE)
    rows = zip(batch["query"], batch["response"], [*scores, *others], strict=True)
    assert media["game_log"]["_value"] == [
        dict(zip(("query", "response", "reward"), row, strict=True)) for row in rows
    ]
    assert sum(media["train/env/reward_dist"]["values"]) == 8
    assert sum(media["train/objective/kl_dist"]["values"]) == 8
    assert numbers["train/objective/kl"] == stats["objective/kl"]
    assert numbers["train/env/reward_mean"] == pytest.approx(np.mean([*scores, *others]))
    assert media["train/global_step"] == numbers["train/global_step"] == 1
    assert (run_config["_Group"], run_config["loss_type"]) == ("tests", "apa")


def test_where_no_run_is_open_nothing_is_logged_and_nobody_is_warned(tmp_path, monkeypatch):
    """As after `train`, which closes the runs: no tracker is taken for one that failed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "comet_ml", CometStandIn())
    wandb.finish()
    comet = object.__new__(INTEGRATION_TO_CALLBACK["comet_ml"])
    callbacks = [WandbCallback(), TrackioCallback(), TensorBoardCallback(), comet]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_media(callbacks, 1, {"env/reward_dist": np.ones(3)}, Table(["query", "reward"], [["q", 1.0]]))
    assert failures(caught) == []
    assert not any(is_disabled(callback) for callback in callbacks)
    assert list(tmp_path.iterdir()) == []


class CometStandIn:
    """What the Trainer's reporter and ours call of `comet_ml`, which is too heavy to install for every test run."""

    def __init__(self):
        self.started, self.logged = [], []
        self.__spec__ = ModuleSpec("comet_ml", None)

    def ExperimentConfig(self, **options):
        return SimpleNamespace(**options)

    def start(self, **options):
        self.started.append(options)
        return self

    def get_running_experiment(self):
        return self if self.started else None

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.logged.append((name, args, kwargs))


def test_comet_gets_numbers_histograms_and_the_table(tmp_path, monkeypatch):
    comet = CometStandIn()
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    for flag in ("_is_comet_installed", "_is_comet_recent_enough"):
        monkeypatch.setattr(integration_utils, flag, True)
    kwargs = {"workspace": "team", "experiment_config": {"tags": ["tiny"]}}
    options = {"tracker_project_name": "alignment", "tracker_kwargs": {"comet_ml": kwargs}, "exp_name": "first"}
    stats, scores = report_twice(tiny_trainer(tmp_path, report_to="comet_ml", **options))
    (started,) = comet.started
    assert (started["workspace"], started["project_name"], started["mode"]) == ("team", "alignment", None)
    assert vars(started["experiment_config"]) == {"name": "first", "tags": ["tiny"]}
    logged = {name: (args, kwargs) for name, args, kwargs in comet.logged}
    metrics, where = logged["__internal_api__log_metrics__"]
    assert metrics[0]["train/objective/kl"] == stats["objective/kl"] and where["step"] == 2
    histograms = [(args[0], kwargs) for name, args, kwargs in comet.logged if name == "log_histogram_3d"]
    assert ("train/env/reward_dist", 2) in [(kwargs["name"], kwargs["step"]) for _, kwargs in histograms]
    (name,), table = logged["log_table"]
    assert name == "game_log_2.csv" and table["headers"] == ["query", "response", "reward"]
    assert [row[2] for row in table["tabular_data"]] == scores


COMET_SCRIPT = """
import comet_ml
from tests.test_reporting import report_twice, tiny_trainer

kwargs = {"online": False, "experiment_config": {"tags": ["tiny"]}}
options = {"tracker_project_name": "alignment", "tracker_kwargs": {"comet_ml": kwargs}}
report_twice(tiny_trainer("out", report_to="comet_ml", **options))
comet_ml.get_running_experiment().end()
"""


@pytest.mark.skipif(importlib.util.find_spec("comet_ml") is None, reason="comet_ml is heavy; it has a stand-in above")
def test_a_real_offline_experiment_of_comet_has_it_all(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMET_OFFLINE_DIRECTORY": str(tmp_path / "offline")}
    done = subprocess.run(
        [sys.executable, "-c", COMET_SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "offline").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        experiment = json.loads(archive.read("experiment.json"))
        messages = [json.loads(line)["payload"] for line in archive.read("messages.json").splitlines()]
        tables = [
            archive.read(payload["file_path"]).decode()
            for payload in messages
            if payload.get("additional_params", {}).get("fileName", "").startswith("game_log")
        ]
    assert (experiment["project_name"], experiment["tags"]) == ("alignment", ["tiny"])
    named = {payload["metric"]["metricName"] for payload in messages if "metric" in payload}
    assert {"train/objective/kl", "train/env/reward_mean"} <= named
    assert any("train/env/reward_dist" in json.dumps(payload) for payload in messages)
    assert len(tables) == 2 and all(table.startswith("query,response,reward") for table in tables)
