"""`APATrainer`: orchestration of generate -> score -> step. Every stage it calls has a separate file."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)

from trl_apa._trl import is_peft_model
from trl_apa.algorithms.kl import AdaptiveKLController, FixedKLController
from trl_apa.algorithms.masking import keep_counted, masked_mean
from trl_apa.algorithms.rewards import RunningMoments
from trl_apa.config.apa import APAConfig
from trl_apa.distributed.sharded import (
    check_engine,
    is_sharded,
    keep_outputs_precise,
    policy_gathered,
    prepare_frozen,
)
from trl_apa.models import PolicyAndValue, ValueModel, reference_policy
from trl_apa.models.checkpointing import without_checkpointing
from trl_apa.models.classic_outputs import answer_as_classic
from trl_apa.models.layouts import Layouts, ShardedLayouts
from trl_apa.models.network_parts import Network, pad_token_id_of, use_cache_kept
from trl_apa.rollout.batch import Rollouts, response_mask, with_known_pads, without_start_tokens
from trl_apa.rollout.collating import collate, rows_of
from trl_apa.rollout.generation import (
    generate_responses,
    generation_options,
    unmasked_queries,
)
from trl_apa.rollout.sampled_logprobs import SampledLogprobs
from trl_apa.rollout.sampling import EngineSampler, Sampler
from trl_apa.rollout.scoring import Scorer
from trl_apa.rollout.shared_prompts import query_keys
from trl_apa.rollout.special_tokens import SpecialTokens
from trl_apa.rollout.vllm_generation import VLLMSampler
from trl_apa.tools.making import make_player, with_environment_rewards
from trl_apa.tools.sampling import EpisodeSampler
from trl_apa.trainer.assembly import assemble
from trl_apa.trainer.classic_methods import ClassicMethods
from trl_apa.trainer.construction import check_policy_answers, make_scorer, networks_that_read
from trl_apa.trainer.drift import DriftWatch
from trl_apa.trainer.estimation import check_compared_rows, check_groups
from trl_apa.trainer.experience import Experience
from trl_apa.trainer.gradient_guard import GradientGuard
from trl_apa.trainer.hooked_stages import statistics_by_override
from trl_apa.trainer.importance import ImportanceCorrection, importance_statistics
from trl_apa.trainer.optimization import (
    check_optimizer_is_finite,
    given_scheduler,
    split_off_value_groups,
    value_learning_rate,
    wrapped_optimizer,
)
from trl_apa.trainer.options_in_use import note_global_sizes, steps_of_episodes
from trl_apa.trainer.preparation import shaped_scores
from trl_apa.trainer.progress import RewardAndKL
from trl_apa.trainer.reference_rewards import given_ref_rewards
from trl_apa.trainer.reporting import gather_table, log_media, reward_statistics, split_statistics
from trl_apa.trainer.run_identity import initial_policy_fingerprint
from trl_apa.trainer.run_state import RunState
from trl_apa.trainer.saving import Saving
from trl_apa.trainer.script_trackers import connect_tracker_objects
from trl_apa.trainer.statistics import (
    StageTimer,
    UpdateRecord,
    counted_rows,
    equal_scores_share,
    gather_rollouts,
    rollout_arrays,
    rollout_statistics,
    sampling_difference,
    with_classic_names,
)
from trl_apa.trainer.token_budget import TokenBudget
from trl_apa.trainer.training_loop import EndOfIteration, TrainingLoop
from trl_apa.trainer.update import Update
from trl_apa.trainer.validation import (
    check_fp16,
    check_has,
    check_positions,
    check_queries,
    check_step_inputs,
    check_type,
    one_of,
)


if TYPE_CHECKING:
    from trl_apa.checking import Report


class APATrainer(ClassicMethods, Experience, Update, GradientGuard, Saving, TrainingLoop):
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
            The policy, a language model (a decoder, or an encoder-decoder), or where to load it from. It is held in
            eval mode. Of a classic wrapper the language model is trained; its value head is not used, because APA's
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
            Made by the caller over the policy's parameters, or a part of them: the rest is frozen, with a warning. The
            value model's join its first group. Defaults to what `args.optim` says.
        data_collator (`Callable`, *optional*):
            Rows to batch, for `dataloader`. Defaults to torch's, with lists where rows cannot be stacked: see
            `rollout.collating.collate`.
        num_shared_layers (`int`, *optional*):
            Freeze this many of the policy's lowest layers and share them with the reference.
        lr_scheduler (`LRScheduler`, *optional*):
            Advanced once a `step`. Defaults to what `args.lr_scheduler_type` says, over `args.total_ppo_epochs` steps;
            with "constant", what a script sets on `optimizer` itself stays.
        training_data_collator (*optional*):
            Classic's; without effect.
        value_model (`str`, `ValueModel`, `PreTrainedModel` or `nn.Module`, *optional*):
            The standalone value model: "separate" (a copy of the policy's trunk with a new head, the default), a
            reward model or another language model (copied), a `ValueModel`, a path or hub name of one of these, or a
            module of your own that gives values (`docs/extending.md`).
            "adapter" is a second adapter with a head on the frozen base of a PEFT policy: a separate network that
            takes hardly any memory; "adapter:PATH" starts it from a reward model's or a saved value model's adapter.
            "head" is classic's critic instead: the wrapper's head (or the checkpoint's, or a new one) on the policy's
            own hidden states.
        reward_funcs (*optional*):
            What `train`, `evaluate` and `score` score with: one of, or a list of, functions
            `(prompts, completions, completion_ids, **columns) -> list of floats`, sequence classifiers of one label,
            folders or hub names of these, and addresses of servers. Also accepted as `reward_model`.
        reward_processing_classes (*optional*):
            The classifiers' tokenizers, where they are not the ones that lie with them.
        peft_config (`PeftConfig`, *optional*):
            Adapters to put on `model`.
        eval_dataset (*optional*):
            Held-out prompts for `evaluate`.
        callbacks, optimizers (*optional*):
            As in [`~transformers.Trainer`].
        sampler (`Sampler`, *optional*):
            An inference engine of your own that answers prompts in place of the model's `generate`
            (`docs/extending.md`).
        tools (`list[Callable]`, *optional*):
            Functions, coroutine functions too, that the policy may call in `train` and `evaluate`, with type hints and
            docstrings (`docs/tools.md`).
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            Makes an environment, one for each rollout, whose public methods are tools, as in TRL; several by the name
            in the data set's column `environment`.
        rollout_func (`Callable`, *optional*):
            `(prompts, trainer) -> dict` samples in place of the trainer in `train` and `evaluate`, as in TRL.

    Raises:
        ValueError: naming the argument that is of the wrong type or does not fit another.
    """

    # The loss is divided by the tokens of the complete optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        args: APAConfig | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Callable[..., Any] | None = None,
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
        value_model: str | ValueModel | PreTrainedModel | nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        sampler: Sampler | None = None,
        tools: list[Callable[..., Any]] | None = None,
        environment_factory: Any = None,
        rollout_func: Callable[..., Any] | None = None,
    ):
        _check_places(model, training_data_collator)
        args = one_of("args", args, "config", config)
        model = one_of("model", model, "policy", policy)
        ref_model = one_of("ref_model", ref_model, "ref_policy", ref_policy)
        processing_class = one_of("processing_class", processing_class, "tokenizer", tokenizer)
        train_dataset = one_of("train_dataset", train_dataset, "dataset", dataset)
        reward_funcs = one_of("reward_funcs", reward_funcs, "reward_model", reward_model)
        optimizer = one_of("optimizer", optimizer, "optimizers[0]", optimizers[0])
        lr_scheduler = one_of("lr_scheduler", lr_scheduler, "optimizers[1]", optimizers[1])
        check_type("config", args, APAConfig)
        _check_objects(args, optimizer, train_dataset, data_collator, lr_scheduler)
        args.check_sizes()
        counts_episodes = args.total_episodes is not None and args.max_steps < 0
        if counts_episodes:
            args.set_unchecked(max_steps=steps_of_episodes(args))
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process trains on one device; torch's DataParallel is not supported
        set_seed(args.seed)

        value_model = self._default_critic(args, model) if value_model is None else value_model
        module, self.ref_model, processing_class = assemble(
            args, model, ref_model, processing_class, value_model, peft_config, num_shared_layers, optimizer
        )
        self._initial_policy = initial_policy_fingerprint(module.policy, self.ref_model)
        if module.base_is_shared:
            args.set_unchecked(
                ddp_find_unused_parameters=True
            )  # each of the two passes leaves the other's adapter out
        self._choose_special_tokens(processing_class, module, args.stop_token_id)
        with use_cache_kept(module.config):
            super().__init__(
                model=module,
                args=args,
                data_collator=data_collator or collate,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=(optimizer, given_scheduler(lr_scheduler)),
            )
        check_fp16(args, self.accelerator)
        check_engine(self.accelerator, args, module, optimizer, lr_scheduler)
        keep_outputs_precise(self.accelerator)
        self.dataloader = self._prompt_dataloader()
        set_seed(args.seed, device_specific=True)

        self.layouts = self._try_layouts()
        check_policy_answers(module.policy, self.accelerator)
        self._note_what_scripts_read()
        if not is_sharded(self.accelerator):
            # There to be read before the first step, as accelerate wraps it; sharded weights are not there yet.
            self.optimizer = wrapped_optimizer(self.create_optimizer(), self.accelerator)
        if self.ref_model is not None:
            self.ref_model = prepare_frozen(self.ref_model, module.policy, self.accelerator)
            answer_as_classic(self.ref_model)
        self.overrides.check(self.args)
        self._player = make_player(tools, environment_factory, rollout_func, self, self.special_tokens.ends)
        self.scorer = self._make_scorer(reward_funcs, reward_processing_classes)
        self._begin(sampler)
        self._follow_options(counts_episodes)

    def _default_critic(self, args: APAConfig, model: Any) -> str | None:
        """What `value_model` means where it is not given; None is a separate copy of the policy's trunk."""
        return None

    def _try_layouts(self) -> Layouts | ShardedLayouts:
        """How micro-batches go through every network.

        Not packed where each new set of lengths would be compiled anew.
        """
        if self.args.torch_compile and self.args.padding_free:
            raise ValueError("padding_free=True does not work with torch_compile; leave it out")
        networks = networks_that_read(self.model, self.ref_model)
        padding_free = False if self.args.torch_compile else self.args.padding_free
        if is_sharded(self.accelerator):
            return ShardedLayouts(networks, padding_free)
        # Flash attention reads half precision alone.
        return Layouts(networks, padding_free, self.accelerator.autocast)

    def _note_what_scripts_read(self) -> None:
        args, module = self.args, self.model
        self.is_peft_model = is_peft_model(module.policy)
        self.is_encoder_decoder = bool(module.config.is_encoder_decoder)
        args.set_unchecked(is_peft_model=self.is_peft_model, is_encoder_decoder=self.is_encoder_decoder)
        note_global_sizes(args, self.accelerator.num_processes)

    def _make_scorer(self, reward_funcs: Any, processing_classes: Any) -> Scorer | None:
        args = self.args
        functions, weights = with_environment_rewards(self._player, reward_funcs, args.reward_weights)
        if isinstance(processing_classes, list | tuple) and isinstance(functions, list):
            processing_classes = [*processing_classes, *[None] * (len(functions) - len(processing_classes))]
        given = (functions, processing_classes, self.processing_class, self.model)
        options = {"weights": weights, "skip_unscored": args.skip_unscored, "timeout": args.reward_timeout}
        return make_scorer(*given, self.special_tokens.ends, self.accelerator, args, **options)

    def _begin(self, sampler: Sampler | None) -> None:
        """What changes from one iteration to the next, and the callbacks that see to it."""
        args = self.args
        kl_ctl = (
            AdaptiveKLController(args.kl_coef, args.target, args.horizon)
            if args.kl_in_reward and args.adap_kl_ctrl
            else FixedKLController(args.kl_coef)
        )
        running_scores = RunningMoments(distributed=self.accelerator.num_processes > 1)
        self.run_state = RunState(kl_ctl, running_scores, args.global_batch_size)
        self.drift = DriftWatch(f"{'init_kl_coef' if args.kl_in_reward else 'kl_coef'}={args.kl_coef}")
        self.sampler = self._make_sampler(sampler)
        self._sampled_logprobs = notes = SampledLogprobs()
        sampling = (self._query, self._respond_on_all_processes, self._respond_as_reference, notes, self.processes)
        self._episodes = EpisodeSampler(self._player, *sampling)
        self._ahead = self._make_rollouts_ahead() if args.rollouts_ahead else None
        self._token_budget = TokenBudget(self.processes)
        self._importance = ImportanceCorrection()
        self._clear_gradient_norms()
        self.add_callback(EndOfIteration(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardAndKL())
        self.add_callback(self.processes.stop_on_signal)
        connect_tracker_objects(self)

    def _make_sampler(self, given: Sampler | None) -> VLLMSampler | EngineSampler | None:
        """What answers prompts, if it is not the policy's own `generate`."""
        args, policy = self.args, self.model.policy
        if args.use_vllm:
            if given is not None:
                raise ValueError("sampler and use_vllm=True name two engines: give one of them")
            return VLLMSampler(policy, self.accelerator, self.processing_class, args, self.processes.together)
        if given is None:
            return None
        if is_sharded(self.accelerator):
            raise ValueError("sampler: under FSDP or DeepSpeed no process holds the policy that it would sample from")
        return EngineSampler(given, policy, self.processing_class, self.processes)

    def _notes(self) -> SampledLogprobs:
        """Where the log-probs of what is sampled now are noted."""
        return self._sampled_logprobs.at(self.args.temperature, 8 * self.args.batch_size)

    @property
    def vllm(self) -> VLLMSampler | None:
        """vLLM, if it samples."""
        return self.sampler if isinstance(self.sampler, VLLMSampler) else None

    @property
    def num_iterations_done(self) -> int:
        """Iterations whose optimizer steps are all made: calls of `step`, or iterations of `train`."""
        return self.run_state.num_iterations_done

    @property
    def running_scores(self) -> RunningMoments:
        """Mean and standard deviation of all scores so far, which `scale_rewards` divides by."""
        return self.run_state.running_scores

    # ---- what classic scripts read ----

    @property
    def kl_ctl(self) -> AdaptiveKLController | FixedKLController:
        """The coefficient of the KL penalty (PPO), or lambda."""
        return self.run_state.kl_ctl

    @kl_ctl.setter
    def kl_ctl(self, controller: AdaptiveKLController | FixedKLController) -> None:
        self.run_state.kl_ctl = controller

    # ---- construction ----

    def _choose_special_tokens(
        self, tokenizer: PreTrainedTokenizerBase, module: PolicyAndValue, stop_token_id: int | None
    ) -> None:
        readers = networks_that_read(module, self.ref_model)
        self.special_tokens = SpecialTokens.of(tokenizer, module.policy, readers, stop_token_id)

    def _prompt_dataloader(self) -> DataLoader[Any] | None:
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
        loader = self.prepare_dataloader(self.train_dataset, self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does, with separate groups for the value model if it has its own rate."""
        made_here = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        module = self.accelerator.unwrap_model(self.model)
        rate = value_learning_rate(self.args, module.value_model)
        if made_here and rate is not None:
            split_off_value_groups(optimizer, module.trainable_parameters()["value"], rate)
        return optimizer

    def check(self, prompts: Sequence[Any] | None = None, tell: Callable[[str], None] | None = None) -> "Report":
        """Measure whether the numbers of these networks can be trusted on this machine: `trl-apa check` in a script.

        Log-probs alone, padded, packed, as trained and as sampled; greedy answers in a batch; train and eval mode; KL
        before training; gradients of split micro-batches; attention, precision, saving, merging; sizes, templates,
        memory. Networks, gradients and random numbers are left as they were.

        Args:
            prompts: texts, chat messages or rows; by default four questions.
            tell: called with the name of each check before it is made.

        Returns:
            The findings; `print(report)` shows the table, `report.ok` whether nothing is wrong.

        Raises:
            ValueError: while `train` runs, or where weights are sharded over processes.
        """
        from trl_apa.checking import check_trainer

        if self.is_in_train:
            raise ValueError("check() was called while train() runs; call it before or after")
        return check_trainer(self, prompts, tell)

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

        The model's own generation config is ignored: options not given here come from `args` (`temperature`,
        `top_p`, `top_k`, `max_completion_length`), so that the update knows the distribution that was sampled. With
        `args.use_vllm` vLLM samples, with `sampler=` that engine, all queries at once, and every process has to call
        this.

        Args:
            query_tensor: one query, 1-D token ids, or a list of them, as `dataloader` gives it.
            length_sampler: draws `max_new_tokens` for each batch.
            batch_size: queries that the model samples at a time, when a list is given; engines make their own batches.
            return_prompt: put the query before each response. An encoder-decoder's responses begin with the decoder's
                start token instead, whatever this says.
            generate_ref_response: also sample from the reference.
            remove_padding: cut each response where it ended; otherwise the pads after it stay.
            pad_to_multiple_of: round the padded prompt width up.
            generation_kwargs: anything that transformers' `generate` takes. `max_new_tokens` may also be a list, one
                number for each query. `stopping_criteria` are added to what ends
                a response; of a query only the tokens that an `attention_mask` of its shape shows are read (a list of
                masks for a list of queries).

        Returns:
            For a list of queries a list of 1-D tensors in the same order, each cut after its first generated EOS (or
            stop string). For one query a tensor `(1, L)`. With `generate_ref_response` a pair of these, policy first.

        Raises:
            ValueError: if there is no query, if one is not a 1-D tensor of known token ids, if query and response
                together exceed the model's positions, or for an option under which a query has not one response
                (beams, say).
        """
        query_tensor = rows_of(query_tensor)
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if single else query_tensor
        policy = self.accelerator.unwrap_model(self.model).policy
        queries = check_queries("query_tensor", queries, policy, self.processing_class)
        mask = generation_kwargs.pop("attention_mask", None)
        read = unmasked_queries(queries, mask, self.is_encoder_decoder)
        options = self._generation_options(generation_kwargs)
        options |= {"length_sampler": length_sampler, "remove_padding": remove_padding}
        batching: dict[str, Any] = {"batch_size": batch_size, "pad_to_multiple_of": pad_to_multiple_of}

        def shaped(responses: list[Tensor]) -> Any:
            if self.is_encoder_decoder:
                responses = [nn.functional.pad(r, (1, 0), value=self.special_tokens.decoder_start) for r in responses]
            elif return_prompt:
                responses = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            return responses[0].unsqueeze(0) if single else responses

        def sample(model: Network, notes: SampledLogprobs | None = None) -> Any:
            options_here = {**options, **batching, "notes": notes}
            return shaped(generate_responses(model, read, tokenizer=self.processing_class, **options_here))

        def sample_all(policy: Network) -> Any:
            responses = sample(policy, self._notes()) if of_engine is None else of_engine
            if not generate_ref_response:
                return responses
            with reference_policy(policy, self.ref_model) as reference:
                return responses, sample(reference)

        if is_sharded(self.accelerator) and not self.is_in_train:
            self._prepare_for_updates()
        of_engine = None
        if self.sampler is not None:
            of_engine = shaped(self._responses_of_engine(self.sampler, read, **options))
            if not generate_ref_response:
                return of_engine
        with self._module_for_generation() as module, self.accelerator.autocast():
            return module.run_with_policy(sample_all)

    def _responses_of_reference(self, queries: list[Tensor], batch_size: int, **options: Any) -> list[Tensor]:
        """One response of pi_init to each query, sampled as `generate` samples the policy's."""
        if is_sharded(self.accelerator) and not self.is_in_train:
            self._prepare_for_updates()

        def sample(policy: Network) -> list[Tensor]:
            with reference_policy(policy, self.ref_model) as reference:
                tokenizer = self.processing_class
                return generate_responses(reference, queries, tokenizer=tokenizer, batch_size=batch_size, **options)

        options = self._generation_options(options)
        with self._module_for_generation() as module, self.accelerator.autocast():
            responses: list[Tensor] = module.run_with_policy(sample)
        return responses

    def _responses_of_engine(
        self, sampler: VLLMSampler | EngineSampler, queries: list[Tensor], **options: Any
    ) -> list[Tensor]:
        """Responses of vLLM, which has weights of its own, or of an engine that may call the policy."""
        options["notes"] = self._notes()
        if isinstance(sampler, VLLMSampler):
            return sampler.responses(queries, step=self.state.global_step, **options)
        with self._module_for_generation(), self.accelerator.autocast():
            return sampler.responses(queries, step=self.state.global_step, **options)

    def _generation_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        defaults = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        pad_token_id = pad_token_id_of(self.processing_class)
        defaults |= {"max_new_tokens": args.max_completion_length, "pad_token_id": pad_token_id}
        defaults["decoder_start_token_id"] = self.special_tokens.decoder_start
        return generation_options({**defaults, "eos_token_id": self.special_tokens.ends or None}, kwargs)

    @contextmanager
    def _module_for_generation(self) -> Iterator[PolicyAndValue]:
        """Out of its distributed wrapper, without gradient checkpointing; that comes back even on error."""
        module = self.accelerator.unwrap_model(self.model)
        gather = policy_gathered if self.args.ds3_gather_for_generation else nullcontext
        with without_checkpointing(module, self.args.gradient_checkpointing_kwargs):
            module.eval()
            with gather(self.model_wrapped):
                yield module

    def _checkpointing_kwargs(self) -> dict[str, Any]:
        return self.args.gradient_checkpointing_kwargs or {"use_reentrant": False}

    # ---- responses and scores to an update ----

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        ref_rewards: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        """One iteration of Algorithm 1: learn from `batch_size` scored responses.

        Rewards, advantages and returns are fixed once; then `num_epochs_per_batch` passes are made over the rollouts
        in mini-batches of `backward_batch_size`, each an optimizer step on the loss of `args.loss_type` plus `vf_coef`
        times the value loss, averaged over the counted tokens of the mini-batch on all processes.

        Args:
            queries: `batch_size` prompts, 1-D token ids.
            responses: what the policy answered, 1-D token ids without the prompt, EOS included; of an encoder-decoder
                with the start token before them or without.
            scores: one number a response, reward units, of shape `()` or `(1,)`.
            response_masks: for each response, which of its tokens count; zero drops one (a tool's output).
            ref_rewards: for each query the scores of responses of pi_init to it, at least one number, reward units:
                `reference_rewards(queries)`, say. Only advantages that are compared with pi_init's read it (QRPO).

        Returns:
            Statistics, floats and NumPy arrays, see `docs/statistics.md`.

        Raises:
            ValueError: on input that cannot be trained on, before any forward pass; nothing has changed then.
            FloatingPointError: if a gradient is not finite; that update was not made.
            RuntimeError: if `train` runs, in a callback or a reward function.
        """
        self._refuse_while_training("step")
        timer = StageTimer()
        queries, responses, scores, response_masks = map(rows_of, (queries, responses, scores, response_masks))
        if self.special_tokens.decoder_start is not None and isinstance(responses, list):
            responses, response_masks = without_start_tokens(
                responses, response_masks, self.special_tokens.decoder_start
            )
        pad_token_id = pad_token_id_of(self.processing_class)
        responses = with_known_pads(responses, response_masks, pad_token_id, self.special_tokens.pad)
        self._check_on_all_processes(queries, responses, scores, response_masks)
        device = self.accelerator.device
        ref_rewards_BN = self.processes.together(lambda: given_ref_rewards(ref_rewards, self.args, device))
        self._prepare_for_updates()
        running_scores, normalizer = self.running_scores.state_dict(), self.run_state.normalizer.state_dict()
        try:
            rollouts, ended_B = self._collect(queries, responses, scores, response_masks)
            rollouts.ref_rewards_BN = ref_rewards_BN
            self._push_if_best(rollouts.scores_B)
            self._prepare_iteration(rollouts, ended_B, timer)
            with timer("optimize_step"):
                self._update()
            stats = self._finish_iteration(timer)
        except BaseException as error:
            # A caller may catch this (out of memory, for example) and continue: leave no gradient or score behind.
            self.model_wrapped.zero_grad()
            self.running_scores.load_state_dict(running_scores)
            self.run_state.normalizer.load_state_dict(normalizer)
            if isinstance(error, RuntimeError):
                with suppress(RuntimeError):  # a device that is lost answers nothing
                    self._check_gradient_norms()
            raise
        finally:
            self._clear_gradient_norms()
        if not self._rate_is_the_scripts:
            self.lr_scheduler.step()
        iteration = self.run_state.current
        scores_B = shaped_scores(iteration.rollouts, iteration.ended_B, self.args, self.run_state)
        return with_classic_names(stats, self.accelerator.gather(scores_B))

    def _finish_iteration(self, timer: StageTimer) -> dict[str, Any]:
        """Statistics of an iteration whose optimizer steps are done; the KL controller learns of it."""
        self._check_gradient_norms()
        iteration = self.run_state.current
        with timer("calc_stats"):
            stats = self._statistics(iteration.rollouts, iteration.record, iteration.ended_B)
            stats |= sampling_difference(iteration.rollouts, iteration.record, iteration.plan[0], self.accelerator)
            stats |= importance_statistics(iteration.rollouts, self.accelerator)
            overridden = statistics_by_override(self, iteration) if self.overrides.include("record_step_stats") else {}
            stats |= overridden
        stats["apa/epochs"] = iteration.epochs_done
        stats |= iteration.rollouts.sampling_statistics or {}
        learned = iteration.rollouts.normalizer_statistics or {}
        stats |= {f"apa/normalizer/{name}": value for name, value in learned.items()}
        self.run_state.end_iteration(stats["objective/kl"])
        # Losses with the policy that sampled as anchor have targets near it, not near pi_init.
        near = {"apa/policy/unexplained"} if self.args.algorithm.needs_old_logprobs else set()
        self.drift.look({name: value for name, value in stats.items() if name not in near})
        rollouts = iteration.rollouts
        num_tokens = sum(len(q) + len(r) for q, r in zip(rollouts.queries, rollouts.responses, strict=True))
        return stats | timer.as_statistics(num_tokens) | overridden

    def _check_on_all_processes(self, queries: Any, responses: Any, scores: Any, response_masks: Any) -> None:
        module = self.accelerator.unwrap_model(self.model)
        policy, size, tokenizer = module.policy, self.args.batch_size, self.processing_class
        others = {"value_model": getattr(module.value_model, "network", None), "ref_model": self.ref_model}

        def check() -> None:
            self.args.check_sizes()
            check_step_inputs(queries, responses, scores, response_masks, size, policy, tokenizer)
            lengths = [len(response) for response in responses]
            for name, network in others.items():
                if network is not None:
                    check_positions(queries, lengths, network, "queries + responses", name)
            check_compared_rows(queries, self.args)

        self.processes.together(check)
        check_groups(queries, self.args, tokenizer, self.accelerator)

    def _collect(
        self, queries: list[Tensor], responses: list[Tensor], scores: list[Tensor], response_masks: Any
    ) -> tuple[Rollouts, Tensor]:
        """The caller's lists as `Rollouts` on the device, and which responses ended with EOS."""
        device = self.accelerator.device
        scores_B = torch.stack([score.detach().reshape(()).float().to(device) for score in scores])
        last_tokens_B = torch.stack([response[-1].to(device) for response in responses])
        ended_B = torch.isin(last_tokens_B, torch.tensor(self.special_tokens.ends, dtype=torch.long, device=device))
        rollouts = Rollouts(
            queries=[query.long().to(device) for query in queries],
            responses=[response.long().to(device) for response in responses],
            response_mask_BR=response_mask(responses, response_masks, device),
            scores_B=scores_B,
            decoder_start_token_id=self.special_tokens.decoder_start,
        )
        return rollouts, ended_B

    # ---- statistics ----

    def _statistics(self, rollouts: Rollouts, record: UpdateRecord, ended_B: Tensor) -> dict[str, Any]:
        args = self.args
        lengths_B = torch.tensor([len(query) for query in rollouts.queries], device=rollouts.device)
        compared = [*self._scores_by_prompt(rollouts, ended_B)] if args.needs_groups else []
        lengths_B, ended_B = self.accelerator.gather(lengths_B), self.accelerator.gather(ended_B)
        everywhere, logprobs_BR, entropy_BR, lengths_B, ended_B, *compared = counted_rows(
            *gather_rollouts(rollouts, record, self.accelerator), lengths_B, ended_B, *compared
        )
        noted_BR = None if rollouts.sampled_by_engine else everywhere.sampling_logprobs_BR
        known_BR = noted_BR if everywhere.old_logprobs_BR is None else everywhere.old_logprobs_BR
        logprobs_BR = logprobs_BR if known_BR is None else known_BR
        kl_coef = None if args.algorithm.prices_kl else args.kl_coef
        stats: dict[str, Any] = rollout_statistics(everywhere, logprobs_BR, entropy_BR, lengths_B, ended_B, kl_coef)
        stats.update(rollout_arrays(everywhere, logprobs_BR, lengths_B))
        stats.update(record.mean_losses(self.processes.sum))
        if "apa/policy/target_sq" in stats:
            stats["apa/policy/unexplained"] = stats["apa/policy/residual_sq"] / max(
                stats["apa/policy/target_sq"], 1e-8
            )
        if "apa/val/error" in stats:
            stats["apa/val/var_explained"] = 1 - stats["apa/val/error"] / max(stats["apa/returns/var"], 1e-8)
        stats.update(record.mean_grad_norms())
        stats["objective/kl_coef"] = args.kl_coef if args.kl_in == "loss" else self.kl_ctl.value
        if known_BR is None:
            stats["objective/kl_at_first_visits"] = stats["objective/kl"]
        if rollouts.ref_rewards_BN is not None:
            kept_B = rollouts.response_mask_BR.any(dim=1)
            means_B = rollouts.ref_rewards_BN[kept_B].nanmean(dim=1)
            total, count = self.processes.sum(torch.stack([means_B.sum(), kept_B.sum().float()])).tolist()
            stats["apa/mean_ref_scores"] = total / max(count, 1.0)
        if compared:
            stats["apa/equal_scores_share"] = equal_scores_share(*compared)
        stats["apa/mean_non_score_reward"] = 0.0
        if everywhere.kl_penalty_BR is not None:
            penalty_BR = keep_counted(everywhere.kl_penalty_BR, everywhere.response_mask_BR)
            mean_penalty = self.kl_ctl.value * masked_mean(penalty_BR, everywhere.response_mask_BR)
            stats["apa/mean_non_score_reward"] = -float(mean_penalty)
            if everywhere.non_score_rewards_BR is not None:
                mean_reward = masked_mean(everywhere.non_score_rewards_BR, everywhere.response_mask_BR)
                stats["apa/mean_non_score_reward"] = float(mean_reward)
            if args.kl_in != "loss":
                # The KL that the reward is charged for, which the controller is to hold: k1 if kl_penalty is "kl".
                stats["objective/kl"] = float(penalty_BR.sum(dim=1).mean())
                stats["objective/kl_dist"] = penalty_BR.sum(dim=1).cpu().numpy()
        # Schedulers keep the groups' rates; the value model's own, if any, is in a later group.
        stats["apa/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        return stats

    def _scores_by_prompt(self, rollouts: Rollouts, ended_B: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as they enter the rewards, and a number for the prompt, of each row of all processes."""
        scores_B = shaped_scores(rollouts, ended_B, self.args, self.run_state)
        prompts_B = query_keys(rollouts.queries).to(rollouts.device)
        return self.accelerator.gather(scores_B), self.accelerator.gather(prompts_B)

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


def _check_places(model: Any, training_data_collator: Any) -> None:
    if isinstance(model, PreTrainedTokenizerBase):
        raise ValueError(
            "model is a tokenizer: the order (args, processing_class, model, ...) is that of TRL 0.12 to 1.12; "
            "give these arguments by keyword"
        )
    if training_data_collator is not None:
        text = "training_data_collator has no effect: the trainer pads or packs micro-batches itself"
        warnings.warn(text, UserWarning, stacklevel=3)


def _check_objects(args: APAConfig, optimizer: Any, dataset: Any, data_collator: Any, lr_scheduler: Any) -> None:
    check_type("optimizer", optimizer, torch.optim.Optimizer, optional=True)
    if optimizer is not None:
        check_optimizer_is_finite("optimizer", optimizer)
    check_has("dataset", dataset, "__getitem__", "__iter__")
    check_has("data_collator", data_collator, "__call__")
    check_has("lr_scheduler", lr_scheduler, "step")
    if args.value_learning_rate is not None and args.estimator.needs_values and lr_scheduler is not None:
        raise ValueError(
            "value_learning_rate adds a parameter group that lr_scheduler does not have; pass only one of them"
        )
