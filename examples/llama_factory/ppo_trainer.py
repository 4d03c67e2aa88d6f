"""LLaMA-Factory's PPO stage on `trl_apa`: a `CustomPPOTrainer` that its `run_ppo` calls as it calls its own.

`train.py` beside this file runs LLaMA-Factory with it, unedited; `docs/llama_factory.md` says more.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_CALLBACKS, TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_apa import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl_apa.distributed.sharded import prepare_frozen
from trl_apa.models.adapters import held_repeatable, only_adapter
from trl_apa.models.checkpointing import renamed_method
from trl_apa.models.classic_value_head import HEAD_WEIGHTS, SummaryHead
from trl_apa.models.logprobs import forward_parameters, last_hidden_states
from trl_apa.models.network_parts import inner_model
from trl_apa.redaction import errors_without_secrets


# Where LLaMA-Factory keeps a value head, beside the model or the adapter.
VALUE_HEAD_FILE = "value_head.safetensors"
# The reward model's adapter on the policy's base, as LLaMA-Factory's `create_reward_model` calls it.
REWARD_ADAPTER = "reward"
REWARD_TYPES = ("lora", "oft", "full", "api")
# JSON in the environment: options of `PPOConfig` for which LLaMA-Factory's YAML has no names, `loss_type` above all.
MORE_OPTIONS = "TRL_APA_OPTIONS"
# Options of training_args that steer a loop, a hub or an evaluation which the PPO stage does not have.
NOT_IN_PPO = {
    *("max_steps", "num_train_epochs", "resume_from_checkpoint", "ignore_data_skip", "auto_find_batch_size"),
    *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_on_start", "load_best_model_at_end"),
    *("save_strategy", "push_to_hub", "remove_unused_columns", "neftune_noise_alpha", "label_names"),
}
# Options of finetuning_args for which LLaMA-Factory makes the optimizer itself.
CUSTOM_OPTIMIZERS = ("use_galore", "use_apollo", "loraplus_lr_ratio", "use_adam_mini", "use_muon")
# Those that step inside the backward pass, or replace how gradients are clipped.
NOT_SUPPORTED = ("use_badam", "galore_layerwise", "apollo_layerwise")


class CustomPPOTrainer(PPOTrainer):
    """PPO with LLaMA-Factory's arguments, models and callbacks. A step of it is an iteration, as there.

    Args:
        model_args, training_args, finetuning_args, generating_args: LLaMA-Factory's, as its parser leaves them.
        callbacks: get `training_args`, and a `TrainerState` that counts iterations.
        model: value-head wrapper around the policy; its head is the critic.
        reward_model: of `create_reward_model`. With `reward_model_type` "full" a value-head wrapper, with "api" a URL,
            with "lora" None: the reward model then is the adapter "reward" of the policy, and its head lies in the
            buffers `reward_head_weight` and `reward_head_bias` of `model`.
        ref_model: pi_init; None for adapters, whose base it is.
        tokenizer, data_collator, train_dataset: rows with `input_ids`; the collator pads them.
        processor: saved beside the model, if there is one.
        eval_dataset: should be None.

    Raises:
        ValueError: naming the option that is not supported, or that does not fit another.
    """

    def __init__(
        self,
        model_args: Any,
        training_args: TrainingArguments,
        finetuning_args: Any,
        generating_args: Any,
        callbacks: list[Any] | None,
        model: AutoModelForCausalLMWithValueHead,
        reward_model: AutoModelForCausalLMWithValueHead | str | None,
        ref_model: AutoModelForCausalLMWithValueHead | None,
        tokenizer: Any,
        processor: Any,
        data_collator: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
    ):
        check_arguments(finetuning_args, model, reward_model, train_dataset, eval_dataset)
        batch_size = rollouts_per_step(training_args, finetuning_args)
        self.max_ppo_steps = ppo_steps(training_args, batch_size, len(train_dataset))
        config = ppo_config(model_args, training_args, finetuning_args, generating_args, self.max_ppo_steps)
        config.gradient_checkpointing |= taken_over_checkpointing(model.pretrained_model)
        super().__init__(
            config=config,
            model=model,
            ref_model=ref_model,
            tokenizer=tokenizer,
            dataset=train_dataset,
            optimizer=custom_optimizer(model, training_args, finetuning_args),
            data_collator=data_collator,
            value_model="head",  # with the other losses too: LLaMA-Factory has no place for a network of its own
        )
        self.training_args, self.processor = training_args, processor
        self.generation_options = sampling_options(generating_args, tokenizer)
        self.reward_model = reward_model
        if isinstance(reward_model, AutoModelForCausalLMWithValueHead):
            reward_model.requires_grad_(False).eval()
            self.reward_head = reward_model.v_head.to(self.accelerator.device)
            self.reward_network = self._on_device(reward_model.pretrained_model)
        elif reward_model is None:
            head = frozen_head(model.reward_head_weight, model.reward_head_bias)
            self.reward_head = head.to(self.accelerator.device)
        # Of LLaMA-Factory's callbacks, which count iterations. The Trainer's own state counts optimizer steps.
        self.ppo_state = TrainerState(
            max_steps=self.max_ppo_steps,
            num_train_epochs=math.ceil(self.max_ppo_steps / len(self.dataloader)),
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
        )
        self.ppo_control = TrainerControl()
        self.ppo_callbacks = CallbackHandler(
            [*DEFAULT_CALLBACKS, *(callbacks or [])], model, tokenizer, self.optimizer, self.lr_scheduler
        )

    def ppo_train(self, resume_from_checkpoint: str | None = None) -> None:
        """Sample, score and learn for `max_steps` iterations, or `num_train_epochs` passes over the prompts.

        Raises:
            ValueError: for `resume_from_checkpoint`: checkpoints of this stage hold no optimizer.
        """
        if resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: checkpoints of the PPO stage hold no optimizer; "
                "give the checkpoint as model_name_or_path or adapter_name_or_path to begin again from its weights"
            )
        args, state = self.training_args, self.ppo_state
        losses: list[float] = []
        rewards: list[float] = []
        self._start_reporters()
        self._tell("on_train_begin")
        batches = self._batches()
        for step in tqdm(range(1, self.max_ppo_steps + 1), disable=not self.is_local_process_zero()):
            queries, responses = self.get_inputs(next(batches))
            scores = self.get_rewards(queries, responses)
            stats = self.step(queries, responses, scores)
            losses.append(float(stats["ppo/loss/total"]))
            rewards.append(float(self.accelerator.gather(torch.stack(scores).to(self.accelerator.device)).mean()))
            state.global_step, state.epoch = step, step / len(self.dataloader)
            self._tell("on_step_end")
            if step % args.logging_steps == 0:
                logs = {"loss": sum(losses) / len(losses), "reward": sum(rewards) / len(rewards)}
                self._log_step(stats, logs, queries, responses, scores)
                losses, rewards = [], []
            if step % args.save_steps == 0:
                self.save_model(os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}"))
                self._tell("on_save")
            if self.ppo_control.should_epoch_stop or self.ppo_control.should_training_stop:
                break
        self._tell("on_train_end")

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.dataloader

    def _tell(self, event: str, *arguments: Any) -> None:
        call = getattr(self.ppo_callbacks, event)
        self.ppo_control = call(self.training_args, self.ppo_state, self.ppo_control, *arguments)

    def _log_step(
        self,
        stats: dict[str, Any],
        means: dict[str, float],
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
    ) -> None:
        """All statistics and texts to the trackers; to the callbacks, and the plots, what LLaMA-Factory logs."""
        logs = {**means, "learning_rate": stats["ppo/learning_rate"], "epoch": round(self.ppo_state.epoch, 2)}
        if self.args.report_to:
            texts = {
                name: self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for name, tokens in (("query", queries), ("response", responses))
            }
            self.log_stats({**stats, **logs}, texts, scores)
        if self.is_local_process_zero():
            tqdm.write(str({name: round(value, 8) for name, value in logs.items()}))
        self.ppo_state.log_history.append({**logs, "step": self.ppo_state.global_step})
        self._tell("on_log", dict(logs))

    def get_inputs(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Queries of a batch, without padding, and what the policy answers: 1-D token ids, EOS included."""
        queries = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        size = self.args.per_device_train_batch_size
        # A new processor each time, because `generate` may change the list.
        processors = LogitsProcessorList([InfNanRemoveLogitsProcessor()])
        options = {"batch_size": size, "return_prompt": False, "logits_processor": processors}
        return queries, self.generate(queries, **options, **self.generation_options)

    @torch.no_grad()
    def get_rewards(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        """The reward model's score of each query with its response, 0-D float32 on the CPU.

        Of a model it is the value after the last token; a server reads texts with their special tokens.
        """
        sequences = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        size = self.args.per_device_train_batch_size
        scores = [score for i in range(0, len(sequences), size) for score in self._scores_of(sequences[i : i + size])]
        return [score.float().cpu() for score in scores]

    def _scores_of(self, sequences: list[Tensor]) -> Tensor:
        if isinstance(self.reward_model, str):
            url, texts = self.reward_model, self.tokenizer.batch_decode(sequences, skip_special_tokens=False)
            return self.processes.together(lambda: torch.tensor(scores_of_server(url, texts)))
        with self.accelerator.autocast():
            if self.reward_model is not None:
                return last_values(self.reward_network, self.reward_head, sequences)
            with self._module_for_generation() as module:
                return module.run_with_policy(self._adapter_scores(sequences))

    def _adapter_scores(self, sequences: list[Tensor]) -> Any:
        def score(policy: Any) -> Tensor:
            with held_repeatable(policy), only_adapter(policy, REWARD_ADAPTER):
                return last_values(policy, self.reward_head, sequences)

        return score

    def _on_device(self, network: Any) -> Any:
        """The reward model where it computes; a quantised one is there already."""
        if getattr(network, "is_quantized", False):
            return network
        return prepare_frozen(network, self.accelerator.unwrap_model(self.model).policy, self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As ever, and the value head and the processor where LLaMA-Factory looks for them."""
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            shutil.copyfile(os.path.join(folder, HEAD_WEIGHTS), os.path.join(folder, VALUE_HEAD_FILE))
            if self.processor is not None:
                self.processor.save_pretrained(folder)

    def save_state(self) -> None:
        """Write `trainer_state.json`, from which LLaMA-Factory plots loss and reward."""
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            self.ppo_state.save_to_json(os.path.join(self.args.output_dir, TRAINER_STATE_NAME))


# ---- options ----


def check_arguments(
    finetuning_args: Any, model: Any, reward_model: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    """Raise ValueError for what this stage cannot do, before anything is loaded or moved."""
    if eval_dataset is not None:
        raise ValueError("eval_dataset: the PPO stage does not evaluate; leave out eval_dataset and val_size")
    if not hasattr(train_dataset, "__len__"):
        raise ValueError("train_dataset has no length: set streaming to false")
    for name in NOT_SUPPORTED:
        if getattr(finetuning_args, name, False):
            raise ValueError(f"{name} is not supported in the PPO stage: leave it out")
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise ValueError(
            f"model is a {type(model).__name__}; it should be trl_apa's AutoModelForCausalLMWithValueHead"
        )
    kind = finetuning_args.reward_model_type
    wanted = {"full": AutoModelForCausalLMWithValueHead, "api": str}.get(kind, type(None))
    if kind not in REWARD_TYPES:
        raise ValueError(f"reward_model_type={kind!r}; it should be one of {', '.join(REWARD_TYPES)}")
    if not isinstance(reward_model, wanted):
        raise ValueError(
            f"reward_model is a {type(reward_model).__name__}; with reward_model_type={kind!r} it should be "
            f"{'None' if wanted is type(None) else wanted.__name__}"
        )
    if reward_model is not None:
        return
    adapters = getattr(model.pretrained_model, "peft_config", {})
    if REWARD_ADAPTER not in adapters or not hasattr(model, "reward_head_weight"):
        raise ValueError(
            f"reward_model_type={kind!r} needs an adapter {REWARD_ADAPTER!r} on model and its head in model's "
            "buffers; LLaMA-Factory's create_reward_model puts them there"
        )


def rollouts_per_step(training_args: TrainingArguments, finetuning_args: Any) -> int:
    """Responses of one process in one iteration."""
    accumulated = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return accumulated * finetuning_args.ppo_buffer_size


def ppo_steps(training_args: TrainingArguments, batch_size: int, num_rows: int) -> int:
    """Iterations of the run: `max_steps`, or what `num_train_epochs` passes over the prompts make.

    Raises:
        ValueError: if the prompts do not fill one iteration.
    """
    rows = batch_size * training_args.world_size
    if num_rows < rows:
        raise ValueError(
            f"train_dataset has {num_rows} rows, and one iteration takes {rows}: per_device_train_batch_size * "
            "gradient_accumulation_steps * ppo_buffer_size on each process; lower one of them"
        )
    if training_args.max_steps > 0:
        return int(training_args.max_steps)
    return math.ceil(training_args.num_train_epochs * (num_rows // rows))


def ppo_config(
    model_args: Any, training_args: TrainingArguments, finetuning_args: Any, generating_args: Any, max_steps: int
) -> PPOConfig:
    """LLaMA-Factory's options as ours. What training_args say of machine, precision and optimizer is kept.

    Over them come those in the environment's `TRL_APA_OPTIONS`, JSON: `{"loss_type": "apa", "kl_coef": 0.1}`, say.
    """
    kept = {
        field.name: getattr(training_args, field.name)
        for field in fields(TrainingArguments)
        if field.init and field.name not in NOT_IN_PPO and hasattr(training_args, field.name)
    }
    batch_size = rollouts_per_step(training_args, finetuning_args)
    if generating_args.do_sample:  # the update takes its log-probs at this temperature
        kept |= {name: getattr(generating_args, name) for name in ("temperature", "top_p", "top_k")}
    if generating_args.max_new_tokens > 0:
        kept["max_completion_length"] = generating_args.max_new_tokens
    given = json.loads(os.environ.get(MORE_OPTIONS, "{}"))
    if given.get("loss_type", "ppo") == "ppo":  # which alone adapts its KL coefficient
        kept["target"] = finetuning_args.ppo_target
    kept |= {
        "model_name": model_args.model_name_or_path,
        "batch_size": batch_size,
        "ppo_epochs": finetuning_args.ppo_epochs,
        "use_score_scaling": finetuning_args.ppo_score_norm,
        "use_score_norm": finetuning_args.ppo_score_norm,
        "whiten_rewards": finetuning_args.ppo_whiten_rewards,
        "remove_unused_columns": False,  # the collator reads what it likes
        "save_strategy": "no",
        "steps": max_steps * batch_size,  # what the schedule of the learning rate stretches over
    }
    return PPOConfig(**kept | given)


def taken_over_checkpointing(network: Any) -> bool:
    """Whether LLaMA-Factory has turned gradient checkpointing on. Afterwards it is off, for the trainer to turn on.

    LLaMA-Factory replaces the method that does so by one that does not know newer transformers' arguments.
    """
    base = inner_model(network)
    vars(base).pop("gradient_checkpointing_enable", None)
    was_on = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if was_on:
        renamed_method(base, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
    return was_on


def custom_optimizer(model: nn.Module, training_args: TrainingArguments, finetuning_args: Any) -> Any:
    """LLaMA-Factory's own optimizer if its options ask for one (LoRA+, GaLore, ...); otherwise None, for `optim`."""
    if not any(getattr(finetuning_args, name, None) for name in CUSTOM_OPTIMIZERS):
        return None
    from llamafactory.train.trainer_utils import create_custom_optimizer

    return create_custom_optimizer(model, training_args, finetuning_args)


def sampling_options(generating_args: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of `generate`. Added special tokens end a response, too: templates put their stop words there."""
    known = GenerationConfig()
    options = {name: value for name, value in generating_args.to_dict().items() if hasattr(known, name)}
    added = getattr(tokenizer, "extra_special_tokens", None) or getattr(tokenizer, "additional_special_tokens", None)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([str(token) for token in added or []])]
    return {**options, "eos_token_id": ends}


# ---- rewards ----


def frozen_head(weight: Tensor, bias: Tensor) -> SummaryHead:
    """A value head with these weights, `(1, H)` and `(1,)`, in float32."""
    head = SummaryHead(weight.shape[1])
    head.summary.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return head.requires_grad_(False).eval()


def last_values(network: Any, head: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """What `head` reads after the last token of each sequence, `(B,)`, reward units.

    Args:
        network: a decoder, of which the head reads the last hidden states.
        head: hidden state -> value.
        sequences: `B` 1-D token ids.
    """
    device = next(network.parameters()).device
    lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=device)
    ids_BT = pad_sequence(list(sequences), batch_first=True).to(device)
    mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
    # Logits of every position would take most of the memory, and nobody reads them.
    few = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(inner_model(network)) else {}
    output = network(
        input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, return_dict=True, use_cache=False, **few
    )
    values_BT = head(last_hidden_states(output)[torch.arange(len(sequences), device=device), lengths_B - 1])
    return values_BT.squeeze(-1)


def scores_of_server(url: str, texts: list[str]) -> list[float]:
    """Scores of a server that speaks LLaMA-Factory's protocol: POST `{"messages": texts}`, get `{"scores": ...}`.

    Raises:
        RuntimeError: if it cannot be reached, or answers with an error.
        ValueError: if it does not answer with one number for each text.
    """
    import requests

    with errors_without_secrets({"reward_model": url}):
        try:
            answer = requests.post(url, json={"model": "model", "messages": texts}, timeout=600)
            answer.raise_for_status()
            scores = answer.json().get("scores")
        except requests.RequestException as error:
            raise RuntimeError(f"reward_model={url!r} gave no scores: {error}") from error
    if not isinstance(scores, list) or len(scores) != len(texts):
        told = f"{len(scores)} scores" if isinstance(scores, list) else f"scores={scores!r}"
        raise ValueError(
            f"reward_model answered {len(texts)} texts with {told}; it should be a list of as many numbers"
        )
    return [float(score) for score in scores]
