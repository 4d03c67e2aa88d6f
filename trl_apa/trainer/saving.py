"""What is left of a run: the networks in a folder or on the hub, and a model card."""

import os
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from trl_apa._trl import _BaseTrainer
from trl_apa.distributed.processes import Processes
from trl_apa.distributed.sharded import shards_weights
from trl_apa.models import merge_and_save
from trl_apa.redaction import without_secrets
from trl_apa.telemetry import NoTelemetry


class Saving(NoTelemetry, _BaseTrainer):
    """The part of `APATrainer` that writes policy, value model, tokenizer and card."""

    _tag_names: ClassVar[list[str]] = ["trl", "apa", "rlhf"]
    _name = "APA"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Fine-Tuning Language Models with Advantage-Induced Policy Alignment",
        "id": "2306.02231",
        # docstyle-ignore
        "citation": (
            "@article{zhu2023apa,\n"
            "    title = {{Fine-Tuning Language Models with Advantage-Induced Policy Alignment}},\n"
            "    author = {Banghua Zhu and Hiteshi Sharma and Felipe Vieira Frujeri and Shi Dong and "
            "Chenguang Zhu and Michael I. Jordan and Jiantao Jiao},\n"
            "    year = 2023,\n"
            "    journal = {arXiv preprint arXiv:2306.02231}\n"
            "}"
        ),
    }

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the policy (an adapter, if it is one), the tokenizer, and the value model in `value_model/`.

        Plain transformers, or peft, loads the policy; `APATrainer(value_model=f"{save_directory}/value_model")` the
        value model.
        """
        self._save_pretrained(save_directory)

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
        """Write a model card that says how the policy was trained and cites the paper, as `README.md`.

        Args:
            path: a folder, made if it is not there; defaults to `args.output_dir`.
            model_name, dataset_name, tags: as in TRL's trainers.
        """
        output_dir = self.args.output_dir
        try:
            if path is not None:
                self.args.output_dir = os.fspath(path)
            os.makedirs(self.args.output_dir, exist_ok=True)
            about = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
            super().create_model_card(**without_secrets(about, vars(self.args)))
        finally:
            self.args.output_dir = output_dir

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Save to `args.output_dir`, write a model card and upload both.

        Args:
            repo_id: where to; defaults to `args.hub_model_id`.
            kwargs: as in [`~transformers.Trainer.push_to_hub`] (`commit_message`, `token`, `blocking`, ...).
        """
        if repo_id is not None:
            self.args.hub_model_id, self.hub_model_id = repo_id, None
        if type(self)._save_pretrained is not Saving._save_pretrained or "_save_pretrained" in vars(self):
            self._save_pretrained(self.args.output_dir)
        return super().push_to_hub(**kwargs)
