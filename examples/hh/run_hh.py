"""SFT -> reward model -> APA -> held-out evaluation on human preferences; see README.md beside this file."""

import argparse
import os

from options import UserError, parse_options

from trl_apa.data.sources import is_local


def main() -> None:
    """Run the pipeline with the options of the command line."""
    options = parse_options()
    prepare_environment(options)
    # Imported late: the hub client reads the environment when it is imported.
    import pipeline

    try:
        pipeline.run(options)
    except UserError as error:
        raise SystemExit(f"run_hh.py: {error}") from error


def prepare_environment(options: argparse.Namespace) -> None:
    """No telemetry; and no network at all where everything is on this machine."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sources = (options.dataset, options.model, options.reward_model)
    if all(source is None or is_local(source) for source in sources):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


if __name__ == "__main__":
    main()
