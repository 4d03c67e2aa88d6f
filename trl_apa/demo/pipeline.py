"""RLHF from nothing to an aligned model: corpus, supervised fine-tuning, reward model, APA, evaluation."""

import json
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trl_apa import APAConfig, APATrainer
from trl_apa.trainer.tracker_failures import warn_if_report_fails

from .cards import LANGUAGE_MODEL, policy_card, supervised_cards, write_cards
from .corpus import Corpus, build_corpus
from .curves import plot_curves
from .evaluation import Evaluation, evaluate, measure_responses
from .networks import build_policy, build_tokenizer, encode
from .options import DemoOptions
from .report import METRICS, Report
from .reward import RewardModel, make_pairs, train_reward_model
from .supervised import train_sft, training_options


SFT_LEARNING_RATE = 2e-3
REWARD_LEARNING_RATE = 1e-3
NUM_SAMPLES_SHOWN = 4
PICTURE = "curves.png"


@dataclass
class Ingredients:
    """What the loop needs, made by the supervised stages."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    policy: PreTrainedModel
    initial_policy: PreTrainedModel
    reward_model: RewardModel
    reward_accuracy: dict[str, float]


def run_demo(options: DemoOptions, report: Report) -> dict[str, Any]:
    """Everything, from the corpus to the saved model.

    Writes into `options.output_dir`: `metrics.jsonl`, `result.json`, `curves.png`, `timings.json` (the only one that
    differs between two runs of the same seed), and the checkpoints `model`, `sft_model` and `reward_model`.

    Returns:
        What `result.json` holds: the options, the reward model's accuracy, and the metrics before and after.
    """
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(), torch_threads(options.num_threads), report.stage("total"):
        made = prepare(options, report)
        before = measure(options, made)
        training = align(options, made, report)
        after = measure(options, made)
    result = {
        "options": {name: value for name, value in asdict(options).items() if name != "output_dir"},
        "reward_model": made.reward_accuracy,
        "before": before.metrics,
        "after": after.metrics,
    }
    save(options, result, training, report)
    save_cards(options, result)
    show(options, report, before, after)
    return result


def prepare(options: DemoOptions, report: Report) -> Ingredients:
    """Corpus, tokenizer, supervised fine-tuning, preference pairs, reward model."""
    seed, output_dir = options.seed, str(options.output_dir)
    corpus = build_corpus(seed, 32 * options.sft_steps, options.num_eval_prompts)
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, seed)
    report.say(
        f"corpus: {len(corpus.demonstrations):,} answers of mixed quality to {len(corpus.train_prompts)} questions, "
        f"{len(corpus.eval_prompts)} more held out; {len(tokenizer)} tokens\n"
        f"model: {policy.config.model_type}, {policy.num_parameters():,} parameters"
    )
    with report.training("supervised fine-tuning", options.sft_steps) as tick:
        sft_options = training_options(output_dir, seed, SFT_LEARNING_RATE, options.sft_steps)
        train_sft(policy, tokenizer, corpus.demonstrations, sft_options, tick)
    # Reloaded, because the trainer leaves a patched `forward` on the network that even its deep copies would call.
    sft_dir = options.output_dir / "sft_model"
    save_model(policy, tokenizer, sft_dir)
    policy, initial_policy = (AutoModelForCausalLM.from_pretrained(sft_dir).eval() for _ in range(2))
    report.say(f"preference pairs: sampling {options.num_pairs:,} pairs of the model's own answers ...")
    with report.stage("preference pairs"):
        pairs, held_out = (
            make_pairs(policy, tokenizer, corpus.train_prompts, count, options.max_new_tokens, pair_seed)
            for count, pair_seed in ((options.num_pairs, seed + 1), (max(options.num_pairs // 4, 1), seed + 2))
        )
    with report.training("reward model", options.reward_steps) as tick:
        reward_options = training_options(output_dir, seed, REWARD_LEARNING_RATE, options.reward_steps)
        reward_model = train_reward_model(policy, tokenizer, pairs, reward_options, tick)
    accuracy = {
        "train_accuracy": reward_model.accuracy(pairs),
        "held_out_accuracy": reward_model.accuracy(held_out),
        "held_out_gold_accuracy": held_out.gold_agreement,
    }
    report.say(
        "reward model: agrees with "
        f"{accuracy['held_out_accuracy']:.0%} of {len(held_out)} held-out noisy labels (the gold reward with "
        f"{accuracy['held_out_gold_accuracy']:.0%});\n  the proxy reward is its score, scaled to mean 0 and standard "
        "deviation 1 over the fine-tuned model's answers"
    )
    save_model(reward_model.network, tokenizer, options.output_dir / "reward_model")
    return Ingredients(corpus, tokenizer, policy, initial_policy, reward_model, accuracy)


def align(options: DemoOptions, made: Ingredients, report: Report) -> list[dict[str, float]]:
    """The loop: generate, score, step. Trains `made.policy` in place, saves it, returns each iteration's metrics."""
    tokenizer, reward_model = made.tokenizer, made.reward_model
    trainer = APATrainer(config_of(options), made.policy, tokenizer=tokenizer)
    rng = random.Random(options.seed)
    history = []
    with report.iterations(f"{options.loss_type.upper()}", options.iterations) as table:
        for iteration in range(1, options.iterations + 1):
            prompts = rng.choices(made.corpus.train_prompts, k=options.batch_size)
            queries = encode(tokenizer, prompts)
            responses = trainer.generate(queries, return_prompt=False, batch_size=options.batch_size)
            scores = reward_model(prompts, responses)
            measured = measure_responses(made.policy, made.initial_policy, tokenizer, prompts, responses, scores)
            stats = trainer.step(queries, responses, scores)
            metrics = {"iteration": iteration, **measured, **numbers_of_step(stats)}
            history.append(metrics)
            table.add(iteration, metrics)
    trainer.save_pretrained(str(options.output_dir / "model"))
    return history


def config_of(options: DemoOptions) -> APAConfig:
    """The options of the trainer."""
    return APAConfig(
        output_dir=str(options.output_dir),
        loss_type=options.loss_type,
        kl_coef=options.kl_coef,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        steps=options.batch_size * options.iterations,
        batch_size=options.batch_size,
        mini_batch_size=8,
        ppo_epochs=2,
        max_grad_norm=1.0,
        cliprange_value=0.2 if options.loss_type == "ppo" else None,
        max_completion_length=options.max_new_tokens,
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )


def measure(options: DemoOptions, made: Ingredients) -> Evaluation:
    """The current policy on the held-out questions, with the same random numbers every time."""
    prompts = made.corpus.eval_prompts * options.samples_per_prompt
    return evaluate(
        made.policy,
        made.initial_policy,
        made.tokenizer,
        made.reward_model,
        prompts,
        options.max_new_tokens,
        seed=options.seed + 3,
    )


def save(options: DemoOptions, result: dict[str, Any], training: list[dict[str, float]], report: Report) -> None:
    """Metrics, timings and picture; a picture that cannot be drawn is a warning."""
    steady, evaluations = save_metrics(options.output_dir, options.iterations, result, training, report)
    with warn_if_report_fails(None, f"drawing {options.output_dir / PICTURE}"):
        title = f"trl-apa demo, {options.loss_type.upper()}"
        plot_curves(options.output_dir / PICTURE, title, steady, evaluations)


def save_cards(options: DemoOptions, result: dict[str, Any]) -> None:
    """The model cards; one that cannot be written is a warning."""
    policy = policy_card(LANGUAGE_MODEL, result, METRICS, config_of(options).estimator.needs_values)
    write_cards(options.output_dir, {"model": policy, **supervised_cards(result, METRICS)})


def numbers_of_step(stats: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the statistics of a step, once: not under classic's names too."""
    return {name: value for name, value in stats.items() if isinstance(value, float) and "ppo/" not in name}


def save_metrics(
    directory: Path, iterations: int, result: dict[str, Any], training: list[dict[str, float]], report: Report
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Write metrics, result and timings.

    Args:
        directory: to write to.
        iterations: updates made before the last evaluation.
        result: with the metrics `before` and `after`.
        training: statistics of each iteration.
        report: knows how long each stage took.

    Returns:
        The iterations without timings, and the evaluations.
    """
    evaluations = [
        {"iteration": iteration, **{f"eval/{name}": value for name, value in result[moment].items()}}
        for iteration, moment in ((0, "before"), (iterations, "after"))
    ]
    steady = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in training]
    timings = [{name: value for name, value in row.items() if name.startswith("time/")} for row in training]
    lines = [evaluations[0], *steady, evaluations[1]]
    write_text(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(directory / "result.json", json.dumps(result, indent=2) + "\n")
    stages = {"stages": report.seconds, "iterations": timings}
    write_text(directory / "timings.json", json.dumps(stages, indent=2) + "\n")
    return steady, evaluations


def save_model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def show(options: DemoOptions, report: Report, before: Evaluation, after: Evaluation) -> None:
    """Samples and the table of before and after."""
    rows = zip(before.prompts, before.answers, before.golds, after.answers, after.golds, strict=True)
    report.samples(list(rows)[:NUM_SAMPLES_SHOWN])
    title = f"Held-out questions, {len(before.prompts)} sampled answers"
    report.summary(before.metrics, after.metrics, title, "before (SFT)")
    outputs = (PICTURE, "metrics.jsonl", "result.json", "timings.json", "model", "sft_model", "reward_model")
    written = ", ".join(name for name in outputs if (options.output_dir / name).exists())
    report.say(f"saved in {options.output_dir}: {written} ({report.seconds['total']:.0f} s in all)")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, warnings and remarks but the demo's own."""
    verbosity, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "no dataset", UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with `count` threads: the order of float additions, and so the numbers, depend on it."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
