"""Runs that are cut short or go bad: nothing already learned is lost, and the message says what to do."""

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Trainer

from tests.test_training import few_nines, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import CONFIGS, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa.redaction import without_secrets
from trl_apa.rollout.scoring import RewardModel, Scorer
from trl_apa.trainer.resuming import is_complete, last_complete_checkpoint
from trl_apa.trainer.signals import StopOnSignal


ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, resource, signal, sys, time
import transformers.trainer
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from tests.test_training import few_nines, trainer_for

folder, fault = sys.argv[1:]
options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}

class Slowly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        if fault == "no room" and state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        time.sleep(0.0 if fault == "no room" else 0.3)

if fault == "no room":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if fault == "killed while writing":
    complete = TrainerState.save_to_json

    def cut_short(self, path):
        if self.global_step == 6:
            with open(path, "w") as file:
                file.write('{"best_metric": nu')
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, path)

    TrainerState.save_to_json = cut_short
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


def go_on(folder, failed=few_nines):
    """Resume the run of a reward function that has been repaired under its name."""

    def repaired(completions, **kwargs):
        return few_nines(completions)

    repaired.__name__ = failed.__name__
    trainer = trainer_for(folder, max_steps=12, reward_funcs=repaired)
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


@pytest.mark.slow
def test_a_checkpoint_that_was_being_written_when_the_process_was_killed_is_no_checkpoint(tmp_path, uninterrupted):
    process = start(tmp_path, "killed while writing")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("_incomplete-checkpoint-6-*")
    assert (left / "model.safetensors").is_file() and not is_complete(left)
    assert not (tmp_path / "checkpoint-6").exists() and is_complete(tmp_path / "checkpoint-3")
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)
    assert not left.exists()


def test_a_checkpoint_that_is_written_anew_is_complete_until_its_successor_is(tmp_path, uninterrupted, monkeypatch):
    """The run is resumed before a complete checkpoint, and ends again while it writes that one anew."""

    def interrupt(*_):
        raise KeyboardInterrupt  # itself, because a shell lets what it starts in the background ignore SIGINT

    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, max_steps=6, **saving).train()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Trainer, "_save_optimizer_and_scheduler", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer_for(tmp_path, max_steps=12, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(is_complete(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6))
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


TOO_LITTLE_ROOM = (
    r"checkpoint-\d+ could not be written: .*Checkpoints before it are complete: make room and continue with train"
)


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, uninterrupted):
    """A file system of its own with room for two checkpoints and a half; where none may be mounted, small files."""
    probe = trainer_for(tmp_path / "probe", max_steps=1, save_strategy="steps", save_steps=1)
    probe.train()
    size = sum(file.stat().st_size for file in (tmp_path / "probe" / "checkpoint-1").rglob("*") if file.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) + 200_000}", "tmpfs", str(disk)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        if mounted:
            with pytest.raises(RuntimeError, match=TOO_LITTLE_ROOM):
                trainer_for(disk, max_steps=12, save_strategy="steps", save_steps=1).train()
        else:
            process = start(disk, "no room")
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 1 and re.search(TOO_LITTLE_ROOM, errors.splitlines()[-1])
        checkpoint = last_complete_checkpoint(str(disk))
        assert int(checkpoint.rsplit("-", 1)[1]) >= 1
        trainer = trainer_for(tmp_path / "elsewhere", max_steps=12)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_same(parameters(trainer), uninterrupted, tolerance=1e-30)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("fault", ["raises", "too few values", "None"])
def test_what_was_learned_before_a_reward_function_failed_is_kept(tmp_path, uninterrupted, fault):
    calls = []

    def flaky(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) < 3:
            return few_nines(completions)
        if fault == "raises":
            raise ConnectionError("the judge is away")
        return few_nines(completions)[:-1] if fault == "too few values" else [None] * len(completions)

    error, message = {
        "raises": (RuntimeError, "reward function flaky failed: ConnectionError: the judge is away"),
        "too few values": (ValueError, "reward function flaky gave 3 values for 4 responses"),
        "None": (ValueError, "reward function flaky gave None for row 0; it should be a finite number"),
    }[fault]
    with pytest.raises(error, match=message):
        trainer_for(tmp_path, reward_funcs=flaky, max_steps=12).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")
    # Random numbers of the failed attempt do not count either.
    assert_same(go_on(tmp_path, flaky), uninterrupted, tolerance=1e-30)


def test_what_was_learned_before_no_response_was_scored_is_kept(tmp_path, uninterrupted):
    calls = []

    def out_of_opinions(completions, **kwargs):
        calls.append(len(completions))
        return [None] * len(completions) if len(calls) == 3 else few_nines(completions)

    with pytest.raises(ValueError, match="no response of this iteration was scored: every one had a None or NaN"):
        trainer_for(tmp_path, reward_funcs=out_of_opinions, skip_unscored=True, max_steps=12).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")
    assert_same(go_on(tmp_path, out_of_opinions), uninterrupted, tolerance=1e-30)


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
    assert_same(go_on(tmp_path, slow), uninterrupted, tolerance=1e-30)


def test_what_is_left_behind_after_a_timeout_begins_with_nothing_more_and_holds_up_no_reward_model():
    """Networks run in the main thread, after the functions, whose time alone is limited."""
    threads, begun, hang = [], [], threading.Event()

    class Network(RewardModel):
        def __call__(self, prompts, **_):
            threads.append(threading.current_thread())
            return [1.0] * len(prompts)

    def slow(prompts, **_):
        threads.append(threading.current_thread())
        hang.wait(10)
        return [2.0] * len(prompts)

    def never(prompts, **_):
        begun.append(prompts)
        return [3.0] * len(prompts)

    config = CONFIGS["llama"]()
    config.num_labels = 1
    network = Network(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer())
    one = torch.tensor([5])
    scorer = Scorer([network, slow, never], timeout=0.2)
    with pytest.raises(TimeoutError, match="reward function slow gave no answer"):
        scorer(["w5"], ["w5"], [one], [one], {})
    (left_behind,) = threads
    hang.set()
    left_behind.join(10)
    assert not left_behind.is_alive() and threads == [left_behind] and not begun
    # In time: the answers are in the order of the functions.
    scores = Scorer([network, slow, never], timeout=60)(["w5"], ["w5"], [one], [one], {})
    assert scores.by_function_BF.tolist() == [[1.0, 2.0, 3.0]]
    assert threads[-1] is threading.main_thread() and threads[-2] is not threading.main_thread()


def test_what_was_learned_before_an_evaluation_failed_is_kept(tmp_path, uninterrupted):
    def fails_on_held_out(prompts, completions, **kwargs):
        if "w31" in prompts[0]:
            raise ConnectionError("the judge is away")
        return few_nines(completions)

    options = {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": ["w31"]}
    with pytest.raises(RuntimeError, match="fails_on_held_out failed"):
        trainer_for(tmp_path, reward_funcs=fails_on_held_out, max_steps=12, **options).train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-6")
    assert_same(go_on(tmp_path, fails_on_held_out), uninterrupted, tolerance=1e-30)


def test_what_was_learned_before_a_gradient_was_not_finite_is_kept(tmp_path, uninterrupted):
    trainer = trainer_for(tmp_path, max_steps=12)

    def spoil(gradient):
        return gradient * (float("nan") if trainer.state.global_step == 6 else 1.0)

    trainer.model.policy.lm_head.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="at optimizer step 6; this update was not made"):
        trainer.train()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-6")
    assert_same(go_on(tmp_path), uninterrupted, tolerance=1e-30)


def test_sigterm_after_the_last_step_is_passed_on():
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("mine"))
    try:
        callback = StopOnSignal(lambda tensor: tensor)
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
        ValueError, match=r"of another run: loss_type was 'apa', is 'ppo', .*num_epochs_per_batch was 2, is 3"
    ):
        trainer_for(tmp_path, loss_type="ppo", ppo_epochs=3).train(resume_from_checkpoint=checkpoint)
    os.remove(tmp_path / "checkpoint-2" / "apa_state_0.pt")
    with pytest.raises(ValueError, match=r"is incomplete, or not a checkpoint: apa_state_0\.pt is missing"):
        trainer_for(tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer_for(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_learned(tmp_path):
    trainer_for(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    wider = LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "intermediate_size": 48})
    for model, kind in (
        (tiny_model("gpt2"), "GPT2LMHeadModel"),
        (get_peft_model(tiny_model(), lora_config()), "PeftModelForCausalLM"),
        (AutoModelForCausalLM.from_config(wider), "LlamaForCausalLM"),
    ):
        trainer = trainer_for(tmp_path, model=model)
        before = parameters(trainer)
        message = rf"checkpoint-2' is of another run: networks was 'LlamaForCausalLM, .* trained', is '{kind}, "
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)
        assert_same(parameters(trainer), before, tolerance=1e-30)


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


KEYS = {"hub_token": "hf_Hub0Token", "api_key": "Wandb0Key", "token": "Best0Token", "password": "Server0Password"}


def with_keys(tmp_path, **options):
    return trainer_for(
        tmp_path,
        hub_token=KEYS["hub_token"],
        tracker_kwargs={"tensorboard": {"comment": "x"}, "wandb": {"settings": {"api_key": KEYS["api_key"]}}},
        push_to_hub_if_best_kwargs={"repo_id": "me/best", "token": KEYS["token"]},
        vllm_server_base_url=f"http://me:{KEYS['password']}@localhost:8000",
        report_to="tensorboard",
        log_completions=True,
        **options,
    )


@pytest.mark.filterwarnings("ignore:tracker_kwargs")
def test_no_file_and_no_output_of_a_run_holds_a_key_or_a_token(tmp_path, monkeypatch, capfd, caplog):
    """Every byte of the output folder, with checkpoints and what goes to the hub, and of what is printed."""
    uploads = []

    def upload(**options):
        uploads.append(options["token"])
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "push_in_progress", None))
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "push_to_hub": True,
        "hub_model_id": "me/run",
    }
    trainer = with_keys(tmp_path, hub_always_push=True, **options)
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.create_model_card()
    # The Trainer has pickled its options for the hub, and the upload had the token.
    assert (tmp_path / "training_args.bin").is_file() and set(uploads) == {KEYS["hub_token"]}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"trainer_state.json", "apa_state_0.pt", "README.md"} <= {path.name for path in files}
    assert any(path.name.startswith("events.") for path in files)
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in files) + (shown.out + shown.err + caplog.text).encode()
    written += f"{trainer.args} {trainer.args!r} {trainer.args.to_json_string()}".encode()
    with zipfile.ZipFile(tmp_path / "training_args.bin") as archive:
        written += archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert [name for name, key in KEYS.items() if key.encode() in written] == []


@pytest.mark.filterwarnings("ignore:tracker_kwargs")
def test_options_keep_their_keys_in_copies_and_not_in_a_pickle(tmp_path):
    config = with_keys(tmp_path).args
    for same in (copy.copy(config), copy.deepcopy(config)):
        assert same.hub_token == KEYS["hub_token"] and same.tracker_kwargs == config.tracker_kwargs
        assert same.push_to_hub_if_best_kwargs["token"] == KEYS["token"] and same.to_dict() == config.to_dict()
    pickled = pickle.loads(pickle.dumps(config))
    assert pickled.hub_token is None and pickled.loss_type == "apa" and pickled.seed == 3
    assert pickled.tracker_kwargs["wandb"] == {"settings": {"api_key": "<secret>"}}
    assert pickled.push_to_hub_if_best_kwargs == {"repo_id": "me/best", "token": "<secret>"}
    assert pickled.vllm_server_base_url == "http://<secret>@localhost:8000"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"headers": {"Authorization": "Bearer x1"}}, {"headers": {"Authorization": "<secret>"}}),
        (
            {"passwd": "x", "db_pwd": "x", "passphrase": "x"},
            dict.fromkeys(("passwd", "db_pwd", "passphrase"), "<secret>"),
        ),
        ({"api_keys": ["x"], "aws_access_key_id": "x"}, {"api_keys": "<secret>", "aws_access_key_id": "<secret>"}),
        ("https://me:x@host/v1?api_key=x&run=7#a", "https://<secret>@host/v1?api_key=<secret>&run=7#a"),
        ("https://host/?run=7&access_token=x", "https://host/?run=7&access_token=<secret>"),
        *(
            (same, same)
            for same in (
                {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
                {"keyword": "x", "max_tokens": 5, "keys_to_ignore": ["x"], "token": None},
                "https://host/?page=2&q=key",
            )
        ),
    ],
    ids=str,
)
def test_what_nobody_else_should_read_is_hidden_and_nothing_else(value, shown):
    assert without_secrets(value) == shown


@pytest.mark.parametrize(
    "options",
    [
        {"push_to_hub_if_best_kwargs": {"token": "Best0Token"}},
        {"tracker_kwargs": ["Best0Token"]},
        {"tracker_kwargs": '{"wandb": {"api_key": "Best0Token"}'},
    ],
)
def test_an_error_about_options_does_not_show_their_keys(tmp_path, options):
    with pytest.raises(ValueError, match=r"push_to_hub_if_best_kwargs|tracker_kwargs") as error:
        tiny_config(tmp_path, **options)
    assert "Best0Token" not in str(error.value)


def test_checkpoints_hold_weights_as_safetensors_and_no_pickle_of_ours(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert load_file(folder / "model.safetensors") and load_file(folder / "value_model" / "model.safetensors")
    state = torch.load(folder / "apa_state_0.pt", weights_only=True)
    assert state["iteration"]["position"] == 3 and len(state["iteration"]["rollouts"]["queries"]) == 4
    others = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "apa_state_0.pt"}
    assert {file.name for file in folder.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")} == others
