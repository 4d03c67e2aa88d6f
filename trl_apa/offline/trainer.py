"""`OfflineAPATrainer`: APA, AWR, ILQL, QRPO and DRO on fixed data, in the Hugging Face Trainer's own loop."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
)

from trl_apa.algorithms.advantages import gae
from trl_apa.algorithms.losses import apa_loss, awr_loss, value_loss
from trl_apa.algorithms.masking import keep_counted, masked_mean, masked_whiten
from trl_apa.algorithms.reference_rewards import quantile_advantages
from trl_apa.algorithms.regression import response_regression_loss
from trl_apa.algorithms.rewards import token_rewards
from trl_apa.cards.figures import note_loaded_step
from trl_apa.evaluation import held_out
from trl_apa.models import ValueModel, reference_policy
from trl_apa.models.checkpointing import without_checkpointing
from trl_apa.models.layouts import Layouts
from trl_apa.models.logprobs import TOKEN_FIELDS, response_logprobs, response_rows, response_tokens
from trl_apa.models.network_parts import Network, num_token_ids, use_cache_kept
from trl_apa.offline.config import OfflineConfig
from trl_apa.offline.data import rollouts_of
from trl_apa.offline.decoding import advantage_shifted
from trl_apa.offline.denominators import CountsTokens
from trl_apa.offline.losses import dro_loss, ilql_loss, state_normaliser_loss
from trl_apa.offline.networks import NORMALISER_FOLDER, OfflineNetworks, offline_networks
from trl_apa.offline.value_fitting import fit_value_model
from trl_apa.redaction.trackers import hide_secrets_from
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.generation import generate_responses, generation_options
from trl_apa.rollout.prompts import as_rows, query_of, reward_columns
from trl_apa.rollout.scoring import Scores
from trl_apa.rollout.special_tokens import SpecialTokens
from trl_apa.rollout.texts import prompts_and_completions
from trl_apa.trainer.assembly import assemble
from trl_apa.trainer.construction import check_policy_answers, make_scorer, networks_that_read
from trl_apa.trainer.optimization import check_optimizer_is_finite
from trl_apa.trainer.resuming import ResumableRuns
from trl_apa.trainer.run_identity import data_fingerprint, initial_policy_fingerprint
from trl_apa.trainer.saving import Saving
from trl_apa.trainer.tracker_failures import isolate_failures
from trl_apa.trainer.validation import check_fp16, check_tokens, check_type


class BetweenSteps(TrainerCallback):
    """Updates after each step: ILQL's target heads, and advantages if the value model is still trained."""

    def __init__(self, trainer: "OfflineAPATrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.goes_on_fitting:
            self.trainer.begin_epoch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.loss_type == "ilql":
            self.trainer.networks.q_model.move_targets(args.polyak)


class OfflineAPATrainer(CountsTokens, Saving, ResumableRuns):
    """
    Learns from fixed prompts, responses and rewards, without sampling: the setting of figure 9 of the paper.

    ```python
    rows = label_pairs(read_preferences("preferences.jsonl.gz").pairs, reward_model, tokenizer)
    trainer = OfflineAPATrainer(OfflineConfig("runs/awr", loss_type="awr"), model, train_dataset=rows)
    trainer.train()
    ```

    APA and AWR: the value model is fitted to the returns first and then frozen, the advantages of the whole data set
    are estimated once, and the policy is trained on them. ILQL: two Q heads and V are learned by temporal differences,
    the policy by imitation, and `generate` and `evaluate` sample from the policy that the values shift. QRPO: the
    quantile of a response's reward among those of pi_init's responses is fitted, without a value model. DRO: policy
    and V of the prompt are fitted together.

    Args:
        args (`OfflineConfig`): options.
        model (`str`, `PreTrainedModel` or `PeftModel`): the policy, or where to load it from.
        ref_model (*optional*): pi_init, by default the policy as it is; see [`APATrainer`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; loaded with `model` if that is a name.
        train_dataset: rows with a prompt (`prompt`, `query` or `input_ids`), a response (`completion` or
            `completion_ids`) and a `reward`; for QRPO also `ref_rewards`, a list of the rewards of responses of
            pi_init to the prompt.
        eval_dataset (*optional*): held-out prompts, with the columns that the reward functions read.
        reward_funcs, reward_processing_classes (*optional*): what `evaluate` scores with; see [`APATrainer`].
        value_model (*optional*): "separate" (a copy of the policy's trunk with a new head, the default), a reward
            model, a `ValueModel`, or a path of one of these.
        peft_config (`PeftConfig`, *optional*): adapters to put on `model`.
        callbacks (*optional*): as in [`~transformers.Trainer`].

    Raises:
        ValueError: naming the argument that does not fit, or the rows that cannot be learned from.
    """

    control: TrainerControl
    learns_from = "fixed responses"
    value_parts = (*Saving.value_parts, NORMALISER_FOLDER)

    def __init__(
        self,
        args: OfflineConfig,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Iterable[Any] | None = None,
        *,
        eval_dataset: Iterable[Any] | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        value_model: str | ValueModel | PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_type("args", args, OfflineConfig)
        if train_dataset is None:
            raise ValueError("train_dataset is None; it should hold prompts, responses and rewards")
        if args.early_stopping_patience is not None and (eval_dataset is None or reward_funcs is None):
            raise ValueError("early_stopping_patience needs eval_dataset and reward_funcs: the held-out reward")
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process trains on one device; torch's DataParallel is not supported
        set_seed(args.seed)
        module, self.ref_model, tokenizer = assemble(
            args, model, ref_model, processing_class, value_model, peft_config, None, None
        )
        self._initial_policy = initial_policy_fingerprint(module.policy, self.ref_model)
        networks = offline_networks(args, module)
        readers = networks_that_read(networks, self.ref_model)
        self.special_tokens = SpecialTokens.of(tokenizer, networks.policy, readers)
        rows = as_rows(train_dataset)
        self._data_fingerprint = data_fingerprint(rows)
        self.rollouts = rollouts_of(rows, tokenizer, networks.policy, args)
        with use_cache_kept(networks.config):
            super().__init__(
                model=networks,
                args=args,
                data_collator=self._micro_batch,
                train_dataset=list(range(len(self.rollouts))),
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        hide_secrets_from(self.callback_handler.callbacks)
        check_fp16(args, self.accelerator)
        check_policy_answers(networks.policy, self.accelerator)
        self._fill_in_returns()
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        self.layouts = Layouts(readers, padding_free=False, around=self.accelerator.autocast)
        # Loaders may lay micro-batches out in processes of their own, which are to try nothing out.
        self._layout = self.layouts(self.rollouts.longest())
        given = (reward_funcs, reward_processing_classes, tokenizer, networks)
        self.scorer = make_scorer(*given, self.special_tokens.ends, self.accelerator, args)
        self._begin()

    def _begin(self) -> None:
        """What changes from one step to the next, and the callbacks that see to it."""
        self._value_is_fitted = False
        self._resumed_estimates: dict[str, Tensor] = {}
        # Frozen layers and a quantised base stay as they are when the value model is thawed.
        value_model = self.networks.value_model
        trained = [] if value_model is None else value_model.parameters()
        self._value_parameters = [p for p in trained if p.requires_grad]
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        self._last_logged_step = 0
        self.add_callback(BetweenSteps(self))
        self.add_callback(self.processes.stop_on_signal)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def _fill_in_returns(self) -> None:
        """Token rewards and Monte Carlo returns: with fixed data each response is known completely."""
        rollouts, mask_BR = self.rollouts, self.rollouts.response_mask_BR
        rollouts.rewards_BR = token_rewards(rollouts.scores_B, mask_BR)
        blank_BR = torch.zeros_like(rollouts.rewards_BR)
        _, rollouts.returns_BR = gae(rollouts.rewards_BR, blank_BR, mask_BR, self.args.gamma, gae_lambda=1.0)

    @property
    def counts_responses(self) -> bool:  # type: ignore[override]  # by the options
        """Whether losses are means over responses."""
        return bool(self.args.of_responses)

    @property
    def networks(self) -> OfflineNetworks:
        """Policy, value model and normaliser, out of any distributed wrapper."""
        networks: OfflineNetworks = self.accelerator.unwrap_model(self.model)
        return networks

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As in [`~transformers.Trainer.add_callback`]; a tracker that fails does not end the run."""
        super().add_callback(callback)
        isolate_failures(self.callback_handler.callbacks)

    # ---- before the policy is trained ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        resume_anyway: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """APA and AWR: fit the value model and estimate the advantages first. Then train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or True for the newest
                complete one of the run in `args.output_dir` that began last. Its value model is taken as it is. A
                finished run stays as it is.
            resume_anyway (`list[str]`, *optional*): see [`APATrainer.train`].
            kwargs: as in [`~transformers.Trainer.train`].

        Returns:
            As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: for a checkpoint that is incomplete, or of another run; if there is none to resume.
            SystemExit: after SIGTERM or Ctrl-C, with a checkpoint.
            KeyboardInterrupt: after a second Ctrl-C, without one.
        """
        self._refuse_while_training("train")
        checkpoint = self._begin_run(resume_from_checkpoint, resume_anyway)
        if self.args.fits_value_first:
            self._prepare_value_model(checkpoint)
            self.estimate_advantages()
        elif self.args.loss_type == "qrpo":
            self._compare_with_reference()
        if (self.args.loss_type == "apa" or self.args.of_responses) and self.rollouts.ref_logprobs_BR is None:
            self.rollouts.ref_logprobs_BR = self._over_the_data(self._ref_logprobs)
        self._sums.clear()
        self._last_logged_step = 0
        self._resumed_estimates = (self._resumed_state or {}).get("estimates", {})
        hide_secrets_from(self.callback_handler.callbacks)  # also from those that were added
        try:
            with self.processes.stop_on_signal.listening():
                result = super().train(checkpoint, **kwargs)
        finally:
            self.is_in_train = False
        self.processes.stop_on_signal.raise_exit(self.state.global_step, self._checkpoint_place())
        return result

    def _fingerprint_of_data(self) -> str | None:
        return self._data_fingerprint

    def _names_of_rewards(self) -> None:
        """The rewards stand in the data; functions only measure."""
        return

    def _process_state(self) -> dict[str, Any]:
        """Sums since the last log; within an epoch also the advantages that it was begun with, if V still learns."""
        in_epoch = self.args.goes_on_fitting and not float(self.state.epoch or 0).is_integer()
        names = ("values_BR", "advantages_BR") if in_epoch else ()
        estimates = {name: getattr(self.rollouts, name) for name in names}
        return {"sums": dict(self._sums), "last_logged_step": self._last_logged_step, "estimates": estimates}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        for name, value in state.get("sums", {}).items():
            self._sums[name] = value.to(self.accelerator.device)
        self._last_logged_step = state.get("last_logged_step", 0)

    def _prepare_value_model(self, checkpoint: str | None) -> None:
        args = self.args
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        elif not self._value_is_fitted and args.value_epochs:
            fit_value_model(self.networks.values, self.rollouts, self._micro_batch, args)
        self._value_is_fitted = True
        for parameter in self._value_parameters:
            parameter.requires_grad_(not args.freeze_value)

    def begin_epoch(self) -> None:
        """Advantages of an epoch in which V learns; of one that is resumed, those that it was begun with.

        Before its first batch is collated, which is earlier than `_restore_process_state`.
        """
        estimates, self._resumed_estimates = self._resumed_estimates, {}
        for name, estimate in estimates.items():
            setattr(self.rollouts, name, estimate)
        if not estimates:
            self.estimate_advantages()

    @torch.no_grad()
    def estimate_advantages(self) -> None:
        """Fill in V and advantages of every row, from the value model as it is now."""
        args, rollouts = self.args, self.rollouts
        mask_BR = rollouts.response_mask_BR
        rollouts.values_BR = self._over_the_data(lambda batch: self.networks.values(batch, _width(batch)))
        advantages_BR, _ = gae(rollouts.rewards_BR, rollouts.values_BR, mask_BR, args.gamma, args.gae_lambda)
        rollouts.advantages_BR = masked_whiten(advantages_BR, mask_BR) if args.whiten_advantages else advantages_BR

    def _compare_with_reference(self) -> None:
        """Advantages of QRPO, from the rewards of pi_init's responses that the rows have."""
        rollouts = self.rollouts
        assert rollouts.ref_rewards_BN is not None  # `rollouts_of` has asked for them
        tensors = rollouts.rewards_BR, rollouts.response_mask_BR, rollouts.ref_rewards_BN
        rollouts.advantages_BR = quantile_advantages(*tensors, self.args.kl_coef)

    def _ref_logprobs(self, batch: dict[str, Tensor]) -> Tensor:
        with reference_policy(self.networks.policy, self.ref_model) as reference:
            return response_logprobs(reference, batch, _width(batch), self.args.temperature)[0]

    @torch.no_grad()
    def _over_the_data(self, measure: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """`measure`, which gives `(B, R)` of a micro-batch, of all rows; every process does its part."""
        self.model.train()  # as in the update; dropout is off
        size, count = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        starts = range(0, len(self.rollouts), size)[self.accelerator.process_index :: count]
        parts = []
        for start in starts:
            rows = list(range(start, min(start + size, len(self.rollouts))))
            batch = send_to_device(self._micro_batch(rows), self.accelerator.device)
            with self.accelerator.autocast():
                parts.append((rows, measure(batch).float().cpu()))
        measured_BR = torch.zeros(self.rollouts.response_mask_BR.shape)
        for rows, values in gather_object(parts):
            measured_BR[rows, : values.shape[1]] = values
        return measured_BR

    def _micro_batch(self, rows: list[int]) -> dict[str, Tensor]:
        batch = self.rollouts.micro_batch(rows, self.special_tokens.pad, self._layout)
        batch["rewards"] = self.rollouts.rewards_BR[batch["rows"], : _width(batch)]
        return batch

    # ---- the update ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, as its share of the optimizer step's mean.

        Multiplied by the number of processes, because distributed engines average gradients over them.
        """
        losses = {"ilql": self._ilql_terms, "qrpo": self._qrpo_terms, "dro": self._dro_terms}
        loss, stats = losses.get(self.args.loss_type, self._advantage_terms)(model, inputs, num_items_in_batch)
        for name, value in {**stats, "loss/total": loss.detach()}.items():
            self._sums[name] = self._sums[name] + value
        loss = loss * self.accelerator.num_processes
        return (loss, stats) if return_outputs else loss

    def _advantage_terms(
        self, model: nn.Module, batch: dict[str, Tensor], num_tokens: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """APA or AWR; with the value loss if V is not frozen, and that of the normaliser if there is one."""
        args, mask, advantages = self.args, batch["response_mask"], batch["advantages"]
        outputs = model(**self._inputs(batch), with_value=not args.freeze_value, with_normaliser=True)
        stats: dict[str, Tensor] = {}
        if args.loss_type == "awr":
            loss, policy_stats = awr_loss(outputs["logprobs"], advantages, mask, args.kl_coef, num_tokens)
        else:
            ref_logprobs, normaliser = batch["ref_logprobs"], outputs.get("normaliser")
            shifted = advantages if normaliser is None else advantages - normaliser.detach()
            loss, policy_stats = apa_loss(outputs["logprobs"], ref_logprobs, shifted, mask, args.kl_coef, num_tokens)
            if normaliser is not None:
                tensors = (normaliser, outputs["logprobs"], ref_logprobs, advantages, mask)
                h_loss, h_stats = state_normaliser_loss(*tensors, args.kl_coef, num_tokens)
                loss = loss + h_loss
                stats |= {f"normaliser/{name}": value for name, value in h_stats.items()}
        stats |= {f"policy/{name}": value for name, value in policy_stats.items()}
        if not args.freeze_value:
            v_loss, v_stats = value_loss(outputs["values"], batch["returns"], mask, num_tokens=num_tokens)
            loss = loss + args.vf_coef * v_loss
            stats["value/error"] = v_stats["error"]
        return loss, stats

    def _dro_terms(
        self, model: nn.Module, batch: dict[str, Tensor], num_responses: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DRO: the squared error of each response, for the policy and for V of its prompt."""
        mask_BR, args = batch["response_mask"], self.args
        outputs = model(**self._inputs(batch), with_value=True)
        # Before the first response token the state is the prompt.
        values_B, rewards_B = outputs["values"][:, 0], keep_counted(batch["rewards"], mask_BR).sum(dim=1)
        read = batch["ref_logprobs"], values_B, rewards_B, mask_BR, args.kl_coef, num_responses
        policy_loss, v_loss, stats = dro_loss(outputs["logprobs"], *read)
        return policy_loss + args.vf_coef * v_loss, {f"policy/{name}": value for name, value in stats.items()}

    def _qrpo_terms(
        self, model: nn.Module, batch: dict[str, Tensor], num_responses: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """QRPO: the squared error of each response."""
        logprobs_BR = model(**self._inputs(batch), with_value=False)["logprobs"]
        read = batch["ref_logprobs"], batch["advantages"], batch["response_mask"]
        loss, stats = response_regression_loss(logprobs_BR, *read, self.args.kl_coef, num_responses)
        return loss, {f"policy/{name}": value for name, value in stats.items()}

    def _ilql_terms(
        self, model: nn.Module, batch: dict[str, Tensor], num_tokens: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ILQL's value losses, and imitation of the data by the policy."""
        args, mask = self.args, batch["response_mask"]
        imitates = args.bc_coef > 0
        outputs = model(**self._inputs(batch), with_policy=imitates, with_value=False, with_q=True)
        actions = response_rows(response_tokens(batch), batch, _width(batch))
        target_q = outputs["target_q"].gather(-1, actions[..., None])[..., 0]
        loss, stats = ilql_loss(
            (outputs["q1"], outputs["q2"]),
            target_q,
            outputs["values"],
            actions,
            batch["rewards"],
            mask,
            args.gamma,
            args.expectile,
            args.cql_coef,
            num_tokens,
        )
        stats = {f"ilql/{name}": value for name, value in stats.items()}
        if imitates:
            nll = -masked_mean(outputs["logprobs"], mask, num_tokens)
            loss = loss + args.bc_coef * nll
            stats["policy/nll"] = nll.detach()
        return loss, stats

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        tokens = {name: batch[name] for name in TOKEN_FIELDS if name in batch}
        return {**tokens, "response_width": _width(batch), "temperature": self.args.temperature}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's logs, with the means over the optimizer steps since the last ones."""
        steps = self.state.global_step - self._last_logged_step
        if "loss" in logs and steps:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
            logs = {**logs, **{name: value / steps for name, value in zip(names, sums.tolist(), strict=True)}}
            self._sums.clear()
            self._last_logged_step = self.state.global_step
        super().log(logs, start_time)

    # ---- the policy that was learned ----

    @contextmanager
    def learned_policy(self) -> Iterator[Network]:
        """Inside, the policy to sample from and to take log-probs of: for ILQL the one that the values shift.

        Without gradient checkpointing meanwhile, under which layers keep no cache.
        """
        networks, args = self.networks, self.args
        shifted: AbstractContextManager[Network] = nullcontext(networks.policy)
        if args.loss_type == "ilql":
            shifted = advantage_shifted(networks.policy, networks.q_model, args.ilql_beta)
        with without_checkpointing(networks, args.gradient_checkpointing_kwargs), shifted as policy:
            yield policy

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reward of responses that are sampled to held-out prompts, and their KL to pi_init: see
        `held_out.held_out_metrics`.

        Raises:
            ValueError: without prompts or reward functions.
            RuntimeError, TimeoutError: if a reward function fails; in the middle of training a checkpoint is written
                first.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None or self.scorer is None:
            raise ValueError("evaluate() needs eval_dataset, held-out prompts, and reward_funcs")
        return held_out.evaluate(self, dataset, metric_key_prefix, self._save_what_was_learned)

    def evaluation_steps(self) -> held_out.EvaluationSteps:
        """How `evaluate` asks the learned policy, and scores its responses."""
        return held_out.EvaluationSteps(
            respond=lambda rows: (self._episodes(rows), None),
            logprobs=self._policy_and_reference,
            score=self._score,
            layouts=self.layouts,
            pad_token_id=self.special_tokens.pad,
            end_token_ids=self.special_tokens.ends,
        )

    def _query(self, row: dict[str, Any]) -> Tensor:
        args, tokenizer = self.args, self.processing_class
        query = query_of(row, tokenizer, args.max_prompt_length, args.chat_template_kwargs)
        check_tokens("a prompt of eval_dataset", query, num_token_ids(self.networks.policy), tokenizer)
        return query

    def _episodes(self, rows: list[dict[str, Any]]) -> Episodes:
        queries = [self._query(row) for row in rows]
        return Episodes(queries, self._respond(queries))

    def _respond(self, queries: list[Tensor]) -> list[Tensor]:
        args, tokenizer = self.args, self.processing_class
        sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
        sampling |= {"max_new_tokens": args.max_completion_length, "pad_token_id": self.special_tokens.pad}
        sampling |= {"eos_token_id": self.special_tokens.ends or None}
        options = generation_options(sampling, {"stop_strings": args.stop_strings})
        with self.learned_policy() as policy, self.accelerator.autocast():
            return generate_responses(policy, queries, tokenizer=tokenizer, batch_size=len(queries), **options)

    def _policy_and_reference(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        """Of a laid-out batch log pi and log pi_init, nats, each `(B, R)`."""
        arguments = (batch, _width(batch), self.args.temperature)
        with self.accelerator.autocast():
            with self.learned_policy() as policy:
                logprobs_BR, _ = response_logprobs(policy, *arguments)
            with reference_policy(self.networks.policy, self.ref_model) as reference:
                ref_logprobs_BR, _ = response_logprobs(reference, *arguments)
        return logprobs_BR, ref_logprobs_BR, None

    def _score(self, rows: list[dict[str, Any]], episodes: Episodes) -> Scores:
        queries, responses = episodes.queries, episodes.responses
        texts = prompts_and_completions(rows, queries, responses, self.processing_class)
        assert self.scorer is not None  # `evaluate` has asked for it
        return self.scorer(*texts, queries, responses, reward_columns(rows))

    # ---- checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.networks.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does; refused by name if the optimizer's state is not finite."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            name = f"the optimizer of {checkpoint}"
            self.processes.together(lambda: check_optimizer_is_finite(name, self.optimizer))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        note_loaded_step(self.state)


def _width(batch: dict[str, Tensor]) -> int:
    return batch["response_mask"].shape[1]
