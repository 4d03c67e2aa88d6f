"""How good a policy is on prompts it was not trained on: reward, KL to pi_init, wins over pi_init's own answers."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from trl_apa.algorithms.masking import keep_counted
from trl_apa.rollout.batch import Layout, lay_out, longest_row, response_mask
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.prompts import as_rows
from trl_apa.rollout.scoring import Scores


if TYPE_CHECKING:
    from trl_apa.offline.trainer import OfflineAPATrainer
    from trl_apa.trainer.apa import APATrainer

Row = dict[str, Any]

# Means that come with their standard error, `<name>_stderr`.
UNCERTAIN = ("reward", "kl", "win_rate")


@dataclass(frozen=True)
class EvaluationSteps:
    """What the online and the offline trainer do each in its own way when they evaluate.

    Args:
        respond: rows to rollouts of the policy and of pi_init; None where pi_init is not sampled.
        logprobs: a batch with its `response_mask` to log pi and log pi_init of the response tokens, nats `(B, R)`, and
            the entropy of the policy's next-token distributions, nats `(B, R)` or None.
        score: rows and their rollouts to scores.
        layouts: the layout of a batch, from the tokens of its longest row.
        pad_token_id, decoder_start_token_id: for that layout.
        end_token_ids: what ends a response.
        in_lockstep: whether `respond`, `logprobs` and `score` talk to other processes, which then have to make equally
            many calls; otherwise each process has its own number, and an error is told to the others at the end.
        score_at_once: score each batch before the next one is sampled, so that its environments may be used again;
            only `in_lockstep`, where `score` fails in all processes if it fails in one.
        dtype: of the means.
    """

    respond: Callable[[list[Row]], tuple[Episodes, Episodes | None]]
    logprobs: Callable[[dict[str, Any]], tuple[Tensor, Tensor, Tensor | None]]
    score: Callable[[list[Row], Episodes], Scores]
    layouts: Callable[[int], Layout]
    pad_token_id: int
    end_token_ids: Sequence[int]
    decoder_start_token_id: int | None = None
    in_lockstep: bool = False
    score_at_once: bool = False
    dtype: torch.dtype = torch.float64


def evaluate(
    trainer: "APATrainer | OfflineAPATrainer", dataset: Any, prefix: str, save_on_error: Callable[[], None]
) -> dict[str, float]:
    """`evaluate` of both trainers: measure, log, tell the callbacks.

    Args:
        trainer: with reward functions and `evaluation_steps`.
        dataset: prompts, or several data sets by name.
        prefix: of the metrics' names.
        save_on_error: called before an error of the measurement is raised.
    """
    if isinstance(dataset, dict):
        parts = [trainer.evaluate(part, metric_key_prefix=f"{prefix}_{name}") for name, part in dataset.items()]
        return {name: value for part in parts for name, value in part.items()}
    try:
        measured = held_out_metrics(trainer, as_rows(dataset))
    except BaseException:
        save_on_error()
        raise
    metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
    trainer.log(metrics)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def held_out_metrics(trainer: "APATrainer | OfflineAPATrainer", rows: list[Row]) -> dict[str, float]:
    """Sample one response to each prompt, and score it; online also one of pi_init, to compare.

    Every process takes its part of the prompts; the seed is `args.seed`, so that checkpoints meet the same luck.

    Args:
        trainer: an `APATrainer` or `OfflineAPATrainer` with reward functions. Prompts that one leaves unscored
            (`skip_unscored`) are not in the means.
        rows: prompts, with the columns that the reward functions read.

    Returns:
        In reward units `reward`, `reward_std` and `rewards/<function>`; `reward_stderr`, `kl_stderr` and online
        `win_rate_stderr`, see `standard_error`, of these means over the prompts; `kl`, nats a response, the mean of
        log pi - log pi_init over the policy's responses; `response_length`, tokens; `eos_share`; `distinct_1` and
        `distinct_2`, see `distinct_ngrams`; `runtime`, seconds. Online also `ref_reward`, reward units; `win_rate`,
        the share of prompts on which the policy scores higher than pi_init, a tie counting half; `entropy` of the
        policy's next-token distributions, nats, mean over response tokens.

    Raises:
        ValueError: if there is no prompt, or none was scored; or what the reward functions raise, in all processes.
    """
    start = time.perf_counter()
    if not rows:
        raise ValueError("eval_dataset has no rows")
    steps = trainer.evaluation_steps()
    together, size = trainer.processes.together, trainer.args.per_device_eval_batch_size
    process, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    # In lockstep the first rows fill up the last batches; they count once.
    numbers = range(process, -(-len(rows) // count) * count if steps.in_lockstep else len(rows), count)
    own = [rows[number % len(rows)] for number in numbers]
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    with random_numbers_of_its_own(trainer.args.seed + process):
        work = partial(_measure, trainer, steps, parts)
        measured = work() if steps.in_lockstep else together(work)
    everywhere = gather_object(list(zip(numbers, measured, strict=True)))
    kept = [row for number, row in everywhere if number < len(rows) and row["kept"]]
    if not kept:
        raise ValueError("no response to eval_dataset was scored: every one had a None or NaN")
    names = kept[0].keys() - {"kept", "text"}
    columns = {name: torch.tensor([row[name] for row in kept], dtype=steps.dtype) for name in sorted(names)}
    entropy_sums = columns.pop("entropy_sum", None)
    metrics = {name: float(values.mean()) for name, values in columns.items()}
    metrics["reward_std"] = float(columns["reward"].std(unbiased=False))
    metrics |= {f"{name}_stderr": standard_error(columns[name]) for name in UNCERTAIN if name in columns}
    if entropy_sums is not None:
        metrics["entropy"] = float(entropy_sums.sum() / columns["response_length"].sum())
    texts = [row["text"] for row in kept]
    metrics |= {f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2)}
    return {**metrics, "runtime": time.perf_counter() - start}


def standard_error(values_B: Tensor) -> float:
    """Of the mean of independent values `(B,)`, in their unit: their unbiased standard deviation over sqrt(B).

    0 for a single value, which says nothing of its spread.
    """
    count = len(values_B)
    return float(values_B.std()) / math.sqrt(count) if count > 1 else 0.0


def distinct_ngrams(texts: Sequence[str | list[int]], n: int) -> float:
    """Different n-grams of words, or of token ids, over all of them, in all texts (Li et al., arXiv 1510.03055).

    0 if there is none. It falls as there are more texts: compare it on equally many.
    """
    words = [text.split() if isinstance(text, str) else text for text in texts]
    ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def _measure(trainer: "APATrainer | OfflineAPATrainer", steps: EvaluationSteps, parts: list[list[Row]]) -> list[Row]:
    """What `_rows` says of every row. Unless `score_at_once`, all are sampled before one is scored: vLLM samples for
    all processes together, and a reward function that fails in one must not leave the others waiting for it."""
    if steps.score_at_once:
        measured = []
        for part in parts:
            both = steps.respond(part)
            measured += _rows(trainer, steps, part, both, _kl_and_entropy(trainer, steps, both[0]))
        return measured
    sampled = [steps.respond(part) for part in parts]
    # Where weights are sharded, the networks are run by all processes together, too.
    nats = [_kl_and_entropy(trainer, steps, episodes) for episodes, _ in sampled]
    together = zip(parts, sampled, nats, strict=True)
    return [row for part in together for row in _rows(trainer, steps, *part)]


def _rows(
    trainer: "APATrainer | OfflineAPATrainer",
    steps: EvaluationSteps,
    rows: list[Row],
    both: tuple[Episodes, Episodes | None],
    nats: dict[str, Tensor],
) -> list[Row]:
    """Of each row its numbers, whether it was scored (`kept`), and the policy's response as `text`.

    Args:
        both: rollouts of the policy, and of pi_init.
        nats: what `_kl_and_entropy` says of the policy's.
    """
    episodes, of_reference = both
    scores, sampled = steps.score(rows, episodes), episodes.sampled
    columns = {
        "kept": scores.kept_B,
        "reward": scores.total_B,
        **nats,
        "response_length": torch.tensor([len(tokens) for tokens in sampled]),
        "eos_share": torch.tensor([int(response[-1]) in steps.end_token_ids for response in episodes.responses]),
        **{f"rewards/{name}": scores.by_function_BF[:, i] for i, name in enumerate(scores.names)},
    }
    if of_reference is not None:
        ref_scores = steps.score(rows, of_reference)
        columns["kept"] = scores.kept_B & ref_scores.kept_B
        columns["ref_reward"] = ref_scores.total_B
        columns["win_rate"] = ((scores.total_B - ref_scores.total_B).sign() + 1) / 2
    texts = trainer.processing_class.batch_decode(sampled, skip_special_tokens=True)
    values = zip(*(column.tolist() for column in columns.values()), texts, strict=True)
    return [dict(zip([*columns, "text"], row, strict=True)) for row in values]


@torch.no_grad()
def _kl_and_entropy(
    trainer: "APATrainer | OfflineAPATrainer", steps: EvaluationSteps, episodes: Episodes
) -> dict[str, Tensor]:
    """Sums over each response, nats, `(B,)`: `kl`, of log pi - log pi_init, and `entropy_sum`, of the policy."""
    device, start = trainer.accelerator.device, steps.decoder_start_token_id
    mask_BR = response_mask(episodes.responses, episodes.masks, device)
    queries, responses = send_to_device([episodes.queries, episodes.responses], device)
    layout = steps.layouts(longest_row(queries, responses, start))
    tokens = lay_out(layout, queries, responses, steps.pad_token_id, start)
    logprobs_BR, ref_logprobs_BR, entropy_BR = steps.logprobs({**tokens, "response_mask": mask_BR})
    nats = {"kl": keep_counted(logprobs_BR - ref_logprobs_BR, mask_BR).sum(dim=1)}
    if entropy_BR is not None:
        nats["entropy_sum"] = keep_counted(entropy_BR, mask_BR).sum(dim=1)
    return nats


@contextmanager
def random_numbers_of_its_own(seed: int, devices: Sequence[int] | None = None) -> Iterator[None]:
    """Inside, torch draws from `seed`; afterwards its generators (CPU, and `devices` or all) are as before."""
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
