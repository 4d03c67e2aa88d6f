"""What is left of a run: the networks in a folder or on the hub, and a model card."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers.trainer_utils import HubStrategy

from trl_apa._trl import _BaseTrainer, is_peft_model
from trl_apa.cards import write_card
from trl_apa.cards.of_runs import name_of_folder, policy_card, value_card
from trl_apa.distributed.processes import Processes
from trl_apa.distributed.sharded import shards_weights
from trl_apa.models import merge_and_save
from trl_apa.models.classic_value_head import HEAD_WEIGHTS
from trl_apa.models.policy_and_value import VALUE_MODEL_FOLDER
from trl_apa.models.value_model import DESCRIPTION
from trl_apa.telemetry import NoTelemetry
from trl_apa.trainer.tracker_failures import warn_if_report_fails


class Saving(NoTelemetry, _BaseTrainer):
    """The part of `APATrainer` that writes policy, value model, tokenizer and card."""

    _tag_names: ClassVar[list[str]] = ["trl", "apa", "rlhf"]
    _name = "APA"
    # What it learns from, as a model card says it.
    learns_from: ClassVar[str] = "responses that it sampled"
    # Data sets that a model card names: hub names, or paths, of which it shows the last part.
    card_datasets: Sequence[str] = ()
    # What lies beside the policy in its folder: the value model, or a head on the policy.
    value_parts: ClassVar[tuple[str, ...]] = (VALUE_MODEL_FOLDER, HEAD_WEIGHTS)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the policy (an adapter, if it is one), the tokenizer, and the value model in `value_model/`.

        Also a model card for each, `README.md`, with the figures so far; a failure of that is a warning.
        Plain transformers, or peft, loads the policy; `APATrainer(value_model=f"{save_directory}/value_model")` the
        value model.
        """
        self._save_pretrained(save_directory)
        with warn_if_report_fails(self, "writing a model card"):
            self.create_model_card(save_directory)

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """What `save_pretrained` and `push_to_hub` call, as in TRL <= 0.11, for subclasses that write more."""
        self.save_model(str(save_directory), _internal_call=True)

    def merge_and_save(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the policy as a plain checkpoint, its adapter merged into its base: see `models.merge_and_save`.

        To be called on every process; one of them writes.

        Raises:
            ValueError: if the policy is sharded (FSDP2, ZeRO-3); if the process that writes failed.
        """
        if shards_weights(self.accelerator):
            raise ValueError(
                "merge_and_save: the policy is sharded, so no process has all of it; call save_pretrained, then "
                "models.merge_and_save (trl-apa merge) on the saved folder"
            )

        def write() -> None:
            if self.args.should_save:
                policy = self.accelerator.unwrap_model(self.model).policy
                merge_and_save(policy, save_directory, self.processing_class, **kwargs)
                with warn_if_report_fails(self, "writing a model card"):
                    self._write_cards(Path(save_directory), None, is_merged=True)

        self.processes.together(write)

    @cached_property
    def processes(self) -> Processes:
        """All processes of the run."""
        return Processes(self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        # A base is written where no checkpoint that is deleted takes it along.
        module, base_folder = self.accelerator.unwrap_model(self.model), self.args.output_dir
        module.save_pretrained(output_dir, state_dict=state_dict, base_folder=base_folder)
        self.processing_class.save_pretrained(output_dir)
        if is_peft_model(module.policy):
            # peft has written a card without figures, with the path of the base.
            with warn_if_report_fails(self, "writing a model card"):
                self.create_model_card(output_dir)

    def _push_if_best(self, scores_B: Tensor) -> None:
        """Push the policy to the hub if its mean score is the best so far and the config asks for it."""
        args = self.args
        if not args.push_to_hub_if_best_kwargs or self.num_iterations_done % args.compare_steps:
            return
        if self.run_state.is_best(float(self.accelerator.gather(scores_B).mean())):
            self.push_to_hub(**args.push_to_hub_if_best_kwargs)

    def create_model_card(
        self,
        path: str | os.PathLike[str] | None = None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write model cards as `README.md`: for the policy, and for the value model if it has a folder of its own.

        A card says what was trained on what with which options, the figures of the log so far (with intervals, where
        prompts were held out), how the model is loaded, and what to cite. A `README.md` that was not generated stays.

        Args:
            path: the folder of the saved policy, made if it is not there; defaults to `args.output_dir`.
            model_name: by default the folder's name.
            dataset_name: by default `card_datasets`.
            tags: of the hub, beside the trainer's own.
        """
        if self.is_world_process_zero():
            self._write_cards(Path(path or self.args.output_dir), model_name, dataset_name, tags)

    def _write_cards(
        self,
        folder: Path,
        model_name: str | None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        is_merged: bool = False,
    ) -> None:
        module = self.accelerator.unwrap_model(self.model)
        name, values = model_name or name_of_folder(folder), folder / VALUE_MODEL_FOLDER
        has_values = (values / DESCRIPTION).is_file() and not is_merged
        card = policy_card(
            self, module.policy, name, values if has_values else None, module.value_is_a_head, is_merged=is_merged
        )
        cards = {folder: card} | ({values: value_card(self, module.policy, name, values)} if has_values else {})
        for place, card in cards.items():
            datasets = card.datasets if dataset_name is None else [dataset_name]
            tagged = [*self._tag_names, *card.tags, *([tags] if isinstance(tags, str) else tags or ())]
            write_card(replace(card, tags=tagged, datasets=datasets), place, vars(self.args))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer does, which copies the policy's files alone; the value model's go with them, and a card."""
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushes and (self.args.hub_always_push or not busy):
            with warn_if_report_fails(self, "writing the value model and a model card to push"):
                folder = Path(self.args.output_dir)
                for name in self.value_parts:
                    source = Path(checkpoint_folder) / name
                    if source.is_dir():
                        shutil.copytree(source, folder / name, dirs_exist_ok=True)
                    elif source.is_file():
                        shutil.copy(source, folder / name)
                self.create_model_card(model_name=self.hub_model_id)
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Save to `args.output_dir`, write model cards and upload policy, tokenizer, value model and cards.

        Args:
            repo_id: where to; defaults to `args.hub_model_id`.
            kwargs: as in [`~transformers.Trainer.push_to_hub`] (`commit_message`, `token`, `blocking`, ...).
        """
        if repo_id is not None:
            self.args.hub_model_id, self.hub_model_id = repo_id, None
        if type(self)._save_pretrained is not Saving._save_pretrained or "_save_pretrained" in vars(self):
            self._save_pretrained(self.args.output_dir)
        return super().push_to_hub(**kwargs)
