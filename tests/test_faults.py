"""Runs that are cut short or go bad: nothing already learned is lost, and the message says what to do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.test_training import few_nines, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import tiny_rollouts, tiny_trainer
from trl_apa.resuming import StopOnSigterm, is_complete, last_complete_checkpoint


ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, signal, sys, time
import transformers.trainer
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from tests.test_training import few_nines, trainer_for

folder, fault = sys.argv[1:]
options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}

class Slowly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.3)

if fault == "killed while writing":
    whole = TrainerState.save_to_json

    def torn(self, path):
        if self.global_step == 6:
            with open(path, "w") as file:
                file.write('{"best_metric": nu')
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, path)

    TrainerState.save_to_json = torn
if fault == "terminated":
    options["save_steps"] = 100
trainer = trainer_for(folder, callbacks=[Slowly()], **options)
trainer.train()
print("finished")
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), max_steps=12)
    trainer.train()
    return parameters(trainer)


def start(folder, fault):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), fault],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def go_on(folder, **options):
    trainer = trainer_for(folder, max_steps=12, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    return parameters(trainer)


def test_sigterm_saves_after_the_current_step_and_the_run_goes_on_from_there(tmp_path, uninterrupted):
    process = start(tmp_path, "terminated")
    for line in process.stdout:
        if line.strip() == "step 4":
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "finished" not in output
    assert "SIGTERM: a checkpoint of step" in errors
    step = int(last_complete_checkpoint(str(tmp_path)).rsplit("-", 1)[1])
    assert 4 <= step < 12
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


def test_a_checkpoint_that_sigkill_cut_short_is_told_from_a_whole_one(tmp_path, uninterrupted):
    process = start(tmp_path, "killed while writing")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-6").is_dir() and not is_complete(str(tmp_path / "checkpoint-6"))
    with pytest.warns(UserWarning, match="checkpoint-6 was not written to its end; going on from the one before"):
        assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)
    with pytest.raises(ValueError, match="no checkpoint that was written to its end"):
        (tmp_path / "torn").mkdir()
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "torn"))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, uninterrupted):
    """A file system of its own with room for two checkpoints and a half."""
    probe = trainer_for(tmp_path / "probe", max_steps=1, save_strategy="steps", save_steps=1)
    probe.train()
    size = sum(file.stat().st_size for file in (tmp_path / "probe" / "checkpoint-1").rglob("*") if file.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) + 200_000}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)):
            trainer_for(disk, max_steps=12, save_strategy="steps", save_steps=1).train()
        checkpoint = last_complete_checkpoint(str(disk))
        assert int(checkpoint.rsplit("-", 1)[1]) >= 1
        trainer = trainer_for(tmp_path / "elsewhere", max_steps=12)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_same(parameters(trainer), uninterrupted, tolerance=1e-30)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_what_was_learned_before_a_reward_function_failed_is_kept(tmp_path, uninterrupted):
    calls = []

    def flaky(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 3:
            raise ConnectionError("the judge is away")
        return few_nines(completions)

    with pytest.raises(RuntimeError, match="reward function flaky failed: ConnectionError: the judge is away"):
        trainer_for(tmp_path, reward_funcs=flaky, max_steps=12).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")
    # Random numbers of the failed attempt do not count either.
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


def test_a_reward_function_that_hangs_is_named_and_the_run_can_go_on(tmp_path, uninterrupted):
    calls = []

    def slow(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            time.sleep(60)
        return few_nines(completions)

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"reward function slow gave no answer within reward_timeout=0\.5 seconds"):
        trainer_for(tmp_path, reward_funcs=slow, max_steps=12, reward_timeout=0.5).train()
    assert time.monotonic() - start < 30
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


def test_what_was_learned_before_an_evaluation_failed_is_kept(tmp_path, uninterrupted):
    def fails_on_held_out(prompts, completions, **kwargs):
        if "w31" in prompts[0]:
            raise ConnectionError("the judge is away")
        return few_nines(completions)

    options = {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": ["w31"]}
    with pytest.raises(RuntimeError, match="fails_on_held_out failed"):
        trainer_for(tmp_path, reward_funcs=fails_on_held_out, max_steps=12, **options).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-6")
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


def test_sigterm_after_the_last_step_is_passed_on():
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("mine"))
    try:
        callback = StopOnSigterm(lambda tensor: tensor)
        with callback.listening():
            signal.raise_signal(signal.SIGTERM)
            assert callback.noted and not callback.received and handled == []
        assert handled == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    trainer_for(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(
        ValueError, match="of another run: loss_type was 'apa', is 'ppo', num_epochs_per_batch was 2, is 3"
    ):
        trainer_for(tmp_path, loss_type="ppo", ppo_epochs=3).train(resume_from_checkpoint=checkpoint)
    os.remove(tmp_path / "checkpoint-2" / "apa_state_0.pt")
    with pytest.raises(ValueError, match=r"has no apa_state_0\.pt"):
        trainer_for(tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer_for(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_training_stops_above_max_kl(tmp_path, caplog):
    trainer = trainer_for(tmp_path, max_steps=40, max_kl=0.05, learning_rate=0.1)
    trainer.train()
    assert trainer.state.global_step < 40 and trainer.state.global_step % 4 == 0
    assert "above max_kl=0.05" in caplog.text
    last = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row]
    assert last[-1] > 0.05 >= max(last[:-1], default=0.0)


def test_rollouts_of_an_update_with_an_infinite_gradient_are_kept_and_no_weight_is_touched(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.step(*tiny_rollouts())
    before = parameters(trainer)
    queries, responses, _ = tiny_rollouts(seed=2)
    hook = trainer.model.policy.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=r"its rollouts are in .*failed_step_1_process_0\.pt"):
        trainer.step(queries, responses, [torch.tensor(1.0)] * 4)
    hook.remove()
    assert_same(parameters(trainer), before, tolerance=1e-30)
    kept = torch.load(tmp_path / "failed_step_1_process_0.pt", weights_only=True)
    assert [query.tolist() for query in kept["rollouts"]["queries"]] == [query.tolist() for query in queries]


def test_checkpoints_hold_weights_as_safetensors_and_no_pickle_of_ours(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert load_file(folder / "model.safetensors") and load_file(folder / "value_model" / "model.safetensors")
    state = torch.load(folder / "apa_state_0.pt", weights_only=True)
    assert state["iteration"]["position"] == 3 and len(state["iteration"]["rollouts"]["queries"]) == 4
    others = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "apa_state_0.pt"}
    assert {file.name for file in folder.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")} <= others
