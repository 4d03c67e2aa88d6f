"""`trl-apa evaluate`: reward, KL, entropy, length and variety of checkpoints on the same prompts, in one table."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trl_apa.commands.data_options import PROMPT_NAMES, DataArguments
from trl_apa.commands.groups import apa_part, model_part
from trl_apa.commands.lengths import check_prompt_lengths, config_of
from trl_apa.commands.models import load_policy, load_rewards, load_tokenizer
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.outputs import check_output_file
from trl_apa.commands.rows import load_prompts
from trl_apa.commands.train_options import reward_part
from trl_apa.config.fields import option
from trl_apa.evaluation.held_out import held_out_metrics
from trl_apa.trainer.apa import APATrainer


MODEL_NAMES = {"dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type"}
SAMPLING_NAMES = {"temperature", "top_p", "top_k", "max_completion_length", "stop_strings", "max_prompt_length"}
SAMPLING_NAMES |= {"generation_batch_size", "chat_template_kwargs", "seed", "use_cpu", "bf16"}
APA_NAMES = {*SAMPLING_NAMES, "reward_weights", "per_device_eval_batch_size"}
# Standard errors on either side of a mean within which the mean of all prompts lies in 95 of 100 samples of prompts.
NUM_STDERRS = 1.96
# Heading, metric, format.
COLUMNS = (
    ("reward", "reward", "{:+.3f}"),
    ("std", "reward_std", "{:.3f}"),
    ("KL", "kl", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "response_length", "{:.1f}"),
    ("ended", "eos_share", "{:.2f}"),
    ("distinct-1", "distinct_1", "{:.3f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
    ("wins", "win_rate", "{:.3f}"),
)

WINS = ("win_rate", "win_rate_stderr")


@dataclass
class EvaluateArguments:
    """What is compared, and with what."""

    checkpoints: list[str] | None = option(
        None, "Folders or hub names of language models or adapters, each a row of the table."
    )
    ref_model_name_or_path: str | None = option(
        None, "What KL and wins are measured against; the first checkpoint by default."
    )
    output: str | None = option(None, "File for the metrics as JSON.")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "evaluate",
        "Reward, KL (nats per response), entropy (nats per token), length (tokens), distinct n-grams of checkpoints "
        "on the same prompts, and how often each beats the reference.",
        Part(EvaluateArguments, lambda name: "checkpoints"),
        Part(DataArguments, lambda name: "prompts", PROMPT_NAMES),
        reward_part(),
        model_part(MODEL_NAMES),
        apa_part(APA_NAMES),
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    with tempfile.TemporaryDirectory() as scratch:
        values = parser.parse(argv)
        arguments, data, rewards, model, config = parser.build({**values, "output_dir": scratch})
        if not arguments.checkpoints:
            raise ValueError("checkpoints is not set: name the folders or hub names of the models")
        check_output_file("output", arguments.output)
        functions, trust = rewards.functions(), rewards.trust_remote_code
        prompts = load_prompts(data)
        tokenizers = {name: load_tokenizer(name, model, trust) for name in arguments.checkpoints}
        reference_name = arguments.ref_model_name_or_path or arguments.checkpoints[0]
        for name, tokenizer in {reference_name: next(iter(tokenizers.values())), **tokenizers}.items():
            check_prompt_lengths(prompts, tokenizer, config_of(name, model, trust), config)
        load = partial(load_policy, arguments=model, trust_remote_code=trust)
        reference = load(reference_name, is_trainable=False)
        scorers = load_rewards(rewards.reward_model_name_or_path, functions, trust)
        results = {}
        for name, tokenizer in tokenizers.items():
            # Nothing is learned here; this critic has no trunk of its own.
            trainer = APATrainer(
                config, load(name), reference, tokenizer, prompts, reward_funcs=scorers, value_model="head"
            )
            results[name] = held_out_metrics(trainer, list(prompts))
            if is_same_model(name, reference_name):  # which wins on half of the prompts, by chance
                results[name] = {key: value for key, value in results[name].items() if key not in WINS}
    if config.should_save:
        print(f"{len(prompts)} prompts; KL and wins against {reference_name}; after ± half a 95% interval")
        print(table(results))
        if arguments.output is not None:
            Path(arguments.output).absolute().parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def is_same_model(name: str, reference_name: str) -> bool:
    """Whether two names are one checkpoint: the same, or two paths of one folder."""
    paths = Path(name), Path(reference_name)
    return name == reference_name or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The metrics as text, a checkpoint a line; "-" for one that it does not have: the wins of a model over itself."""
    rows = [["", *(heading for heading, _, _ in COLUMNS)]]
    for name, metrics in results.items():
        rows.append([name, *(_cell(metrics, key, form) for _, key, form in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    )


def _cell(metrics: dict[str, Any], name: str, form: str) -> str:
    if name not in metrics:
        return "-"
    text = form.format(metrics[name])
    if f"{name}_stderr" not in metrics:
        return text
    return f"{text} ± {NUM_STDERRS * metrics[f'{name}_stderr']:.3f}"
