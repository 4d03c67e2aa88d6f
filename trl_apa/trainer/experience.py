"""Rollouts to what their update needs: passes of the networks over them, and the stages of `preparation`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa._trl import _BaseTrainer
from trl_apa.algorithms.kl import kl_estimate, kl_full
from trl_apa.distributed.sharded import is_sharded
from trl_apa.models import reference_policy
from trl_apa.models.layouts import try_sampling_up_to
from trl_apa.models.logprobs import TOKEN_FIELDS, policy_outputs
from trl_apa.models.trials import LONG
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.rollout.shared_prompts import equal_queries
from trl_apa.trainer.estimation import estimate_advantages, subtract_normalizer
from trl_apa.trainer.hooked_stages import advantages_by_override, rewards_by_override
from trl_apa.trainer.normalizing import StatesOfPass, subtract_learned_normalizer
from trl_apa.trainer.preparation import (
    in_reading_order,
    plan_iteration,
    rewards_of_tokens,
    shaped_ref_rewards,
)
from trl_apa.trainer.statistics import StageTimer


class Experience(_BaseTrainer):
    """The part of `APATrainer` between the scores of an iteration and its first optimizer step."""

    def _prepare_iteration(self, rollouts: Rollouts, ended_B: Tensor, timer: StageTimer) -> None:
        """From rollouts to what the update needs, a stage a line."""
        self.overrides.check(self.args)
        with timer("forward_pass"):
            rollouts.sampling_logprobs_BR = self._noted_logprobs(rollouts)
            full_logprobs = self._evaluate_rollouts(rollouts)
        with timer("compute_rewards"):
            if self.overrides.include("compute_rewards", "_kl_penalty"):
                rewards_by_override(self, rollouts, ended_B, full_logprobs)
            else:
                rollouts.rewards_BR = rewards_of_tokens(rollouts, ended_B, self.args, self.run_state)
        with timer("compute_advantages"):
            if self.overrides.include("compute_advantages"):
                advantages_by_override(self, rollouts)
            else:
                ref_rewards_BN = shaped_ref_rewards(rollouts, self.args, self.run_state)
                estimate_advantages(rollouts, self.args, self.processes, ref_rewards_BN)
            if self.args.learns_normalizer:
                reading = self._read_states(rollouts)
                subtract_learned_normalizer(rollouts, self.args, self.run_state.normalizer, reading, self.processes)
            else:
                subtract_normalizer(rollouts, self.args, self.processes)
        self._importance.weigh(rollouts, self.args)
        stream = (self.args.seed, self.accelerator.process_index, self.run_state.num_iterations_done)
        layout = self.layouts(rollouts.longest(), share=True)
        plan = plan_iteration(rollouts, ended_B, self.args, stream, layout, self.processes.sum)
        self.run_state.begin_iteration(plan, self.state.global_step)

    def _noted_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """What `generate` noted of these responses, `(B, R)`; None unless all are known on all processes."""
        noted_BR = self._sampled_logprobs.take(rollouts.queries, rollouts.responses, rollouts.response_mask_BR)
        unknown = self.processes.sum(torch.tensor(float(noted_BR is None), device=rollouts.device))
        rollouts.sampled_by_engine = not unknown and self._sampled_logprobs.of_engine
        return None if unknown else noted_BR

    @torch.no_grad()
    def _evaluate_rollouts(self, rollouts: Rollouts) -> tuple[Tensor, Tensor] | None:
        """Fill in equal prompts and log pi_init; V, log pi_old and the KL of the reward where they are read.

        Returns:
            Log-probs of the whole vocabulary under policy and pi_init, nats `(B, R, V)`, if an override reads them.
        """
        rollouts.prompts = equal_queries(rollouts.queries)
        blank_BR = torch.zeros_like(rollouts.response_mask_BR, dtype=torch.float32)
        rollouts.ref_logprobs_BR = blank_BR.clone()
        algorithm, needs_values = self.args.algorithm, self.args.estimator.needs_values
        needs_old = algorithm.needs_old_logprobs or self.args.kl_in_reward or self.args.early_stopping
        rewards_overridden = self.overrides.include("compute_rewards", "_kl_penalty")
        needs_old = needs_old or rewards_overridden or self.overrides.include("loss")
        noted = rollouts.sampling_logprobs_BR is not None and not rollouts.sampled_by_engine
        # With a learned normaliser `_read_states` reads them too.
        reads_drift = (self.args.exact_kl or self.args.normalizes_groups) and not self.args.learns_normalizer
        needs_old = needs_old or self.args.importance_correction is not None or (reads_drift and not noted)
        full_kl = self.args.kl_in_reward and self.args.kl_penalty == "full"
        full: list[Tensor] = []
        if needs_values:
            rollouts.values_BR = blank_BR.clone()
        if needs_old:
            rollouts.old_logprobs_BR = blank_BR.clone()
        if self.args.kl_in_reward:
            rollouts.kl_penalty_BR = blank_BR.clone()
        # bitsandbytes has one int8 kernel for each mode, and the update runs in this one.
        self.model_wrapped.train()
        layout_for = partial(self.layouts, packable=not full_kl)
        for rows in self._passes_before_update(rollouts, layout_for):
            layout = layout_for(rollouts.longest(rows), share=rollouts.share_prompts(rows))
            batch = rollouts.micro_batch(rows, self.special_tokens.pad, layout)
            index, width = batch["rows"], batch["response_mask"].shape[1]
            if needs_values or needs_old:
                outputs = self.model_wrapped(**self._model_inputs(batch), with_policy=needs_old, with_logits=full_kl)
            if needs_values:
                rollouts.values_BR[index, :width] = outputs["values"].float()
            ref_outputs = self._reference_outputs(batch, with_logits=full_kl)
            rollouts.ref_logprobs_BR[index, :width] = ref_outputs["logprobs"].float()
            if needs_old:
                rollouts.old_logprobs_BR[index, :width] = outputs["logprobs"].float()
            if full_kl:
                logprobs_BRV = outputs["logits"].log_softmax(-1), ref_outputs["logits"].log_softmax(-1)
                if rewards_overridden:
                    vocabulary = logprobs_BRV[0].shape[-1]
                    full = full or [blank_BR[..., None].repeat(1, 1, vocabulary) for _ in range(2)]
                    for kept, found in zip(full, logprobs_BRV, strict=True):
                        kept[index, :width] = found.float()
                else:
                    rollouts.kl_penalty_BR[index, :width] = kl_full(*logprobs_BRV).float()
        if self.args.kl_in_reward and not full_kl and not rewards_overridden:
            rollouts.kl_penalty_BR = kl_estimate(
                rollouts.old_logprobs_BR, rollouts.ref_logprobs_BR, self.args.kl_penalty
            )
        return (full[0], full[1]) if full else None

    @torch.no_grad()
    def _read_states(self, rollouts: Rollouts) -> Iterator[StatesOfPass]:
        """The policy's last hidden states and log-probs of all response tokens, a forward pass at a time."""
        layout_for = self.layouts
        for rows in self._passes_before_update(rollouts, layout_for):
            layout = layout_for(rollouts.longest(rows), share=rollouts.share_prompts(rows))
            batch = rollouts.micro_batch(rows, self.special_tokens.pad, layout)
            outputs = self.model_wrapped(**self._model_inputs(batch), with_value=False, with_hidden=True)
            yield StatesOfPass(batch["rows"], outputs["logprobs"], outputs["hidden"])

    def _passes_before_update(self, rollouts: Rollouts, layout_for: Callable[..., Layout]) -> list[list[int]]:
        """The rows of each forward pass over an iteration, cut by tokens or into equally many rows."""
        args, rows = self.args, rollouts.by_length(range(len(rollouts)))
        if args.tokens_per_micro_batch is not None and args.local_rollout_forward_batch_size is None:
            return self._cut_by_tokens(rollouts, [rows], layout_for)[0]
        size = args.local_rollout_forward_batch_size or args.per_device_train_batch_size
        order = in_reading_order(rollouts, rows, size, layout_for(rollouts.longest(), share=True))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _cut_by_tokens(
        self,
        rollouts: Rollouts,
        steps: list[list[int]],
        layout_for: Callable[..., Layout],
        groups: list[int] | None = None,
    ) -> list[list[list[int]]]:
        """For each list of rows, which are read with the same weights, those of its passes: see `TokenBudget`."""
        budget = self.args.tokens_per_micro_batch
        if is_sharded(self.accelerator):
            layout = layout_for(rollouts.longest())
            # As many calls of a network on every process.
            budget = 0 if layout is Layout.ONE_BY_ONE else budget

            def layout_for(longest: int, share: bool = False) -> Layout:
                return layout

        passes: list[list[list[int]]] = self._token_budget.passes(rollouts, steps, budget, layout_for, groups)
        return passes

    @torch.no_grad()
    def _reference_outputs(self, batch: dict[str, Tensor], with_logits: bool = False) -> dict[str, Tensor]:
        """`logprobs` under pi_init, and `logits` if asked for, as `PolicyAndValue.forward` gives them."""
        policy, width = self.accelerator.unwrap_model(self.model).policy, batch["response_mask"].shape[1]
        with reference_policy(policy, self.ref_model) as reference, self.accelerator.autocast():
            if reference is policy:
                outputs: dict[str, Tensor] = self._module_to_call(
                    **self._model_inputs(batch), with_value=False, with_logits=with_logits
                )
                return outputs
            reading = (reference, self._tokens(batch), width, self.args.temperature)
            found = policy_outputs(*reading, with_logits=with_logits, own_forward=is_sharded(self.accelerator))
        logits = {} if found.logits_BRV is None else {"logits": found.logits_BRV}
        return {"logprobs": found.logprobs_BR, **logits}

    def policy_and_reference(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a laid-out batch log pi, log pi_init and the entropy of the policy, nats, each `(B, R)`."""
        with self.accelerator.autocast():
            outputs = self._module_to_call(**self._model_inputs(batch), with_value=False, with_entropy=True)
        return outputs["logprobs"], self._reference_outputs(batch)["logprobs"], outputs["entropy"]

    @property
    def _module_to_call(self) -> nn.Module:
        """For a pass without gradient: what has the weights, and waits for other processes only if it must."""
        sharded = is_sharded(self.accelerator)
        module: nn.Module = self.model_wrapped if sharded else self.accelerator.unwrap_model(self.model)
        return module

    @property
    def _packed(self) -> bool:
        """Whether short rows go without padding."""
        return self.layouts(LONG) is Layout.PACKED

    def _try_rows_of_the_run(self) -> None:
        """Make trials with the weights that a run begins with, so that it is the same one when it is resumed."""
        if is_sharded(self.accelerator):
            return
        longest = (self.args.max_prompt_length or LONG) + self.args.max_completion_length
        self.layouts.try_up_to(longest)
        if self.sampler is None:
            with self._module_for_generation() as module, self.accelerator.autocast():
                size = self.args.generation_batch_size or self.args.local_rollout_forward_batch_size
                joins = size is not None and size < self.args.batch_size
                try_sampling_up_to(module.policy, longest, joins)

    def _tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in TOKEN_FIELDS if name in batch}

    def _model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        width = batch["response_mask"].shape[1]
        return {**self._tokens(batch), "response_width": width, "temperature": self.args.temperature}
