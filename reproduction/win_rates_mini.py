"""Win rates at mini scale: answers to the demo's held-out questions, judged by their true quality."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from reproduction.win_rates import Comparison, WinRates, answers_file, sampling_seed, summarize
from trl_apa.demo.corpus import build_corpus
from trl_apa.demo.networks import encode, sample
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import quiet_libraries, torch_threads
from trl_apa.demo.reward import gold_rewards
from trl_apa.winrate import Judgement, Pair, compare
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.verdicts import FIRST, SECOND, TIE


class GoldJudge:
    """The answer with the higher gold reward wins; equal ones tie. The reference answer is not read.

    Args:
        tokenizer: the demo's. The answers are texts with its special tokens: one that does not end with EOS was cut.
    """

    # It is blind to the order; asked both ways all the same, an agreement below 1 would be an error of the counting.
    sees_order = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.identity: dict[str, Any] = {"judge": "gold reward"}

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        prompts = [question.prompt for question in questions]
        firsts = self._golds(prompts, [question.first for question in questions])
        seconds = self._golds(prompts, [question.second for question in questions])
        for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            yield number, TIE if first == second else (FIRST if first > second else SECOND)

    def _golds(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return gold_rewards(self.tokenizer, prompts, encode(self.tokenizer, answers))


def held_out_prompts(options: DemoOptions) -> list[str]:
    """The questions that no stage of the task trains on; how many demonstrations are written does not change them."""
    return build_corpus(options.seed, 0, options.num_eval_prompts).eval_prompts


def compare_in_small(
    comparison: Comparison,
    policies: Mapping[int, Mapping[str, Path]],
    folder: Path,
    options: DemoOptions,
) -> WinRates:
    """Sample from every policy, write the answers to `folder`, and judge every pair.

    Args:
        comparison: what is compared.
        policies: seed of the runs to label to the folder of the policy.
        folder: of the answers.
        options: of the task: its held-out questions, the samples to each, the longest answer.

    Raises:
        ValueError: if a policy is not there.
    """
    for path in (path for found in policies.values() for path in found.values()):
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no policy: remove {path.parent}, and run this again")
    folder.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(options) * options.samples_per_prompt
    judged: dict[tuple[str, str], dict[int, list[Judgement]]] = {pair: {} for pair in comparison.pairs}
    with quiet_libraries(), torch_threads(options.num_threads):
        for seed, found in policies.items():
            judge = GoldJudge(AutoTokenizer.from_pretrained(found[comparison.start]))
            answers = {}
            for label, path in found.items():
                drawn_with = sampling_seed(comparison, label, seed)
                answers[label] = sample_answers(path, judge.tokenizer, prompts, options.max_new_tokens, drawn_with)
                _write_answers(answers_file(folder, label, seed), prompts, answers[label])
            for ours, theirs in comparison.pairs:
                pairs = [Pair(*row) for row in zip(prompts, answers[ours], answers[theirs], strict=True)]
                judged[ours, theirs][seed] = compare(pairs, judge)
    return summarize(judged, "the gold reward")


def sample_answers(
    policy: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """One answer to each prompt, as text with its special tokens."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    responses = sample(model, tokenizer, prompts, max_new_tokens, seed)
    texts: list[str] = tokenizer.batch_decode([response.tolist() for response in responses])
    return texts


def _write_answers(path: Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
