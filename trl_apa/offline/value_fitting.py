"""The value model fitted to the returns of fixed data, before the policy is trained."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from trl_apa.algorithms.losses import value_loss
from trl_apa.models import ValueModel
from trl_apa.models.checkpointing import renamed_method
from trl_apa.offline.config import OfflineConfig
from trl_apa.offline.denominators import CountsTokens
from trl_apa.rollout.batch import Rollouts
from trl_apa.telemetry import NoTelemetry
from trl_apa.trainer.optimization import value_learning_rate


class _ValueFitting(NoTelemetry, CountsTokens):
    """The Trainer's loop over the value model alone."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        mask_BR = inputs["response_mask"]
        values_BR = model(inputs, mask_BR.shape[1])
        loss, stats = value_loss(values_BR, inputs["returns"], mask_BR, num_tokens=num_items_in_batch)
        loss = loss * self.accelerator.num_processes
        return (loss, stats) if return_outputs else loss


class _ValueProgress(ProgressCallback):
    """Its bar, and a line for each log, that say what is trained: the policy's come after them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("value model")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            place = f"value model, step {state.global_step}/{state.max_steps}"
            self.training_bar.write(f"{place}  loss {float(logs['loss']):.4f}")


def fit_value_model(
    value_model: ValueModel,
    rollouts: Rollouts,
    micro_batch: Callable[[list[int]], dict[str, Tensor]],
    args: OfflineConfig,
) -> None:
    """Fit V to `rollouts.returns_BR` in `args.value_epochs` passes, in place; nothing is saved.

    Args:
        value_model: a separate network.
        rollouts: with returns.
        micro_batch: rows to tokens, mask and returns.
        args: the options of the run; those about batches, precision and optimizer are used.
    """
    own = copy.copy(args)
    own.num_train_epochs, own.max_steps = args.value_epochs, -1
    own.learning_rate = value_learning_rate(args, value_model) or args.learning_rate
    own.report_to, own.push_to_hub, own.load_best_model_at_end = [], False, False
    own.eval_strategy, own.save_strategy = type(args.eval_strategy)("no"), type(args.save_strategy)("no")
    if args.gradient_checkpointing:
        network = value_model.network
        enable = renamed_method(network, "activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    # Switched on here, because the Trainer looks for it on the value model itself.
    own.gradient_checkpointing = False
    if hasattr(own, "activation_checkpointing"):
        own.activation_checkpointing = False
    trainer = _ValueFitting(
        model=value_model, args=own, data_collator=micro_batch, train_dataset=list(range(len(rollouts)))
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ValueProgress())
    # The Trainer chooses which weights decay by their names in the modules.
    given_names, value_model.given_names = value_model.given_names, {}
    try:
        trainer.train()
    finally:
        value_model.given_names = given_names
