"""TRL 0.11.4's side: `python -m parity.classic_step FOLDER` plays every case there. Runs in its own environment."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from accelerate.state import AcceleratorState, GradientState
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)

from parity.case import Case, Outcome, play, play_folders


class PrescribedOrder(PPOTrainer):
    """Visits rows in the order that the case prescribes instead of numpy's."""

    orders: list[list[list[int]]]

    def step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        orders = [np.array(order) for order in self.orders.pop(0)]
        with mock.patch("numpy.random.permutation", side_effect=orders):
            return super().step(*args, **kwargs)


def play_case(case: Case) -> Outcome:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    two_stacks = case.is_encoder_decoder
    wrapper_class = AutoModelForSeq2SeqLMWithValueHead if two_stacks else AutoModelForCausalLMWithValueHead
    wrapper = wrapper_class.from_pretrained(case.language_model("policy"))
    wrapper.v_head.load_state_dict(case.weights_of("v_head"))
    reference = wrapper_class.from_pretrained(case.language_model("reference")) if case.has_reference else None
    optimizer, scheduler = case.optimizer_and_scheduler(wrapper.parameters())
    config = PPOConfig(**case.options, accelerator_kwargs={"cpu": True})
    trainer = PrescribedOrder(
        config, wrapper, reference, case.tokenizer(), optimizer=optimizer, lr_scheduler=scheduler
    )
    trainer.orders = [rollouts.orders for rollouts in case.rollouts]
    if two_stacks:
        # Classic leaves out the start token and the first generated token by itself.
        case.rollouts = [dataclasses.replace(rollouts, masks=None) for rollouts in case.rollouts]
    return play(case, trainer, wrapper.pretrained_model, wrapper.v_head)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    warnings.simplefilter("ignore")
    play_folders(parser.parse_args().folder, "classic", play_case)
