"""TRL's trainers for SFT and reward models, which send nothing from here, and whose model cards have figures."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from transformers import Trainer
from trl import RewardTrainer, SFTTrainer

from trl_apa._trl import is_peft_model
from trl_apa.cards import write_card
from trl_apa.cards.of_runs import CLASSIFICATION, TEXT_GENERATION, name_of_folder, supervised_card
from trl_apa.telemetry import NoTelemetry
from trl_apa.trainer.tracker_failures import warn_if_report_fails


class _WithCards(NoTelemetry, Trainer):
    """What both share: it goes before TRL's trainer."""

    # What the model is, the class that loads it, its task on the hub.
    card_kinds: ClassVar[tuple[str, str, str]]
    card_datasets: Sequence[str] = ()
    _tag_names: ClassVar[list[str]]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if is_peft_model(self.accelerator.unwrap_model(self.model)):
            # peft has written a card without figures, with the path of the base.
            with warn_if_report_fails(None, "writing a model card"):
                self._write_card(output_dir or self.args.output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card as `README.md` of `args.output_dir`: see [`APATrainer.create_model_card`]."""
        self._write_card(self.args.output_dir, model_name, dataset_name, tags)

    def _write_card(
        self,
        folder: str | os.PathLike[str],
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else tags or ()
        name = model_name or name_of_folder(folder)
        card = supervised_card(self, name, *self.card_kinds, [*self._tag_names, *more])
        if dataset_name is not None:
            card = replace(card, datasets=[dataset_name])
        write_card(card, folder, vars(self.args))


class QuietSFTTrainer(_WithCards, SFTTrainer):
    """TRL's trainer, which sends nothing."""

    card_kinds = ("language model, fine-tuned on demonstrations", "AutoModelForCausalLM", TEXT_GENERATION)


class QuietRewardTrainer(_WithCards, RewardTrainer):
    """TRL's trainer, which sends nothing."""

    card_kinds = (
        "reward model: it scores a text of prompt and response with one number, fitted to preference pairs",
        "AutoModelForSequenceClassification",
        CLASSIFICATION,
    )
