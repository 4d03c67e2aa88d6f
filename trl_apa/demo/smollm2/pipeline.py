"""The run: load the model, measure, align it by the classic loop, measure again, draw."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_apa import APAConfig, APATrainer
from trl_apa.demo.cards import ADAPTER, LANGUAGE_MODEL, policy_card, write_cards
from trl_apa.demo.networks import decode, draw_prompts, encode, sample
from trl_apa.demo.pipeline import numbers_of_step, quiet_libraries, save_metrics, torch_threads
from trl_apa.demo.report import Report
from trl_apa.models.gguf import gguf_read_once
from trl_apa.models.network_parts import Network
from trl_apa.trainer.tracker_failures import warn_if_report_fails

from .curves import plot_real_curves
from .measuring import METRICS, measure_responses
from .model import computes_in_bfloat16, load_base, load_smollm2, load_smollm2_tokenizer
from .options import RealDemoOptions
from .task import REWARDS, Prompts, make_prompts


KL_COEF = {"apa": 0.2, "awr": 1.0, "ppo": 0.03}
NUM_SAMPLES_SHOWN = 6
PICTURE = "curves.png"


@dataclass
class Ingredients:
    """What the loop needs."""

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    policy: Network
    reward: Callable[[Sequence[str], Sequence[str]], list[float]]
    frozen: Network | None = None


@dataclass(frozen=True)
class Evaluation:
    """Responses of the policy to held-out prompts, their rewards, and the means of `measure_responses`."""

    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    metrics: dict[str, float]


def run_real_demo(options: RealDemoOptions, report: Report) -> dict[str, Any]:
    """Everything, from loading the model to the picture.

    Writes into `options.output_dir`: `metrics.jsonl`, `result.json`, `samples.json`, `curves.png`, `timings.json` (the
    only one that differs between two runs of the same seed), and the trained adapters in `model`.

    Returns:
        What `result.json` holds: the options, and the metrics before and after.
    """
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(), torch_threads(options.num_threads), report.stage("total"):
        made = prepare(options, report)
        before = measure("before: held-out sentences", options, made, report)
        training = align(options, made, report)
        after = measure("after: held-out sentences", options, made, report)
    result = {
        "options": {name: value for name, value in asdict(options).items() if name != "output_dir"},
        "before": before.metrics,
        "after": after.metrics,
    }
    save_metrics(options.output_dir, options.iterations, result, training, report)
    save_samples(options, before, after)
    save_card(options, result)
    with warn_if_report_fails(None, f"drawing {options.output_dir / PICTURE}"):
        picture = options.output_dir / PICTURE
        plot_real_curves(picture, f"SmolLM2-135M-Instruct, {options.loss_type.upper()}", training, before, after)
    show(options, report, before, after)
    return result


def prepare(options: RealDemoOptions, report: Report) -> Ingredients:
    """Tokenizer, model with adapters, prompts, reward."""
    with report.training("loading SmolLM2-135M-Instruct", 3) as tick, gguf_read_once():
        tokenizer = load_smollm2_tokenizer()
        tick(1, None)
        base = load_base(options.trains)
        tick(2, None)
        made = assemble(options, tokenizer, base)
        tick(3, None)
    policy, prompts = made.policy, made.prompts
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    report.say(
        f"model: {policy.num_parameters() - trained:,} frozen parameters in {policy.dtype}, {trained:,} in adapters\n"
        f"prompts: {len(prompts.train)} beginnings of sentences about films, {len(prompts.held_out)} more held out"
    )
    return made


def assemble(options: RealDemoOptions, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> Ingredients:
    """What is trained, on `base` or a copy of it, with prompts and reward."""
    if options.trains == "all":
        policy, frozen = copy.deepcopy(base), base
    else:
        policy, frozen = load_smollm2(options.seed, base), None
    return Ingredients(make_prompts(options.seed), tokenizer, policy, REWARDS[options.reward](), frozen)


def align(options: RealDemoOptions, made: Ingredients, report: Report) -> list[dict[str, float]]:
    """The loop: generate, score, step. Trains `made.policy` in place, saves it, returns each iteration's metrics."""
    value_model = "adapter" if made.frozen is None else None
    trainer = APATrainer(
        config_of(options), made.policy, made.frozen, tokenizer=made.tokenizer, value_model=value_model
    )
    rng, history = random.Random(options.seed), []
    with report.iterations(options.loss_type.upper(), options.iterations) as table:
        for iteration in range(1, options.iterations + 1):
            prompts = draw_prompts(rng, made.prompts.train, options.batch_size)
            queries = encode(made.tokenizer, prompts)
            responses = trainer.generate(queries, return_prompt=False, batch_size=options.batch_size)
            rewards = made.reward(prompts, decode(made.tokenizer, responses))
            measured = measure_responses(made.policy, made.tokenizer, queries, responses, rewards, made.frozen)
            stats = trainer.step(queries, responses, [tensor(reward) for reward in rewards])
            history.append({"iteration": iteration, **measured, **numbers_of_step(stats)})
            table.add(iteration, history[-1])
    trainer.save_pretrained(str(options.output_dir / "model"))
    return history


def config_of(options: RealDemoOptions) -> APAConfig:
    """The options of the trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(options.output_dir),
        "loss_type": options.loss_type,
        "kl_coef": KL_COEF[options.loss_type] if options.kl_coef is None else options.kl_coef,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "steps": options.batch_size * options.iterations,
        "batch_size": options.batch_size,
        "mini_batch_size": 8,
        "ppo_epochs": 2,
        "max_grad_norm": 1.0,
        "max_completion_length": options.max_new_tokens,
        "seed": options.seed,
        "use_cpu": True,
        "bf16": options.trains == "all" and computes_in_bfloat16(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return APAConfig(**settings | options.overrides)


def measure(title: str, options: RealDemoOptions, made: Ingredients, report: Report) -> Evaluation:
    """The current policy on the held-out prompts, with the same random numbers every time."""
    count, texts, responses, rewards = options.samples_per_prompt, [], [], []
    queries: list[Tensor] = []
    with report.training(title, count) as tick:
        for index in range(count):
            prompts = made.prompts.held_out
            sampled = sample(made.policy, made.tokenizer, prompts, options.max_new_tokens, options.seed + 1 + index)
            texts += decode(made.tokenizer, sampled)
            queries += encode(made.tokenizer, prompts)
            responses += sampled
            tick(index + 1, None)
        prompts = made.prompts.held_out * count
        rewards = made.reward(prompts, texts)
        metrics = measure_responses(made.policy, made.tokenizer, queries, responses, rewards, made.frozen)
    return Evaluation(prompts, texts, rewards, metrics)


def save_samples(options: RealDemoOptions, before: Evaluation, after: Evaluation) -> None:
    """Every held-out sentence before and after, with its reward."""
    pairs = zip(before.prompts, before.responses, before.rewards, after.responses, after.rewards, strict=True)
    names = ("prompt", "before", "reward_before", "after", "reward_after")
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
    (options.output_dir / "samples.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def save_card(options: RealDemoOptions, result: dict[str, Any]) -> None:
    """The model card of what was trained; that it cannot be written is a warning."""
    has_values = config_of(options).estimator.needs_values
    card = policy_card(LANGUAGE_MODEL if options.trains == "all" else ADAPTER, result, METRICS, has_values)
    what = "SmolLM2-135M-Instruct" if options.trains == "all" else "Adapters for SmolLM2-135M-Instruct"
    card = replace(
        card,
        name=f"{card.name}, SmolLM2",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        what=f"{what}, aligned by `trl-apa demo --real` with {options.loss_type.upper()} to end sentences about films "
        "with a reward. The figures are of held-out sentences, before and after.",
    )
    write_cards(options.output_dir, {"model": card})


def show(options: RealDemoOptions, report: Report, before: Evaluation, after: Evaluation) -> None:
    """Sentences side by side, the table of before and after, and whether the English is still fluent."""
    rows = zip(before.prompts, before.responses, before.rewards, after.responses, after.rewards, strict=True)
    report.side_by_side(list(rows)[:NUM_SAMPLES_SHOWN])
    title = f"Held-out sentences, {len(before.prompts)} sampled"
    report.summary(before.metrics, after.metrics, title, "before")
    report.say(fluency(before.metrics["perplexity"], after.metrics["perplexity"], after.metrics["distinct_2"]))
    outputs = (PICTURE, "metrics.jsonl", "result.json", "samples.json", "timings.json", "model")
    written = ", ".join(name for name in outputs if (options.output_dir / name).exists())
    report.say(f"saved in {options.output_dir}: {written} ({report.seconds['total']:.0f} s in all)")


def fluency(before: float, after: float, distinct_2: float) -> str:
    """The guard against reward that is bought with broken English or with one phrase for all.

    Args:
        before, after: perplexity of the responses under the frozen model.
        distinct_2: different pairs of tokens, as a share of all.
    """
    if after > 2 * before:
        return (
            f"fluency guard: NOT fluent, the frozen model finds these sentences odd ({after:.1f}, before {before:.1f})"
        )
    if distinct_2 < 0.3:
        return f"fluency guard: REPEATS ITSELF, {distinct_2:.0%} of the pairs of tokens are different"
    return f"fluency guard: passed (perplexity {after:.1f}, before {before:.1f}; distinct-2 {distinct_2:.0%})"
