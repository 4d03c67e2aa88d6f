"""A gradient that is not finite: no update is made from it or after it, and the run is told which step it was."""

import json

import pytest
import torch

from tests.test_training import parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.trainer import gradient_guard
from trl_apa.trainer.gradient_guard import skips_on_device


# A step of it that is left out is left out on the device; the host waits before each step of the others.
TOLD_ON_DEVICE = "adamw_torch_fused"
WAITED_FOR = ("adamw_torch", "sgd")
RUN = {"lr_scheduler_type": "linear", "logging_strategy": "no", "max_steps": 12}
LOOKS = {
    "at the end of the iteration": {},
    "before a log": {"logging_strategy": "steps", "logging_steps": 6},
    "before a checkpoint": {"save_strategy": "steps", "save_steps": 6},
    "before an evaluation": {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": ["w3"]},
}


def spoil(trainer, step, factor):
    """Multiply a gradient of optimizer step `step` by `factor`."""
    return trainer.model.policy.lm_head.weight.register_hook(
        lambda gradient: gradient * (factor if trainer.state.global_step == step else 1.0)
    )


def state_of(optimizer):
    return [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("optim", [TOLD_ON_DEVICE, *WAITED_FOR])
def test_weights_and_optimizer_stay_as_they_were_after_the_last_finite_step(tmp_path, optim, factor):
    """The second of four steps is spoilt: told on the device, the other two are begun as well, and change nothing."""
    trainer = tiny_trainer(tmp_path, mini_batch_size=2, ppo_epochs=2, optim=optim)
    after_step = []
    trainer.optimizer.register_step_post_hook(lambda *_: after_step.append((parameters(trainer), state_of(optimizer))))
    optimizer = trainer.optimizer
    hook = spoil(trainer, 1, factor)
    with pytest.raises(
        FloatingPointError, match=r"the gradient norm is (nan|inf) at optimizer step 1; this update was"
    ):
        trainer.step(*tiny_rollouts())
    assert len(after_step) == (4 if optim == TOLD_ON_DEVICE else 1)
    assert trainer.state.global_step == 1
    weights, moments = after_step[0]
    assert_same(parameters(trainer), weights, tolerance=1e-30)
    for now, then in zip(state_of(optimizer), moments, strict=True):
        assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
    hook.remove()
    kept = torch.load(tmp_path / "failed_step_1_process_0.pt", weights_only=True)
    assert kept["position"] == len(kept["record"]["optimizer_steps"]) == len(kept["record"]["grad_norms"]) == 2
    trainer.step(*tiny_rollouts())
    assert trainer.state.global_step == 5
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_run_whose_first_step_was_left_out_goes_on_like_a_new_one(tmp_path):
    """Adam's moments are then there already: they are zero, and so is its step count."""
    spoilt, new = (tiny_trainer(tmp_path, ppo_epochs=2) for _ in range(2))
    hook = spoil(spoilt, 0, float("nan"))
    with pytest.raises(FloatingPointError, match="at optimizer step 0"):
        spoilt.step(*tiny_rollouts())
    hook.remove()
    assert spoilt.optimizer.state
    spoilt.run_state.num_iterations_done = new.num_iterations_done
    for trainer in (spoilt, new):
        trainer.step(*tiny_rollouts())
    assert_same(parameters(spoilt), parameters(new), tolerance=1e-30)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), **RUN)
    trainer.train()
    return parameters(trainer)


def fail_at_step_5(folder, **options):
    trainer = trainer_for(folder, **{**RUN, **options})
    spoil(trainer, 5, float("nan"))
    with pytest.raises(FloatingPointError, match="at optimizer step 5; this update was not made"):
        trainer.train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-5"]
    return trainer


def written(folder):
    """The checkpoint, and what was kept for inspection, but for the rows that the steps taken back have visited."""
    checkpoint = folder / "checkpoint-5"
    parts = {name: torch.load(checkpoint / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    iterations = {
        "saved": torch.load(checkpoint / "apa_state_0.pt", weights_only=True)["iteration"],
        "kept": torch.load(folder / "failed_step_5_process_0.pt", weights_only=True),
    }
    for iteration in iterations.values():
        del iteration["record"]["logprobs_BR"], iteration["record"]["entropy_BR"]
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]
    return {**parts, **iterations, "state": state}


def as_text(value):
    """Nested containers with tensors, to be compared as a whole; NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, dict):
        return {name: as_text(element) for name, element in value.items()}
    return [as_text(element) for element in value] if isinstance(value, list | tuple) else str(value)


@pytest.mark.parametrize("looked_at", LOOKS)
def test_train_takes_back_what_followed_and_a_resumed_run_is_the_one_without(tmp_path, uninterrupted, looked_at):
    """Iterations have four steps, and the sixth of all is spoilt: found out at the end of the second iteration, and
    before anything is logged, saved or measured in the middle of it."""
    trainer = fail_at_step_5(tmp_path, **LOOKS[looked_at])
    assert not trainer.state.log_history
    resumed = trainer_for(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), uninterrupted, tolerance=1e-30)


def test_the_checkpoint_is_the_one_of_a_run_that_waits_at_each_step(tmp_path, monkeypatch):
    fail_at_step_5(tmp_path / "told")
    monkeypatch.setattr(gradient_guard, "skips_on_device", lambda *_: False)
    fail_at_step_5(tmp_path / "waits")
    told, waits = written(tmp_path / "told"), written(tmp_path / "waits")
    assert told["saved"]["position"] == 1 and told["kept"]["position"] == 2 and told["scheduler.pt"]["last_epoch"] == 5
    for name in waits:
        assert as_text(told[name]) == as_text(waits[name]), name


def test_a_run_that_ends_in_the_middle_of_an_iteration_looks_before_it_ends(tmp_path):
    trainer = fail_at_step_5(tmp_path, max_steps=7)
    assert not trainer.state.log_history and trainer.state.global_step == 5


def test_an_optimizer_is_left_as_its_owner_made_it(tmp_path):
    """After a `step`, a `step` that fails, a `train` and a `train` that fails."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    attributes, seen = set(vars(optimizer)), []
    optimizer.register_step_post_hook(lambda made, *_: seen.append(float(made.found_inf)))
    trainer = trainer_for(tmp_path, model=model, optimizer=optimizer, max_steps=4, logging_strategy="no")
    for number, work in enumerate((lambda: trainer.step(*tiny_rollouts()), trainer.train)):
        seen.clear()
        work()
        assert seen == [0.0] * 4 and set(vars(optimizer)) - {"step", "_opt_called"} == attributes
        hook = spoil(trainer, (5, 1)[number], float("nan"))
        with pytest.raises(FloatingPointError):
            work()
        hook.remove()
        assert seen == [0.0] * 5 + [1.0] * 3 and set(vars(optimizer)) - {"step", "_opt_called"} == attributes


def test_which_optimizers_are_told_on_the_device():
    parameter, cpu = torch.nn.Parameter(torch.zeros(2)), torch.device("cpu")

    class Mine(torch.optim.AdamW):
        pass

    def made(cls, **options):
        return cls([parameter], lr=0.1, **options)

    assert skips_on_device(made(torch.optim.AdamW, fused=True), cpu)
    assert skips_on_device(made(torch.optim.Adam, fused=True), cpu)
    for optimizer in (
        made(torch.optim.AdamW),
        made(torch.optim.AdamW, foreach=True),
        made(torch.optim.SGD, fused=True, momentum=0.9),
        made(Mine, fused=True),
    ):
        assert not skips_on_device(optimizer, cpu)
    # parameters on another kind of device than the norm; a device whose kernels were not looked at
    assert not skips_on_device(made(torch.optim.AdamW, fused=True), torch.device("cuda"))
    assert not skips_on_device(made(torch.optim.AdamW, fused=True), torch.device("mps"))


class Halving:
    """A scheduler of which no state can be put back."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize("spoilt", [False, True])
def test_under_train_a_scheduler_of_the_script_s_own_is_not_run_ahead_of(tmp_path, spoilt):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    told = []
    optimizer.register_step_post_hook(lambda made, *_: told.append(hasattr(made, "found_inf")))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if spoilt else Halving(optimizer)
    options = {"optimizer": optimizer, "lr_scheduler": scheduler, "logging_strategy": "no"}
    trainer = trainer_for(tmp_path, model=model, **options)
    if spoilt:
        spoil(trainer, 2, float("nan"))
        with pytest.raises(FloatingPointError, match="at optimizer step 2"):
            trainer.train()
    else:
        trainer.train()
    steps = 2 if spoilt else 4
    assert trainer.state.global_step == steps and told == [False] * steps
    assert optimizer.param_groups[0]["lr"] == 0.01 / 2**steps


def test_an_error_in_a_later_step_does_not_hide_the_gradient(tmp_path, monkeypatch):
    """A script that catches what a GPU raises when it is full would go on with a count of steps that were not made."""
    trainer = tiny_trainer(tmp_path, mini_batch_size=2, ppo_epochs=2, optim=TOLD_ON_DEVICE)
    spoil(trainer, 1, float("nan"))
    compute_loss = trainer.compute_loss

    def full_at_step_3(*args, **kwargs):
        if trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("full")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", full_at_step_3)
    with pytest.raises(FloatingPointError, match="at optimizer step 1") as raised:
        trainer.step(*tiny_rollouts())
    assert isinstance(raised.value.__context__, torch.OutOfMemoryError) and trainer.state.global_step == 1
