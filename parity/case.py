"""One case of the comparison, on disk and in action. Both environments run this file, so it imports neither TRL."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


PAD, EOS = 0, 1
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass
class Rollouts:
    """What one `step` is given.

    Args:
        queries, responses: token ids, a list a row.
        scores: one number a row.
        masks: which response tokens count; all if None.
        orders: for each epoch the order in which rows are visited; both libraries are made to follow it.
    """

    queries: list[list[int]]
    responses: list[list[int]]
    scores: list[float]
    orders: list[list[int]]
    masks: list[list[int]] | None = None

    def as_tensors(self) -> tuple[list[Tensor] | None, ...]:
        """The arguments of `step`."""
        queries, responses = ([torch.tensor(row) for row in rows] for rows in (self.queries, self.responses))
        masks = None if self.masks is None else [torch.tensor(row) for row in self.masks]
        return queries, responses, [torch.tensor(score) for score in self.scores], masks


@dataclass
class Case:
    """Everything that both libraries must start from to be comparable.

    Args:
        name: of its folder.
        about: what it exercises, and which of classic's bugs it steps around.
        model: arguments of `AutoConfig.for_model`.
        options: of `PPOConfig`, by classic's names; what is not here has either library's default.
        rollouts: one element for each consecutive `step`.
        prompts: token ids to answer greedily, before the first `step` and after the last.
        lora: arguments of `LoraConfig`; none for full fine-tuning.
        optimizer: name and arguments, given to both trainers; either library's own if None.
        decay: if set, the learning rate is multiplied by it after every `step`; needs `optimizer`.
        pad_is_eos: whether the tokenizer pads with EOS.
        padding_side: on which side classic pads what it trains on; nothing to us.
        weights: `policy.*` and `v_head.*`, and `reference.*` unless the reference is what the trainer makes itself.
    """

    name: str
    about: str
    model: dict[str, Any]
    options: dict[str, Any]
    rollouts: list[Rollouts]
    prompts: list[list[int]]
    lora: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    decay: float | None = None
    pad_is_eos: bool = False
    padding_side: str = "right"
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.model["model_type"] == "t5"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        fields = dataclasses.asdict(dataclasses.replace(self, weights={}))
        (folder / "case.json").write_text(json.dumps(fields))
        save_file(self.weights, folder / "weights.safetensors")

    @classmethod
    def read(cls, folder: Path) -> "Case":
        fields = json.loads((folder / "case.json").read_text())
        fields["rollouts"] = [Rollouts(**rollouts) for rollouts in fields["rollouts"]]
        return cls(**{**fields, "weights": load_file(folder / "weights.safetensors")})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word for every id of the vocabulary."""
        words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, self.model["vocab_size"])}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        pad_token = "<eos>" if self.pad_is_eos else "<pad>"
        options = {"pad_token": pad_token, "eos_token": "<eos>", "padding_side": self.padding_side}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)

    def language_model(self, part: str) -> PreTrainedModel | PeftModel:
        """`policy` or `reference`, with the weights of this case."""
        model = random_language_model(self.model)
        if part == "policy" and self.lora is not None:
            model = get_peft_model(model, LoraConfig(**self.lora))
        weights = self.weights_of(part)
        if weights.keys() != dict(model.named_parameters()).keys():
            raise ValueError(f"the weights of {part} are not those of the model: {sorted(weights)}")
        model.load_state_dict(weights, strict=False)  # tied weights are stored once
        return model

    def weights_of(self, part: str) -> dict[str, Tensor]:
        prefix = f"{part}."
        return {name.removeprefix(prefix): t for name, t in self.weights.items() if name.startswith(prefix)}

    @property
    def has_reference(self) -> bool:
        return bool(self.weights_of("reference"))

    def optimizer_and_scheduler(self, parameters: Any) -> tuple[Any, Any]:
        if self.optimizer is None:
            return None, None
        options = dict(self.optimizer)
        optimizer = OPTIMIZERS[options.pop("name")]((p for p in parameters if p.requires_grad), **options)
        if self.decay is None:
            return optimizer, None
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)


def random_language_model(model: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(**model)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config)


def snapshot(module: nn.Module, prefix: str, trainable_only: bool = False) -> dict[str, Tensor]:
    """Copies of the parameters, tied ones once."""
    return {
        f"{prefix}.{name}": parameter.detach().clone().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or not trainable_only
    }


@dataclass
class Outcome:
    """What a library made of a case.

    Args:
        statistics: what each `step` returned: numbers, and arrays as nested lists.
        greedy: responses to the prompts before the first `step` and after the last.
        parameters: `step<n>.<name>` for every trainable parameter after step n.
    """

    statistics: list[dict[str, Any]]
    greedy: list[list[list[int]]]
    parameters: dict[str, Tensor]

    def write(self, folder: Path, library: str) -> None:
        fields = {"statistics": self.statistics, "greedy": self.greedy}
        (folder / f"{library}.json").write_text(json.dumps(fields, separators=(",", ":")))
        save_file(self.parameters, folder / f"{library}.safetensors")

    @classmethod
    def read(cls, folder: Path, library: str) -> "Outcome":
        fields = json.loads((folder / f"{library}.json").read_text())
        return cls(**fields, parameters=load_file(folder / f"{library}.safetensors"))


def play(case: Case, trainer: Any, policy: nn.Module, v_head: nn.Module) -> Outcome:
    """Generate, take every `step` of the case, generate again: the classic loop, the same for either library.

    Args:
        case: what to do.
        trainer: of either library.
        policy, v_head: the modules that it trains.
    """
    outcome = Outcome([], [answer(case, trainer)], {})
    for number, rollouts in enumerate(case.rollouts):
        statistics = trainer.step(*rollouts.as_tensors())
        outcome.statistics.append({name: as_json(value) for name, value in statistics.items()})
        for part, module in (("policy", policy), ("v_head", v_head)):
            outcome.parameters |= snapshot(module, f"step{number}.{part}", trainable_only=True)
    outcome.greedy.append(answer(case, trainer))
    return outcome


def answer(case: Case, trainer: Any) -> list[list[int]]:
    """Greedy responses to the prompts, in batches of three."""
    prompts = [torch.tensor(prompt) for prompt in case.prompts]
    pad = EOS if case.pad_is_eos else PAD
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": pad, "eos_token_id": EOS}
    responses = trainer.generate(prompts, batch_size=3, return_prompt=False, **options)
    return [response.tolist() for response in responses]


def as_json(value: Any) -> Any:
    """A number or nested lists of numbers, rounded to seven digits, as many as float32 has."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [as_json(element) for element in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def play_folders(root: Path, library: str, play_case: Callable[[Case], Outcome]) -> None:
    """Play every case under `root` and leave the outcome in its folder."""
    for folder in sorted(path.parent for path in root.glob("*/case.json")):
        play_case(Case.read(folder)).write(folder, library)
