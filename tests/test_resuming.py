"""Runs that are resumed: a finished one stays finished, none is taken for another, and what may change does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.test_training import PROMPTS, StopAt, few_nines, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import tiny_model, tiny_rollouts
from trl_apa.trainer.checkpoints import MANIFEST, read_manifest
from trl_apa.trainer.resuming import is_complete, last_complete_checkpoint


SAVING = {"save_strategy": "steps", "save_steps": 2}
RECORDED = Path(__file__).parent / "data" / "checkpoint-0.1.0.tar.gz"


def steps_in(folder):
    return sorted(int(path.name.rsplit("-", 1)[1]) for path in Path(folder).glob("checkpoint-*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("uninterrupted"), max_steps=12)
    trainer.train()
    return parameters(trainer)


def away(completions, **kwargs):
    raise ConnectionError("the judge is away")


away.__name__ = "few_nines"


# ---- finished runs ----


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 4},
        {"max_steps": 6},
        {"max_steps": 16},  # a pass over the prompts
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"max_steps": -1, "total_episodes": 9},
        {"max_steps": 20, "max_kl": 1e-9},
        {"max_steps": -1, "total_episodes": 9, "early_stopping": True, "target_kl": 1e-9},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_finished_run_stays_finished(tmp_path, caplog, options):
    options = {"save_strategy": "steps", "save_steps": 5, **options}
    first = trainer_for(tmp_path, **options)
    first.train()
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for again in (trainer_for(tmp_path, model=tiny_model(seed=0), **options), first):
        caplog.clear()
        result = again.train(resume_from_checkpoint=True)
        assert result.global_step == again.state.global_step == steps_in(tmp_path)[-1]
        assert_same(parameters(again), parameters(first), tolerance=1e-30)
        assert again.num_iterations_done == first.num_iterations_done
        (line,) = [record.message for record in caplog.records if "is finished" in record.message]
        assert first.run.id in line and "Nothing is trained" in line
    assert saved == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"max_steps": 6}, {"max_steps": 12}),
        ({"max_steps": -1, "num_train_epochs": 0.5}, {"max_steps": 12}),
        ({"max_steps": -1, "total_episodes": 8}, {"max_steps": -1, "total_episodes": 12}),
        ({"max_steps": 12, "max_kl": 1e-9}, {"max_steps": 12, "max_kl": 1e9}),
        ({"max_steps": 12, "max_kl": 1e-9}, {"max_steps": 12}),
    ],
)
def test_a_finished_run_goes_on_when_more_is_asked_of_it(tmp_path, uninterrupted, before, after):
    trainer_for(tmp_path, save_strategy="steps", save_steps=100, **before).train()
    again = trainer_for(tmp_path, **after)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert_same(parameters(again), uninterrupted, tolerance=1e-30)


def test_a_run_that_early_stopping_ended_stays_finished_until_it_gets_more_patience(tmp_path, caplog):
    def worse_each_time(prompts, completions, **kwargs):
        calls.append(len(prompts))
        return [-float(len(calls))] * len(prompts)

    def run(patience, resume=None):
        options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **SAVING}
        options |= {"metric_for_best_model": "eval_reward", "greater_is_better": True, "eval_dataset": ["w3"]}
        callbacks = [EarlyStoppingCallback(patience)]
        trainer = trainer_for(tmp_path, reward_funcs=worse_each_time, max_steps=12, callbacks=callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    calls = []
    assert run(patience=1) == 4
    assert run(patience=1, resume=True) == 4 and "EarlyStoppingCallback ended it" in caplog.text
    assert run(patience=9, resume=True) == 12


def test_episodes_before_a_resume_count_in_the_same_trainer_too(tmp_path):
    options = {"max_steps": -1, "total_episodes": 12, "early_stopping": True, "target_kl": 1e-9}
    expected = trainer_for(tmp_path / "uninterrupted", **options)
    expected.train()
    cut = trainer_for(tmp_path / "cut", callbacks=[StopAt(3)], **options)
    cut.train()
    cut.remove_callback(StopAt)
    cut.train(resume_from_checkpoint=True)
    again = trainer_for(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for trainer in (cut, again):
        assert trainer.num_iterations_done == expected.num_iterations_done == 3
        assert_same(parameters(trainer), parameters(expected), tolerance=1e-30)


# ---- whose checkpoint ----


def test_every_checkpoint_of_a_run_has_its_id_and_every_new_run_another(tmp_path):
    first = trainer_for(tmp_path, max_steps=4, **SAVING)
    first.train()
    assert {read_manifest(tmp_path / f"checkpoint-{step}")["run"]["id"] for step in (2, 4)} == {first.run.id}
    again = trainer_for(tmp_path, max_steps=6, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.run.id == first.run.id and again.run.attempt == 2
    random_before = torch.get_rng_state()
    again.train()
    assert again.run.id != first.run.id
    assert not random_before.equal(torch.get_rng_state())  # used by sampling


def test_a_new_run_says_whose_checkpoints_lie_there_and_leaves_them(tmp_path, caplog):
    old = trainer_for(tmp_path, max_steps=6, **SAVING)
    old.train()
    assert "another run" not in caplog.text
    new = trainer_for(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=1, kl_coef=1.0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        new.train()
    assert "holds checkpoints of another run (checkpoint-2, checkpoint-4, checkpoint-6)" in caplog.text
    moved = sorted(str(warning.message) for warning in warned if "is of another run" in str(warning.message))
    assert len(moved) == 2 and "checkpoint-2 " in moved[0] and "checkpoint-4 " in moved[1]
    kept = [tmp_path / "_older-runs" / old.run.id / f"checkpoint-{step}" for step in (2, 4)] + [
        tmp_path / "checkpoint-6"
    ]
    assert all(is_complete(path) for path in kept)
    assert steps_in(tmp_path) == [5, 6] and last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-5")
    # The older run is still there to be continued.
    again = trainer_for(tmp_path, max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.run.id == old.run.id and again.state.global_step == 8


def other_words(completions, **kwargs):
    return few_nines(completions)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_type", {"loss_type": "awr", "kl_coef": 0.1}),
        ("kl_coef", {"kl_coef": 0.2}),
        ("gamma", {"gamma": 0.5}),
        ("vf_coef", {"vf_coef": 0.5}),
        ("whiten_advantages", {"whiten_advantages": False}),
        ("score_clip", {"score_clip": 1.0}),
        ("seed", {"seed": 4}),
        ("batch_size", {"batch_size": 8}),
        ("per_device_train_batch_size", {"mini_batch_size": 4}),
        ("num_epochs_per_batch", {"ppo_epochs": 3}),
        ("num_generations", {"num_generations": 2}),
        ("shuffle", {"shuffle": "groups"}),
        ("temperature", {"temperature": 0.5}),
        ("top_k", {"top_k": 3}),
        ("max_completion_length", {"max_completion_length": 6}),
        ("train_dataset", {"dataset": Dataset.from_dict({"prompt": [*PROMPTS[:-1], "w9 w9"]})}),
        ("train_dataset", {"dataset": PROMPTS[:-1]}),
        ("reward_funcs", {"reward_funcs": other_words}),
        ("reward_funcs", {"reward_funcs": [few_nines, other_words]}),
        ("ref_model", {"model": tiny_model(seed=1)}),
    ],
)
def test_what_makes_another_run_of_it_is_refused_by_name_unless_it_is_named(tmp_path, checkpoint_6, name, options):
    trainer = trainer_for(tmp_path, max_steps=8, **options)
    before = parameters(trainer)
    with pytest.raises(ValueError, match=rf"is of another run: .*{name} .*resume_anyway=\[.*'{name}'"):
        trainer.train(resume_from_checkpoint=checkpoint_6)
    assert_same(parameters(trainer), before, tolerance=1e-30)
    trainer.train(resume_from_checkpoint=checkpoint_6, resume_anyway=[name])
    assert trainer.state.global_step == 8


@pytest.fixture(scope="module")
def checkpoint_6(tmp_path_factory):
    """In the middle of an iteration."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, max_steps=12, callbacks=[StopAt(6)]).train()
    return str(folder / "checkpoint-6")


def test_the_networks_must_fit_whatever_is_named(tmp_path, checkpoint_6):
    trainer = trainer_for(tmp_path, model=tiny_model("gpt2"), resume_anyway=["ref_model"])
    with pytest.raises(ValueError, match=r"of another run: networks was 'LlamaForCausalLM, .* is 'GPT2LMHeadModel"):
        trainer.train(resume_from_checkpoint=checkpoint_6, resume_anyway=["networks", "world_size"])


def test_a_name_that_tells_no_run_from_another_is_refused(tmp_path, checkpoint_6):
    with pytest.raises(ValueError, match=r"resume_anyway names learning_rat.* it can name .*kl_coef"):
        trainer_for(tmp_path, resume_anyway=["learning_rat"]).train(resume_from_checkpoint=checkpoint_6)


def test_what_has_changed_is_said_and_an_overridden_difference_leaves_out_the_old_rollouts(
    tmp_path, checkpoint_6, caplog
):
    prompts = []

    def recording(prompts_asked, completions):
        prompts.append(prompts_asked)
        return few_nines(completions)

    def few_nines_named(prompts, completions, **kwargs):
        return recording(prompts, completions)

    few_nines_named.__name__ = "few_nines"
    options = {"max_steps": 10, "logging_steps": 2, "max_grad_norm": 0.5, "reward_funcs": few_nines_named}
    trainer_for(tmp_path / "same", **options).train(resume_from_checkpoint=checkpoint_6)
    said = caplog.text
    assert f"from {checkpoint_6}" in said
    for text in ("max_steps was 12, is 10", "logging_steps was 1", "max_grad_norm was 1.0, is 0.5"):
        assert text in said
    assert "output_dir" not in said and "kl_coef" not in said
    assert len(prompts) == 1  # the unfinished iteration was finished first
    caplog.clear()
    trainer_for(tmp_path / "other", kl_coef=0.2, resume_anyway=["kl_coef"], **options).train(
        resume_from_checkpoint=checkpoint_6
    )
    assert "kl_coef was 0.1, is 0.2" in caplog.text
    assert len(prompts) == 2 and prompts[1] != prompts[0]  # those of the unfinished iteration, asked anew


# ---- what may change ----


def test_a_new_learning_rate_weight_decay_and_betas_are_used_and_said(tmp_path, checkpoint_6, caplog):
    changes = {"learning_rate": 1e-6, "weight_decay": 0.1, "adam_beta1": 0.5, "adam_epsilon": 1e-3}
    trainer = trainer_for(tmp_path, max_steps=8, **changes)
    trainer.train(resume_from_checkpoint=checkpoint_6)
    assert [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row][-2:] == [1e-6] * 2
    decayed = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert set(decayed) == {0.1, 0.0}
    assert all(group["betas"][0] == 0.5 and group["eps"] == 1e-3 for group in trainer.optimizer.param_groups)
    for name, before in (("learning_rate", 0.01), ("weight_decay", 0.0), ("adam_beta1", 0.9)):
        assert f"{name} was {before}, is {changes[name]}" in caplog.text
    assert "the optimizer continues with" in caplog.text
    # The moments are the checkpoint's: after two more steps they are in their eighth.
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {8}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_new_rate_takes_the_old_ones_place_in_the_schedule(tmp_path, schedule):
    """From the first step on, with the rates of a run that had the new one from the start."""
    options = {"max_steps": 8, "lr_scheduler_type": schedule, "warmup_steps": 2}
    trainer_for(tmp_path / "old", learning_rate=1e-2, callbacks=[StopAt(3)], **options).train()
    expected = trainer_for(tmp_path / "new", learning_rate=1e-3, **options)
    expected.train()
    resumed = trainer_for(tmp_path / "old", learning_rate=1e-3, **options)
    resumed.train(resume_from_checkpoint=True)

    def rates(trainer):
        return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]

    assert rates(resumed)[3:] == rates(expected)[3:] and rates(resumed)[:3] != rates(expected)[:3]


def test_another_optimizer_is_refused_by_name(tmp_path, checkpoint_6):
    trainer = trainer_for(tmp_path, max_steps=8, optim="sgd")
    message = r"optim was 'adamw_torch\w*' \(AdamW\), is 'sgd' \(SGD\); their states are incompatible"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint_6)
    trainer = trainer_for(tmp_path, max_steps=8, value_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"its optimizer has 2 groups .*, this one has 4; .*value_learning_rate"):
        trainer.train(resume_from_checkpoint=checkpoint_6)


# ---- checkpoints that cannot be resumed ----


@pytest.mark.parametrize(
    "name",
    ["config.json", "value_model/config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"],
)
def test_an_incomplete_checkpoint_is_refused_by_name_and_passed_over(tmp_path, uninterrupted, name):
    trainer_for(tmp_path, max_steps=6, **SAVING).train()
    os.remove(tmp_path / "checkpoint-6" / name)
    trainer = trainer_for(tmp_path, max_steps=12)
    before = parameters(trainer)
    with pytest.raises(ValueError, match=rf"checkpoint-6' is incomplete, or not a checkpoint: {name} is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(parameters(trainer), before, tolerance=1e-30)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is incomplete \({name} is missing\)"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(parameters(trainer), uninterrupted, tolerance=1e-30)


def rewrite_state(folder, **changes):
    """Another state of the process, as a checkpoint of 0.1.0 might hold it: without a checksum."""
    path = Path(folder) / "apa_state_0.pt"
    state = torch.load(path, weights_only=True)
    for name, value in changes.items():
        *containers, last = name.split("__")
        container = state
        for key in containers:
            container = container[key]
        container[last] = value
    torch.save(state, path)
    (Path(folder) / MANIFEST).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": 5}, "apa_state_0.pt: it is of step 5, trainer_state.json of step 6"),
        ({"iteration__position": 99}, "micro-batch 99 of an iteration of 4 optimizer steps"),
        ({"iteration__position": 3}, "micro-batch 3 of an iteration .* that began at step 4 does not fit step 6"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(tmp_path, checkpoint_6, changes, message):
    shutil.copytree(checkpoint_6, tmp_path / "checkpoint-6")
    rewrite_state(tmp_path / "checkpoint-6", **changes)
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, max_steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    shutil.copytree(checkpoint_6, tmp_path / "checkpoint-4")
    rewrite_trainer_state(tmp_path / "checkpoint-4", global_step=4)
    rewrite_state(tmp_path / "checkpoint-4", global_step=4, iteration__position=0)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is incomplete \((apa_state_0.pt: )?{message}"):
        assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-4")


def rewrite_trainer_state(folder, **changes):
    path = Path(folder) / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_state_that_torch_cannot_read_is_named(tmp_path, checkpoint_6):
    shutil.copytree(checkpoint_6, tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    (tmp_path / "checkpoint-6" / "apa_state_0.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"checkpoint-6: apa_state_0\.pt: it cannot be read"):
        trainer_for(tmp_path, max_steps=12).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_0_1_0_is_resumed_and_what_it_does_not_say_is_said(tmp_path, caplog):
    """Written by version 0.1.0 at step 6 of 12, in the middle of an iteration, with a linear schedule."""
    options = {"max_steps": 12, "scale_rewards": True, "lr_scheduler_type": "linear"}
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    expected = trainer_for(tmp_path / "new", **options)
    expected.train()
    resumed = trainer_for(tmp_path / "old", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    # It was recorded on another machine, whose last digits may differ.
    assert_same(parameters(resumed), parameters(expected), tolerance=1e-4)
    (line,) = [record.message for record in caplog.records if "0.1.0" in record.message]
    assert "cannot be verified" in line
    with pytest.raises(ValueError, match="of another run: batch_size was 4, is 8"):
        trainer_for(tmp_path / "old", batch_size=8).train(resume_from_checkpoint=True)


# ---- among several runs ----


BY_REWARD = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": ["w3"]}
BY_REWARD |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}


def test_a_run_that_had_no_time_to_save_is_not_taken_for_an_older_one(tmp_path):
    trainer_for(tmp_path, max_steps=4, **SAVING).train()
    with pytest.raises(RuntimeError, match="ConnectionError"):
        trainer_for(tmp_path, max_steps=8, reward_funcs=away, **SAVING).train()
    with pytest.raises(
        ValueError, match=r"no complete checkpoint of run .*; to resume an older run, name .*checkpoint-4"
    ):
        trainer_for(tmp_path, max_steps=8).train(resume_from_checkpoint=True)
    trainer_for(tmp_path, max_steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_run_that_was_resumed_last_is_the_one_to_resume(tmp_path):
    older = trainer_for(tmp_path, max_steps=6, **SAVING)
    older.train()
    with pytest.warns(UserWarning, match="is of another run"):
        trainer_for(tmp_path, max_steps=4, **SAVING).train()
    again = trainer_for(tmp_path, max_steps=8, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.run.id == older.run.id
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")
    os.remove(tmp_path / "checkpoint-8" / "optimizer.pt")
    os.remove(tmp_path / "checkpoint-6" / "optimizer.pt")
    # That of step 4 had to make room.
    with pytest.warns(UserWarning, match="checkpoint-6 is incomplete"):
        assert last_complete_checkpoint(str(tmp_path)).endswith(f"_older-runs/{older.run.id}/checkpoint-4")


def test_the_best_checkpoint_is_the_runs_own(tmp_path):
    trainer_for(tmp_path, max_steps=2, **SAVING).train()

    def worse_each_time(completions, **kwargs):
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    calls = []
    options = {"save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True, **BY_REWARD}
    trainer = trainer_for(tmp_path, max_steps=4, kl_coef=1.0, reward_funcs=worse_each_time, **options)
    trainer.train()
    # The best is at step 2, where only the other run has a checkpoint.
    assert trainer.state.best_global_step == 2 and trainer.state.best_model_checkpoint is None


@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_a_run_that_ends_between_two_checkpoints_is_saved_where_it_ended(tmp_path, strategy):
    """Ended by a callback or a signal; `save_strategy="best"` takes back what they ask for."""

    class Terminated(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)

    def worse_each_time(completions, **kwargs):
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    calls, options = [], {"save_strategy": strategy, "save_steps": 100, "load_best_model_at_end": False, **BY_REWARD}
    options |= {"max_steps": 12, "reward_funcs": worse_each_time}
    with pytest.raises(SystemExit) as ended:
        trainer_for(tmp_path, callbacks=[Terminated()], **options).train()
    assert ended.value.code == 143 and is_complete(tmp_path / "checkpoint-4")
    patient = trainer_for(tmp_path, callbacks=[EarlyStoppingCallback(4)], **options)
    patient.train(resume_from_checkpoint=True)
    assert is_complete(tmp_path / f"checkpoint-{patient.state.global_step}")


def test_resume_anyway_takes_one_name_and_classics_names(tmp_path, checkpoint_6):
    options = {"max_steps": 8, "mini_batch_size": 4, "ppo_epochs": 4}
    trainer = trainer_for(tmp_path, **options, resume_anyway=["ppo_epochs"])
    trainer.train(resume_from_checkpoint=checkpoint_6, resume_anyway="mini_batch_size")
    assert trainer.state.global_step == 8


def test_episodes_count_by_what_each_iteration_had(tmp_path):
    trainer_for(tmp_path, max_steps=-1, total_episodes=8, **SAVING).train()
    again = trainer_for(tmp_path, max_steps=-1, total_episodes=16, batch_size=8, resume_anyway=["batch_size"])
    again.train(resume_from_checkpoint=True)
    assert again.run_state.episodes_done == 16 and again.num_iterations_done == 3


def test_a_secret_among_the_options_that_define_a_run_is_in_no_manifest(tmp_path):
    secret = "sk-0123456789abcdefghij"
    trainer = trainer_for(tmp_path, max_steps=2, chat_template_kwargs={"api_key": secret}, **SAVING)
    trainer.train()
    assert secret not in (tmp_path / "checkpoint-2" / MANIFEST).read_text()
    trainer.train(resume_from_checkpoint=True)


# ---- what a failure leaves ----


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_a_resumed_run_that_fails_at_once_leaves_what_it_came_from(tmp_path, uninterrupted, monkeypatch, disk_is_full):
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    trainer_for(tmp_path, max_steps=8, **saving).train()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        if disk_is_full:
            patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RuntimeError, match="few_nines failed: ConnectionError"):
            trainer_for(tmp_path, max_steps=12, reward_funcs=away, **saving).train(resume_from_checkpoint=True)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = trainer_for(tmp_path, max_steps=12, **saving)
    again.train(resume_from_checkpoint=True)
    assert_same(parameters(again), uninterrupted, tolerance=1e-30)


def test_the_error_of_the_run_is_raised_where_its_checkpoint_cannot_be_written(tmp_path, monkeypatch, caplog):
    calls = []

    def third_fails(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            monkeypatch.setattr(
                torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )
            raise ConnectionError("the judge is away")
        return few_nines(completions)

    with pytest.raises(RuntimeError, match="third_fails failed: ConnectionError"):
        trainer_for(tmp_path, max_steps=12, reward_funcs=third_fails, save_strategy="steps", save_steps=3).train()
    assert "is lost: " in caplog.text and "No space left" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-3", "checkpoint-6"]
    assert is_complete(tmp_path / "checkpoint-6")


class CallsDuringTraining(TrainerCallback):
    def __init__(self, call):
        self.call, self.errors = call, []

    def on_step_end(self, args, state, control, **kwargs):
        with pytest.raises(RuntimeError) as raised:
            self.call()
        self.errors.append(str(raised.value))


@pytest.mark.parametrize("method", ["step", "train"])
def test_neither_step_nor_train_is_called_while_training(tmp_path, uninterrupted, method):
    callback = CallsDuringTraining(lambda: getattr(trainer, method)(*(tiny_rollouts() if method == "step" else ())))
    trainer = trainer_for(tmp_path, max_steps=12, callbacks=[callback])
    trainer.train()
    assert set(callback.errors) == {f"{method}() was called while train() runs, which makes its own updates"}
    assert_same(parameters(trainer), uninterrupted, tolerance=1e-30)

    def steps(completions, **kwargs):
        getattr(trainer, method)(*(tiny_rollouts() if method == "step" else ()))

    trainer = trainer_for(tmp_path, reward_funcs=steps)
    with pytest.raises(RuntimeError, match=rf"reward function steps failed: .*{method}\(\) was called while train"):
        trainer.train()
    trainer.step(*tiny_rollouts())  # afterwards it works


# ---- signals ----

SLOW_RUN = """
import signal, sys, time
from transformers import TrainerCallback
from tests.test_training import trainer_for

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Slowly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(float(sys.argv[2]) if state.global_step >= 4 else 0.0)

trainer_for(sys.argv[1], max_steps=12, callbacks=[Slowly()], disable_tqdm=True, logging_steps=100).train()
print("finished")
"""


def interrupted_at_step_4(folder, seconds, *signals):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW_RUN, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    for line in process.stdout:
        if line.strip() == "step 4":
            break
    errors = []
    for number in signals:
        process.send_signal(number)
        for line in process.stderr:  # until it is told, or the end
            errors.append(line)
            if "ends with a checkpoint" in line:
                break
    output, rest = process.communicate(timeout=120)
    assert "finished" not in output
    return process.returncode, "".join(errors) + rest


@pytest.mark.slow
def test_ctrl_c_saves_after_the_current_step_and_says_how_to_continue(tmp_path, uninterrupted):
    status, errors = interrupted_at_step_4(tmp_path, 0.3, signal.SIGINT)
    assert status == 130
    (line,) = [line for line in errors.splitlines() if "Ctrl-C: a checkpoint of step" in line]
    assert re.search(r"is in .*checkpoint-\d+; continue with train\(resume_from_checkpoint=True\)", line)
    assert "Traceback" not in errors
    trainer = trainer_for(tmp_path, max_steps=12)
    trainer.train(resume_from_checkpoint=True)
    assert_same(parameters(trainer), uninterrupted, tolerance=1e-30)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    status, errors = interrupted_at_step_4(tmp_path, 60, signal.SIGINT, signal.SIGINT)
    assert status in (-signal.SIGINT, 130), errors
    assert steps_in(tmp_path) == []


def test_a_file_is_loaded_to_a_cpu_with_an_index(tmp_path):
    """As transformers below 5.20 does with the optimizer's state in several processes."""
    torch.save({"state": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    for index in (0, 1):
        loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", index), weights_only=True)
        assert loaded["state"].tolist() == [0.0, 1.0, 2.0]
