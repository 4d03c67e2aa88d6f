"""`APATrainer`: orchestration of generate -> score -> step. Every stage it calls is a file of its own."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)

from trl_apa._trl import is_peft_model, unwrap_model_for_generation
from trl_apa.advantages import gae
from trl_apa.config import APAConfig
from trl_apa.generation import decoder_start_token_id, end_token_ids, generate_responses, generation_options
from trl_apa.iteration import Iteration
from trl_apa.kl import AdaptiveKLController, FixedKLController, kl_estimate, kl_full
from trl_apa.logprobs import TOKEN_FIELDS, response_logits, sampled_logprobs
from trl_apa.losses import apa_loss, awr_loss, policy_shift, ppo_loss, value_loss
from trl_apa.masking import keep_counted, masked_mean, masked_whiten
from trl_apa.models import (
    PolicyAndValue,
    ValueModel,
    build_policy,
    choose_reference,
    disable_dropout,
    load_language_model,
    reference_policy,
    resolve_value_model,
    reward_adapter_of,
    select_adapter,
    value_head_of,
    without_value_head,
)
from trl_apa.optimization import add_value_parameters, split_off_value_groups
from trl_apa.progress import RewardAndKL
from trl_apa.prompts import columns_of, prompt_dataloader
from trl_apa.reporting import gather_table, log_media, reward_statistics, split_statistics
from trl_apa.resuming import StopOnSigterm
from trl_apa.rewards import RunningMoments, kl_penalized_rewards, shape_scores, token_rewards
from trl_apa.rollouts import Rollouts, response_mask, without_start_tokens
from trl_apa.scoring import Scorer, reward_functions
from trl_apa.statistics import (
    StageTimer,
    UpdateRecord,
    counted_rows,
    gather_rollouts,
    rollout_arrays,
    rollout_statistics,
)
from trl_apa.training import EndOfIteration, TrainingLoop
from trl_apa.validation import (
    check_has,
    check_networks_are_apart,
    check_precision,
    check_step_inputs,
    check_tokens,
    check_type,
    one_of,
)
from trl_apa.vllm_generation import VLLMSampler


class APATrainer(TrainingLoop):
    """
    Advantage-Induced Policy Alignment (arXiv 2306.02231), with AWR and PPO2 as baselines, in the classic loop:

    ```python
    trainer = APATrainer(config, model, tokenizer=tokenizer, dataset=dataset)
    for batch in trainer.dataloader:
        responses = trainer.generate(batch["input_ids"], return_prompt=False)
        scores = [torch.tensor(score(r)) for r in tokenizer.batch_decode(responses)]
        stats = trainer.step(batch["input_ids"], responses, scores)
    ```

    Args:
        args (`APAConfig`):
            Options; also accepted as `config`.
        model (`str`, `PreTrainedModel`, `PeftModel` or `AutoModelForCausalLMWithValueHead`):
            The policy, a language model (a decoder, or an encoder-decoder), or where to load it from. Its dropout is
            switched off. Of a classic wrapper the language model is trained; its value head is not used, because APA's
            value model stands alone, unless `value_model="head"`.
        ref_model (`str`, `PreTrainedModel`, `PeftModel` or `AutoModelForCausalLMWithValueHead`, *optional*):
            pi_init, or where to load it from. Defaults to a frozen copy of `model`; for a PEFT policy to its base, or,
            when the adapter has been trained already (SFT), to a frozen copy of that adapter. TRL 0.12 called these
            `policy` and `ref_policy`, which are understood too.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer with a pad or an EOS token; also accepted as `tokenizer`. Loaded with `model` if that is a name.
        train_dataset (`Dataset`, *optional*):
            What `dataloader` iterates over; also accepted as `dataset`.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Made by the caller over the policy's parameters; the value model's join its first group. Defaults to what
            `args.optim` says.
        data_collator (`Callable`, *optional*):
            Rows to batch, for `dataloader`. Defaults to a dict of columns, each a list.
        num_shared_layers (`int`, *optional*):
            Freeze this many of the policy's lowest layers and share them with the reference.
        lr_scheduler (`LRScheduler`, *optional*):
            Advanced once a `step`. Defaults to what `args.lr_scheduler_type` says, over `args.total_ppo_epochs` steps;
            with "constant", what a script sets on `optimizer` itself stays.
        training_data_collator (*optional*):
            Classic's; without effect.
        value_model (`str`, `ValueModel` or `PreTrainedModel`, *optional*):
            The standalone value model: "separate" (a copy of the policy's trunk with a new head, the default), a
            reward model or another language model (copied), a `ValueModel`, or a path or hub name of one of these.
            "head" is classic's critic instead: the wrapper's head (or the checkpoint's, or a new one) on the policy's
            own hidden states.
        reward_funcs (*optional*):
            What `train`, `evaluate` and `score` score with: one of, or a list of, functions
            `(prompts, completions, completion_ids, **columns) -> list of floats`, sequence classifiers of one label,
            and folders or hub names of these. Also accepted as `reward_model`.
        reward_processing_classes (*optional*):
            The classifiers' tokenizers, where they are not the ones that lie with them.
        peft_config (`PeftConfig`, *optional*):
            Adapters to put on `model`.
        eval_dataset (*optional*):
            Held-out prompts for `evaluate`.
        callbacks, optimizers (*optional*):
            As in [`~transformers.Trainer`].

    Raises:
        ValueError: naming the argument that is of the wrong type or does not fit another.
    """

    _tag_names = ["trl", "apa", "rlhf"]
    _name = "APA"
    _paper = {
        "title": "Fine-Tuning Language Models with Advantage-Induced Policy Alignment",
        "id": "2306.02231",
        # docstyle-ignore
        "citation": (
            "@article{zhu2023apa,\n"
            "    title = {{Fine-Tuning Language Models with Advantage-Induced Policy Alignment}},\n"
            "    author = {Banghua Zhu and Hiteshi Sharma and Felipe Vieira Frujeri and Shi Dong and "
            "Chenguang Zhu and Michael I. Jordan and Jiantao Jiao},\n"
            "    year = 2023,\n"
            "    journal = {arXiv preprint arXiv:2306.02231}\n"
            "}"
        ),
    }
    # The loss is divided by the tokens of the whole optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        args: APAConfig | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Callable | None = None,
        *,
        config: APAConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        policy: Any = None,
        ref_policy: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        reward_model: Any = None,
        reward_processing_classes: Any = None,
        value_model: str | ValueModel | PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ):
        if isinstance(model, PreTrainedTokenizerBase):
            raise ValueError(
                "model is a tokenizer: the order (args, processing_class, model, ...) is that of TRL 0.12 to 1.12; "
                "give these arguments by keyword"
            )
        if training_data_collator is not None:
            text = "training_data_collator has no effect: the update pads its micro-batches itself"
            warnings.warn(text, UserWarning, stacklevel=2)
        args = one_of("args", args, "config", config)
        model = one_of("model", model, "policy", policy)
        ref_model = one_of("ref_model", ref_model, "ref_policy", ref_policy)
        processing_class = one_of("processing_class", processing_class, "tokenizer", tokenizer)
        train_dataset = one_of("train_dataset", train_dataset, "dataset", dataset)
        reward_funcs = one_of("reward_funcs", reward_funcs, "reward_model", reward_model)
        optimizer = one_of("optimizer", optimizer, "optimizers[0]", optimizers[0])
        lr_scheduler = one_of("lr_scheduler", lr_scheduler, "optimizers[1]", optimizers[1])
        check_type("config", args, APAConfig)
        given, model, ref_model = model, without_value_head(model), without_value_head(ref_model)
        check_type("model", model, (str, Path, PreTrainedModel, PeftModel))
        check_type("ref_model", ref_model, (str, Path, PreTrainedModel, PeftModel), optional=True)
        check_type("optimizer", optimizer, torch.optim.Optimizer, optional=True)
        check_type("num_shared_layers", num_shared_layers, int, optional=True)
        check_has("dataset", train_dataset, "__getitem__", "__iter__")
        check_has("data_collator", data_collator, "__call__")
        check_has("lr_scheduler", lr_scheduler, "step")
        if args.value_learning_rate is not None and lr_scheduler is not None:
            raise ValueError("value_learning_rate adds a group that lr_scheduler does not know; give one or the other")
        if args.total_episodes is not None and args.max_steps < 0:
            iterations = -(-args.total_episodes // (args.batch_size * args.world_size))
            args.max_steps = iterations * args.steps_per_iteration
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process trains on one device; torch's DataParallel is not supported
        set_seed(args.seed)

        if isinstance(model, str | Path):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = load_language_model(str(model))
        if isinstance(ref_model, str | Path):
            ref_model = load_language_model(str(ref_model))
        check_type("tokenizer", processing_class, PreTrainedTokenizerBase)
        self._choose_special_tokens(processing_class, model, args.stop_token_id)
        policy = build_policy(model, peft_config)
        select_adapter(policy, args.model_adapter_name)
        value_model = resolve_value_model(value_model, policy, value_head_of(given, policy))
        module = PolicyAndValue(policy, value_model, reward_adapter_of(given))
        check_precision(module)
        check_networks_are_apart(policy, ref_model, value_model, optimizer)
        disable_dropout(module)
        self.ref_model = choose_reference(policy, ref_model, num_shared_layers, args.ref_adapter_name)
        add_value_parameters(optimizer, value_model, args.value_learning_rate)

        use_cache = module.config.use_cache
        super().__init__(
            model=module,
            args=args,
            data_collator=data_collator or columns_of,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=(optimizer, lr_scheduler),
        )
        module.config.use_cache = use_cache  # the Trainer switches it off, and it would be saved with the policy
        self.dataloader = self._prompt_dataloader()
        set_seed(args.seed, device_specific=True)

        self.is_peft_model = is_peft_model(policy)
        self.is_encoder_decoder = bool(module.config.is_encoder_decoder)
        args.is_peft_model, args.is_encoder_decoder = self.is_peft_model, self.is_encoder_decoder
        args.global_batch_size = args.batch_size * self.accelerator.num_processes
        args.global_backward_batch_size = args.backward_batch_size * self.accelerator.num_processes
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled or self.is_fsdp_xla_enabled):
            self.create_optimizer()  # there to be read before the first step; sharded weights are not there yet
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        self.kl_ctl = (
            AdaptiveKLController(args.kl_coef, args.target, args.horizon)
            if args.loss_type == "ppo" and args.adap_kl_ctrl
            else FixedKLController(args.kl_coef)
        )
        self.scorer: Scorer | None = None
        if reward_funcs is not None:
            functions = reward_functions(
                reward_funcs, reward_processing_classes, processing_class, self.accelerator.device
            )
            self.scorer = Scorer(functions, args.reward_weights, args.skip_unscored, args.reward_timeout)
        self.vllm: VLLMSampler | None = None
        if args.use_vllm:
            self.vllm = VLLMSampler(policy, self.accelerator, processing_class, args, self._on_all_processes)
        self.running_scores = RunningMoments(distributed=self.accelerator.num_processes > 1)
        self.num_iterations_done = 0
        self._iteration: Iteration | None = None
        self._prepared = False
        self._unlogged: list[dict[str, Any]] = []
        self._best_mean_score = -math.inf
        self._stop_on_sigterm = StopOnSigterm(self._sum_over_processes)
        self.add_callback(EndOfIteration(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardAndKL())
        self.add_callback(self._stop_on_sigterm)

    # ---- what classic scripts read ----

    @property
    def config(self) -> APAConfig:
        return self.args

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing_class

    @property
    def dataset(self) -> Any:
        return self.train_dataset

    @property
    def is_distributed(self) -> bool:
        return self.accelerator.num_processes > 1

    @property
    def current_device(self) -> torch.device:
        return self.accelerator.device

    # ---- construction ----

    def _choose_special_tokens(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, stop_token_id: int | None
    ) -> None:
        self._end_token_ids = end_token_ids(model, tokenizer, stop_token_id)
        self._decoder_start_token_id = decoder_start_token_id(model)
        self._pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad_token_id is None:
            raise ValueError("tokenizer has neither a pad nor an EOS token; set one: tokenizer.pad_token = ...")

    def _prompt_dataloader(self) -> DataLoader | None:
        """Called while all processes still have the same seed: each takes its own part of one order.

        A stream has no order to shuffle: `train` reads it, the classic loop does not.
        """
        if self.train_dataset is None:
            text = (
                f"no dataset: dataloader is None, and step takes lists of config.batch_size = {self.args.batch_size}"
            )
            warnings.warn(text, UserWarning, stacklevel=4)
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            return None
        args = self.args
        loader = prompt_dataloader(
            self.train_dataset, args.batch_size, self.data_collator, not args.remove_unused_columns, args.seed
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does, with groups of their own for the value model if it has its own rate."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.value_learning_rate
        if made_here and rate is not None:
            split_off_value_groups(optimizer, self.accelerator.unwrap_model(self.model).value_model, rate)
        return optimizer

    # ---- prompts to responses ----

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        remove_padding: bool = True,
        pad_to_multiple_of: int | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample responses from the policy.

        The model's own generation config is not consulted: what is not given here comes from `args` (`temperature`,
        `top_p`, `top_k`, `max_completion_length`), so that the update knows the distribution that was sampled. With
        `args.use_vllm` vLLM samples, all queries at once, and every process has to call this.

        Args:
            query_tensor: one query, 1-D token ids, or a list of them.
            length_sampler: draws `max_new_tokens` for each batch.
            batch_size: queries a call of the model's `generate`, when a list is given; vLLM makes its own batches.
            return_prompt: put the query before each response. An encoder-decoder's responses begin with the decoder's
                start token instead, whatever this says.
            generate_ref_response: also sample from the reference.
            remove_padding: cut each response where it ended; otherwise the pads after it stay.
            pad_to_multiple_of: round the padded prompt width up.
            generation_kwargs: anything that transformers' `generate` takes.

        Returns:
            For a list of queries a list of 1-D tensors in the same order, each cut after its first generated EOS (or
            stop string). For one query a tensor `(1, L)`. With `generate_ref_response` a pair of these, policy first.

        Raises:
            ValueError: if a query is not a 1-D tensor of known token ids, if query and response together exceed the
                model's positions, or for an option under which a query has not one response (beams, say).
        """
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if single else list(query_tensor)
        policy = self.accelerator.unwrap_model(self.model).policy
        for row, query in enumerate(queries):
            check_tokens(f"query_tensor[{row}]", query, policy)
        options = self._generation_options(generation_kwargs)
        options |= {"length_sampler": length_sampler, "remove_padding": remove_padding}
        batching = {"batch_size": batch_size, "pad_to_multiple_of": pad_to_multiple_of}

        def shaped(responses: list[Tensor]) -> Any:
            if self.is_encoder_decoder:
                responses = [nn.functional.pad(r, (1, 0), value=self._decoder_start_token_id) for r in responses]
            elif return_prompt:
                responses = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            return responses[0].unsqueeze(0) if single else responses

        def sample(model: nn.Module) -> Any:
            return shaped(generate_responses(model, queries, tokenizer=self.processing_class, **options, **batching))

        if self.vllm is not None:
            responses = shaped(self.vllm.responses(queries, step=self.state.global_step, **options))
            if not generate_ref_response:
                return responses
        with self._policy_for_generation() as policy, self.accelerator.autocast():
            if self.vllm is None:
                responses = sample(policy)
            if not generate_ref_response:
                return responses
            with reference_policy(policy, self.ref_model) as reference:
                return responses, sample(reference)

    def _generation_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        defaults = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        defaults |= {"max_new_tokens": args.max_completion_length, "pad_token_id": self._pad_token_id}
        defaults["decoder_start_token_id"] = self._decoder_start_token_id
        return generation_options({**defaults, "eos_token_id": self._end_token_ids or None}, kwargs)

    @contextmanager
    def _policy_for_generation(self) -> Iterator[nn.Module]:
        """The policy out of its distributed wrapper, without gradient checkpointing; that comes back even on error."""
        module = self.accelerator.unwrap_model(self.model)
        checkpointing, kwargs = module.is_gradient_checkpointing, self._checkpointing_kwargs()
        try:
            with unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=kwargs,
            ) as unwrapped:
                yield unwrapped.policy
        finally:
            if checkpointing and not module.is_gradient_checkpointing:
                module.gradient_checkpointing_enable(kwargs)

    def _checkpointing_kwargs(self) -> dict[str, Any]:
        return self.args.gradient_checkpointing_kwargs or {"use_reentrant": False}

    # ---- responses and scores to an update ----

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One iteration of Algorithm 1: learn from `batch_size` scored responses.

        Rewards, advantages and returns are fixed once; then `num_epochs_per_batch` passes are made over the rollouts
        in mini-batches of `backward_batch_size`, each an optimizer step on the loss of `args.loss_type` plus `vf_coef`
        times the value loss, averaged over the counted tokens of the mini-batch on all processes.

        Args:
            queries: `batch_size` prompts, 1-D token ids.
            responses: what the policy answered, 1-D token ids without the prompt, EOS included; of an encoder-decoder
                with the start token before them or without.
            scores: one number a response, reward units, 0-D or of one element.
            response_masks: for each response, which of its tokens count; zero drops one (a tool's output).

        Returns:
            Statistics, floats and NumPy arrays, see `docs/statistics.md`.

        Raises:
            ValueError: on input that cannot be trained on, before any forward pass; nothing has changed then.
            FloatingPointError: if a gradient is not finite; that update was not made.
        """
        timer = StageTimer()
        if self.is_encoder_decoder and isinstance(responses, list):
            responses, response_masks = without_start_tokens(responses, response_masks, self._decoder_start_token_id)
        self._check_on_all_processes(queries, responses, scores, response_masks)
        self._prepare_for_updates()
        running_scores = self.running_scores.state_dict()
        try:
            rollouts, ended_B = self._collect(queries, responses, scores, response_masks)
            self._push_if_best(rollouts.scores_B)
            self._prepare_iteration(rollouts, ended_B, timer)
            with timer("optimize_step"):
                self._update()
            stats = self._finish_iteration(timer)
        except BaseException:
            # What a caller who catches this (out of memory, say) goes on with: no gradient and no score of this batch.
            self.model_wrapped.zero_grad()
            self.running_scores.load_state_dict(running_scores)
            raise
        if not self._rate_is_the_scripts:
            self.lr_scheduler.step()
        return stats

    def _prepare_iteration(self, rollouts: Rollouts, ended_B: Tensor, timer: StageTimer) -> None:
        """From rollouts to what the update needs, a stage a line."""
        with timer("forward_pass"):
            self._evaluate_rollouts(rollouts)
        with timer("compute_rewards"):
            rollouts.rewards_BR = self._token_rewards(rollouts, ended_B)
        with timer("compute_advantages"):
            self._estimate_advantages(rollouts)
        self._iteration = self._plan(rollouts, ended_B)

    def _finish_iteration(self, timer: StageTimer) -> dict[str, Any]:
        """Statistics of an iteration whose optimizer steps are done; the KL controller learns of it."""
        iteration = self._iteration
        with timer("calc_stats"):
            stats = self._statistics(iteration.rollouts, iteration.record, iteration.ended_B)
        stats["apa/epochs"] = iteration.epochs_done
        self.kl_ctl.update(stats["objective/kl"], self.args.global_batch_size)
        self.num_iterations_done += 1
        rollouts = iteration.rollouts
        num_tokens = sum(len(q) + len(r) for q, r in zip(rollouts.queries, rollouts.responses, strict=True))
        stats |= timer.as_statistics(num_tokens)
        if self.args.loss_type == "ppo":
            # Classic's names, for scripts and dashboards that read them.
            stats |= {name.replace("apa/", "ppo/"): value for name, value in stats.items() if "apa/" in name}
        return stats

    def _check_on_all_processes(self, queries: Any, responses: Any, scores: Any, response_masks: Any) -> None:
        policy = self.accelerator.unwrap_model(self.model).policy
        self._on_all_processes(
            lambda: check_step_inputs(queries, responses, scores, response_masks, self.args.batch_size, policy)
        )

    def _on_all_processes(self, work: Callable[[], Any]) -> Any:
        """Do `work`, which talks to no other process; if it fails in one, all raise: none is left waiting."""
        error, result = None, None
        try:
            result = work()
        except Exception as failed:
            error = failed
        failures = self._sum_over_processes(torch.tensor(float(error is not None), device=self.accelerator.device))
        if error is not None:
            raise error
        if failures:
            raise ValueError(f"{int(failures)} other process(es) failed at the same point; see their messages")
        return result

    def _prepare_for_updates(self) -> None:
        """Scheduler, distributed engine and, for sharded weights, optimizer: made when the first `step` needs them."""
        if self._prepared:
            return
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self._checkpointing_kwargs())
        rates = [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        self._prepare_for_training(self.args.total_ppo_epochs, None, None)
        if self._rate_is_the_scripts:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate  # a new scheduler sets the initial one again
        self._prepared = True

    @property
    def _rate_is_the_scripts(self) -> bool:
        """Nobody asked for a schedule: what the script sets on `optimizer`, by one of its own say, stays."""
        return self._created_lr_scheduler and self.args.lr_scheduler_type == "constant"

    def _collect(
        self, queries: list[Tensor], responses: list[Tensor], scores: list[Tensor], response_masks: Any
    ) -> tuple[Rollouts, Tensor]:
        """The caller's lists as `Rollouts` on the device, and which responses ended with EOS."""
        device = self.accelerator.device
        scores_B = torch.stack([score.detach().reshape(()).float().to(device) for score in scores])
        ended_B = torch.tensor([int(response[-1]) in self._end_token_ids for response in responses], device=device)
        rollouts = Rollouts(
            queries=[query.long().to(device) for query in queries],
            responses=[response.long().to(device) for response in responses],
            response_mask_BR=response_mask(responses, response_masks, device),
            scores_B=scores_B,
            decoder_start_token_id=self._decoder_start_token_id,
        )
        return rollouts, ended_B

    @torch.no_grad()
    def _evaluate_rollouts(self, rollouts: Rollouts) -> None:
        """Fill in log pi_init and V; for PPO and for early stopping log pi_old; for PPO the KL in its reward."""
        blank_BR = torch.zeros_like(rollouts.response_mask_BR, dtype=torch.float32)
        rollouts.ref_logprobs_BR, rollouts.values_BR = blank_BR.clone(), blank_BR.clone()
        is_ppo = self.args.loss_type == "ppo"
        needs_old = is_ppo or self.args.early_stopping
        full_kl = is_ppo and self.args.kl_penalty == "full"
        if needs_old:
            rollouts.old_logprobs_BR = blank_BR.clone()
        if is_ppo:
            rollouts.kl_penalty_BR = blank_BR.clone()
        policy = self.accelerator.unwrap_model(self.model).policy
        # bitsandbytes has one int8 kernel for each mode, and the update runs in this one.
        self.model_wrapped.train()
        size = self.args.local_rollout_forward_batch_size or self.args.per_device_train_batch_size
        for start in range(0, len(rollouts), size):
            rows = range(start, min(start + size, len(rollouts)))
            batch = rollouts.micro_batch(rows, self._pad_token_id)
            index, width = batch["rows"], batch["response_mask"].shape[1]
            outputs = self.model_wrapped(**self._model_inputs(batch), with_policy=needs_old, with_logits=full_kl)
            rollouts.values_BR[index, :width] = outputs["values"].float()
            with reference_policy(policy, self.ref_model) as reference, self.accelerator.autocast():
                ref_logits, _ = response_logits(reference, self._tokens(batch), width, self.args.temperature)
            rollouts.ref_logprobs_BR[index, :width] = sampled_logprobs(ref_logits, batch).float()
            if needs_old:
                rollouts.old_logprobs_BR[index, :width] = outputs["logprobs"].float()
            if full_kl:
                kl = kl_full(outputs["logits"].log_softmax(-1), ref_logits.log_softmax(-1))
                rollouts.kl_penalty_BR[index, :width] = kl.float()
        if is_ppo and not full_kl:
            rollouts.kl_penalty_BR = kl_estimate(
                rollouts.old_logprobs_BR, rollouts.ref_logprobs_BR, self.args.kl_penalty
            )

    def _token_rewards(self, rollouts: Rollouts, ended_B: Tensor) -> Tensor:
        """Scores, shaped, on the last counted token; for PPO minus the KL penalty on every token."""
        args, scores_B = self.args, rollouts.scores_B
        if args.missing_eos_penalty is not None:
            scores_B = scores_B - args.missing_eos_penalty * ~ended_B
        std = mean = None
        if args.scale_rewards:
            self.running_scores.update(scores_B[rollouts.response_mask_BR.any(dim=1)])
            std = self.running_scores.std
            mean = self.running_scores.mean if args.center_rewards else None
        given_BR = rollouts.given_rewards_BR
        if given_BR is not None:
            # Given token by token, they stay on their tokens; only their scale is shaped.
            given_BR = keep_counted(given_BR, rollouts.response_mask_BR)
            scores_B = scores_B - given_BR.sum(dim=1)
        scores_B = shape_scores(scores_B, std=std, mean=mean, clip=args.score_clip)
        rewards_BR = token_rewards(scores_B, rollouts.response_mask_BR)
        if given_BR is not None:
            rewards_BR = rewards_BR + shape_scores(given_BR, std=std)
        if args.loss_type == "ppo":
            mask_BR = rollouts.response_mask_BR
            rewards_BR = kl_penalized_rewards(rewards_BR, rollouts.kl_penalty_BR, mask_BR, self.kl_ctl.value)
        return rewards_BR

    def _estimate_advantages(self, rollouts: Rollouts) -> None:
        args, mask_BR, distributed = self.args, rollouts.response_mask_BR, self.accelerator.num_processes > 1
        rewards_BR = rollouts.rewards_BR
        if args.whiten_rewards:
            rewards_BR = masked_whiten(rewards_BR, mask_BR, shift_mean=False, distributed=distributed)
        advantages_BR, rollouts.returns_BR = gae(rewards_BR, rollouts.values_BR, mask_BR, args.gamma, args.gae_lambda)
        if args.whiten_advantages:
            advantages_BR = masked_whiten(advantages_BR, mask_BR, distributed=distributed)
        rollouts.advantages_BR = advantages_BR

    def _plan(self, rollouts: Rollouts, ended_B: Tensor) -> Iteration:
        """The optimizer steps of one iteration: for each epoch a shuffle, split into mini-batches."""
        epochs = [self._mini_batches(len(rollouts), epoch) for epoch in range(self.args.num_epochs_per_batch)]
        size = self.args.per_device_train_batch_size
        return Iteration.begin(rollouts, ended_B, epochs, size, self._sum_over_processes)

    def _mini_batches(self, num_rows: int, epoch: int) -> list[list[int]]:
        """Rows of each optimizer step of an epoch, in an order that depends on seed, process, iteration and epoch."""
        seed = hash((self.args.seed, self.accelerator.process_index, self.num_iterations_done, epoch)) % 2**63
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
        size = self.args.backward_batch_size
        return [order[start : start + size] for start in range(0, num_rows, size)]

    def _update(self) -> None:
        """Work off the plan; under `train()` the Trainer's own loop does it."""
        iteration = self._iteration
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
            self.model_wrapped.zero_grad()
            self._stop_if_moved_too_far()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of the iteration's next micro-batch; `inputs` are not read.

        Called by `step` and by the Trainer's loop alike, which gets new rollouts when those before are used up.
        """
        if self._iteration is None or self._iteration.finished:
            self._collect_iteration()
        iteration = self._iteration
        batch = iteration.next_micro_batch(self._pad_token_id)
        loss = super().training_step(model, batch, num_items_in_batch)
        if iteration.ends_step and self._ratio_explodes():
            model.zero_grad()
        return loss

    def _stop_if_moved_too_far(self) -> None:
        """Leave out the epochs that remain if the last mini-batch has moved further than `early_stopping` allows."""
        iteration = self._iteration
        if not self.args.early_stopping or not iteration.ends_epoch or iteration.finished:
            return
        moved = float(self._sum_over_processes(iteration.record.optimizer_steps[-1]["apa/policy/policykl"]))
        # Classic's PPO lets log-probs rise as far as they like, and so does ours, for runs that are compared with it.
        moved = moved if self.args.loss_type == "ppo" else abs(moved)
        iteration.stopped = moved > 1.5 * self.args.target_kl

    def _ratio_explodes(self) -> bool:
        """Whether PPO's mini-batch is so far off-policy that its update is left out."""
        if self.args.loss_type != "ppo":
            return False
        record = self._iteration.record
        step = record.optimizer_steps[-1]
        ratio = float(self._sum_over_processes(step["apa/policy/ratio"]))
        record.skipped = skipped = ratio > self.args.ratio_threshold
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
        """Policy loss plus `vf_coef` times value loss of one micro-batch, as its share of the optimizer step's mean.

        Multiplied by the number of processes, because distributed engines average gradients over them.
        """
        args, mask, num_tokens = self.args, inputs["response_mask"], inputs["num_tokens"]
        record = self._iteration.record
        is_ppo = args.loss_type == "ppo"
        outputs = model(**self._model_inputs(inputs), with_entropy=record.observing or is_ppo)
        if record.observing:
            record.observe(inputs["rows"], outputs)
        pi_loss, stats = self._policy_loss(outputs["logprobs"], inputs, num_tokens)
        v_loss, v_stats = value_loss(
            outputs["values"], inputs["returns"], mask, inputs["values"], args.cliprange_value, num_tokens
        )
        loss = pi_loss + args.vf_coef * v_loss
        if "policykl" not in stats:
            # Without a forward pass of pi_old, its log-probs are those of each row's first visit.
            first_visit = record.logprobs_BR[inputs["rows"], : mask.shape[1]]
            old_logprobs = inputs.get("old_logprobs", first_visit)
            stats |= policy_shift(outputs["logprobs"], old_logprobs, mask, num_tokens)
        if is_ppo:
            # As in classic the mean over all epochs; the others report that of each row's first visit.
            stats["entropy"] = masked_mean(outputs["entropy"], mask, num_tokens)
        record.add(
            {
                **{f"apa/policy/{name}": value for name, value in stats.items()},
                **{f"apa/val/{name}": value for name, value in v_stats.items()},
                "apa/val/vpred": masked_mean(outputs["values"].detach(), mask, num_tokens),
                "apa/loss/policy": pi_loss.detach(),
                "apa/loss/value": v_loss.detach(),
                "apa/loss/total": loss.detach(),
            }
        )
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _policy_loss(self, logprobs_BR: Tensor, batch: dict[str, Tensor], num_tokens: Tensor) -> tuple[Tensor, dict]:
        """The one place where APA, AWR and PPO differ in the update."""
        args, advantages, mask = self.args, batch["advantages"], batch["response_mask"]
        if args.loss_type == "apa":
            return apa_loss(logprobs_BR, batch["ref_logprobs"], advantages, mask, args.kl_coef, num_tokens)
        if args.loss_type == "awr":
            return awr_loss(logprobs_BR, advantages, mask, args.kl_coef, num_tokens)
        return ppo_loss(logprobs_BR, batch["old_logprobs"], advantages, mask, args.cliprange, num_tokens)

    def _tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in TOKEN_FIELDS if name in batch}

    def _model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        width = batch["response_mask"].shape[1]
        return {**self._tokens(batch), "response_width": width, "temperature": self.args.temperature}

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._note_gradient_norms()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The joint norm before clipping, noted; refuses a gradient that is not finite."""
        if grad_norm is None:
            self._note_gradient_norms()
        total = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._iteration.record.grad_norms[-1]["apa/grad_norm/total"] = torch.as_tensor(total)
        # With a gradient scaler (fp16) an overflow is expected now and then, and the scaler skips that update.
        if self.accelerator.scaler is None and not math.isfinite(total):
            kept = self._keep_for_inspection()
            raise FloatingPointError(
                f"the gradient norm is {float(total)} at optimizer step {self.state.global_step}; this update was not "
                f"made, and its rollouts are in {kept}. Look at the scores and at apa/policy/log_ratio of the step "
                "before; lower the learning rate"
            )
        return total

    def _keep_for_inspection(self) -> Path:
        """The rollouts of an update that failed, for `torch.load`."""
        name = f"failed_step_{self.state.global_step}_process_{self.accelerator.process_index}.pt"
        path = Path(self.args.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._iteration.state_dict(), path)
        return path

    def _note_gradient_norms(self) -> None:
        """Norms of each network's gradient before clipping, where one process holds it whole and unscaled."""
        norms: dict[str, Tensor] = {}
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.accelerator.scaler is None and not sharded:
            module = self.accelerator.unwrap_model(self.model)
            for name, network in (("policy", module.policy), ("value", module.value_model)):
                gradients = [p.grad for p in network.parameters() if p.grad is not None]
                norms[f"apa/grad_norm/{name}"] = nn.utils.get_total_norm(gradients)
        self._iteration.record.grad_norms.append(norms)

    # ---- statistics ----

    def _statistics(self, rollouts: Rollouts, record: UpdateRecord, ended_B: Tensor) -> dict[str, Any]:
        args = self.args
        lengths_B = torch.tensor([len(query) for query in rollouts.queries], device=rollouts.device)
        lengths_B, ended_B = self.accelerator.gather(lengths_B), self.accelerator.gather(ended_B)
        everywhere, logprobs_BR, entropy_BR, lengths_B, ended_B = counted_rows(
            *gather_rollouts(rollouts, record, self.accelerator), lengths_B, ended_B
        )
        if everywhere.old_logprobs_BR is not None:
            logprobs_BR = everywhere.old_logprobs_BR
        kl_coef = None if args.loss_type == "ppo" else args.kl_coef
        stats = rollout_statistics(everywhere, logprobs_BR, entropy_BR, lengths_B, ended_B, kl_coef)
        stats.update(rollout_arrays(everywhere, logprobs_BR, lengths_B))
        stats.update(record.mean_losses(self._sum_over_processes))
        stats["apa/val/var_explained"] = 1 - stats["apa/val/error"] / max(stats["apa/returns/var"], 1e-8)
        stats.update(record.mean_grad_norms())
        stats["objective/kl_coef"] = self.kl_ctl.value
        stats["apa/mean_non_score_reward"] = 0.0
        if args.loss_type == "ppo":
            penalty_BR = keep_counted(everywhere.kl_penalty_BR, everywhere.response_mask_BR)
            mean_penalty = self.kl_ctl.value * masked_mean(penalty_BR, everywhere.response_mask_BR)
            stats["apa/mean_non_score_reward"] = -float(mean_penalty)
            # The KL that the reward is charged for, which the controller is to hold: k1 if kl_penalty is "kl".
            stats["objective/kl"] = float(penalty_BR.sum(dim=1).mean())
            stats["objective/kl_dist"] = penalty_BR.sum(dim=1).cpu().numpy()
        # Schedulers keep the groups' rates; the value model's own, if any, is in a later group.
        stats["apa/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        return stats

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Tensor],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send the statistics of a `step`, the rewards and the texts of all processes to the configured trackers.

        Numbers reach every tracker. Vectors (`env/reward_dist`, `objective/kl_dist`, ...) become histograms, and texts
        with their rewards the table `game_log`, in W&B, Trackio and Comet; TensorBoard has histograms but no tables
        and shows the first ten rows as a text.

        Args:
            stats: what `step` returned, and whatever the script has added to it.
            batch: texts under the names in `columns_to_log`, one for each reward.
            rewards: the scores of this process, 0-D tensors or numbers.
            columns_to_log: the columns of the table; a warning says which are missing.
        """
        numbers, vectors = split_statistics({**stats, **reward_statistics(rewards, self.accelerator)})
        table = gather_table(batch, columns_to_log, rewards, self.accelerator)
        self._start_reporters()
        if self.is_world_process_zero():
            log_media(self.callback_handler.callbacks, self.state.global_step, vectors, table)
        self.log(numbers)

    # ---- saving ----

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the policy (an adapter, if it is one), the tokenizer, and the value model in `value_model/`.

        Plain transformers, or peft, loads the policy; `APATrainer(value_model=f"{save_directory}/value_model")` the
        value model.
        """
        self.save_model(str(save_directory), _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)

    def _push_if_best(self, scores_B: Tensor) -> None:
        """The hub's copy is the policy with the best mean score yet, if the config asks for that."""
        args = self.args
        if not args.push_to_hub_if_best_kwargs or self.num_iterations_done % args.compare_steps:
            return
        mean = float(self.accelerator.gather(scores_B).mean())
        if mean > self._best_mean_score:
            self._best_mean_score = mean
            self.push_to_hub(**args.push_to_hub_if_best_kwargs)

    def create_model_card(
        self,
        path: str | os.PathLike | None = None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write a model card that says how the policy was trained and cites the paper, as `README.md`.

        Args:
            path: a folder, made if it is not there; defaults to `args.output_dir`.
            model_name, dataset_name, tags: as in TRL's trainers.
        """
        output_dir = self.args.output_dir
        try:
            if path is not None:
                self.args.output_dir = os.fspath(path)
            os.makedirs(self.args.output_dir, exist_ok=True)
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        finally:
            self.args.output_dir = output_dir

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Save to `args.output_dir`, write a model card and upload both.

        Args:
            repo_id: where to; defaults to `args.hub_model_id`.
            kwargs: as in [`~transformers.Trainer.push_to_hub`] (`commit_message`, `token`, `blocking`, ...).
        """
        if repo_id is not None:
            self.args.hub_model_id, self.hub_model_id = repo_id, None
        return super().push_to_hub(**kwargs)

    def _send_telemetry(self) -> None:
        """This package sends none."""
