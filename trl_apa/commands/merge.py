"""`trl-apa merge ADAPTER`: an adapter put into its base, as a checkpoint that plain transformers loads."""

import argparse
from collections.abc import Sequence

import torch


DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="trl-apa merge", description="Put an adapter into its base, for good.")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of an adapter of a language model")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="where the merged model is written")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the merged weights")
    options = parser.parse_args(argv)
    from trl_apa.models import merge_and_save

    try:
        merge_and_save(options.adapter, options.output_dir, dtype=getattr(torch, options.dtype))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"model and tokenizer are in {options.output_dir}")
    return 0
