"""The optimizer steps of one iteration: micro-batches to losses, gradients and new weights."""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa._trl import _BaseTrainer
from trl_apa.algorithms import PolicyTokens
from trl_apa.algorithms.losses import policy_shift, value_loss
from trl_apa.algorithms.masking import masked_mean
from trl_apa.distributed.sharded import forget_gradients
from trl_apa.trainer.hooked_stages import loss_by_override
from trl_apa.trainer.optimization import forget_gradients_of


# What `policy_shift` reports, for losses that do not.
SHIFT = {"approxkl", "policykl", "ratio"}


class Update(_BaseTrainer):
    """The part of `APATrainer` that learns: `step` and the Trainer's own loop both go through `training_step`."""

    # Of the first of two passes over a micro-batch, for an override of `loss` that reads both networks.
    _outputs_of_policy: dict[str, Tensor]

    def _update(self) -> None:
        """Process the plan; under `train()` the Trainer's own loop does so."""
        iteration = self.run_state.iteration
        self.model_wrapped.zero_grad()  # gradients left by an interrupted train()
        while not iteration.finished:
            for number in range(1, iteration.micro_batches_per_step + 1):
                last = number == iteration.micro_batches_per_step
                self.accelerator.gradient_state._set_sync_gradients(last)
                with nullcontext() if last else self.accelerator.no_sync(self.model_wrapped):
                    self.training_step(self.model_wrapped, {})
            if not iteration.record.skipped:
                norm = self._clip_grad_norm(self.model_wrapped) if self.args.max_grad_norm else None
                self._get_grad_norm(self.model_wrapped, grad_norm=norm)
                self.optimizer.step()
                self.state.global_step += 1
            forget_gradients_of(self.model_wrapped, self.optimizer)
            self._stop_if_moved_too_far()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward passes of the iteration's next micro-batch; `inputs` are not read.

        Called by `step` and by the Trainer's loop alike, which gets new rollouts when those before are used up.
        """
        if self.run_state.iteration is None or self.run_state.iteration.finished:
            self._collect_iteration()
        iteration = self.run_state.iteration
        # An override of loss reads logits, which a packed row does not have.
        layouts = partial(self.layouts, packable=False) if self.overrides.include("loss") else self.layouts
        # Between two optimizer steps: rows that a step has read already are not cut again.
        if self.args.tokens_per_micro_batch is not None and iteration.cuts is None and iteration.ends_step:
            iteration.cuts = self._cut_by_tokens(iteration.rollouts, iteration.plan, layouts, iteration.groups)
        passes, ends_step = iteration.next_passes(), self.accelerator.sync_gradients
        module = self.accelerator.unwrap_model(model)
        if module.base_is_shared and iteration.starts_step:
            forget_gradients([p for parameters in module.trainable_parameters().values() for p in parameters])
        loss = torch.zeros((), device=self.accelerator.device)
        for number, rows in enumerate(passes, 1):
            last = number == len(passes)
            batch = iteration.batch(rows, self.special_tokens.pad, layouts)
            with nullcontext() if last else self.accelerator.no_sync(model):
                self.accelerator.gradient_state._set_sync_gradients(ends_step and last)
                loss = loss + self._learn_from(batch, model, num_items_in_batch)
        if iteration.ends_step and self._ratio_explodes():
            model.zero_grad()
        return loss

    def _learn_from(self, batch: dict[str, Any], model: nn.Module, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Forward and backward pass over some rows, of both networks together or one after the other."""
        module, losses = self.accelerator.unwrap_model(model), []
        ends_step = self.accelerator.sync_gradients
        for number, networks in enumerate(module.passes, 1):
            if self.is_deepspeed_enabled:  # which updates the weights in the backward pass that it takes for the last
                is_last = number == len(module.passes)
                self.accelerator.gradient_state._set_sync_gradients(ends_step and is_last)
            with module.adapter_for(**networks):
                losses.append(super().training_step(model, {**batch, **networks}, num_items_in_batch))
        loss: Tensor = sum(losses)
        return loss

    def _stop_if_moved_too_far(self) -> None:
        """Leave out the epochs that remain if the last mini-batch has moved further than `early_stopping` allows."""
        iteration = self.run_state.iteration
        if not self.args.early_stopping or not iteration.ends_epoch or iteration.finished:
            return
        moved = float(self.processes.sum(iteration.record.optimizer_steps[-1]["apa/policy/policykl"]))
        # Classic's PPO lets log-probs rise as far as they like, and so does ours, for runs that are compared with it.
        moved = moved if self.args.algorithm.classic_statistics else abs(moved)
        iteration.stopped = moved > 1.5 * self.args.target_kl

    def _ratio_explodes(self) -> bool:
        """Whether a mini-batch is so far off-policy that its update is left out."""
        if not self.args.reads("ratio_threshold"):
            return False
        record = self.run_state.iteration.record
        step = record.optimizer_steps[-1]
        ratio = float(self.processes.sum(step["apa/policy/ratio"]))
        skipped: bool = ratio > self.args.ratio_threshold
        record.skipped = skipped
        step["apa/policy/skipped"] = torch.full_like(step["apa/loss/total"], skipped / self.accelerator.num_processes)
        if skipped:
            warnings.warn(
                f"a mini-batch was skipped: its mean ratio {ratio:.2f} exceeds {self.args.ratio_threshold=}",
                stacklevel=2,
            )
        return skipped

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Policy loss plus `vf_coef` times value loss, if any, of a micro-batch, as its share of the step's mean.

        Multiplied by the number of processes, because distributed engines average gradients over them.
        """
        args, record = self.args, self.run_state.iteration.record
        networks = {name: inputs.get(name, True) for name in ("with_policy", "with_value")}
        if self.overrides.include("loss"):
            loss = self._overridden_loss(model, inputs, networks) * self.accelerator.num_processes
            return (loss, {}) if return_outputs else loss
        with_entropy = networks["with_policy"] and (record.observing or args.algorithm.classic_statistics)
        outputs = model(**self._model_inputs(inputs), **networks, with_entropy=with_entropy)
        terms: list[Tensor] = []
        stats: dict[str, Tensor] = {}
        if networks["with_policy"]:
            policy_loss, stats = self._policy_terms(outputs, inputs)
            terms.append(policy_loss)
        if "values" in outputs:
            v_loss, v_stats = self._value_terms(outputs["values"], inputs)
            terms.append(args.vf_coef * v_loss)
            stats = stats | v_stats
        loss = sum(terms[1:], terms[0])
        record.add({**stats, "apa/loss/total": loss.detach()})
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _overridden_loss(self, model: nn.Module, batch: dict[str, Tensor], networks: dict[str, Any]) -> Tensor:
        """The same where a subclass has its own `loss`. Statistics that it does not return are those without it.

        Reported as losses is what is minimised, whatever the override's statistics say. Networks on one base are
        trained in a pass each: `loss` then reads the other network's outputs without gradient, and is called twice.
        """
        inputs = self._model_inputs(batch)
        if not networks["with_policy"]:
            outputs = {**self._outputs_of_policy, **model(**inputs, with_policy=False)}
            self._outputs_of_policy = {}  # logits are large
            policy_term, value_term, _ = loss_by_override(self, outputs, batch)
            loss = policy_term + value_term
            return loss - loss.detach()  # the first pass has reported it
        outputs = {}
        if not networks["with_value"]:
            with torch.no_grad():
                outputs = model(**inputs, with_policy=False)
        outputs |= model(**inputs, with_value=networks["with_value"], with_entropy=True, with_logits=True)
        if not networks["with_value"]:
            self._outputs_of_policy = {name: outputs[name].detach() for name in ("logprobs", "logits")}
        with torch.no_grad():
            stats = self._policy_terms(outputs, batch)[1]
            if "values" in outputs:
                stats |= self._value_terms(outputs["values"], batch)[1]
        policy_term, value_term, own_stats = loss_by_override(self, outputs, batch)
        loss = policy_term + value_term
        terms = {"apa/loss/policy": policy_term.detach()}
        if "values" in outputs:
            terms["apa/loss/value"] = value_term.detach() / (self.args.vf_coef or 1.0)
        self.run_state.iteration.record.add({**stats, **own_stats, **terms, "apa/loss/total": loss.detach()})
        return loss

    def _policy_terms(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss and its statistics; keeps the values of a row's first visit."""
        mask, num_tokens, record = batch["response_mask"], batch["num_tokens"], self.run_state.iteration.record
        if record.observing:
            record.observe(batch["rows"], outputs)
        tokens = PolicyTokens(
            outputs["logprobs"],
            batch["ref_logprobs"],
            batch["advantages"],
            mask,
            num_tokens,
            batch.get("old_logprobs") if self.args.algorithm.needs_old_logprobs else None,
            batch.get("num_responses"),
            batch.get("groups"),
        )
        loss, stats = self.args.algorithm.loss(tokens, self.args)
        if not SHIFT <= stats.keys():
            # Without a forward pass of pi_old, its log-probs are those of each row's first visit.
            first_visit = record.logprobs_BR[batch["rows"], : mask.shape[1]]
            old_logprobs = batch.get("old_logprobs", first_visit)
            stats = policy_shift(outputs["logprobs"], old_logprobs, mask, num_tokens) | stats
        if self.args.algorithm.classic_statistics:
            # As in classic the mean over all epochs; the others report that of each row's first visit.
            stats["entropy"] = masked_mean(outputs["entropy"], mask, num_tokens)
        return loss, {**{f"apa/policy/{name}": v for name, v in stats.items()}, "apa/loss/policy": loss.detach()}

    def _value_terms(self, values_BR: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The value model's loss and its statistics."""
        mask, num_tokens = batch["response_mask"], batch["num_tokens"]
        clip = self.args.cliprange_value
        loss, stats = value_loss(values_BR, batch["returns"], mask, batch["values"], clip, num_tokens)
        stats["vpred"] = masked_mean(values_BR.detach(), mask, num_tokens)
        return loss, {**{f"apa/val/{name}": v for name, v in stats.items()}, "apa/loss/value": loss.detach()}
