"""Trackers that a script brings or reaches: objects in `log_with`, `trainer.accelerator.log`, `project_kwargs`."""

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from tests._engines import announce_rank
from tests._two_processes import run_in_two_processes
from tests.test_reporting import wandb_offline  # noqa: F401  # a fixture
from tests.tiny import tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APAConfig, APATrainer, PPOConfig
from trl_apa.config.trackers import tracker_objects


class Memory(GeneralTracker):
    """A tracker as a script writes it; it holds what cannot be pickled or copied."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self, fails_in=None):
        super().__init__()
        self.rows, self.config, self.started, self.finished, self.fails_in = [], None, 0, 0, fails_in
        self.connection = (row for row in self.rows)

    @property
    def tracker(self):
        return self.rows

    def happens(self, event):
        if event == self.fails_in:
            raise ConnectionError("the network is down")

    def start(self):
        self.happens("start")
        self.started += 1

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.happens("log")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


def loop(trainer, times=2):
    for _ in range(times):
        queries, responses, scores = tiny_rollouts()
        stats = trainer.step(queries, responses, scores)
        texts = {"query": ["q"] * 4, "response": ["r"] * 4}
        trainer.log_stats(stats, texts, scores)
    return stats


def in_train(tmp_path, tracker, **config):
    def words(completions, **columns):
        return [float(len(completion)) for completion in completions]

    arguments = {"train_dataset": ["w2 w3", "w4"] * 4, "reward_funcs": words}
    config = {"max_steps": 2, "logging_steps": 1, "max_completion_length": 4, **config}
    return tiny_trainer(tmp_path, trainer_kwargs=arguments, log_with=tracker, **config)


def scalars(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


# ---- objects ----


@pytest.mark.parametrize("form", [lambda t: t, lambda t: [t], lambda t: (t,), lambda t: ["tensorboard", t]])
def test_a_tracker_object_gets_config_and_numbers_of_the_classic_loop(tmp_path, form):
    tracker = Memory()
    trainer = tiny_trainer(tmp_path, log_with=form(tracker))
    assert tracker.started == 1 and tracker.config["batch_size"] == 4
    assert all(value is None or isinstance(value, bool | int | float | str) for value in tracker.config.values())
    stats = loop(trainer)
    (first, _), (second, row) = tracker.rows
    assert 0 < first < second == trainer.state.global_step
    for name in ("objective/kl", "apa/mean_scores", "ppo/mean_scores", "time/ppo/total"):
        assert row[name] == pytest.approx(float(stats[name]))
    assert row["env/reward_mean"] == pytest.approx(float(torch.stack(tiny_rollouts()[2]).mean()))
    assert all(isinstance(value, int | float) for value in row.values()) and not tracker.finished


def test_a_tracker_object_gets_what_train_logs(tmp_path):
    tracker = Memory()
    trainer = in_train(tmp_path, tracker)
    trainer.train()
    assert [step for step, row in tracker.rows if "apa/loss/policy" in row] == [1, 2]
    assert tracker.started == 1 and not tracker.finished


def test_two_objects_and_a_name_all_get_the_numbers(tmp_path):
    mine, theirs = Memory(), TensorBoardTracker("run", tmp_path / "theirs")
    loop(tiny_trainer(tmp_path, log_with=[mine, "tensorboard", theirs]))
    assert len(mine.rows) == 2
    assert len(scalars(tmp_path / "theirs" / "run")["objective/kl"]) == 2
    assert len(scalars(tmp_path / "runs")["train/objective/kl"]) == 2


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("option", ["log_with", "report_to"])
@pytest.mark.parametrize("others", [[], ["tensorboard"], [LoggerType.TENSORBOARD]])
def test_names_and_objects_are_told_apart(tmp_path, later, option, others):
    tracker = Memory()
    given = {option: [*others, tracker]}
    config = tiny_config(tmp_path, **({} if later else {"report_to": "none", **given}))
    if later:
        setattr(config, option, given[option])
    assert config.report_to == ["tensorboard"][: len(others)] and tracker_objects(config.log_with) == [tracker]


def test_a_config_with_a_tracker_object_is_written_copied_and_pickled(tmp_path):
    tracker = Memory()
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True, batch_size=4, log_with=["tensorboard", tracker])
    assert json.loads(config.to_json_string())["log_with"] == ["tensorboard", "memory"]
    for copied in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config, gamma=0.5)):
        assert tracker_objects(copied.log_with) == [tracker] and copied.report_to == ["tensorboard"]
    loaded = pickle.loads(pickle.dumps(config))
    assert loaded.report_to == ["tensorboard"] and not tracker_objects(loaded.log_with)
    assert "memory" in repr(config)
    trainer = tiny_trainer(tmp_path, log_with=tracker)
    trainer.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("event", ["start", "log"])
def test_training_goes_on_without_an_object_that_fails(tmp_path, event):
    tracker = Memory(fails_in=event)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(tmp_path, log_with=tracker)
        loop(trainer, times=3)
    told = [str(w.message) for w in caught if "the run continues without it" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("memory failed in ") and not tracker.rows


def test_a_class_of_trackers_or_a_wrong_project_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_with has the class Memory; it should be an object of it"):
        tiny_config(tmp_path, log_with=Memory)
    for wrong in ({"log_dir": "x"}, ["x"]):
        with pytest.raises(ValueError, match=r"project_kwargs=.*it should be a dict of project_dir, logging_dir"):
            tiny_config(tmp_path, project_kwargs=wrong)


class Everywhere(Memory):
    name = "everywhere"
    main_process_only = False


def use_objects(rank, folder):
    announce_rank(rank)
    trackers = [Memory(), Everywhere()]
    trainer = tiny_trainer(folder, log_with=[*trackers, "tensorboard"])
    loop(trainer, times=1)
    trainer.accelerator.get_tracker("tensorboard").log({"mine": 1.0})
    return [(tracker.started, len(tracker.rows)) for tracker in trackers]


@pytest.mark.slow
def test_of_several_processes_those_report_that_the_tracker_wants(tmp_path):
    assert run_in_two_processes(use_objects, tmp_path) == [[(1, 1), (1, 1)], [(0, 0), (1, 1)]]
    assert scalars(tmp_path / "runs")["mine"] == [(1, 1.0)]


# ---- the accelerator ----


def test_the_accelerator_logs_to_all_trackers_and_ends_them(tmp_path):
    tracker = Memory()
    trainer = tiny_trainer(tmp_path, log_with=["tensorboard", tracker])
    trainer.accelerator.log({"mine/first": 1.5})  # before any step
    loop(trainer, times=1)
    trainer.accelerator.log({"mine/second": 2})
    trainer.accelerator.log({"mine/third": 3.0, "mine/text": "so"}, step=40)
    assert trainer.accelerator.get_tracker("memory") is tracker
    trainer.accelerator.get_tracker("tensorboard", unwrap=True).add_scalar("mine/raw", 7.0, 1)
    trainer.accelerator.get_tracker("tensorboard").writer.add_scalar("mine/writer", 8.0, 2)
    trainer.accelerator.end_training()
    assert tracker.finished == 1 and tracker.started == 1
    assert [row for _, row in tracker.rows if "mine/first" in row or "mine/third" in row] == [
        {"mine/first": 1.5},
        {"mine/third": 3.0, "mine/text": "so"},
    ]
    found = scalars(tmp_path / "runs")
    step = trainer.state.global_step
    assert found["mine/first"] == [(0, 1.5)] and found["mine/second"] == [(step, 2.0)]
    assert found["mine/third"] == [(40, 3.0)] and found["mine/raw"] == [(1, 7.0)]
    assert found["mine/writer"] == [(2, 8.0)] and len(found["train/objective/kl"]) == 1


class LogsToo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.accelerator.log({"mine": float(state.global_step)})


def test_the_accelerator_logs_inside_train(tmp_path):
    tracker, callback = Memory(), LogsToo()
    trainer = in_train(tmp_path, ["tensorboard", tracker])
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    assert [row["mine"] for _, row in tracker.rows if "mine" in row] == [1.0, 2.0]
    found = scalars(tmp_path / "runs")
    assert found["mine"] == [(1, 1.0), (2, 2.0)] and len(found["train/apa/loss/policy"]) == 2


def test_a_script_may_call_init_trackers_as_in_a_loop_of_its_own(tmp_path):
    tracker = Memory()
    trainer = tiny_trainer(tmp_path, log_with=["tensorboard", tracker])
    trainer.accelerator.init_trackers("mine", config={"lr": 0.5})
    trainer.accelerator.log({"x": 1.0})
    trainer.accelerator.end_training()
    assert tracker.config == {"lr": 0.5} and len(tracker.rows) == 1
    assert scalars(tmp_path / "runs")["x"] == [(0, 1.0)]


def test_without_trackers_the_accelerator_takes_everything_and_does_nothing(tmp_path):
    accelerator = tiny_trainer(tmp_path).accelerator
    accelerator.init_trackers("mine")
    accelerator.log({"x": 1.0})
    accelerator.end_training()
    assert not list(tmp_path.rglob("events.out.tfevents.*"))


class Named(WandbCallback):
    """A reporter whose library has no run that is open."""

    def __init__(self):
        self.logs = []

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_a_reporter_that_is_added_or_removed_later_is_known(tmp_path):
    trainer, reporter = tiny_trainer(tmp_path), Named()
    trainer.add_callback(reporter)
    trainer.accelerator.log({"x": 1.0})
    assert reporter.logs == [{"x": 1.0}]
    trainer.remove_callback(reporter)
    trainer.accelerator.log({"x": 2.0})
    assert reporter.logs == [{"x": 1.0}]


def test_wandb_gets_the_scripts_numbers_under_their_names(wandb_offline):  # noqa: F811
    import wandb

    trainer = tiny_trainer(wandb_offline, report_to="wandb")
    run = trainer.accelerator.get_tracker("wandb", unwrap=True)
    assert run is wandb.run
    trainer.accelerator.log({"mine/reward": 2.5})
    assert run.summary["mine/reward"] == 2.5 and run.summary["train/global_step"] == 0
    loop(trainer, times=1)
    trainer.accelerator.log({"mine/reward": 3.5}, step=1)  # not lost, though W&B has counted further
    assert run.summary["mine/reward"] == 3.5 and run.summary["train/global_step"] == 1
    trainer.accelerator.get_tracker("wandb").store_init_configuration({"mine": 1})
    assert run.config["mine"] == 1
    trainer.accelerator.end_training()
    assert wandb.run is None


# ---- project_kwargs ----


@pytest.mark.parametrize("way", ["loop", "train", "accelerator"])
@pytest.mark.parametrize(
    "given", [lambda folder: {"logging_dir": folder}, lambda folder: {"project_dir": folder}, str]
)
def test_tensorboard_writes_where_project_kwargs_says(tmp_path, way, given):
    folder = tmp_path / "logs"
    project = given(str(folder)) if given is not str else json.dumps({"logging_dir": str(folder)})
    if way == "train":
        in_train(tmp_path / "out", "tensorboard", project_kwargs=project).train()
    else:
        trainer = tiny_trainer(tmp_path / "out", report_to="tensorboard", project_kwargs=project)
        loop(trainer, times=1) if way == "loop" else trainer.accelerator.log({"x": 1.0})
        assert trainer.accelerator.logging_dir == str(folder)
    assert scalars(folder) and not list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_log_dir_in_tracker_kwargs_comes_before_project_kwargs(tmp_path):
    options = {"project_kwargs": {"logging_dir": str(tmp_path / "less")}}
    options["tracker_kwargs"] = {"tensorboard": {"log_dir": str(tmp_path / "more")}}
    loop(tiny_trainer(tmp_path, report_to="tensorboard", **options), times=1)
    assert scalars(tmp_path / "more") and not (tmp_path / "less").exists()


def test_project_kwargs_is_fixed_once_the_trainer_is_made(tmp_path):
    config = APAConfig(output_dir=str(tmp_path), use_cpu=True, batch_size=4, project_kwargs={"logging_dir": "a"})
    config.project_kwargs = {"logging_dir": "b"}
    trainer = APATrainer(config, tiny_model(), tokenizer=tiny_tokenizer())
    assert trainer.accelerator.logging_dir == "b"
    with pytest.raises(ValueError, match=r"project_kwargs=.* is set after the trainer was made"):
        config.project_kwargs = {"logging_dir": "c"}
