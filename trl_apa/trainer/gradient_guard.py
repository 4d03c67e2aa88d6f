"""No update from a gradient or an optimizer that is not finite, where possible without waiting for the device."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa._trl import _BaseTrainer
from trl_apa.distributed.sharded import full_tensor, gradient_norm, is_sharded
from trl_apa.trainer.optimization import check_optimizer_is_finite


@dataclass(frozen=True)
class Gradient:
    """A gradient whose norm is not checked yet, and the state of the run at that time.

    Args:
        norm: of all of it before clipping, 0-D, on the device.
        position: micro-batches of the iteration that were handed out.
        num_norms: gradients of the iteration whose norms were noted, this one included.
        global_step, epoch: the Trainer's.
        schedule: the scheduler's state and the options of the optimizer's groups, if the loop may move on before the
            norm is looked at.
    """

    norm: Tensor
    position: int
    num_norms: int
    global_step: int
    epoch: float | None
    schedule: tuple[dict[str, Any], list[dict[str, Any]]] | None


class GradientGuard(_BaseTrainer):
    """The part of `APATrainer` that checks each gradient between the backward pass and the update.

    Where `skips_on_device`, the device tells the optimizer: from the first gradient on that is not finite it makes no
    update, and the host learns of it where it waits anyway. Elsewhere the host waits before each update.
    """

    _unseen: list[Gradient]
    _told: torch.optim.Optimizer | None = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As the Trainer does, before the first step of `train` or of the classic loop; then a look at the optimizer.

        Raises:
            ValueError: if its state, that of a checkpoint perhaps, is not finite.
        """
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self.is_deepspeed_enabled:  # whose optimizer's state is the engine's own
            name = "optimizer" if resume_from_checkpoint is None else f"the optimizer of {resume_from_checkpoint}"
            self.processes.together(lambda: check_optimizer_is_finite(name, self.optimizer))
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip both networks together, or each by itself with `value_max_grad_norm`; the norm of both before that."""
        if self.args.value_max_grad_norm is None or not self.args.reads("value_max_grad_norm"):
            self._note_gradient_norms()
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        self._note_gradient_norms()
        networks = self.accelerator.unwrap_model(model).trainable_parameters()
        limits = {"policy": self.args.max_grad_norm, "value": self.args.value_max_grad_norm}
        norms = [full_tensor(nn.utils.clip_grad_norm_(network, limits[name])) for name, network in networks.items()]
        return torch.stack([norm.to(self.accelerator.device) for norm in norms]).norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The joint norm before clipping, noted; no update is made from a gradient that is not finite."""
        if grad_norm is None:
            self._note_gradient_norms()
        total = full_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        norm = torch.as_tensor(total, device=self.accelerator.device)  # torch's norm of no gradient is on the CPU
        self.run_state.iteration.record.grad_norms[-1]["apa/grad_norm/total"] = norm
        # With fp16 an overflow is expected now and then, and whoever scales the gradient skips that update.
        if self.accelerator.mixed_precision != "fp16":
            self._guard_update(norm)
        return total

    def _note_gradient_norms(self) -> None:
        """Norms of each network's gradient before clipping, where they are there, and unscaled."""
        norms: dict[str, Tensor] = {}
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            module = self.accelerator.unwrap_model(self.model)
            for name, parameters in module.trainable_parameters().items():
                if name == "value" and module.value_model is None:
                    continue
                norms[f"apa/grad_norm/{name}"] = gradient_norm(parameters).to(self.accelerator.device)
        self.run_state.iteration.record.grad_norms.append(norms)

    def _guard_update(self, norm: Tensor) -> None:
        # Accelerate's wrapper reads no found_inf.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        # A scheduler of the script's own need not have a state, and its state may hold whole networks.
        put_back = not self.is_in_train or self._created_lr_scheduler
        waits = is_sharded(self.accelerator) or not put_back or not skips_on_device(optimizer, norm.device)
        iteration, state = self.run_state.iteration, self.state
        self._unseen.append(
            Gradient(
                norm=norm,
                position=iteration.position,
                num_norms=len(iteration.record.grad_norms),
                global_step=state.global_step,
                epoch=state.epoch,
                schedule=self._schedule() if self.is_in_train and not waits else None,
            )
        )
        if waits:
            self._check_gradient_norms()
            return
        found_before = getattr(optimizer, "found_inf", torch.zeros((), device=norm.device))
        optimizer.found_inf = torch.maximum(found_before, (~norm.isfinite()).float())
        self._told = optimizer

    def _schedule(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the Trainer's loop moves on after an update, to be put back."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return copy.deepcopy((self.lr_scheduler.state_dict(), groups))

    def _check_gradient_norms(self) -> None:
        """Wait for all norms that are not checked yet, at once.

        Raises:
            FloatingPointError: if one is not finite. The run is then where it was before the first such update.
        """
        unseen, self._unseen = self._unseen, []
        norms = torch.stack([gradient.norm for gradient in unseen]).tolist() if unseen else []
        failed = next((number for number, norm in enumerate(norms) if not math.isfinite(norm)), None)
        if failed is None:
            return
        self._go_back_to(unseen[failed])
        kept = self._keep_for_inspection()
        self.run_state.iteration.take_back_step()
        self._save_what_was_learned()
        raise FloatingPointError(
            f"the gradient norm is {norms[failed]} at optimizer step {self.state.global_step}; this update was not "
            f"made, and its rollouts are in {kept}. Look at the scores and at apa/policy/log_ratio of the step "
            "before; lower the learning rate"
        )

    def _go_back_to(self, gradient: Gradient) -> None:
        """Counters and schedule as they were then; the weights are so already."""
        self.state.global_step, self.state.epoch = gradient.global_step, gradient.epoch
        self.run_state.iteration.rewind(gradient.position, gradient.num_norms)
        if gradient.schedule is not None:
            scheduler, groups = gradient.schedule
            self.lr_scheduler.load_state_dict(scheduler)
            for group, options in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(options)

    def _keep_for_inspection(self) -> Path:
        """The rollouts of an update that failed, for `torch.load`."""
        name = f"failed_step_{self.state.global_step}_process_{self.accelerator.process_index}.pt"
        path = Path(self.args.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.run_state.iteration.state_dict(), path)
        return path

    def _clear_gradient_norms(self) -> None:
        """After the last update of a `step` or a `train`: the optimizer is as its owner knows it."""
        self._unseen = []
        if self._told is not None:
            del vars(self._told)["found_inf"]
            self._told = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does between two optimizer steps; gradients are checked before it logs or ends."""
        if self.control.should_log or self.control.should_training_stop:
            self._check_gradient_norms()
        super()._maybe_log_save_evaluate(*args, **kwargs)


def skips_on_device(optimizer: Any, device: torch.device) -> bool:
    """Whether `optimizer.step()` changes nothing where `optimizer.found_inf` is 1, without asking the host.

    Fused kernels do, for `torch.amp.GradScaler`, with Adam's step counts and moments too. Fused SGD is left out: a
    momentum that it begins at such a step is memory that nothing was written to. So are parameters on the CPU beside
    a GPU, whose kernel does not wait until it is told.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or device.type not in ("cpu", "cuda"):
        return False
    groups = optimizer.param_groups
    return all(group["fused"] and all(p.device.type == device.type for p in group["params"]) for group in groups)
