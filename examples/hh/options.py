"""The options of `run_hh.py` and the two sets of defaults that they start from."""

import argparse
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """The run cannot be what its options ask for; the message is for the user, who is shown no traceback."""


STAGES = ("sft", "reward", "apa", "eval")

# name: (type, default with --small, default with --model, help)
SIZED: dict[str, tuple[type, Any, Any, str]] = {
    "held_out": (float, 0.15, 0.02, "share of the pairs that no training stage sees"),
    "max_prompt_length": (int, 64, 896, "tokens of a prompt; the oldest turns of a longer one are dropped"),
    "max_target_length": (int, 48, 512, "tokens of a response of the data, for SFT and for the reward model"),
    "max_new_tokens": (int, 32, 128, "tokens of a sampled response"),
    "sft_epochs": (float, 3.0, 1.0, "passes over the preferred responses"),
    "sft_learning_rate": (float, 2e-3, 1e-5, "peak learning rate of SFT"),
    "sft_batch_size": (int, 16, 16, "dialogues an update of SFT"),
    "reward_epochs": (float, 1.0, 1.0, "passes over the preference pairs"),
    "reward_learning_rate": (float, 2e-4, 1e-5, "peak learning rate of the reward model"),
    "reward_batch_size": (int, 16, 16, "pairs an update of the reward model"),
    "iterations": (int, 25, 1250, "rounds of generate, score, step"),
    "learning_rate": (float, 1e-4, 8e-6, "learning rate of the policy and the value model"),
    "batch_size": (int, 64, 64, "rollouts an iteration"),
    "mini_batch_size": (int, 16, 8, "rollouts an update"),
    "ppo_epochs": (int, 2, 2, "passes over the rollouts of an iteration"),
    "generation_batch_size": (int, 64, 64, "prompts that are answered at once"),
    "eval_prompts": (int, 128, 280, "held-out prompts of the evaluation"),
    "vocab_size": (int, 2048, None, "tokens of the tokenizer that is made on the spot"),
    "hidden_size": (int, 192, None, "width of the model that is made on the spot; a multiple of 64"),
    "num_layers": (int, 4, None, "layers of the model that is made on the spot"),
}

DATA_OPTIONS = (
    *("dataset", "dataset_config", "data_dir", "dataset_split", "limit", "split_seed", "disjoint", "held_out"),
    *("max_prompt_length", "max_target_length"),
)
# What each stage's result depends on, beside the stages before it.
STAGE_OPTIONS = {
    "sft": (
        *("model", "seed", "sft_epochs", "sft_learning_rate", "sft_batch_size"),
        *("vocab_size", "hidden_size", "num_layers"),
    ),
    "reward": (
        *("reward_model", "seed", "reward_epochs", "reward_learning_rate", "reward_batch_size", "max_new_tokens"),
    ),
    "apa": (
        *("loss_type", "kl_coef", "seed", "peft", "max_new_tokens", "iterations", "learning_rate"),
        *("batch_size", "mini_batch_size", "ppo_epochs"),
    ),
    "eval": ("seed", "eval_prompts", "max_new_tokens"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `run_hh.py`."""
    parser = argparse.ArgumentParser(
        prog="run_hh.py", description="SFT, reward model, APA and held-out evaluation on human preferences."
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", required=True, help="a .jsonl, .jsonl.gz, .json or .parquet file, or a hub data set"
    )
    data.add_argument("--dataset-config", help="configuration of a hub data set")
    data.add_argument("--data-dir", help="folder in a hub data set, e.g. harmless-base of Anthropic/hh-rlhf")
    data.add_argument("--dataset-split", default="train", help="split of a hub data set (default: train)")
    data.add_argument("--limit", type=int, help="use the first LIMIT rows only")
    data.add_argument("--split-seed", type=int, default=0, help="seed of the division into training and held-out data")
    data.add_argument("--disjoint", action="store_true", help="SFT, reward model and APA each get a third of the data")

    what = parser.add_argument_group("what to run")
    what.add_argument("--model", help="base model, path or hub name; without it a small one is made on the spot")
    what.add_argument("--reward-model", help="sequence classifier with one output to use; without it one is trained")
    what.add_argument("--small", action="store_true", help="the small sizes below, also with --model")
    what.add_argument("--peft", action="store_true", help="train the policy as a LoRA adapter in the APA stage")
    what.add_argument("--loss-type", choices=("apa", "ppo", "awr"), default="apa")
    what.add_argument("--kl-coef", type=float, help="the paper's lambda (default: that of APAConfig)")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--stages", type=stage_list, default=list(STAGES), help="comma-separated, default: %(default)s")
    what.add_argument("--overwrite", action="store_true", help="redo the stages even where their results are there")
    what.add_argument("--output-dir", type=Path, default=Path("hh-output"), help="default: %(default)s")
    what.add_argument("--samples", type=int, default=3, help="held-out answers to print (default: %(default)s)")

    sizes = parser.add_argument_group("sizes (default with --small or without --model | with --model)")
    for name, (kind, small, real, text) in SIZED.items():
        real_text = "" if real is None else f" | {real}"
        sizes.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} ({small}{real_text})")
    return parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the chosen sizes."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    small = options.small or options.model is None
    for name, (_, small_default, real_default, _) in SIZED.items():
        if getattr(options, name) is None:
            setattr(options, name, small_default if small else real_default)
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if not options.held_out < 1:
        parser.error(f"--held-out {options.held_out}: expected a share below 1")
    if options.batch_size % options.mini_batch_size:
        parser.error(
            f"--batch-size {options.batch_size} is no multiple of --mini-batch-size {options.mini_batch_size}"
        )
    return options


def stage_list(text: str) -> list[str]:
    """`"apa,eval"` as stages in the order in which they run."""
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(STAGES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in names]
