"""The command line: `trl-apa --version` and `trl-apa <command> ...`.

A command is a module with `main(argv: list[str]) -> int`, imported only when it is called for.
"""

import argparse
import logging
from collections.abc import Sequence
from importlib import import_module

import trl_apa


COMMANDS = {
    "demo": ("trl_apa.demo", "a complete RLHF in miniature on the CPU: SFT, reward model, APA"),
    "sft": ("trl_apa.commands.sft", "supervised fine-tuning with TRL's SFTTrainer"),
    "reward": ("trl_apa.commands.reward", "a reward model from preferences with TRL's RewardTrainer"),
    "train": ("trl_apa.commands.train", "align a policy with APA, AWR or PPO"),
    "offline": ("trl_apa.commands.offline", "learn from fixed responses with APA, AWR or ILQL"),
    "evaluate": ("trl_apa.commands.evaluate", "reward, KL, entropy, length of checkpoints on prompts, in one table"),
    "generate": ("trl_apa.commands.generate", "responses of a model to prompts, as JSON lines"),
    "memory": ("trl_apa.commands.memory", "peak memory of a run on each GPU, from the config of its model"),
    "winrate": ("trl_apa.commands.winrate", "how often a judge prefers one model's answers to another's"),
    "merge": ("trl_apa.commands.merge", "an adapter put into its base, as a plain checkpoint"),
    "paper": ("trl_apa.commands.paper", "the curves of one of the paper's figures, and their picture"),
    "plot": ("trl_apa.commands.plot", "reward, KL, and reward against KL of runs, as PNG"),
    "env": ("trl_apa.commands.env", "versions and devices, for a bug report"),
}


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; it leaves a command's own arguments untouched for that command."""
    lines = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-apa",
        description="Align language models with Advantage-Induced Policy Alignment (APA).",
        epilog=f"commands:\n{lines}\n\n`trl-apa <command> --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {trl_apa.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-apa` with `argv` (*optional*, defaults to the process's arguments); returns the exit status."""
    options = build_parser().parse_args(argv)
    module, _ = COMMANDS[options.command]
    # Imported, it warns of a faster 4-bit kernel for CPUs, which has no gradient and is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module(module).main(options.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
