"""`trl-apa check` on a shape with random weights: `python -m benchmarks.check_shape --output F [--small] [OPTION]`.

The shape is that of Llama-3.2-1B, `--small` a Llama of a few thousand weights, with a tokenizer of bytes. More
options are those of the command. Exit status 1 if something is wrong.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import byte_tokenizer
from trl_apa.commands import check
from trl_apa.memory.shapes import config_of


ONE_BILLION = (
    "family=llama,hidden_size=2048,num_hidden_layers=16,num_attention_heads=32,num_key_value_heads=8,"
    "intermediate_size=8192,vocab_size=128256,tie_word_embeddings=true,max_position_embeddings=4096"
)
SMALL = (
    "family=llama,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=300,"
    "max_position_embeddings=512"
)


def make_model(shape: str, folder: str) -> None:
    """Random weights in float32, made on a GPU if there is one, and the tokenizer."""
    tokenizer, config = byte_tokenizer(), config_of(shape)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", required=True, help="a file for the report as JSON")
    parser.add_argument("--small", action="store_true", help="a few thousand weights, for a CPU")
    options, others = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_model(SMALL if options.small else ONE_BILLION, folder)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = check.main([folder, "--json", *others])
    # Libraries print on standard output too.
    report = printed.getvalue()
    Path(options.output).write_text(report[report.index("{\n") :])
    return status


if __name__ == "__main__":
    sys.exit(main())
