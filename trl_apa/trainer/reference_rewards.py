"""Rewards of responses of pi_init that an advantage estimator reads: given with the prompt, or sampled once for it."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_apa.distributed.processes import Processes
from trl_apa.evaluation.held_out import random_numbers_of_its_own
from trl_apa.rollout.prompts import as_rows
from trl_apa.rollout.scoring import Scores
from trl_apa.rollout.shared_prompts import token_keys
from trl_apa.trainer.validation import LARGEST_SCORE
from trl_apa.values import shown


Row = dict[str, Any]
# The column of a data set that holds them.
COLUMN = "ref_rewards"
# Options that the rewards of sampled responses depend on and that may be set between two iterations.
OPTIONS = (
    *("num_ref_samples", "missing_eos_penalty"),
    *("temperature", "top_p", "top_k", "max_completion_length", "stop_strings"),
)


@dataclass(frozen=True)
class ReferenceSampling:
    """How responses of pi_init are sampled and scored. All processes call each function, with equally many prompts.

    Args:
        respond: prompts to one response of pi_init each, 1-D token ids.
        score: rows, prompts and responses to scores.
        num_samples: responses to each prompt.
        end_token_ids: what ends a response.
        missing_eos_penalty: subtracted from the score of a response that did not end; 0 for none.
        seed: of the sampling. The random numbers of training stay as they are.
    """

    respond: Callable[[list[Tensor]], list[Tensor]]
    score: Callable[[list[Row], list[Tensor], list[Tensor]], Scores]
    num_samples: int
    end_token_ids: Sequence[int]
    missing_eos_penalty: float
    seed: int


def check_ref_rewards_in_dataset(dataset: Any, advantage_estimator: str) -> None:
    """`check_ref_rewards_are_given` for all rows, where they can be read at little cost.

    Raises:
        ValueError: if a prompt comes without rewards of responses of pi_init.
    """
    rows = dataset if isinstance(dataset, list) else []
    if hasattr(dataset, "__len__") and hasattr(dataset, "select_columns"):
        if COLUMN not in dataset.column_names:
            raise ValueError(f"train_dataset has no column {COLUMN}: {_only_given(advantage_estimator)}")
        rows = dataset.select_columns([COLUMN])
    check_ref_rewards_are_given(rows, "train_dataset", advantage_estimator)


def check_ref_rewards_are_given(rows: Iterable[Any], whose: str, advantage_estimator: str) -> None:
    """For rollouts of several turns, of which none is sampled from pi_init to compare with.

    Raises:
        ValueError: with the number of the row, from 0, if one comes without rewards of responses of pi_init.
    """
    for number, row in enumerate(as_rows(rows)):
        if row.get(COLUMN) is None:
            raise ValueError(f"row {number} of {whose} has no {COLUMN}: {_only_given(advantage_estimator)}")


def _only_given(advantage_estimator: str) -> str:
    return (
        "with tools, environment_factory or rollout_func no rollouts of pi_init are sampled for "
        f"advantage_estimator={advantage_estimator!r}; give their rewards with each prompt"
    )


def find_ref_rewards(
    rows: list[Row],
    queries: list[Tensor],
    known: dict[str, list[float]],
    sampling: ReferenceSampling | None,
    processes: Processes,
) -> list[Tensor]:
    """Rewards of responses of pi_init to each prompt: those of its row, those that are known, or of new samples.

    Two rows with the same token ids have the same prompt, whatever their other columns.

    Args:
        rows: of this process, of which some may have `ref_rewards`.
        queries: their prompts, 1-D token ids.
        known: from earlier calls, by prompt; what is sampled is added on all processes.
        sampling: see there; None where nothing may be sampled.
        processes: of the run; all call this.

    Returns:
        1-D float32 tensors, reward units.

    Raises:
        ValueError: if `ref_rewards` of a row is not what it should be, or missing where nothing may be sampled; or if
            no response to a prompt was scored.
    """
    names = [hashlib.blake2b(key, digest_size=16).hexdigest() for key in token_keys(queries)]
    given = processes.together(lambda: [_given(number, row, sampling is not None) for number, row in enumerate(rows)])
    missing: dict[str, int] = {}
    for number, name in enumerate(names):
        if given[number] is None and name not in known:
            missing.setdefault(name, number)
    count = processes.largest(len(missing))
    if count and sampling is not None:
        # Processes with fewer new prompts ask some again, so that all make the same calls.
        asked = list(islice(cycle(missing.values() or [0]), count))
        sampled = _sample(
            [rows[number] for number in asked],
            [queries[number] for number in asked],
            len(missing),
            sampling,
            processes,
        )
        own = dict(zip(missing, sampled, strict=True))
        for rewards in gather_object([own]):
            for name, values in rewards.items():
                known.setdefault(name, values)
    return [
        torch.tensor(known[name]) if rewards is None else rewards for name, rewards in zip(names, given, strict=True)
    ]


def _given(number: int, row: Row, may_sample: bool) -> Tensor | None:
    rewards = row.get(COLUMN)
    if rewards is None and not may_sample:
        raise ValueError(f"row {number} has no {COLUMN}, and responses of pi_init in one turn are no rollouts")
    return None if rewards is None else as_ref_rewards(f"{COLUMN} of row {number}", rewards)


def _sample(
    rows: list[Row], queries: list[Tensor], needed: int, sampling: ReferenceSampling, processes: Processes
) -> list[list[float]]:
    """For each of the first `needed` prompts the rewards of the responses to it that were scored, one or more."""
    rows = [row for row in rows for _ in range(sampling.num_samples)]
    queries = [query for query in queries for _ in range(sampling.num_samples)]
    with random_numbers_of_its_own(sampling.seed):
        responses = sampling.respond(queries)
        scores = sampling.score(rows, queries, responses)
    ended_B = torch.tensor([int(response[-1]) in sampling.end_token_ids for response in responses])
    rewards_B = scores.total_B.cpu() - sampling.missing_eos_penalty * ~ended_B
    parts = zip(rewards_B.split(sampling.num_samples), scores.kept_B.cpu().split(sampling.num_samples), strict=True)
    found = [rewards[kept].tolist() for rewards, kept in parts][:needed]

    def check() -> None:
        if not all(found):
            prompt = queries[found.index([]) * sampling.num_samples].tolist()
            raise ValueError(f"no response of pi_init to the prompt {shown(prompt)} was scored: all had None or NaN")

    processes.together(check)
    return found


def given_ref_rewards(ref_rewards: Any, args: Any, device: torch.device) -> Tensor | None:
    """What `step` was given, `(B, N)`, NaN where a prompt has fewer than N; None if the estimator does not read it.

    Raises:
        ValueError: naming `ref_rewards`, if it is missing or not what it should be.
    """
    setting = f"advantage_estimator={args.advantage_estimator!r}"
    if not args.estimator.needs_ref_rewards:
        if ref_rewards is not None:
            warnings.warn(f"ref_rewards has no effect with {setting}", UserWarning, stacklevel=3)
        return None
    if ref_rewards is None:
        raise ValueError(
            f"ref_rewards is None, but {setting} compares the score of a response with those of responses of pi_init "
            "to its prompt: give step ref_rewards=trainer.reference_rewards(queries), or your own, one list of "
            "numbers a query"
        )
    if isinstance(ref_rewards, str | bytes) or not hasattr(ref_rewards, "__len__"):
        raise ValueError(f"ref_rewards is a {type(ref_rewards).__name__}; it should hold a list of numbers a query")
    if len(ref_rewards) != args.batch_size:
        raise ValueError(
            f"ref_rewards has {len(ref_rewards)} elements; it should have config.batch_size = {args.batch_size}"
        )
    return padded_ref_rewards(
        [as_ref_rewards(f"ref_rewards[{row}]", rewards) for row, rewards in enumerate(ref_rewards)], device
    )


def padded_ref_rewards(ref_rewards: list[Tensor], device: torch.device) -> Tensor:
    """1-D tensors as one `(B, N)`, with NaN behind the shorter ones."""
    return pad_sequence(ref_rewards, batch_first=True, padding_value=float("nan")).to(device)


def as_ref_rewards(name: str, rewards: Any) -> Tensor:
    """Rewards of a prompt as a 1-D float32 tensor on the CPU.

    Raises:
        ValueError: naming `name`, unless they are at least one finite number, and of a size whose square is finite.
    """
    try:
        tensor = torch.as_tensor(rewards).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {shown(rewards)}; it should be a list of numbers") from error
    if tensor.dim() != 1 or len(tensor) == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be 1-D, with at least one number")
    if not (tensor.abs() <= LARGEST_SCORE).all():
        wrong = tensor[~(tensor.abs() <= LARGEST_SCORE)][0].item()
        raise ValueError(f"{name} holds {wrong}; it should hold finite numbers of at most {LARGEST_SCORE:g} in size")
    return tensor
