"""`trl-apa merge ADAPTER`: an adapter put into its base, as a checkpoint that plain transformers loads."""

from collections.abc import Sequence

from trl_apa.commands.outputs import check_output_folder
from trl_apa.commands.parsing import OneLineParser


DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser(
        prog="trl-apa merge",
        description="Merge an adapter into its base, as a checkpoint that plain transformers loads.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of an adapter of a language model")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="where the merged model is written")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the merged weights (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    check_output_folder("output_dir", options.output_dir)
    import torch
    from transformers import AutoConfig

    from trl_apa.cards import write_card
    from trl_apa.cards.of_runs import merged_card, name_of_folder
    from trl_apa.commands.models import loading
    from trl_apa.models import merge_and_save
    from trl_apa.models.loading import language_model_class
    from trl_apa.trainer.tracker_failures import warn_if_report_fails

    with loading("adapter", options.adapter):
        merge_and_save(options.adapter, options.output_dir, dtype=getattr(torch, options.dtype))
    with warn_if_report_fails(None, "writing a model card"):
        auto = language_model_class(AutoConfig.from_pretrained(options.output_dir)).__name__
        card = merged_card(options.adapter, name_of_folder(options.output_dir), auto)
        write_card(card, options.output_dir)
    print(f"model, tokenizer and README.md are in {options.output_dir}")
    return 0
