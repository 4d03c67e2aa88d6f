"""This package's side of a case: `PPOTrainer` and `PPOConfig` with the value head of the wrapper as critic."""

import tempfile
import warnings
from typing import Any
from unittest.mock import patch

from parity.case import Case, Outcome, play
from trl_apa import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)


def prescribed_order(case: Case) -> Any:
    """Inside, rows are visited in the order that the case prescribes, as classic is made to."""

    def mini_batches(num_rows: int, size: int, stream: tuple[int, ...], groups: object = None) -> list[list[int]]:
        *_, iteration, epoch = stream
        order = case.rollouts[iteration].orders[epoch]
        return [order[start : start + size] for start in range(0, num_rows, size)]

    return patch("trl_apa.trainer.preparation.mini_batches", mini_batches)


def play_case(case: Case) -> Outcome:
    wrapper_class = (
        AutoModelForSeq2SeqLMWithValueHead if case.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    )
    wrapper = wrapper_class.from_pretrained(case.language_model("policy"))
    wrapper.v_head.load_state_dict(case.weights_of("v_head"))
    reference = wrapper_class.from_pretrained(case.language_model("reference")) if case.has_reference else None
    optimizer, scheduler = case.optimizer_and_scheduler(wrapper.parameters())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PPOConfig(**case.options, output_dir=folder, use_cpu=True, report_to="none")
        trainer = PPOTrainer(
            config,
            wrapper,
            reference,
            case.tokenizer(),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            value_model="head",
        )
        with prescribed_order(case):
            return play(case, trainer, wrapper.pretrained_model, wrapper.v_head)
