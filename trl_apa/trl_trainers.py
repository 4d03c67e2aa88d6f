"""TRL's trainers for SFT and reward models, which send nothing from here, and whose model cards have figures."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from trl import RewardTrainer, SFTTrainer

from trl_apa._trl import _BaseTrainer
from trl_apa.cards import write_card
from trl_apa.cards.figures import note_loaded_step
from trl_apa.cards.of_runs import CLASSIFICATION, TEXT_GENERATION, name_of_folder, supervised_card
from trl_apa.models.adapters import without_card_of_peft
from trl_apa.telemetry import NoTelemetry
from trl_apa.trainer.tracker_failures import warn_if_report_fails


class SupervisedCards(_BaseTrainer):
    """Stands before one of TRL's trainers: the model cards of this package in place of TRL's and peft's."""

    # What the model is, the class that loads it, its task on the hub.
    kinds: ClassVar[tuple[str, str, str]]
    # Data sets that a model card names: hub names, or paths, of which it shows the last part.
    card_datasets: Sequence[str] = ()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> bool:
        """Write the model card as `README.md` of `args.output_dir`: see [`APATrainer.create_model_card`].

        TRL writes one before each checkpoint: a failure is a warning.

        Returns:
            Whether it was written, by this process.
        """
        if self.is_world_process_zero():
            with warn_if_report_fails(self, "writing a model card"):
                return self._write_card(model_name, dataset_name, tags)
        return False

    def _write_card(self, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None) -> bool:
        folder: str | os.PathLike[str] = self.args.output_dir
        more = [tags] if isinstance(tags, str) else tags or ()
        card = supervised_card(self, model_name or name_of_folder(folder), *self.kinds, [*self._tag_names, *more])
        if dataset_name is not None:
            card = replace(card, datasets=[dataset_name])
        return write_card(card, folder, vars(self.args))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with without_card_of_peft(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict=state_dict)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        note_loaded_step(self.state)


class QuietSFTTrainer(NoTelemetry, SupervisedCards, SFTTrainer):
    """TRL's trainer, which sends nothing."""

    kinds = ("language model, fine-tuned on demonstrations", "AutoModelForCausalLM", TEXT_GENERATION)


class QuietRewardTrainer(NoTelemetry, SupervisedCards, RewardTrainer):
    """TRL's trainer, which sends nothing."""

    kinds = (
        "reward model: it scores a text of prompt and response with one number, fitted to preference pairs",
        "AutoModelForSequenceClassification",
        CLASSIFICATION,
    )
