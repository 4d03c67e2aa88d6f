"""TRL's trainers for SFT and reward models, which send nothing from here, and whose model cards have figures."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl import RewardTrainer, SFTTrainer

from trl_apa.cards import write_card
from trl_apa.cards.of_runs import CLASSIFICATION, TEXT_GENERATION, name_of_folder, supervised_card
from trl_apa.telemetry import NoTelemetry


class QuietSFTTrainer(NoTelemetry, SFTTrainer):
    """TRL's trainer, which sends nothing."""

    card_datasets: Sequence[str] = ()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card as `README.md` of `args.output_dir`: see [`APATrainer.create_model_card`]."""
        kind = "language model, fine-tuned on demonstrations"
        _write(self, (kind, "AutoModelForCausalLM", TEXT_GENERATION), self._tag_names, model_name, dataset_name, tags)


class QuietRewardTrainer(NoTelemetry, RewardTrainer):
    """TRL's trainer, which sends nothing."""

    card_datasets: Sequence[str] = ()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card as `README.md` of `args.output_dir`: see [`APATrainer.create_model_card`]."""
        kind = "reward model: it scores a text of prompt and response with one number, fitted to preference pairs"
        kinds = (kind, "AutoModelForSequenceClassification", CLASSIFICATION)
        _write(self, kinds, self._tag_names, model_name, dataset_name, tags)


def _write(
    trainer: Any,
    kinds: tuple[str, str, str],
    own_tags: Sequence[str],
    model_name: str | None,
    dataset_name: str | None,
    tags: str | list[str] | None,
) -> None:
    """Args: `kinds`: what the model is, the class that loads it, its task on the hub."""
    if not trainer.is_world_process_zero():
        return
    folder: str | os.PathLike[str] = trainer.args.output_dir
    more = [tags] if isinstance(tags, str) else tags or ()
    card = supervised_card(trainer, model_name or name_of_folder(folder), *kinds, [*own_tags, *more])
    if dataset_name is not None:
        card = replace(card, datasets=[dataset_name])
    write_card(card, folder, vars(trainer.args))
