"""What the curves at mini scale learn: a fine-tuned policy, prompts, and a reward."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reproduction.sizes import DEMO, MiniSizes
from trl_apa.demo.networks import decode, sample
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import Ingredients, measure, prepare, quiet_libraries, torch_threads
from trl_apa.demo.report import Report
from trl_apa.models import independent_copy


class Task(ABC):
    """What all curves of a figure start from; made when the first curve needs it.

    Args:
        folder: where its networks are saved.
        sizes: how small.
    """

    num_threads = 1  # of torch: the order of float additions, and so the numbers, depend on it

    def __init__(self, folder: Path, sizes: MiniSizes):
        self.folder, self.sizes = folder, sizes

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of policy and rewards."""

    @property
    @abstractmethod
    def train_prompts(self) -> list[str]:
        """The questions to learn from."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """The longest response."""

    @property
    @abstractmethod
    def initial_policy(self) -> PreTrainedModel:
        """The fine-tuned model, which nothing changes."""

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        """The reward of each response, as 0-D float32 tensors: all that a method sees of it."""

    @abstractmethod
    def measure_finite(self, policy: PreTrainedModel) -> dict[str, float]:
        """Quantities of a log, of this policy on prompts that no stage trains on."""

    def policy(self) -> PreTrainedModel:
        """A new copy of the fine-tuned model."""
        return independent_copy(self.initial_policy)

    def measure(self, policy: PreTrainedModel) -> dict[str, float]:
        """Quantities of a log, of this policy on held-out prompts, with the same random numbers every time.

        Raises:
            FloatingPointError: if a weight is not finite.
        """
        if not all(parameter.isfinite().all() for parameter in policy.parameters()):
            raise FloatingPointError("the policy has weights that are not finite")
        return {f"eval_{name}": value for name, value in self.measure_finite(policy).items()}

    def reference_rewards(self, prompt: str, count: int) -> list[float]:
        """Rewards of `count` answers of the fine-tuned model to a prompt, the same whenever it is asked."""
        seed = int(sha256(prompt.encode()).hexdigest()[:8], 16)
        answers = sample(self.initial_policy, self.tokenizer, [prompt] * count, self.max_new_tokens, seed=seed)
        return [float(score) for score in self.score([prompt] * count, answers)]

    @cached_property
    def fixed_rows(self) -> list[dict[str, Any]]:
        """The fine-tuned model's own answers with their rewards, from which the offline curves learn."""
        prompts = random.Random(0).choices(self.train_prompts, k=self.sizes.num_responses)
        responses = sample(self.initial_policy, self.tokenizer, prompts, self.max_new_tokens, seed=7)
        scores = self.score(prompts, responses)
        rows = zip(prompts, responses, decode(self.tokenizer, responses), scores, strict=True)
        return [
            {"prompt": prompt, "completion_ids": response.tolist(), "text": text, "reward": float(score)}
            for prompt, response, text, score in rows
        ]


class DemoTask(Task):
    """The demo's questions about products, with its learned reward; the gold reward is measured beside it."""

    def __init__(self, folder: Path, sizes: MiniSizes):
        super().__init__(folder, sizes)
        self.options = replace(demo_options(sizes), output_dir=folder)

    @cached_property
    def made(self) -> Ingredients:
        """What the demo's supervised stages leave."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with quiet_libraries(), torch_threads(self.num_threads):
            return prepare(self.options, Report(Console()))

    @property
    def start(self) -> Path:
        """Folder of the fine-tuned model, which is made if it is not there."""
        path = self.folder / "sft_model"
        if not (path / "config.json").is_file():
            _ = self.made
        return path

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.made.tokenizer

    @property
    def train_prompts(self) -> list[str]:
        return self.made.corpus.train_prompts

    @property
    def max_new_tokens(self) -> int:
        return self.options.max_new_tokens

    @property
    def initial_policy(self) -> PreTrainedModel:
        return self.made.initial_policy

    def score(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        return self.made.reward_model(prompts, responses)

    def measure_finite(self, policy: PreTrainedModel) -> dict[str, float]:
        options = replace(self.options, samples_per_prompt=self.sizes.samples_per_prompt)
        found = measure(options, replace(self.made, policy=policy)).metrics
        return {"reward": found.pop("proxy_reward"), **found}


def make_task(name: str, folder: Path, sizes: MiniSizes) -> Task:
    """The task of that name, in a folder of its own in `folder`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name == DEMO:
        return DemoTask(task_folder(folder, sizes), sizes)
    from reproduction.verifiable import VerifiableTask

    return VerifiableTask(name, task_folder(folder, sizes, name), sizes)


def task_folder(folder: Path, sizes: MiniSizes, name: str = DEMO) -> Path:
    """The path of the networks that curves start from, next to the runs in `folder`."""
    return folder / f"task-{digest(describe_task(sizes, name))}"


def demo_options(sizes: MiniSizes) -> DemoOptions:
    """The task as the demo knows it."""
    return DemoOptions(
        batch_size=sizes.batch_size,
        sft_steps=sizes.sft_steps,
        num_pairs=sizes.num_pairs,
        reward_steps=sizes.reward_steps,
        samples_per_prompt=sizes.samples_per_prompt,
    )


def describe_task(sizes: MiniSizes, name: str = DEMO) -> dict[str, Any]:
    """What the networks of a task depend on, and how policies are measured on it."""
    if name == DEMO:
        alignment = {"output_dir", "loss_type", "iterations", "kl_coef", "learning_rate", "batch_size"}
        return {name: value for name, value in asdict(demo_options(sizes)).items() if name not in alignment}
    from reproduction.verifiable import kind_of

    read = {"samples_per_prompt": sizes.samples_per_prompt, "sft_steps": sizes.sft_steps}
    return {"task": name, "right": kind_of(name).right, **read}


def digest(content: Any) -> str:
    """Eight characters that are the same for the same content; 1 and 1.0 are."""
    return sha256(json.dumps(_with_floats(content), sort_keys=True).encode()).hexdigest()[:8]


def _with_floats(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _with_floats(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_floats(value) for value in content]
    return float(content) if isinstance(content, int) and not isinstance(content, bool) else content
