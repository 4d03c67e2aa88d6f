"""The stages one after the other; a stage whose result is there already is not repeated."""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import stage_apa
import stage_eval
import stage_reward
import stage_sft
import transformers
from options import STAGES, UserError
from progress import say
from resume import run_stage
from transformers import AutoTokenizer

from trl_apa.data import Preference, Preferences, prompts, read_preferences, split_by_prompt


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen stages, print what they got and write `result.json`."""
    quiet_libraries()
    try:
        preferences = read(options)
        say("data", preferences.report())
        parts = split(options, preferences.pairs)
    except (ValueError, OSError) as error:
        raise UserError(f"--dataset {options.dataset}: {error}") from error
    say("data", ", ".join(f"{len(part)} pairs for {name}" for name, part in parts.items()))
    out = {stage: options.output_dir / stage for stage in STAGES}
    held_out_prompts = prompts(parts["held_out"])
    rl_prompts = prompts(parts["apa"])
    records: dict[str, dict[str, Any]] = {}

    def reward_model() -> stage_reward.RewardModel:
        return stage_reward.load(options, out["reward"], records["reward"]["result"])

    work: dict[str, Callable[[], dict[str, Any]]] = {
        "sft": lambda: stage_sft.run(options, parts["sft"], out["sft"]),
        "reward": lambda: stage_reward.run(
            options, parts["reward"], parts["held_out"], rl_prompts, out["sft"], out["reward"]
        ),
        "apa": lambda: stage_apa.run(options, rl_prompts, reward_model(), out["sft"], out["apa"]),
        "eval": lambda: stage_eval.run(options, held_out_prompts, reward_model(), out["sft"], out["apa"], out["eval"]),
    }
    for stage in STAGES[: STAGES.index(options.stages[-1]) + 1]:
        records[stage] = run_stage(stage, options, records, work[stage])
    results = {stage: record["result"] for stage, record in records.items()}
    return report(options, preferences, parts, results)


def quiet_libraries() -> None:
    """No bars and no notices of the libraries between the progress lines."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # TRL sets an option by a name that transformers has begun to replace.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def read(options: argparse.Namespace) -> Preferences:
    """The pairs; chat messages are written with the base model's chat template if it has one."""
    tokenizer = None if options.model is None else AutoTokenizer.from_pretrained(options.model)
    return read_preferences(
        options.dataset,
        name=options.dataset_config,
        data_dir=options.data_dir,
        split=options.dataset_split,
        limit=options.limit,
        chat_tokenizer=tokenizer,
    )


def split(options: argparse.Namespace, pairs: list[Preference]) -> dict[str, list[Preference]]:
    """Held-out pairs, of which no training stage sees a dialogue, and those of each training stage."""
    training = ("sft", "reward", "apa")
    shares = {"held_out": options.held_out}
    if options.disjoint:
        shares |= {stage: (1 - options.held_out) / len(training) for stage in training}
        return split_by_prompt(pairs, shares, options.split_seed)
    parts = split_by_prompt(pairs, shares | {"training": 1 - options.held_out}, options.split_seed)
    return {"held_out": parts["held_out"]} | dict.fromkeys(training, parts["training"])


def report(
    options: argparse.Namespace,
    preferences: Preferences,
    parts: dict[str, list[Preference]],
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Print the evaluation and write everything to `result.json`."""
    result = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "pairs": {name: len(part) for name, part in parts.items()},
        "bad_rows": [bad._asdict() for bad in preferences.bad_rows],
        **results,
    }
    (options.output_dir / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    if "eval" in results:
        print("\n" + stage_eval.sample_lines(options.output_dir / "eval" / "samples.jsonl", options.samples))
        print("\n" + stage_eval.table(results["eval"], options.loss_type))
        accuracy = results["reward"]["held_out_accuracy"]
        print(f"the reward is a proxy: its model agrees with people on {accuracy:.1%} of held-out pairs (chance: 50%)")
    say("done", f"results in {options.output_dir}")
    return result
