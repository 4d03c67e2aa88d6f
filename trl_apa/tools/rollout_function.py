"""`rollout_func`: a function of the user's that samples, under TRL's signature, and a check of what it returns."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_apa.distributed.processes import Processes
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.prompts import prompt_of
from trl_apa.rollout.reward_calls import private_copy
from trl_apa.tools.turns import SampleTurn
from trl_apa.values import shown


RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]
MASK = "env_mask"
# Keys of what it returns that are no columns of the reward functions.
READ = ("prompt_ids", "completion_ids", "logprobs", "logprob_token_ids", MASK)


class FunctionPlayer:
    """Rollouts of a `rollout_func`.

    Args:
        function: called with the prompts of this process, each `num_generations` times, and with the trainer. It
            returns one row for each prompt: `prompt_ids` and `completion_ids`, token ids; if it likes `env_mask`, for
            each token of a completion 1 where the policy sampled it and 0 where not; and any other columns, which
            reward functions read. `logprobs` may be there, as TRL asks for them, and are not read: the trainer takes
            its own.
        trainer: given to the function.
        processes: of the run.

    Raises:
        ValueError: if `function` cannot be called.
    """

    def __init__(self, function: RolloutFunction, trainer: Any, processes: Processes):
        if not callable(function):
            raise ValueError(f"rollout_func is a {type(function).__name__}; it should be a function")
        self.function, self.trainer, self.processes = function, trainer, processes

    @property
    def names(self) -> list[str]:
        """The function's name."""
        return [getattr(self.function, "__name__", type(self.function).__name__)]

    def __call__(self, rows: Sequence[Mapping[str, Any]], sample: SampleTurn) -> Episodes:
        """One rollout to each row.

        Args:
            rows: of the data set.
            sample: not used, because the function samples.

        Raises:
            ValueError: naming the key and the row of what is missing or wrong in the function's answer.
        """
        prompts = self.processes.together(lambda: [private_copy(prompt_of(dict(row))) for row in rows])
        answer: Any = None
        failed: BaseException | None = None
        try:  # not `together`: it may talk to other processes, as `trainer.generate` does
            answer = self.function(prompts, self.trainer)
        except BaseException as error:
            failed = error

        def read() -> Episodes:
            if failed is not None:
                raise failed
            return read_rollouts(answer, len(rows))

        return self.processes.together(read)


def read_rollouts(answer: Any, count: int) -> Episodes:
    """What a `rollout_func` returned.

    Args:
        answer: a mapping with the keys that `FunctionPlayer` describes.
        count: rollouts that there should be.

    Raises:
        ValueError: naming the key, and the row, of what is missing or wrong.
    """
    if not isinstance(answer, Mapping):
        raise ValueError(f"rollout_func returned a {type(answer).__name__}; it should return a dict")
    missing = [name for name in ("prompt_ids", "completion_ids") if answer.get(name) is None]
    if missing:
        raise ValueError(f"rollout_func returned no {' and no '.join(missing)}")
    queries = _token_rows("prompt_ids", answer["prompt_ids"], count)
    responses = _token_rows("completion_ids", answer["completion_ids"], count)
    masks = None
    if answer.get(MASK) is not None:
        masks = [
            _mask(row, mask, response)
            for row, (mask, response) in enumerate(zip(_rows(MASK, answer[MASK], count), responses, strict=True))
        ]
    columns = {str(name): _column(name, values, count) for name, values in answer.items() if name not in READ}
    return Episodes(queries, responses, masks, columns=columns)


def _column(name: str, values: Any, count: int) -> list[Any]:
    """A row each of a list, or of a tuple, tensor or array of as many; anything else is for every row."""
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim and len(values) == count:
            return values.tolist() if values.ndim == 1 else list(values)
    elif isinstance(values, list) or (isinstance(values, tuple) and len(values) == count):
        return _rows(name, values, count)
    return [values] * count


def _rows(name: str, values: Any, count: int) -> list[Any]:
    rows = list(values) if isinstance(values, list | tuple | Tensor | np.ndarray) else None
    if rows is None or len(rows) != count:
        said = type(values).__name__ if rows is None else f"list of {len(rows)}"
        raise ValueError(
            f"rollout_func returned a {said} as {name!r}; it should hold {count} rows, one for each of its prompts"
        )
    return rows


def _token_rows(name: str, values: Any, count: int) -> list[Tensor]:
    tensors = []
    for row, ids in enumerate(_rows(name, values, count)):
        ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
        if not isinstance(ids, list | tuple) or not ids or not all(isinstance(token, Integral) for token in ids):
            raise ValueError(
                f"rollout_func returned {shown(ids)} as {name}[{row}]; it should be a list of token ids, at least one"
            )
        tensors.append(torch.tensor([int(token) for token in ids]))
    return tensors


def _mask(row: int, mask: Any, response: Tensor) -> Tensor:
    values = mask.tolist() if isinstance(mask, Tensor | np.ndarray) else mask
    if not isinstance(values, list | tuple) or len(values) != len(response) or not all(v in (0, 1) for v in values):
        raise ValueError(
            f"rollout_func returned {shown(values)} as {MASK}[{row}]; it should hold 0 or 1 for each of the "
            f"{len(response)} tokens of its completion"
        )
    if not any(values):
        raise ValueError(f"rollout_func returned only zeros as {MASK}[{row}]; a token should count")
    return torch.tensor([bool(value) for value in values])
