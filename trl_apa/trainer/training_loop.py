"""`train()` and `evaluate()`: how the Hugging Face Trainer's own loop drives the same iterations as `step`."""

import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from trl_apa.cards.figures import note_loaded_step
from trl_apa.distributed.sharded import is_sharded
from trl_apa.evaluation import held_out
from trl_apa.models import load_policy_and_value
from trl_apa.redaction.trackers import hide_secrets_from
from trl_apa.rollout.batch import without_start_tokens
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.prompts import PromptSource, as_rows, query_of, reward_columns
from trl_apa.rollout.scoring import Scores
from trl_apa.rollout.texts import Texts, prompts_and_completions
from trl_apa.rollout.vllm_generation import VLLMRequest
from trl_apa.tools.environments import EnvironmentReward
from trl_apa.tools.making import Player, rows_without_data
from trl_apa.tools.sampling import EpisodeSampler
from trl_apa.trainer.reference_rewards import (
    OPTIONS,
    ReferenceSampling,
    check_ref_rewards_are_given,
    check_ref_rewards_in_dataset,
    find_ref_rewards,
    padded_ref_rewards,
)
from trl_apa.trainer.reporting import OPENERS, gather_table, log_media, save_table, show_table, start_reporters
from trl_apa.trainer.resuming import ResumableRuns, random_state_restored_on_error
from trl_apa.trainer.rollouts_ahead import RolloutsAhead
from trl_apa.trainer.script_trackers import connect_reporters
from trl_apa.trainer.statistics import StageTimer, mean_of_numbers
from trl_apa.trainer.tracker_failures import isolate_failures, warn_if_report_fails
from trl_apa.trainer.validation import check_queries, check_score_inputs


logger = logging.getLogger(__name__)
# Options that the coefficient of the KL penalty, and what adapts it, are made from.
CONTROLLER_OPTIONS = {"loss_type", "kl_in", "kl_coef", "adap_kl_ctrl", "target", "horizon"}


class EndOfIteration(TrainerCallback):
    """Closes an iteration after its last optimizer step, before the Trainer logs and saves."""

    def __init__(self, trainer: "TrainingLoop"):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kl = self.trainer._close_iteration()
        if args.max_kl is not None and kl is not None and kl > args.max_kl:
            logger.warning("training stops: KL to pi_init is %.2f nats per response, above max_kl=%s", kl, args.max_kl)
            self._stop(args, control)
        if args.total_episodes is not None and self.trainer.run_state.episodes_done >= args.total_episodes:
            self._stop(args, control)  # before max_steps where early stopping left epochs out

    def _stop(self, args: Any, control: Any) -> None:
        """Save a checkpoint, as at the last of `max_steps`: resuming then recognises the run as finished."""
        control.should_training_stop = True
        control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO


class EmptyRows(IterableDataset[int]):
    """A placeholder data set of endless empty rows: training uses rollouts, not the data loader's rows."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class TrainingLoop(ResumableRuns):
    """The part of `APATrainer` that the Hugging Face Trainer calls.

    Its loop counts micro-batches and takes the optimizer steps; `training_step` gets the next rollouts here when
    those before are used up.
    """

    _source: PromptSource
    _player: Player | None
    _episodes: EpisodeSampler
    _ahead: RolloutsAhead | None
    _timer: StageTimer | None = None
    _reporters_started = False
    # Whether scheduler, engine and optimizer are ready for `step`.
    _prepared = False
    _engine_is_made = False
    _kept_engine: Any = None
    # The Trainer's.
    control: TrainerControl
    lr_scheduler: Any
    _created_lr_scheduler: bool

    @property
    def callback_handler(self) -> CallbackHandler:
        return self._callback_handler

    @callback_handler.setter
    def callback_handler(self, handler: CallbackHandler) -> None:
        """Set by the Trainer, which then notifies all callbacks."""
        hide_secrets_from(handler.callbacks)
        isolate_failures(handler.callbacks)
        self._callback_handler = handler

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As in [`~transformers.Trainer.add_callback`]."""
        super().add_callback(callback)
        hide_secrets_from(self.callback_handler.callbacks)
        isolate_failures(self.callback_handler.callbacks)
        connect_reporters(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        resume_anyway: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate, score and learn until `num_train_epochs`, `max_steps` or `total_episodes` is reached.

        One optimizer step of the Trainer is one mini-batch of `step`; `max_steps`, `logging_steps`, `save_steps` and
        `eval_steps` count those. An epoch is a pass over `train_dataset`.

        On SIGTERM or Ctrl-C a checkpoint is written after the current optimizer step and the process ends. If prompts,
        reward functions or sampling fail, a checkpoint of what was learned so far is written before the error is
        raised.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or True for the newest
                complete one of the run in `args.output_dir` that began last. The run continues as if it had not
                stopped, in the middle of an iteration too. A finished run stays as it is.
            resume_anyway (`list[str]`, *optional*): options in which the checkpoint may differ from this trainer
                although they make another run of it, beside those in `args.resume_anyway`. The rest of an iteration
                that was sampled under the old ones is left out.
            kwargs: as in [`~transformers.Trainer.train`].

        Returns:
            As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: without `train_dataset`, or without `reward_funcs` or `reward_model`; if a subclass overrides
                `prepare_dataloader`; for a checkpoint that is incomplete, or of another run.
            SystemExit: after SIGTERM or Ctrl-C.
            KeyboardInterrupt: after a second Ctrl-C.
            FloatingPointError: if a gradient is not finite; that update was not made.
            RuntimeError: if it is called while it runs, by a callback or a reward function.
        """
        self._refuse_while_training("train")
        dataset = self._prompts_of_train()
        args = self.args
        args.check_sizes()
        if args.needs_groups and args.num_generations == 1:
            raise ValueError(
                f"num_generations=1, but {args.compares_by} compares the responses to a prompt: set num_generations "
                "to 2 or more"
            )
        size = args.per_device_train_batch_size
        if args.algorithm.compares_responses and math.gcd(args.num_generations, size) < 2:
            raise ValueError(
                f"num_generations={args.num_generations} and per_device_train_batch_size={size}: "
                f"loss_type={args.loss_type!r} compares responses to a prompt in a forward pass; they should "
                "have a common divisor of 2 or more"
            )
        if self._player is not None and args.estimator.needs_ref_rewards:
            check_ref_rewards_in_dataset(dataset, args.advantage_estimator)
        self._source = PromptSource(
            dataset,
            args.batch_size // args.num_generations,
            args.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if args.fp16 and args.reads("ratio_threshold"):
            raise ValueError(
                f"fp16 with loss_type={args.loss_type!r}: train() cannot skip a mini-batch with fp16; use bf16, or "
                "step"
            )
        self.run_state.begin_run()
        if self._ahead is not None:
            self._ahead.forget()
        checkpoint = self._begin_run(resume_from_checkpoint, resume_anyway)
        self._try_rows_of_the_run()
        # Those whose runs take options of ours; the Trainer starts the others itself.
        self._start_reporters(OPENERS)
        if self._engine_is_made and self.is_deepspeed_enabled:
            # A run begins with `Accelerator.free_memory`, which would destroy the engine.
            self._kept_engine, self.accelerator.deepspeed_engine_wrapped = (
                self.accelerator.deepspeed_engine_wrapped,
                None,
            )
        try:
            with self.processes.stop_on_signal.listening():
                result = super().train(checkpoint, **kwargs)
        finally:
            self._clear_gradient_norms()
            # The end of training closes the trackers' runs; schedule and optimizer are prepared again for `step`.
            self.is_in_train = self._reporters_started = self._prepared = False
        self._restore_resumed_state()  # of a finished run, whose loop was not entered
        self.processes.stop_on_signal.raise_exit(self.state.global_step, self._checkpoint_place())
        return result

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As the Trainer does; but an engine that shards weights is made once, and the next run reuses it."""
        if not self._engine_is_made:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            for name in ("run_with_policy", "compute_reward_score"):
                register_fsdp_forward_method(self.model, name)
            self._engine_is_made = is_sharded(self.accelerator)
            if is_sharded(self.accelerator):
                module = self.accelerator.unwrap_model(self.model)
                with self.accelerator.autocast():
                    self.layouts.try_out(module.networks(), module.run_with_policy)
            return prepared
        if self._kept_engine is not None:
            self.accelerator.deepspeed_engine_wrapped, self._kept_engine = self._kept_engine, None
        self.accelerator.prepare_optimizer(self.optimizer)  # which knows it again
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

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

    def _start_reporters(self, trackers: Collection[str] = INTEGRATION_TO_CALLBACK) -> None:
        if not self._reporters_started:
            callbacks = self.callback_handler.callbacks
            start_reporters(trackers, callbacks, self.args, self.state, self.control, self.model)
        self._reporters_started = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As many empty rows as a pass over the prompts has micro-batches."""
        passes = self._source.iterations_per_pass
        micro_batches = self.args.steps_per_iteration * self.args.gradient_accumulation_steps
        rows: Any = EmptyRows() if passes is None else range(passes * micro_batches)
        # With a separate generator the loader does not advance the global one, which samples tokens.
        return DataLoader(rows, collate_fn=lambda rows: {}, generator=torch.Generator().manual_seed(0))

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rollouts in a pass over the prompts."""
        rollouts: int = (self._source.iterations_per_pass or 0) * self.args.global_batch_size
        return rollouts

    def _collect_iteration(self) -> None:
        """Prompts to rollouts with scores, advantages and a plan: what `step` gets from its caller and makes of it."""
        self._timer = timer = StageTimer()
        try:
            with random_state_restored_on_error():
                episodes, texts, scores, ref_rewards = self._scored_episodes(timer)
        except BaseException:
            self._save_what_was_learned()
            raise
        collected = (episodes.queries, episodes.responses, list(scores.total_B), episodes.masks)
        rollouts, ended_B = self._collect(*collected)
        rollouts.sampling_statistics = episodes.statistics or None
        rollouts.response_mask_BR &= scores.kept_B[:, None].to(rollouts.device)
        if ref_rewards is not None:
            rollouts.ref_rewards_BN = padded_ref_rewards(ref_rewards, rollouts.device)
        if scores.per_token is not None:
            rollouts.given_rewards_BR = pad_sequence(scores.per_token, batch_first=True).to(rollouts.device)
        self._prepare_iteration(rollouts, ended_B, timer)
        if self.args.log_completions:
            self._log_completions(texts, scores)

    def _log_completions(self, texts: Texts, scores: Scores) -> None:
        """Prompts, completions and rewards of all processes: on the terminal, as parquet, in trackers with tables.

        A failed write is a warning, the first time, and the run continues.
        """
        prompts, completions = texts
        columns = scores.by_function_BF.T.tolist()
        by_function = {f"rewards/{name}": column for name, column in zip(self.scorer.names, columns, strict=True)}
        batch = {"prompt": prompts, "completion": completions, **by_function}
        table = gather_table(batch, list(batch), scores.total_B.tolist(), self.accelerator)
        if table is None or not self.is_world_process_zero():
            return
        step, folder = self.state.global_step, Path(self.args.output_dir) / "completions"
        with warn_if_report_fails(self, "printing completions"):
            show_table(table, step, self.args.num_completions_to_print)
        with warn_if_report_fails(self, f"writing completions to {folder}"):
            save_table(table, folder / f"completions_{step:06d}.parquet")
        log_media(self.callback_handler.callbacks, step, {}, table)

    def generate_completions(self, sampling: bool = False) -> None:
        """Answer the prompts of `eval_dataset` greedily and show prompts, completions and rewards as `train` does.

        What scripts for TRL 0.12 to 1.12 end with.

        Args:
            sampling: the first `per_device_eval_batch_size` prompts only.

        Raises:
            ValueError: without `eval_dataset` or reward functions.
        """
        if self.eval_dataset is None or self.scorer is None:
            raise ValueError("generate_completions() needs eval_dataset and reward_funcs or reward_model")
        parts = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        rows = [row for part in parts for row in as_rows(part)]
        if not rows:
            raise ValueError("eval_dataset has no rows")
        rows = rows[: self.args.per_device_eval_batch_size] if sampling else rows
        count = self.accelerator.num_processes
        # The same number on every process; the last rows may be used twice.
        rows = [rows[(k * count + self.accelerator.process_index) % len(rows)] for k in range(-(-len(rows) // count))]

        self._start_reporters()
        episodes = self._episodes(rows, do_sample=False)
        texts, scores = self._scores_on_all_processes(rows, episodes)
        self._log_completions(texts, scores)

    def _prompts_of_train(self) -> Any:
        """The data set of prompts.

        Raises:
            ValueError: if it is missing, or a reward; or if a subclass overrides `prepare_dataloader`.
        """
        dataset = self.train_dataset
        if dataset is None:
            dataset = rows_without_data(self._player, self.args)
        if dataset is None:
            raise ValueError("train() needs train_dataset, the prompts")
        if self.scorer is None:
            raise ValueError("train() needs reward_funcs or reward_model; without them use generate, score and step")
        if self.overrides.include("prepare_dataloader"):
            raise ValueError(
                "prepare_dataloader is overridden, but train() reads train_dataset by itself; give the rows that it "
                "should read as train_dataset, or loop over trainer.dataloader with generate, score and step"
            )
        return dataset

    def _scored_episodes(self, timer: StageTimer) -> tuple[Episodes, Texts, Scores, list[Tensor] | None]:
        """Rollouts of the next iteration, their texts, scores, and rewards of pi_init's responses if they are read.

        Raises:
            ValueError: if not one response of all processes was scored.
        """
        with timer("generate"):
            rows, episodes = self._rollouts_of_next_iteration()
        with timer("score"):
            texts, scores = self._scores_on_all_processes(rows, episodes)
        self._check_on_all_processes(episodes.queries, episodes.responses, list(scores.total_B), episodes.masks)
        if not self.processes.sum(scores.kept_B.sum().float().to(self.accelerator.device)):
            raise ValueError("no response of this iteration was scored: every one had a None or NaN")
        ref_rewards = None
        if self.args.estimator.needs_ref_rewards:
            with timer("reference_rewards"):
                ref_rewards = self._find_ref_rewards(rows, episodes.queries)
        return episodes, texts, scores, ref_rewards

    def _rollouts_of_next_iteration(self) -> tuple[list[dict[str, Any]], Episodes]:
        """This process's rows of the next iteration and their rollouts."""
        iteration, step = self.num_iterations_done, self.state.global_step
        if self._ahead is not None:
            return self._ahead(iteration, step, self._is_last_iteration(step))
        rows = self._rows_of(iteration)
        return rows, self._episodes(rows)

    def _make_rollouts_ahead(self) -> RolloutsAhead:
        if self._player is not None:
            raise ValueError(
                "rollouts_ahead=1 with tools, environment_factory or rollout_func: rollouts of several turns are not "
                "sampled ahead; leave it out"
            )
        return RolloutsAhead(self.vllm, self._rows_of, self._vllm_request, self._notes)

    def _vllm_request(self, rows: list[dict[str, Any]]) -> VLLMRequest:
        """What `generate` would ask vLLM for these rows."""
        policy = self.accelerator.unwrap_model(self.model).policy

        def queries() -> list[Tensor]:
            return check_queries("prompt", [self._query(row) for row in rows], policy, self.processing_class)

        options = self._generation_options({"stop_strings": self.args.stop_strings})
        request: VLLMRequest = self.vllm.request(self.processes.together(queries), **options)
        return request

    def _is_last_iteration(self, step: int) -> bool:
        """Whether the iteration that begins after `step` optimizer steps is the run's last."""
        args, state = self.args, self.run_state
        if step + args.steps_per_iteration >= self.state.max_steps:
            return True
        rollouts = state.episodes_done + state.responses_per_iteration
        return args.total_episodes is not None and rollouts >= args.total_episodes

    def _rows_of(self, iteration: int) -> list[dict[str, Any]]:
        """This process's rows of an iteration, each `num_generations` times; fails everywhere if it fails once."""

        def read() -> list[dict[str, Any]]:
            rows = self._source.rows(iteration)
            if self._player is not None and self.args.estimator.needs_ref_rewards:
                check_ref_rewards_are_given(rows, "an iteration", self.args.advantage_estimator)
            return [row for row in rows for _ in range(self.args.num_generations)]

        rows: list[dict[str, Any]] = self.processes.together(read)
        return rows

    def _names_of_tools(self) -> list[str]:
        return [] if self._player is None else self._player.names

    def _close_iteration(self) -> float | None:
        """After an optimizer step: the KL of the iteration, nats a response, if that was its last."""
        self._stop_if_moved_too_far()
        if not self.run_state.iteration.finished:
            return None
        stats = self._finish_iteration(self._timer)
        self.run_state.note_for_log(mean_of_numbers([stats]))
        kl: float | None = self.run_state.last_kl
        return kl

    def _query(self, row: dict[str, Any]) -> Tensor:
        args = self.args
        options = (args.max_prompt_length, args.chat_template_kwargs, self.is_encoder_decoder)
        return query_of(row, self.processing_class, *options)

    def _respond(self, queries: list[Tensor], **options: Any) -> Any:
        """As `generate`, responses without prompt or start token."""
        size = self.args.generation_batch_size or self.args.local_rollout_forward_batch_size or len(queries)
        options |= {"batch_size": size, "return_prompt": False, "stop_strings": self.args.stop_strings}
        responses = self.generate(queries, **options)
        if not self.is_encoder_decoder:
            return responses
        pair = responses if isinstance(responses, tuple) else (responses,)
        pair = tuple([response[1:] for response in part] for part in pair)
        return pair if isinstance(responses, tuple) else pair[0]

    def _respond_on_all_processes(self, queries: list[Tensor], **options: Any) -> Any:
        """`_respond`, failing everywhere if it fails in one process; an engine sees to it by itself."""
        if self.sampler is not None:
            return self._respond(queries, **options)
        return self.processes.together(lambda: self._respond(queries, **options))

    def _respond_as_reference(self, queries: list[Tensor], **options: Any) -> list[Tensor]:
        """Responses of pi_init alone, failing everywhere if it fails in one process."""
        size = self.args.generation_batch_size or self.args.local_rollout_forward_batch_size or len(queries)
        options = {"batch_size": size, "stop_strings": self.args.stop_strings, **options}
        responses: list[Tensor] = self.processes.together(lambda: self._responses_of_reference(queries, **options))
        return responses

    def _texts(self, rows: list[dict[str, Any]], queries: list[Tensor], responses: list[Tensor]) -> Texts:
        """Prompts and completions: texts, or chat messages where the prompts are chat messages."""
        return prompts_and_completions(rows, queries, responses, self.processing_class)

    def _scores(
        self, texts: Texts, rows: list[dict[str, Any]], queries: list[Tensor], responses: list[Tensor]
    ) -> Scores:
        scores: Scores = self.scorer(*texts, queries, responses, reward_columns(rows))
        return scores

    def _scores_on_all_processes(self, rows: list[dict[str, Any]], episodes: Episodes) -> tuple[Texts, Scores]:
        """Prompts and completions, and their scores, failing everywhere if one process fails."""

        def read() -> tuple[Texts, dict[str, list[Any]]]:
            columns = {**reward_columns(rows), **episodes.columns}
            if episodes.completions is not None and episodes.prompts is not None:
                return (episodes.prompts, episodes.completions), columns
            return self._texts(rows, episodes.queries, episodes.responses), columns

        texts, columns = self.processes.together(read)
        tokens = (episodes.queries, episodes.responses)
        scores: Scores = self.scorer(*texts, *tokens, columns, self.processes.together)
        episodes.release()
        return texts, scores

    def score(
        self, queries: list[Tensor], responses: list[Tensor], prompts: list[Any] | None = None, **columns: list[Any]
    ) -> list[Tensor]:
        """Scores by the trainer's own reward functions, for the classic loop.

        Args:
            queries, responses: 1-D token ids, as `step` takes them.
            prompts: texts or chat messages that the reward functions should see; the decoded queries by default.
            columns: what else the reward functions read, one value a response.

        Returns:
            One 0-D tensor a response, reward units.

        Raises:
            ValueError: without `reward_funcs` or `reward_model`; on input that `step` would not take; or if a function
                gives what is not a finite number (`step` cannot leave out a response, so `skip_unscored` does not
                count here).
            RuntimeError, TimeoutError: if one fails, or does not answer in time.
        """
        if self.scorer is None:
            raise ValueError("score() needs reward_funcs or reward_model")
        if any(isinstance(function, EnvironmentReward) for function in self.scorer.functions):
            raise ValueError(
                "score() was called with an environment that gives rewards; only train() and evaluate() play in it"
            )
        policy = self.accelerator.unwrap_model(self.model).policy
        check_score_inputs(queries, responses, prompts, columns, policy, self.processing_class)
        rows = _as_rows(queries, prompts, columns)
        if self.is_encoder_decoder:
            responses, _ = without_start_tokens(responses, None, self.special_tokens.decoder_start)
        scores = self._scores(self._texts(rows, queries, responses), rows, queries, responses)
        if not scores.kept_B.all():
            left_out = torch.nonzero(~scores.kept_B).flatten().tolist()
            raise ValueError(f"rows {left_out} were not scored, and step cannot skip a response")
        return list(scores.total_B)

    def reference_rewards(
        self, queries: list[Tensor], prompts: list[Any] | None = None, **columns: list[Any]
    ) -> list[Tensor]:
        """Scores of `num_ref_samples` responses of pi_init to each query, for `step(ref_rewards=...)`.

        Each prompt is sampled and scored once; equal queries have equal scores, now and later, until an option of the
        config that they depend on is set to another value. They are sampled as the config says: options given to
        `generate` itself do not count here. `train` takes what it needs by itself. All processes call this, with
        equally many queries.

        Args:
            queries, prompts, columns: as in `score`.

        Returns:
            A 1-D tensor a query, reward units, less `missing_eos_penalty` where a response did not end.

        Raises:
            ValueError: without `reward_funcs` or `reward_model`; with tools, `environment_factory` or `rollout_func`,
                where pi_init would answer in one turn; on queries that `generate` would not take.
            RuntimeError, TimeoutError: if a reward function fails, or does not answer in time.
        """
        if self.scorer is None:
            raise ValueError("reference_rewards() needs reward_funcs or reward_model")
        if self._player is not None:
            raise ValueError(
                "reference_rewards() samples responses of pi_init in one turn, and this trainer has tools, "
                "environment_factory or rollout_func: score rollouts of pi_init yourself"
            )
        policy = self.accelerator.unwrap_model(self.model).policy
        check_score_inputs(queries, queries, prompts, columns, policy, self.processing_class)
        return self._find_ref_rewards(_as_rows(queries, prompts, columns), queries)

    def _find_ref_rewards(self, rows: list[dict[str, Any]], queries: list[Tensor]) -> list[Tensor]:
        args = self.args
        known = self.run_state.ref_rewards_made_with({name: getattr(args, name) for name in OPTIONS})
        size = args.generation_batch_size or args.local_rollout_forward_batch_size or args.batch_size
        sampling = ReferenceSampling(
            respond=partial(self._respond_as_reference, batch_size=size),
            score=lambda rows, queries, responses: self._scores_on_all_processes(rows, Episodes(queries, responses))[
                1
            ],
            num_samples=args.num_ref_samples,
            end_token_ids=self.special_tokens.ends,
            missing_eos_penalty=args.missing_eos_penalty or 0.0,
            seed=hash((args.seed, self.accelerator.process_index, len(known))) % 2**63,
        )
        return find_ref_rewards(rows, queries, known, sampling if self._player is None else None, self.processes)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's logs, with the means of the iterations that ended since the last ones."""
        if self.is_in_train and self.run_state.unlogged and logs.keys() & {"loss", "train_runtime"}:
            logs = {**logs, **mean_of_numbers(self.run_state.take_unlogged())}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reward, KL and wins over pi_init on held-out prompts, see `held_out.held_out_metrics`.

        Samples as training does, with separate random numbers: training's are unchanged.

        Raises:
            ValueError: without prompts or reward functions.
            RuntimeError, TimeoutError: if a reward function fails; in the middle of training a checkpoint is written
                first.
        """
        self._check_gradient_norms()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs eval_dataset, held-out prompts")
        if self.scorer is None:
            raise ValueError("evaluate() needs reward_funcs or reward_model")
        if not self.is_in_train:
            self._start_reporters()
        return held_out.evaluate(self, dataset, metric_key_prefix, self._save_what_was_learned)

    def evaluation_steps(self) -> held_out.EvaluationSteps:
        """How `evaluate` asks the policy and pi_init, and scores their responses."""
        return held_out.EvaluationSteps(
            respond=self._episodes.with_reference,
            logprobs=self.policy_and_reference,
            score=lambda rows, episodes: self._scores_on_all_processes(rows, episodes)[1],
            layouts=self.layouts,
            pad_token_id=self.special_tokens.pad,
            end_token_ids=self.special_tokens.ends,
            decoder_start_token_id=self.special_tokens.decoder_start,
            in_lockstep=True,
            score_at_once=getattr(self._player, "environments", None) is not None,
            dtype=torch.float32,
        )

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_gradient_norms()
        super()._save_checkpoint(model, trial)

    def _process_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.run_state.state_dict()
        if self._ahead is None:
            return state
        next_iteration = self.num_iterations_done + (state["iteration"] is not None)
        return {**state, "rollouts_ahead": self._ahead.state_dict(next_iteration)}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        with_controller = not self._overridden.keys() & CONTROLLER_OPTIONS
        device, step = self.accelerator.device, self.state.global_step
        self.run_state.load_state_dict(state, device, step, with_controller, with_iteration=not self._overridden)
        if self._ahead is not None and not self._overridden:
            self._ahead.load_state_dict(state.get("rollouts_ahead", []))
        self._timer = StageTimer()

    def _numbers_to_agree(self, step: int, state: dict[str, Any]) -> list[int]:
        iteration = state["iteration"]
        position = -1 if iteration is None else iteration["position"]
        return [*super()._numbers_to_agree(step, state), state["num_iterations_done"], position]

    def _why_finished(self, step: int, state: dict[str, Any]) -> str | None:
        args = self.args
        if args.total_episodes is not None and self.run_state.episodes_in(state) >= args.total_episodes:
            return f"it has reached total_episodes={args.total_episodes}; set more to continue"
        kl = state.get("last_kl")
        if args.max_kl is not None and kl is not None and state["iteration"] is None and kl > args.max_kl:
            return (
                f"its KL, {kl:.2f} nats per response, is above max_kl={args.max_kl}; set a larger max_kl to continue"
            )
        return super()._why_finished(step, state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights of policy and value model, whatever the engine; all processes call it."""
        if is_sharded(self.accelerator) and not self.is_in_train:
            self._prepare_for_updates()
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))  # the Trainer writes none
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint)
        elif self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_policy_and_value(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(os.fspath(self.state.best_model_checkpoint), self.model)
        note_loaded_step(self.state)


def _as_rows(queries: list[Tensor], prompts: list[Any] | None, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What a classic script holds in columns, as rows of a data set."""
    rows: list[dict[str, Any]] = [{"input_ids": query} for query in queries]
    for name, values in {**columns, **({} if prompts is None else {"prompt": prompts})}.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    return rows
