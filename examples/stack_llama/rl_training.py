"""Stage three of StackLLaMA, aligned by APA: LoRA adapters on an 8-bit model learn what answers people vote for.

The policy is a language model that was fine-tuned on the answers, the reward a classifier with one output that was
trained on pairs of them. See `examples/README.md`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import (
    Adafactor,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    Pipeline,
    PreTrainedTokenizerBase,
    pipeline,
)

from trl_apa import APAConfig, APATrainer, AutoModelForCausalLMWithValueHead, LengthSampler, set_seed
from trl_apa.data import load_table


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    reward_model_name: str = field(metadata={"help": "Classifier with one output: folder or hub name."})
    model_name: str = option("huggyllama/llama-7b", "Policy, after supervised fine-tuning: folder or hub name.")
    tokenizer_name: str | None = option(None, "Tokenizer of both models; the policy's by default.")
    dataset_name: str = option("lvwerra/stack-exchange-paired", "Hub name or file with a column 'question'.")
    dataset_rows: int = option(100_000, "Questions that are read.")
    max_query_length: int = option(512, "Questions with as many tokens or more are left out.")
    loss_type: str = option("apa", "'apa', 'awr' or 'ppo'.")
    kl_coef: float | None = option(None, "lambda of APA and AWR.")
    init_kl_coef: float | None = option(None, "PPO only: initial coefficient of the KL penalty.")
    adap_kl_ctrl: bool | None = option(None, "PPO only: adapt that coefficient.")
    value_model: str = option("separate", "'separate': APA's, one more base; 'head': on the policy, as classic's.")
    learning_rate: float = option(1.41e-5, "Of adapters and value model.")
    adafactor: bool = option(False, "Adafactor instead of AdamW.")
    load_in_8bit: bool = option(True, "Load policy and reward model with bitsandbytes' int8 weights.")
    batch_size: int = option(8, "Questions an iteration and process.")
    mini_batch_size: int = option(1, "Rollouts a forward pass of the update.")
    gradient_accumulation_steps: int = option(8, "Forward passes an optimizer step.")
    ppo_epochs: int = option(4, "Passes over the rollouts of an iteration.")
    early_stopping: bool = option(False, "Leave out the passes that remain once the policy has moved too far.")
    target_kl: float = option(0.1, "How far is too far, nats a token.")
    output_min_length: int = option(32, "Least tokens of an answer.")
    output_max_length: int = option(128, "One more than the most tokens of an answer.")
    reward_baseline: float = option(0.0, "Subtracted from every reward.")
    steps: int = option(20_000, "Questions to learn from, on each process.")
    save_freq: int | None = option(None, "Save the adapter every this many iterations; only at the end by default.")
    output_dir: str = option("stack-llama-rl", "Where to.")
    log_with: str = option("none", "Tracker: 'wandb', 'tensorboard', ...")
    seed: int = option(0, "Of everything random.")


def build_config(script: ScriptArguments) -> APAConfig:
    return APAConfig(
        output_dir=script.output_dir,
        model_name=script.model_name,
        log_with=script.log_with,
        seed=script.seed,
        steps=script.steps,
        loss_type=script.loss_type,
        kl_coef=script.kl_coef,
        init_kl_coef=script.init_kl_coef,
        adap_kl_ctrl=script.adap_kl_ctrl,
        learning_rate=script.learning_rate,
        batch_size=script.batch_size,
        mini_batch_size=script.mini_batch_size,
        gradient_accumulation_steps=script.gradient_accumulation_steps,
        ppo_epochs=script.ppo_epochs,
        early_stopping=script.early_stopping,
        target_kl=script.target_kl,
        optimize_device_cache=True,
        remove_unused_columns=False,
    )


def build_dataset(script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Questions as prompts, those that are too long left out."""
    dataset = load_table(script.dataset_name, data_dir="data/rl", verification_mode="no_checks")
    dataset = dataset.select(range(min(script.dataset_rows, len(dataset))))

    def to_prompts(rows: dict) -> dict:
        queries = [f"Question: {question}\n\nAnswer: " for question in rows["question"]]
        return {"query": queries, "input_ids": tokenizer(queries)["input_ids"]}

    dataset = dataset.map(to_prompts, batched=True, remove_columns=dataset.column_names)
    return dataset.filter(lambda row: len(row["input_ids"]) < script.max_query_length).with_format("torch")


def collator(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def build_model(script: ScriptArguments) -> AutoModelForCausalLMWithValueHead:
    """LoRA adapters on a base that stays as it is, on this process's device: a GPU, or the CPU where there is none."""
    lora = LoraConfig(r=16, lora_alpha=32, bias="none", task_type="CAUSAL_LM")
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        script.model_name,
        load_in_8bit=script.load_in_8bit,
        device_map={"": Accelerator().device},
        peft_config=lora,
    )


def build_optimizer(script: ScriptArguments, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """Adafactor at a constant rate if it is asked for; without one the trainer makes AdamW."""
    if not script.adafactor:
        return None
    return Adafactor(
        filter(lambda p: p.requires_grad, model.parameters()),
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        lr=script.learning_rate,
    )


def build_reward_pipeline(script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> Pipeline:
    quantization = BitsAndBytesConfig(load_in_8bit=True) if script.load_in_8bit else None
    reward_pipeline = pipeline(
        "sentiment-analysis",
        model=script.reward_model_name,
        tokenizer=tokenizer,
        device_map={"": Accelerator().device},
        model_kwargs={"quantization_config": quantization},
        return_token_type_ids=False,
    )
    # The classifier reads its score before the padding, which is this tokenizer's.
    reward_pipeline.model.config.pad_token_id = tokenizer.pad_token_id
    return reward_pipeline


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    # bitsandbytes says before every int8 product that its input is not in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = build_config(script)
    set_seed(config.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer_name or script.model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = build_dataset(script, tokenizer)
    model = build_model(script)
    trainer = APATrainer(
        config,
        model,
        tokenizer=tokenizer,
        dataset=dataset,
        data_collator=collator,
        optimizer=build_optimizer(script, model),
        value_model=script.value_model,
    )
    reward_pipeline = build_reward_pipeline(script, tokenizer)

    generation_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.pad_token_id,
        # No token has this id: every answer is as long as its sampler says.
        "eos_token_id": 100_000,
    }
    output_length = LengthSampler(script.output_min_length, script.output_max_length)
    for iteration, batch in enumerate(tqdm(trainer.dataloader)):
        if iteration >= config.total_ppo_epochs:
            break
        question_tensors = batch["input_ids"]
        response_tensors = trainer.generate(
            question_tensors, return_prompt=False, length_sampler=output_length, **generation_kwargs
        )
        batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

        texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
        outputs = reward_pipeline(texts, top_k=None, function_to_apply="none", batch_size=16, truncation=True)
        rewards = [torch.tensor(output[0]["score"] - script.reward_baseline) for output in outputs]

        stats = trainer.step(question_tensors, response_tensors, rewards)
        trainer.log_stats(stats, batch, rewards)
        if script.save_freq and iteration and iteration % script.save_freq == 0:
            trainer.save_pretrained(Path(script.output_dir) / f"step_{iteration}")
    trainer.save_pretrained(script.output_dir)


if __name__ == "__main__":
    main()
