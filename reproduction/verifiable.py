"""Tasks at mini scale whose answers are right or wrong: sums of small numbers, and short lists to sort."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reproduction.sizes import DEMO, MiniSizes
from reproduction.tasks import Task
from trl_apa.demo.evaluation import divergence_and_entropy
from trl_apa.demo.networks import build_policy, build_tokenizer, decode, sample
from trl_apa.demo.pipeline import quiet_libraries, torch_threads
from trl_apa.demo.supervised import train_sft, training_options


SFT_LEARNING_RATE = 2e-3
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Problem:
    """A question, its only right answer, and answers of a careless writer; all are words with spaces between."""

    prompt: str
    answer: str
    mistakes: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        words: all that its questions and answers are made of.
        problems: every one there is, or as many as are drawn, in the order of a random generator.
        held_out: how many of them no stage trains on.
        right: share of right answers among those that the policy is fine-tuned on.
        sft_rate: optimizer steps of supervised fine-tuning, on 32 rows each, to one of the demo's.
        max_new_tokens: longest response.
    """

    words: tuple[str, ...]
    problems: Callable[[random.Random], list[Problem]]
    held_out: int
    right: float
    sft_rate: int
    max_new_tokens: int

    def sft_steps(self, sizes: MiniSizes) -> int:
        """Optimizer steps of supervised fine-tuning."""
        return self.sft_rate * sizes.sft_steps


def sums(rng: random.Random, count: int = 4, below: int = 6) -> list[Problem]:
    """Four numbers below 6; mistakes are one more, one less, two more, and the sum without the last number."""
    drawn = list(product(range(below), repeat=count))
    rng.shuffle(drawn)
    problems = []
    for numbers in drawn:
        total = sum(numbers)
        wrong = {total + 1, abs(total - 1), total + 2, sum(numbers[:-1])} - {total}
        prompt = f"{' + '.join(map(str, numbers))} ="
        problems.append(Problem(prompt, _digits(total), tuple(_digits(number) for number in sorted(wrong))))
    return problems


def sorting(rng: random.Random, count: int = 3000, length: int = 5) -> list[Problem]:
    """Lists of five digits, repeated ones among them; mistakes are the list itself, and two neighbours exchanged."""
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.choices(range(10), k=length))] = None
    problems = []
    for numbers in drawn:
        ordered = tuple(sorted(numbers))
        exchanged = [
            (*ordered[:place], ordered[place + 1], ordered[place], *ordered[place + 2 :])
            for place in range(length - 1)
        ]
        wrong = dict.fromkeys([numbers, *exchanged])
        wrong.pop(ordered, None)
        mistakes = tuple(" ".join(map(str, found)) for found in wrong) or (" ".join(map(str, ordered[1:])),)
        problems.append(Problem(f"{' '.join(map(str, numbers))} >", " ".join(map(str, ordered)), mistakes))
    return problems


KINDS = {
    "sums": Kind((*DIGITS, "+", "="), sums, held_out=200, right=0.4, sft_rate=4, max_new_tokens=6),
    "sorting": Kind((*DIGITS, ">"), sorting, held_out=200, right=0.3, sft_rate=2, max_new_tokens=8),
}


class VerifiableTask(Task):
    """A policy fine-tuned on answers of which few are right, and the exact reward: 1 for the right answer, else 0.

    The reward is exact, so that no method can exploit it, and held-out problems tell what was learned from what was
    remembered.

    Args:
        name: one of `KINDS`.
        folder: where the fine-tuned policy is saved.
        sizes: how small.
    """

    def __init__(self, name: str, folder: Path, sizes: MiniSizes):
        super().__init__(folder, sizes)
        self.kind = kind_of(name)
        problems = self.kind.problems(random.Random(0))
        self._held_out, self._train = problems[: self.kind.held_out], problems[self.kind.held_out :]
        self._answers = {problem.prompt: problem.answer for problem in problems}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.kind.words)

    @cached_property
    def train_prompts(self) -> list[str]:
        return [problem.prompt for problem in self._train]

    @property
    def max_new_tokens(self) -> int:
        return self.kind.max_new_tokens

    @cached_property
    def initial_policy(self) -> PreTrainedModel:
        path = self.folder / "sft_model"
        with quiet_libraries(), torch_threads(self.num_threads):
            if not (path / "config.json").is_file():
                self._fine_tune(path)
            return AutoModelForCausalLM.from_pretrained(path).eval()

    def score(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        """1 for a response that is the right answer and ends there, 0 for any other."""
        texts = decode(self.tokenizer, responses)
        return [
            torch.tensor(float(text == self._answers[prompt] and int(response[-1]) == self.tokenizer.eos_token_id))
            for prompt, text, response in zip(prompts, texts, responses, strict=True)
        ]

    def measure_finite(self, policy: PreTrainedModel) -> dict[str, float]:
        """The share of held-out problems that is solved, `reward`; exact KL and entropy."""
        prompts = [problem.prompt for problem in self._held_out] * self.sizes.samples_per_prompt
        responses = sample(policy, self.tokenizer, prompts, self.max_new_tokens, seed=3)
        kl_B, entropy = divergence_and_entropy(policy, self.initial_policy, self.tokenizer, prompts, responses)
        solved = torch.stack(self.score(prompts, responses)).mean().item()
        return {"reward": solved, "kl": kl_B.mean().item(), "entropy": entropy.item()}

    def _fine_tune(self, path: Path) -> None:
        rng, rows = random.Random(1), []
        steps = self.kind.sft_steps(self.sizes)
        for problem in rng.choices(self._train, k=32 * steps):
            is_right = rng.random() < self.kind.right
            answer = problem.answer if is_right else rng.choice(problem.mistakes)
            rows.append({"prompt": problem.prompt, "completion": answer})
        policy = build_policy(self.tokenizer, seed=0)
        options = training_options(str(self.folder), 0, SFT_LEARNING_RATE, steps)
        train_sft(policy, self.tokenizer, rows, options, lambda step, loss: None)
        policy.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def kind_of(name: str) -> Kind:
    """One of `KINDS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in KINDS:
        raise ValueError(f"task is {name!r}; it should be {DEMO}, {' or '.join(KINDS)}")
    return KINDS[name]


def _exchanged(numbers: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (*numbers[:place], numbers[place + 1], numbers[place], *numbers[place + 2 :])


def _digits(number: int) -> str:
    """The last digit first, which is the order in which one adds."""
    return " ".join(reversed(str(number)))
