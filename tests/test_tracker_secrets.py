"""Trackers are told what a run is, and no key or token; what logs in to them has the real one."""

import dataclasses
import json
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import wandb
from datasets import Dataset
from transformers.integrations import TensorBoardCallback

from tests._secrets import PLANTED, leaks, planted_options
from tests.test_training import trainer_for
from tests.tiny import tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa.commands.sft import SFTOptions
from trl_apa.commands.supervised import finish
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.redaction.patterns import HIDDEN
from trl_apa.redaction.trackers import options_to_open
from trl_apa.trl_trainers import QuietSFTTrainer


pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect")


def test_w_and_b_opens_its_run_with_the_real_key_and_none_of_its_files_holds_a_secret(tmp_path, monkeypatch, capfd):
    """All bytes that W&B leaves on disk, the offline run's own file with the command line among them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    line = ["run.py", "Shown0Argument", "--hub_token", PLANTED["hub_token"], "--judge_password", PLANTED["added"]]
    line += [
        "--tracker_kwargs",
        json.dumps(planted_options()["tracker_kwargs"]),
        f"--url=http://a:{PLANTED['server']}@h",
    ]
    monkeypatch.setattr(sys, "argv", line)
    opened, pushed, real = [], [], wandb.init
    # W&B reads the environment once in a process, so that another test may have said where its files go.
    place = {"dir": str(tmp_path), "mode": "offline"}
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(options) or real(**{**options, **place}))
    with warnings.catch_warnings(record=True) as caught:
        trainer = tiny_trainer(tmp_path, report_to="wandb", **planted_options())
        trainer.push_to_hub = lambda repo_id, token: pushed.append(token)
        queries, responses, scores = tiny_rollouts()
        texts = {"query": ["q"] * 4, "response": ["r"] * 4}
        trainer.log_stats(trainer.step(queries, responses, scores), texts, scores)
    assert not [str(warning.message) for warning in caught if "failed in" in str(warning.message)]
    print(trainer.args)
    wandb.finish()
    assert sys.argv == line and pushed == [PLANTED["best"]]
    (options,) = opened
    assert options["settings"] == {"api_key": PLANTED["settings"][:40], "init_timeout": 300}
    markers = ("Argument", "Config", "Notes", "Tag", "Group", "Name", "Project", "Run", "Best")
    files = written_by_w_and_b(tmp_path, [f"Shown0{marker}" for marker in markers])
    assert leaks("".join(files.values()) + str(capfd.readouterr())) == []
    assert "Shown0Config" in files["debug.log"]


def written_by_w_and_b(folder, expected):
    """Its files by name, once its own has all that is expected: W&B writes it some time after the end."""
    (folder,) = (folder / "wandb").glob("offline-run-*")
    deadline = time.monotonic() + 120
    while True:
        files = {path.name: path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()}
        run = "".join(content for name, content in files.items() if name.endswith(".wandb"))
        if all(text in run for text in expected):
            return files
        assert time.monotonic() < deadline, [text for text in expected if text not in run]
        time.sleep(0.05)


class Told(TensorBoardCallback):
    """A reporter that notes what it is told, and fails if asked to."""

    def __init__(self, fails=False):
        self.fails, self.told, self.last = fails, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.note(args)

    def on_log(self, args, state, control, **kwargs):
        self.note(args)
        if self.fails:
            raise OSError(f"401 for {PLANTED['hub_token'][:6]}*** as {PLANTED['server']} of {PLANTED['run_name']}")

    def on_train_end(self, args, state, control, **kwargs):
        self.last = args

    def note(self, args):
        # As ClearML's, which reads the attributes.
        self.told.append(repr({f.name: getattr(args, f.name) for f in dataclasses.fields(args)}) + repr(sys.argv))


def online(tmp_path, callback, **options):
    return trainer_for(tmp_path, callbacks=[callback], max_steps=2, **options)


def offline(tmp_path, callback, **options):
    rows = [{"prompt": "w2 w3", "completion": "w4 w5", "reward": float(i)} for i in range(4)]
    config = OfflineConfig(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", logging_steps=1, **options)
    return OfflineAPATrainer(
        config, tiny_model(), processing_class=tiny_tokenizer(), train_dataset=rows, callbacks=[callback]
    )


def supervised(tmp_path, callback, **options):
    config = SFTOptions(
        str(tmp_path), use_cpu=True, max_steps=1, report_to="none", logging_steps=1, bf16=False, **options
    )
    rows = Dataset.from_dict({"text": ["w2 w3 w4"] * 8})
    trainer = QuietSFTTrainer(tiny_model(), config, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.add_callback(callback)
    trainer.train = lambda train=trainer.train, **kwargs: train(**kwargs)
    return SimpleNamespace(train=lambda: finish(trainer, ()), args=config)


@pytest.mark.parametrize("make", [online, offline, supervised])
def test_reporters_are_told_options_and_a_command_line_without_secrets(tmp_path, monkeypatch, make):
    monkeypatch.setattr(sys, "argv", ["run.py", "--hub_token", PLANTED["hub_token"], "--seed", "3"])
    told = Told()
    trainer = make(tmp_path, told, hub_token=PLANTED["hub_token"], run_name=f"Shown0Run key={PLANTED['run_name']}")
    trainer.train()
    assert len(told.told) >= 2 and [leaks(text) for text in told.told] == [[]] * len(told.told)
    assert all("Shown0Run" in text and "'--seed', '3'" in text for text in told.told)
    # W&B's reporter makes a Trainer of them at the end, which may log in
    assert told.last is trainer.args and told.last.hub_token == PLANTED["hub_token"] == sys.argv[2]


def test_a_tracker_whose_error_quotes_a_key_does_not_tell_it(tmp_path):
    options = {"vllm_server_base_url": f"http://me:{PLANTED['server']}@h", "hub_token": PLANTED["hub_token"]}
    with pytest.warns(UserWarning, match="tensorboard failed in on_log, .*OSError: 401") as caught:
        online(tmp_path, Told(fails=True), run_name=f"key={PLANTED['run_name']}", **options).train()
    (said,) = [str(warning.message) for warning in caught if "failed in on_log" in str(warning.message)]
    assert leaks(said) == [] and PLANTED["hub_token"][:6] not in said


def test_what_opens_a_run_is_real_only_where_it_logs_in():
    given_options = {
        "api_key": "q7Z0pLm4TtR2",
        "settings": {"api_key": "q7Z0pLm4TtR2"},
        "server_url": "https://host?write_token=q7Z0pLm4TtR2",
        "experiment_key": "q7Z0pLm4TtR2",
        "name": "run q7Z0pLm4TtR2",
        "config": {"api_key": "q7Z0pLm4TtR2"},
        "steps": 3,
    }
    opened = options_to_open(given_options)
    assert opened == {**given_options, "name": f"run {HIDDEN}", "config": {"api_key": HIDDEN}}
