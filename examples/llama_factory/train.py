"""LLaMA-Factory as it is, with its PPO stage on `trl_apa`; arguments are those of `llamafactory-cli train`."""

import os
import sys
from importlib import import_module

import ppo_trainer

from trl_apa.compat import install


def main() -> None:
    """Run the stage that the YAML file, or the command line, asks for."""
    # LLaMA-Factory's upper bounds of TRL, transformers, peft and datasets are below the versions used here.
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    install()  # its model loader imports AutoModelForCausalLMWithValueHead from TRL
    sys.modules["llamafactory.train.ppo.trainer"] = ppo_trainer
    workflow = import_module("llamafactory.train.ppo.workflow")
    # It would split one file of policy and head into the layout that the trainer has written already.
    workflow.fix_valuehead_checkpoint = lambda *args: None
    import_module("llamafactory.train.tuner").run_exp()


if __name__ == "__main__":
    main()
