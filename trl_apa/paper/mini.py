"""A curve in small: the options of its file about the algorithm, on the task of the demo, on the CPU."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback

from trl_apa.config import APAConfig
from trl_apa.demo.evaluation import measure_responses
from trl_apa.demo.networks import decode, encode, sample
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import Ingredients, prepare, quiet_libraries, torch_threads
from trl_apa.demo.report import Report
from trl_apa.models import independent_copy
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.trainer import APATrainer


# What a curve's file says of these counts in small too; models, data, sizes and rates are the task's own.
ONLINE_OPTIONS = frozenset(
    "loss_type kl_coef init_kl_coef adap_kl_ctrl target horizon cliprange cliprange_value gamma gae_lambda "
    "scale_rewards whiten_advantages num_epochs_per_batch".split()
)
OFFLINE_OPTIONS = frozenset(
    "loss_type kl_coef gamma gae_lambda whiten_advantages value_epochs freeze_value learn_state_normaliser expectile "
    "cql_coef polyak bc_coef ilql_beta".split()
)


@dataclass(frozen=True)
class MiniSizes:
    """How small.

    Args:
        iterations: of a curve that samples; epochs of one that does not.
        batch_size: rollouts an iteration.
        num_responses: of the fixed data.
        learning_rate: of policy and value model; it falls linearly to 0.
        sft_steps, num_pairs, reward_steps: of the task, see `DemoOptions`.
    """

    iterations: int = 30
    batch_size: int = 64
    num_responses: int = 2048
    learning_rate: float = 3e-4
    sft_steps: int = 300
    num_pairs: int = 1500
    reward_steps: int = 150


class MiniTask:
    """The fine-tuned policy and the reward model that all curves start from; made when the first curve needs them.

    Args:
        folder: where they are saved.
        sizes: how small.
    """

    def __init__(self, folder: Path, sizes: MiniSizes):
        self.folder, self.sizes = folder, sizes
        self.options = replace(
            DemoOptions(),
            output_dir=folder,
            batch_size=sizes.batch_size,
            sft_steps=sizes.sft_steps,
            num_pairs=sizes.num_pairs,
            reward_steps=sizes.reward_steps,
        )
        self._made: Ingredients | None = None

    @property
    def made(self) -> Ingredients:
        if self._made is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = prepare(self.options, Report(Console()))
        return self._made

    def policy(self) -> torch.nn.Module:
        """A new copy of the fine-tuned model."""
        return independent_copy(self.made.initial_policy)


def run_mini(task: MiniTask, command: str, options: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Run one curve and leave its log in `folder` as `trainer_state.json`, where the Trainer leaves its own.

    Args:
        task: shared by the curves of a figure.
        command: "train" or "offline".
        options: the curve's file.
        seed: of sampling and order.
        folder: of the run.
    """
    with quiet_libraries(), torch_threads(task.options.num_threads):
        run = _online if command == "train" else _offline
        rows = run(task, dict(options), seed, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}, indent=1) + "\n", encoding="utf-8")


def _online(task: MiniTask, options: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Reward, exact KL, gold reward, entropy and variety of the rollouts of each iteration, before its update."""
    sizes, made = task.sizes, task.made
    kept = {name: value for name, value in options.items() if name in ONLINE_OPTIONS}
    config = APAConfig(
        output_dir=str(folder),
        learning_rate=sizes.learning_rate,
        lr_scheduler_type="linear",
        steps=sizes.batch_size * sizes.iterations,
        batch_size=sizes.batch_size,
        mini_batch_size=8,
        max_completion_length=task.options.max_new_tokens,
        seed=seed,
        **_common(),
        **kept,
    )
    policy = task.policy()
    trainer = APATrainer(config, policy, tokenizer=made.tokenizer)
    rng = random.Random(seed)
    rows = []
    for _ in range(sizes.iterations):
        prompts = rng.choices(made.corpus.train_prompts, k=sizes.batch_size)
        queries = encode(made.tokenizer, prompts)
        responses = trainer.generate(queries, return_prompt=False, batch_size=sizes.batch_size)
        scores = made.reward_model(prompts, responses)
        measured = measure_responses(policy, made.initial_policy, made.tokenizer, prompts, responses, scores)
        log = {"apa/mean_scores": measured.pop("proxy_reward"), "objective/kl": measured.pop("kl"), **measured}
        rows.append({"step": trainer.state.global_step, **log})
        trainer.step(queries, responses, scores)
    return rows


def _offline(task: MiniTask, options: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Reward and KL of samples to held-out prompts after each epoch over the fixed data."""
    sizes, made = task.sizes, task.made
    kept = {name: value for name, value in options.items() if name in OFFLINE_OPTIONS}
    config = OfflineConfig(
        output_dir=str(folder),
        learning_rate=sizes.learning_rate,
        lr_scheduler_type="linear",
        num_train_epochs=sizes.iterations,
        per_device_train_batch_size=min(32, sizes.num_responses),
        per_device_eval_batch_size=512,
        max_completion_length=task.options.max_new_tokens,
        eval_strategy="epoch",
        save_strategy="no",
        seed=seed,
        **_common(),
        **kept,
    )

    def proxy_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        responses = [torch.tensor(ids) for ids in completion_ids]
        return [float(score) for score in made.reward_model(prompts, responses)]

    trainer = OfflineAPATrainer(
        config,
        task.policy(),
        processing_class=made.tokenizer,
        train_dataset=_fixed_rows(task),
        eval_dataset=[{"prompt": prompt} for prompt in made.corpus.eval_prompts * 4],
        reward_funcs=proxy_reward,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.evaluate()
    before = list(trainer.state.log_history)  # which `train` begins anew
    trainer.train()
    return [row for row in (*before, *trainer.state.log_history) if "eval_reward" in row]


def _fixed_rows(task: MiniTask) -> list[dict[str, Any]]:
    """The fine-tuned model's own answers with the reward model's scores: the same for every curve and seed."""
    made, count = task.made, task.sizes.num_responses
    prompts = random.Random(0).choices(made.corpus.train_prompts, k=count)
    responses = sample(made.initial_policy, made.tokenizer, prompts, task.options.max_new_tokens, seed=7)
    scores = made.reward_model(prompts, responses)
    rows = zip(prompts, responses, decode(made.tokenizer, responses), scores, strict=True)
    return [
        {"prompt": prompt, "completion_ids": response.tolist(), "text": text, "reward": float(score)}
        for prompt, response, text, score in rows
    ]


def _common() -> dict[str, Any]:
    return {"max_grad_norm": 1.0, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 10**6}
