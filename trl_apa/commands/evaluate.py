"""`trl-apa evaluate`: reward, KL, entropy, length and variety of checkpoints on the same prompts, in one table."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from trl import ModelConfig

from trl_apa._trl import is_peft_model
from trl_apa.commands.lengths import check_prompt_lengths, config_of
from trl_apa.commands.models import load_policy, load_rewards, load_tokenizer
from trl_apa.commands.options import CommandParser
from trl_apa.commands.outputs import check_output_file
from trl_apa.commands.rows import load_prompts
from trl_apa.config.apa import APAConfig
from trl_apa.config.rates import PRETRAINED_RATE
from trl_apa.evaluation.held_out import held_out_metrics
from trl_apa.models.network_parts import Network
from trl_apa.trainer.apa import APATrainer


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


def run(parser: CommandParser, values: dict[str, Any]) -> int:
    """Run the command with its options, read; returns the exit status.

    Args:
        parser: that has read them.
        values: every option.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments, data, rewards, loading, sampling = parser.build(values)
        model = ModelConfig(**vars(loading))
        # A trainer tells of a learning rate that it chooses itself, which nothing uses here.
        config = APAConfig(output_dir=scratch, learning_rate=PRETRAINED_RATE, **vars(sampling))
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
            policy = load(name)
            trainer = APATrainer(
                config,
                policy,
                reference,
                tokenizer,
                prompts,
                reward_funcs=scorers,
                value_model="head",  # nothing is learned here, and this critic has no trunk of its own
                peft_config=adapters_without_effect(policy),
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


def adapters_without_effect(policy: Network) -> LoraConfig | None:
    """New adapters on a quantised model, which a trainer takes with adapters alone: they add exactly zero to it."""
    if not getattr(policy, "is_quantized", False) or is_peft_model(policy):
        return None
    task = "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM"
    return LoraConfig(r=1, target_modules="all-linear", task_type=task)


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
