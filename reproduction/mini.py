"""A curve at mini scale: the algorithm options of its file, on the demo's task, on the CPU."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reproduction.figures import Curve
from reproduction.sizes import UNREAD, MiniSizes
from trl_apa.config.apa import APAConfig
from trl_apa.demo.networks import decode, encode, sample
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import Ingredients, measure, prepare, quiet_libraries, torch_threads
from trl_apa.demo.report import Report
from trl_apa.files import replace_text
from trl_apa.models import independent_copy
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.trainer.apa import APATrainer


# What a curve's file says of these counts in small too; models, data, sizes and rates are the task's own.
ONLINE_OPTIONS = frozenset(
    "loss_type kl_coef init_kl_coef adap_kl_ctrl target horizon cliprange cliprange_value gamma gae_lambda "
    "scale_rewards whiten_advantages num_epochs_per_batch".split()
)
OFFLINE_OPTIONS = frozenset(
    "loss_type kl_coef gamma gae_lambda whiten_advantages value_epochs freeze_value learn_state_normaliser expectile "
    "cql_coef polyak bc_coef ilql_beta".split()
)
KEPT_OPTIONS = {"train": ONLINE_OPTIONS, "offline": OFFLINE_OPTIONS}

# The same for every curve.
COMMON = {"max_grad_norm": 1.0, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 10**6}
FIXED: dict[str, dict[str, Any]] = {
    "train": {**COMMON, "mini_batch_size": 8},
    "offline": {**COMMON, "per_device_train_batch_size": 32, "save_strategy": "no"},
}

Log = list[dict[str, Any]]


class MiniTask:
    """The fine-tuned policy and the reward model that all curves start from; made when the first curve needs them.

    Args:
        folder: where they are saved.
        sizes: how small.
    """

    def __init__(self, folder: Path, sizes: MiniSizes):
        self.folder, self.sizes = folder, sizes
        self.options = replace(task_options(sizes), output_dir=folder)

    @cached_property
    def made(self) -> Ingredients:
        self.folder.mkdir(parents=True, exist_ok=True)
        with quiet_libraries(), torch_threads(self.options.num_threads):
            return prepare(self.options, Report(Console()))

    @property
    def start(self) -> Path:
        """Folder of the fine-tuned model, which is made if it is not there."""
        path = self.folder / "sft_model"
        if not (path / "config.json").is_file():
            _ = self.made
        return path

    def policy(self) -> PreTrainedModel:
        """A new copy of the fine-tuned model."""
        return independent_copy(self.made.initial_policy)

    def measure(self, policy: PreTrainedModel) -> dict[str, float]:
        """What the demo measures before and after, of this policy.

        Raises:
            FloatingPointError: if a weight is not finite.
        """
        if not all(parameter.isfinite().all() for parameter in policy.parameters()):
            raise FloatingPointError("the policy has weights that are not finite")
        found = measure(self.options, replace(self.made, policy=policy)).metrics
        named = {"eval_reward": found.pop("proxy_reward"), "eval_kl": found.pop("kl")}
        return {**named, **{f"eval_{name}": value for name, value in found.items()}}

    @cached_property
    def fixed_rows(self) -> list[dict[str, Any]]:
        """The fine-tuned model's own answers with the reward model's scores, from which the offline curves learn."""
        made, count = self.made, self.sizes.num_responses
        prompts = random.Random(0).choices(made.corpus.train_prompts, k=count)
        responses = sample(made.initial_policy, made.tokenizer, prompts, self.options.max_new_tokens, seed=7)
        scores = made.reward_model(prompts, responses)
        rows = zip(prompts, responses, decode(made.tokenizer, responses), scores, strict=True)
        return [
            {"prompt": prompt, "completion_ids": response.tolist(), "text": text, "reward": float(score)}
            for prompt, response, text, score in rows
        ]


def algorithm_options(command: str, curve: Curve) -> dict[str, Any]:
    """The options of a curve that apply at mini scale.

    Raises:
        ValueError: if there is no `loss_type` among them.
    """
    kept = {name: value for name, value in curve.options().items() if name in KEPT_OPTIONS[command]}
    options = {**kept, **curve.mini}
    if "loss_type" not in options:
        raise ValueError(f"{curve.file} has no loss_type")
    return options


def run_name(command: str, options: Mapping[str, Any], seed: int, sizes: MiniSizes) -> str:
    """A name that runs share if all that they are given is the same: options, sizes, task and seed."""
    read = {name: size for name, size in asdict(sizes).items() if name not in UNREAD[command]}
    given = [command, dict(options), FIXED[command], read, _task_of(sizes)]
    return f"{command}-{options['loss_type']}-{_digest(given)}-seed{seed}"


def task_folder(folder: Path, sizes: MiniSizes) -> Path:
    """The paths of the fine-tuned model and the reward model, next to the runs in `folder`."""
    return folder / f"task-{_digest(_task_of(sizes))}"


def task_options(sizes: MiniSizes) -> DemoOptions:
    """The task as the demo knows it."""
    return DemoOptions(
        batch_size=sizes.batch_size,
        sft_steps=sizes.sft_steps,
        num_pairs=sizes.num_pairs,
        reward_steps=sizes.reward_steps,
        samples_per_prompt=sizes.samples_per_prompt,
    )


def _task_of(sizes: MiniSizes) -> dict[str, Any]:
    """What the fine-tuned model and the reward model depend on, and how they are measured."""
    alignment = {"output_dir", "loss_type", "iterations", "kl_coef", "learning_rate", "batch_size"}
    return {name: value for name, value in asdict(task_options(sizes)).items() if name not in alignment}


def _digest(content: Any) -> str:
    return sha256(json.dumps(_with_floats(content), sort_keys=True).encode()).hexdigest()[:8]


def _with_floats(content: Any) -> Any:
    """1 and 1.0 are the same option."""
    if isinstance(content, dict):
        return {name: _with_floats(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_floats(value) for value in content]
    return float(content) if isinstance(content, int) and not isinstance(content, bool) else content


def run_mini(task: MiniTask, command: str, options: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Run one curve. Leaves in `folder` its options, its policy, and at last its log as `trainer_state.json`.

    A run whose gradients or weights are no longer finite ends there, with what was measured before.

    Args:
        task: shared by the curves of a figure.
        command: "train" or "offline".
        options: of `algorithm_options`.
        seed: of sampling and order.
        folder: of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "options.json", {"command": command, **options, "seed": seed, "sizes": asdict(task.sizes)})
    run = _online if command == "train" else _offline
    log: Log = []
    with quiet_libraries(), torch_threads(task.options.num_threads):
        try:
            run(task, config_of(command, options, seed, task.sizes, folder), log)
        except FloatingPointError as error:
            log.append({"ended_early": str(error)})
    _write_json(folder / "trainer_state.json", {"log_history": log})


def config_of(
    command: str, options: Mapping[str, Any], seed: int, sizes: MiniSizes, folder: Path
) -> APAConfig | OfflineConfig:
    """The options of a curve's trainer.

    Args:
        command: "train" or "offline".
        options: of `algorithm_options`.
        seed: of sampling and order.
        sizes: how small.
        folder: of the run.

    Raises:
        ValueError: as the classes do.
    """
    given = {**FIXED[command], **options, "seed": seed, "output_dir": str(folder)}
    given["max_completion_length"] = task_options(sizes).max_new_tokens
    if command == "offline":
        return OfflineConfig(num_train_epochs=sizes.epochs, **given)
    return APAConfig(steps=sizes.batch_size * sizes.iterations, batch_size=sizes.batch_size, **given)


def _online(task: MiniTask, config: APAConfig, log: Log) -> None:
    """Generate, score, step; `log` gets the measurements on held-out prompts."""
    sizes, made = task.sizes, task.made
    policy = task.policy()
    trainer = APATrainer(config, policy, tokenizer=made.tokenizer)
    rng = random.Random(config.seed)
    log.append({"step": 0, "samples": 0, **task.measure(policy)})
    for iteration in range(1, sizes.iterations + 1):
        prompts = rng.choices(made.corpus.train_prompts, k=sizes.batch_size)
        queries = encode(made.tokenizer, prompts)
        responses = trainer.generate(queries, return_prompt=False, batch_size=sizes.batch_size)
        trainer.step(queries, responses, made.reward_model(prompts, responses))
        if _is_due(iteration, sizes.iterations, sizes.evaluations):
            samples = iteration * sizes.batch_size
            log.append({"step": trainer.state.global_step, "samples": samples, **task.measure(policy)})
    trainer.save_pretrained(f"{config.output_dir}/policy")


class _Measuring(TrainerCallback):
    """Calls `measure` with the optimizer step at the end of the epochs whose turn it is."""

    def __init__(self, sizes: MiniSizes, measure: Callable[[int], None]):
        self.sizes, self.measure = sizes, measure

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _is_due(round(state.epoch), self.sizes.epochs, self.sizes.evaluations):
            self.measure(state.global_step)


def _offline(task: MiniTask, config: OfflineConfig, log: Log) -> None:
    """Train on the fixed data; `log` gets the measurements on held-out prompts."""
    sizes, made = task.sizes, task.made
    trainer = OfflineAPATrainer(config, task.policy(), processing_class=made.tokenizer, train_dataset=task.fixed_rows)

    def note(step: int) -> None:
        with trainer.learned_policy() as policy:
            log.append({"step": step, "samples": sizes.num_responses, **task.measure(policy)})

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Measuring(sizes, note))
    note(0)
    trainer.train()
    trainer.save_pretrained(f"{config.output_dir}/policy")


def _is_due(number: int, last: int, evaluations: int) -> bool:
    """Whether one of `evaluations` evenly spaced moments up to `last` falls on `number`, and not before it."""
    return number * evaluations // last > (number - 1) * evaluations // last


def _write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=1) + "\n")
