"""A curve at mini scale: the algorithm options of its file, on a task that the CPU learns."""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reproduction.figures import Curve
from reproduction.sizes import DEMO, UNREAD, MiniSizes
from reproduction.tasks import Task, describe_task, digest
from trl_apa.commands.progress import Column, print_line, shown_figures
from trl_apa.config.apa import APAConfig
from trl_apa.demo.networks import encode
from trl_apa.demo.pipeline import quiet_libraries, torch_threads
from trl_apa.files import replace_text
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.trainer.apa import APATrainer


# What a curve's file says of these counts in small too; models, data, sizes and rates are the task's own.
ONLINE_OPTIONS = frozenset(
    "loss_type kl_coef init_kl_coef adap_kl_ctrl target horizon cliprange cliprange_value gamma gae_lambda "
    "scale_rewards whiten_advantages num_epochs_per_batch num_generations advantage_estimator group_normalization "
    "loss_aggregation kl_in normalizer num_ref_samples value_kl_coef".split()
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
# What is printed of an iteration or an epoch.
COLUMNS: tuple[Column, ...] = (
    ("reward", "apa/mean_scores", "{:+.3f}"),
    ("KL", "objective/kl", "{:.3f}"),
    ("held-out reward", "eval_reward", "{:+.3f}"),
    ("held-out gold reward", "eval_gold_reward", "{:+.3f}"),
    ("held-out KL", "eval_kl", "{:.3f}"),
)


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


def run_name(command: str, options: Mapping[str, Any], seed: int, sizes: MiniSizes, task: str = DEMO) -> str:
    """A name that runs share if all that they are given is the same: options, sizes, task and seed."""
    read = {name: size for name, size in asdict(sizes).items() if name not in UNREAD[command]}
    given = [command, dict(options), FIXED[command], read, describe_task(sizes, task)]
    return f"{command}-{options['loss_type']}-{digest(given)}-seed{seed}"


def run_mini(task: Task, command: str, options: Mapping[str, Any], seed: int, folder: Path) -> None:
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
    with quiet_libraries(), torch_threads(task.num_threads):
        try:
            run(task, config_of(command, options, seed, task, folder), log)
        except FloatingPointError as error:
            log.append({"ended_early": str(error)})
    _write_json(folder / "trainer_state.json", {"log_history": log})


def config_of(
    command: str, options: Mapping[str, Any], seed: int, task: Task, folder: Path
) -> APAConfig | OfflineConfig:
    """The options of a curve's trainer.

    Args:
        command: "train" or "offline".
        options: of `algorithm_options`.
        seed: of sampling and order.
        task: that it learns.
        folder: of the run.

    Raises:
        ValueError: as the classes do.
    """
    sizes = task.sizes
    given = {**FIXED[command], **options, "seed": seed, "output_dir": str(folder)}
    given["max_completion_length"] = task.max_new_tokens
    if command == "offline":
        return OfflineConfig(num_train_epochs=sizes.epochs, **given)
    return APAConfig(steps=sizes.batch_size * sizes.iterations, batch_size=sizes.batch_size, **given)


def _online(task: Task, config: APAConfig, log: Log) -> None:
    """Generate, score, step; `log` gets the measurements on held-out prompts."""
    sizes, policy = task.sizes, task.policy()
    trainer = APATrainer(config, policy, tokenizer=task.tokenizer)
    rng, cpu_seconds, start = random.Random(config.seed), 0.0, time.monotonic()
    ref_rewards: dict[str, list[float]] = {}
    log.append({"step": 0, "samples": 0, **task.measure(policy)})
    for iteration in range(1, sizes.iterations + 1):
        began = time.process_time()
        prompts = _draw(rng, task.train_prompts, sizes.batch_size, config.num_generations)
        queries = encode(task.tokenizer, prompts)
        responses = trainer.generate(queries, return_prompt=False, batch_size=sizes.batch_size)
        more: dict[str, Any] = {}
        if config.estimator.needs_ref_rewards:
            new = set(prompts) - ref_rewards.keys()
            ref_rewards |= {prompt: task.reference_rewards(prompt, config.num_ref_samples) for prompt in new}
            more["ref_rewards"] = [ref_rewards[prompt] for prompt in prompts]
        stats = trainer.step(queries, responses, task.score(prompts, responses), **more)
        cpu_seconds += time.process_time() - began
        measured: dict[str, float] = {}
        if _is_due(iteration, sizes.iterations, sizes.evaluations):
            so_far = {"samples": iteration * sizes.batch_size, "cpu_seconds": cpu_seconds}
            measured = task.measure(policy)
            log.append({"step": trainer.state.global_step, **so_far, **measured})
        print_line(f"iteration {iteration}/{sizes.iterations}", shown_figures({**stats, **measured}, COLUMNS), start)
    trainer.state.log_history += log  # for the model card
    trainer.save_pretrained(f"{config.output_dir}/policy")


def _draw(rng: random.Random, prompts: Sequence[str], count: int, num_generations: int) -> list[str]:
    """`count` prompts, each `num_generations` times; different ones where they are asked more than once."""
    if num_generations == 1:
        return rng.choices(prompts, k=count)
    return [prompt for prompt in rng.sample(prompts, count // num_generations) for _ in range(num_generations)]


class _Measuring(TrainerCallback):
    """Calls `measure` with the optimizer step at the end of the epochs whose turn it is; prints a line for each."""

    def __init__(self, sizes: MiniSizes, measure: Callable[[int], dict[str, float]]):
        self.sizes, self.measure, self.start = sizes, measure, time.monotonic()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch, epochs = round(state.epoch), self.sizes.epochs
        measured = self.measure(state.global_step) if _is_due(epoch, epochs, self.sizes.evaluations) else {}
        print_line(f"epoch {epoch}/{epochs}", shown_figures(measured, COLUMNS), self.start)


def _offline(task: Task, config: OfflineConfig, log: Log) -> None:
    """Train on the fixed data; `log` gets the measurements on held-out prompts."""
    sizes, rows = task.sizes, task.fixed_rows
    trainer = OfflineAPATrainer(config, task.policy(), processing_class=task.tokenizer, train_dataset=rows)

    def note(step: int) -> dict[str, float]:
        with trainer.learned_policy() as policy:
            measured = task.measure(policy)
        log.append({"step": step, "samples": sizes.num_responses, **measured})
        return measured

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Measuring(sizes, note))
    note(0)
    trainer.train()
    trainer.state.log_history += log  # for the model card
    trainer.save_pretrained(f"{config.output_dir}/policy")


def _is_due(number: int, last: int, evaluations: int) -> bool:
    """Whether one of `evaluations` evenly spaced moments up to `last` falls on `number`, and not before it."""
    return number * evaluations // last > (number - 1) * evaluations // last


def _write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=1) + "\n")
