"""This package's side of a case: `PPOTrainer` and `PPOConfig` with the value head of the wrapper as critic."""

import tempfile
import warnings

from parity.case import Case, Outcome, play
from trl_apa import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)


class PrescribedOrder(PPOTrainer):
    """Visits rows in the order that the case prescribes, as classic is made to."""

    orders: list[list[list[int]]]

    def _mini_batches(self, num_rows: int, epoch: int) -> list[list[int]]:
        order, size = self.orders[self.num_iterations_done][epoch], self.args.backward_batch_size
        return [order[start : start + size] for start in range(0, num_rows, size)]


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
        trainer = PrescribedOrder(
            config,
            wrapper,
            reference,
            case.tokenizer(),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            value_model="head",
        )
        trainer.orders = [rollouts.orders for rollouts in case.rollouts]
        return play(case, trainer, wrapper.pretrained_model, wrapper.v_head)
