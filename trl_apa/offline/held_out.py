"""The held-out reward of a policy that was learned offline."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from trl_apa.algorithms.masking import keep_counted
from trl_apa.evaluation.held_out import distinct_ngrams, random_numbers_of_its_own
from trl_apa.models import reference_policy
from trl_apa.models.logprobs import response_logprobs
from trl_apa.models.network_parts import num_token_ids
from trl_apa.rollout.batch import lay_out, longest_row, response_mask
from trl_apa.rollout.generation import generate_responses, generation_options
from trl_apa.rollout.prompts import PROMPT_COLUMNS, query_of
from trl_apa.rollout.scoring import Scorer
from trl_apa.rollout.texts import prompts_and_completions
from trl_apa.trainer.validation import check_tokens


if TYPE_CHECKING:
    from trl_apa.offline.trainer import OfflineAPATrainer


def held_out_reward(trainer: "OfflineAPATrainer", scorer: Scorer, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sample one response to each prompt, from the same seed every time, and score it.

    Args:
        trainer: every process takes its part of the prompts.
        scorer: the reward functions.
        rows: prompts, with the columns that the reward functions read.

    Returns:
        `reward` and `reward_std`, reward units; `kl`, nats a response, the mean of log pi - log pi_init over the
        responses; `response_length`, tokens; `eos_share`; `distinct_1` and `distinct_2`, see
        `held_out.distinct_ngrams`.

    Raises:
        ValueError: if there is no prompt; or what the reward functions raise, in all processes.
    """
    if not rows:
        raise ValueError("eval_dataset has no rows")
    process, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    numbers = list(range(process, len(rows), count))
    size = trainer.args.per_device_eval_batch_size
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def measure() -> list[tuple[Any, ...]]:
        return [
            row
            for part in parts
            for row in zip(part, *_measure(trainer, scorer, [rows[n] for n in part]), strict=True)
        ]

    with random_numbers_of_its_own(trainer.args.seed, process):
        # Together: processes may have different numbers of parts.
        measured = trainer.processes.together(measure)
    everything = sorted(gather_object(measured))
    _, rewards, kls, lengths, ended, texts = zip(*everything, strict=True)
    rewards_B = torch.tensor(rewards, dtype=torch.float64)
    return {
        "reward": float(rewards_B.mean()),
        "reward_std": float(rewards_B.std(unbiased=False)),
        "kl": sum(kls) / len(kls),
        "response_length": sum(lengths) / len(lengths),
        "eos_share": sum(ended) / len(ended),
        **{f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2)},
    }


def _measure(trainer: "OfflineAPATrainer", scorer: Scorer, rows: list[dict[str, Any]]) -> tuple[list[Any], ...]:
    """Reward, KL, length, whether it ended and text of a response to each row's prompt."""
    args, tokenizer = trainer.args, trainer.processing_class
    queries = [query_of(row, tokenizer, args.max_prompt_length, args.chat_template_kwargs) for row in rows]
    num_ids = num_token_ids(trainer.networks.policy)
    for query in queries:
        check_tokens("a prompt of eval_dataset", query, num_ids, tokenizer)
    with trainer.learned_policy() as policy, trainer.accelerator.autocast():
        options = generation_options(_sampling(trainer), {"stop_strings": args.stop_strings})
        responses = generate_responses(policy, queries, tokenizer=tokenizer, batch_size=len(queries), **options)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    prompts, completions = prompts_and_completions(rows, queries, responses, tokenizer)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in PROMPT_COLUMNS}
    scores = scorer(prompts, completions, queries, responses, columns)
    ended = [float(int(response[-1]) in trainer._end_token_ids) for response in responses]
    lengths = [len(response) for response in responses]
    return scores.total_B.tolist(), _kl(trainer, queries, responses).tolist(), lengths, ended, texts


def _sampling(trainer: "OfflineAPATrainer") -> dict[str, Any]:
    args = trainer.args
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    options |= {"max_new_tokens": args.max_completion_length, "pad_token_id": trainer._pad_token_id}
    return {**options, "eos_token_id": trainer._end_token_ids or None}


@torch.no_grad()
def _kl(trainer: "OfflineAPATrainer", queries: list[Tensor], responses: list[Tensor]) -> Tensor:
    """log pi - log pi_init summed over each response, nats, `(B,)`."""
    device = trainer.accelerator.device
    mask_BR = response_mask(responses, device=device)
    queries, responses = send_to_device([list(queries), list(responses)], device)
    tokens = lay_out(trainer._layouts(longest_row(queries, responses)), queries, responses, trainer._pad_token_id)
    arguments = (tokens, mask_BR.shape[1], trainer.args.temperature)
    with trainer.accelerator.autocast():
        with trainer.learned_policy() as policy:
            logprobs_BR, _ = response_logprobs(policy, *arguments)
        with reference_policy(trainer.networks.policy, trainer.ref_model) as reference:
            ref_logprobs_BR, _ = response_logprobs(reference, *arguments)
    return keep_counted(logprobs_BR - ref_logprobs_BR, mask_BR).sum(dim=1).cpu()
