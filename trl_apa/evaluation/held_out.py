"""How good a policy is on prompts it was not trained on: reward, KL to pi_init, wins over pi_init's own answers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from trl_apa.algorithms.masking import keep_counted
from trl_apa.rollout.batch import lay_out, longest_row, response_mask


if TYPE_CHECKING:
    from trl_apa.trainer.apa import APATrainer


def held_out_metrics(trainer: "APATrainer", rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sample one response of the policy and one of pi_init to each prompt, and compare.

    Every process takes its part of the prompts; the seed is `args.seed`, so that checkpoints meet the same luck.

    Args:
        trainer: with reward functions. Prompts that one leaves unscored (`skip_unscored`) are not in the means.
        rows: prompts, with the columns that the reward functions read.

    Returns:
        In reward units `reward`, `reward_std`, `ref_reward` and `rewards/<function>`; `win_rate`, the share of prompts
        on which the policy scores higher than pi_init, a tie counting half; `kl`, nats a response, the mean of
        log pi - log pi_init over the policy's responses; `entropy` of the policy's next-token distributions, nats,
        mean over response tokens; `response_length`, tokens; `eos_share`; `distinct_1` and `distinct_2`, see
        `distinct_ngrams`; `runtime`, seconds.
    """
    start = time.perf_counter()
    process, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    per_process = -(-len(rows) // count)
    # Every process takes part in every collective; rows that only fill up are left out of the means.
    numbers = [process + k * count for k in range(per_process)]
    own = [rows[number % len(rows)] for number in numbers]
    with random_numbers_of_its_own(trainer.args.seed, trainer.accelerator.process_index):
        parts = _measured_in_parts(trainer, own, trainer.args.per_device_eval_batch_size)
    table = [part for part, _ in parts]
    columns = {name: torch.cat([part[name] for part in table]) for name in table[0]}
    names = sorted(columns)
    stacked = torch.stack([columns[name].float() for name in names], dim=1).to(trainer.accelerator.device)
    everywhere = trainer.accelerator.gather(stacked)
    is_real = trainer.accelerator.gather(torch.tensor(numbers, device=stacked.device)) < len(rows)
    columns = dict(zip(names, everywhere[is_real].unbind(dim=1), strict=True))
    kept = columns.pop("kept").bool()
    if not kept.any():
        raise ValueError("no response to eval_dataset was scored: every one had a None or NaN")
    columns = {name: values[kept] for name, values in columns.items()}
    entropy_sums = columns.pop("entropy_sum")
    metrics = {name: float(values.mean()) for name, values in columns.items()}
    metrics["reward_std"] = float(columns["reward"].std(unbiased=False))
    metrics["entropy"] = float(entropy_sums.sum() / columns["response_length"].sum())
    texts = [text for _, texts in parts for text in texts]
    is_kept = [kept for part in table for kept in part["kept"].tolist()]
    gathered = gather_object(list(zip(numbers, is_kept, texts, strict=True)))
    texts = [text for number, was_kept, text in gathered if was_kept and number < len(rows)]
    metrics |= {f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2)}
    return {**metrics, "runtime": time.perf_counter() - start}


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all of them, counted over all texts (Li et al., arXiv 1510.03055).

    0 if there is none. It falls as there are more texts: compare it on equally many.
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def _measured_in_parts(
    trainer: "APATrainer", rows: list[dict[str, Any]], size: int
) -> list[tuple[dict[str, Tensor], list[str]]]:
    """What `_measure` says of every `size` rows. All are sampled before one is scored: vLLM samples for all processes
    together, and a reward function that fails in one of them must not leave the others waiting for it."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    queries = trainer.processes.together(lambda: [[trainer._query(row) for row in part] for part in parts])
    responses = [trainer._respond_on_all_processes(part, generate_ref_response=True) for part in queries]
    # Where weights are sharded, the networks are run by all processes together, too.
    nats = [_kl_and_entropy(trainer, asked, both[0]) for asked, both in zip(queries, responses, strict=True)]
    together = list(zip(parts, queries, responses, nats, strict=True))
    return [_measure(trainer, *part) for part in together]


def _measure(
    trainer: "APATrainer",
    rows: list[dict[str, Any]],
    queries: list[Tensor],
    both: tuple[list[Tensor], list[Tensor]],
    nats: tuple[Tensor, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """One value a row, and the policy's responses as text.

    Args:
        both: responses of the policy, and of pi_init.
        nats: what `_kl_and_entropy` says of the policy's.
    """
    responses, ref_responses = both
    kl_B, entropy_sum_B = nats
    _, scores = trainer._scores_on_all_processes(rows, queries, responses)
    reward_B = scores.total_B
    _, ref_scores = trainer._scores_on_all_processes(rows, queries, ref_responses)
    ref_reward_B = ref_scores.total_B
    end = trainer._end_token_ids
    columns = {
        "kept": scores.kept_B & ref_scores.kept_B,
        "reward": reward_B,
        "ref_reward": ref_reward_B,
        "win_rate": ((reward_B - ref_reward_B).sign() + 1) / 2,
        "kl": kl_B.cpu(),
        "entropy_sum": entropy_sum_B.cpu(),
        "response_length": torch.tensor([float(len(response)) for response in responses]),
        "eos_share": torch.tensor([float(int(response[-1]) in end) for response in responses]),
        **{f"rewards/{name}": scores.by_function_BF[:, i] for i, name in enumerate(scores.names)},
    }
    return columns, trainer.processing_class.batch_decode(responses, skip_special_tokens=True)


@torch.no_grad()
def _kl_and_entropy(trainer: "APATrainer", queries: list[Tensor], responses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over each response, nats, `(B,)`: of log pi - log pi_init, and of the policy's entropy."""
    device = trainer.accelerator.device
    mask_BR = response_mask(responses, device=device)
    queries, responses = send_to_device([queries, responses], device)
    layout = trainer._layouts(longest_row(queries, responses, trainer._decoder_start_token_id))
    tokens = lay_out(layout, queries, responses, trainer._pad_token_id, trainer._decoder_start_token_id)
    batch = {**tokens, "response_mask": mask_BR}
    with trainer.accelerator.autocast():
        outputs = trainer._module_to_call(**trainer._model_inputs(batch), with_value=False, with_entropy=True)
    ref_logprobs_BR = trainer._reference_outputs(batch)["logprobs"]
    kl_B = keep_counted(outputs["logprobs"] - ref_logprobs_BR, mask_BR).sum(dim=1)
    return kl_B, keep_counted(outputs["entropy"], mask_BR).sum(dim=1)


@contextmanager
def random_numbers_of_its_own(seed: int, process_index: int = 0) -> Iterator[None]:
    """Inside, torch's generators are seeded; afterwards their states are restored."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + process_index)
        yield
