"""Cards of what trainers leave: policy, value model, fine-tuned model, reward model, merged adapter."""

import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa._trl import get_comet_experiment_url, get_trackio_space_url, is_peft_model
from trl_apa.cards.card import Card, shown_name
from trl_apa.cards.figures import OF_VALUES, figures_of
from trl_apa.cards.papers import papers_of
from trl_apa.models.loading import language_model_class
from trl_apa.models.network_parts import Network


CHECKPOINT = re.compile(r"checkpoint-\d+")
# Of TrainingArguments; an algorithm's config has a list of its own besides.
TRAINING_OPTIONS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "bf16", "fp16"),
)
SUPERVISED_OPTIONS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "completion_only_loss"),
    *("assistant_only_loss", "center_rewards_coefficient", "seed"),
)
# Values of settings that say that there is nothing to say.
SILENT = {
    "max_steps": -1,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "bf16": False,
    "fp16": False,
    "early_stopping": False,
}
# Options that are read only with another one.
READ_WITH = {"target_kl": "early_stopping"}
READ_WITH |= dict.fromkeys(("importance_level", "importance_max", "importance_min"), "importance_correction")
TEXT_GENERATION, CLASSIFICATION = "text-generation", "text-classification"
TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(folder)"
IMPORT_VALUES = "from trl_apa import ValueModel"
OWN_VALUE_MODEL = """value_model: torch.nn.Module = ...  # of the class that value_model.json names
value_model.load_state_dict(load_file(f"{folder}/value_head.safetensors"))"""


def policy_card(
    trainer: Any, policy: Network, name: str, value_folder: Path | None, has_head: bool, is_merged: bool = False
) -> Card:
    """The card of an aligned policy.

    Args:
        trainer: an online or an offline one.
        policy: that is saved.
        name: of the model.
        value_folder: of the value model that is saved beside it; None if there is none.
        has_head: whether the value model is a head saved with the policy.
        is_merged: whether the adapter was put into its base.
    """
    args = trainer.args
    adapted = is_peft_model(policy) and not is_merged
    auto = language_model_class(policy.config).__name__
    imports, loading = _loading(auto, adapted)
    if value_folder is not None and "hidden_size" in _description(value_folder):
        imports.append(IMPORT_VALUES)
        loading += "\n# To train on: APATrainer(..., value_model=value_model)\nvalue_model = "
        loading += 'ValueModel.from_pretrained(f"{folder}/value_model")'
    elif has_head and not is_merged:
        imports.append(f"from trl_apa import {auto}WithValueHead")
        loading += (
            f"\n# The same with the value head, to train on.\nwith_head = {auto}WithValueHead.from_pretrained(folder)"
        )
    kind = "An adapter" if adapted else "A language model"
    method = _method(args.loss_type)
    what = f"{kind} aligned by reinforcement learning on {trainer.learns_from}, with {method} of trl_apa."
    if args.loss_type == "ilql":
        what += " When it samples, `OfflineAPATrainer` shifts it by the values; alone it imitates the data."
    return Card(
        what=what,
        imports=imports,
        loading=loading,
        rewards=[] if trainer.scorer is None else trainer.scorer.names,
        task=None if policy.config.is_encoder_decoder else TEXT_GENERATION,
        options=_options(args, (*args.defines_run, *TRAINING_OPTIONS)),
        figures=figures_of(trainer.state.log_history),
        links=tracker_links(),
        papers=papers_of(args.loss_type),
        **_common(trainer, policy, name, adapted),
    )


def value_card(trainer: Any, policy: Network, name: str, folder: Path) -> Card:
    """The card of the value model in a folder of its own."""
    args, description = trainer.args, _description(folder)
    adapted = bool(description.get("adapter"))
    imports, loading = [IMPORT_VALUES], "value_model = ValueModel.from_pretrained(folder)"
    if "hidden_size" not in description:
        imports, loading = ["import torch", "from safetensors.torch import load_file"], OWN_VALUE_MODEL
    return Card(
        what=f"The value model of the policy `{name}`: V of the state before each response token, in reward units, "
        f"fitted while the policy was trained with {_method(args.loss_type)} of trl_apa. It generates no text.",
        imports=imports,
        loading=loading,
        tags=["value-model"],
        options=_options(args, ("loss_type", "gamma", "gae_lambda", "vf_coef", "cliprange_value", "value_epochs")),
        figures=figures_of(trainer.state.log_history, OF_VALUES),
        papers=papers_of(args.loss_type),
        **_common(trainer, policy, f"{name}, value model", adapted),
    )


def supervised_card(trainer: Any, name: str, what: str, auto: str, task: str, tags: Sequence[str]) -> Card:
    """The card of what `trl-apa sft` and `trl-apa reward` leave.

    Args:
        trainer: TRL's.
        name: of the model.
        what: it is.
        auto: class of transformers that loads it.
        task: of the hub.
        tags: of TRL's trainer.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted = is_peft_model(model)
    more = ", num_labels=1" if adapted and task == CLASSIFICATION else ""
    imports, loading = _loading(auto, adapted, more)
    return Card(
        what=f"{'An adapter, a' if adapted else 'A'} {what}, trained with TRL by trl_apa.",
        imports=imports,
        loading=loading,
        task=task,
        tags=tags,
        options=_options(trainer.args, (*SUPERVISED_OPTIONS, *TRAINING_OPTIONS)),
        figures=figures_of(trainer.state.log_history),
        links=tracker_links(),
        papers=papers_of("apa"),
        **_common(trainer, model, name, adapted),
    )


def merged_card(adapter: str, name: str, auto: str) -> Card:
    """The card of an adapter that was put into its base.

    Args:
        adapter: its folder or hub name; the figures are those of the run that its folder has the log of.
        name: of the merged model.
        auto: class of transformers that loads it.
    """
    log = Path(adapter) / "trainer_state.json"
    state = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    is_adapter = find_adapter_config_file(adapter) is not None
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path if is_adapter else None
    imports, loading = _loading(auto, False)
    return Card(
        name=name,
        what=f"A language model: the adapter `{shown_name(adapter)}`, put into its base by `trl-apa merge`.",
        imports=imports,
        loading=loading,
        base_model=base,
        task=TEXT_GENERATION if "Causal" in auto else None,
        figures=figures_of(state.get("log_history", [])),
        steps=state.get("global_step", 0),
        papers=papers_of("apa"),
    )


def tracker_links() -> dict[str, str]:
    """Addresses of the runs at trackers, as TRL's cards link them."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if find_spec("wandb") is not None:
        import wandb

        links["Weights & Biases"] = None if wandb.run is None else wandb.run.url
    return {name: address for name, address in links.items() if address}


def _common(trainer: Any, network: Network, name: str, adapted: bool) -> dict[str, Any]:
    return {
        "name": name,
        "hub_id": trainer.hub_model_id or trainer.args.hub_model_id,
        "base_model": base_name(network),
        "datasets": trainer.card_datasets,
        "library": "peft" if adapted else "transformers",
        "steps": trainer.state.global_step,
    }


def base_name(network: Network) -> str | None:
    """Hub name or path of what a network was loaded from; None where it was made in memory."""
    if is_peft_model(network):
        return network.peft_config[network.active_adapter].base_model_name_or_path or None
    return getattr(network.config, "_name_or_path", None) or None


def _options(args: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that the config has, with settings of the Trainer that say nothing left out."""
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    unread = {name for name, switch in READ_WITH.items() if not options.get(switch)}
    if not getattr(getattr(args, "estimator", None), "needs_ref_rewards", False):
        unread |= {"num_ref_samples", "value_kl_coef"}
    shown = {name: value for name, value in options.items() if name not in unread}
    return {name: value for name, value in shown.items() if name not in SILENT or value != SILENT[name]}


def _loading(auto: str, adapted: bool, more: str = "") -> tuple[list[str], str]:
    """The import lines and the Python that load model and tokenizer."""
    if adapted and auto.startswith("AutoModel"):
        auto = auto.replace("AutoModel", "AutoPeftModel")
        imports = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    else:
        imports = [f"from transformers import {auto}, AutoTokenizer"]
    return imports, f"model = {auto}.from_pretrained(folder{more})\n{TOKENIZER}"


def _method(loss_type: str) -> str:
    """`apa` as APA; an algorithm of the user's own by its name."""
    return f"`{loss_type}`" if ":" in loss_type else loss_type.upper().replace("_", " ")


def _description(folder: Path) -> dict[str, Any]:
    """What a saved value model says of itself."""
    file = folder / "value_model.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def name_of_folder(folder: str | os.PathLike[str]) -> str:
    """A model's name, where none is given: that of its folder, behind that of the run if it is a checkpoint."""
    path = Path(folder).resolve()
    checkpoint = CHECKPOINT.search(path.name)
    return path.name if checkpoint is None else f"{path.parent.name}/{checkpoint[0]}"
