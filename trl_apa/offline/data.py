"""Fixed prompts, responses and rewards, as rows and as rollouts."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_apa.data.pairs import Demonstration, Preference
from trl_apa.data.sources import BadRow, report
from trl_apa.models.network_parts import Network, num_token_ids
from trl_apa.offline.config import OfflineConfig
from trl_apa.rollout.batch import Rollouts, response_mask
from trl_apa.rollout.prompts import as_rows, prompt_of, query_of
from trl_apa.rollout.reward_values import as_float
from trl_apa.rollout.scoring import Scorer, reward_functions
from trl_apa.rollout.texts import Texts, as_completion, prompts_and_completions
from trl_apa.trainer.reference_rewards import as_ref_rewards, padded_ref_rewards
from trl_apa.trainer.validation import LARGEST_SCORE, check_positions, check_tokens
from trl_apa.values import shown


def label_pairs(
    pairs: Iterable[Preference | Demonstration],
    reward_funcs: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_weights: list[float] | None = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """Every response in preference pairs (both of a pair) or demonstrations, once, with its reward.

    Args:
        pairs: from `trl_apa.data`.
        reward_funcs, reward_weights: as in `APATrainer`.
        tokenizer: the policy's.
        batch_size: responses a call of the reward functions.

    Returns:
        Rows with `prompt`, `completion` and `reward`: a `train_dataset` of `OfflineAPATrainer`. See `label_rows`.
    """
    texts = dict.fromkeys(
        (pair.prompt, text)
        for pair in pairs
        for text in ((pair.chosen, pair.rejected) if isinstance(pair, Preference) else (pair.completion,))
    )
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    return label_rows(rows, reward_funcs, tokenizer, reward_weights, batch_size)


def label_rows(
    rows: Iterable[dict[str, Any]],
    reward_funcs: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_weights: list[float] | None = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """The same rows with a `reward`, which the reward functions give to prompt and completion.

    Args:
        rows: with `prompt` and `completion`, texts or chat messages. What else they hold goes to the functions.

    Raises:
        ValueError, RuntimeError: as the scorer does for a function that fails; for an adapter on a policy's base.
    """
    rows = list(rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = Scorer(reward_functions(reward_funcs, None, tokenizer, device, None), reward_weights)
    labelled = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        queries = [query_of(row, tokenizer) for row in batch]
        responses = [completion_ids(row, tokenizer, add_eos=True) for row in batch]
        names = [name for name in batch[0] if name not in ("prompt", "completion", "query", "input_ids")]
        columns = {name: [row[name] for row in batch] for name in names}
        prompts, completions = given_texts(batch, queries, responses, tokenizer)
        scores = scorer(prompts, completions, queries, responses, columns)
        labelled += [{**row, "reward": score} for row, score in zip(batch, scores.total_B.tolist(), strict=True)]
    return labelled


def completion_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, add_eos: bool) -> Tensor:
    """A row's response as 1-D token ids: `completion_ids` as they are, or `completion` as text or assistant's message.

    Raises:
        ValueError: if the row has neither, or no token.
    """
    if row.get("completion_ids") is not None:
        ids = list(row["completion_ids"])
    else:
        completion = _completion_text(row)
        if completion is None:
            raise ValueError("it should have completion, a text or one assistant's message, or completion_ids")
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        if add_eos and end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
    if len(ids) == 0:
        raise ValueError("the response has no token")
    return torch.as_tensor(ids, dtype=torch.long)


def _completion_text(row: dict[str, Any]) -> str | None:
    """A response that is given as text or as one message of the assistant; None if it is not."""
    completion = row.get("completion")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    return completion if isinstance(completion, str) else None


def given_texts(
    rows: list[dict[str, Any]], queries: list[Tensor], responses: list[Tensor], tokenizer: PreTrainedTokenizerBase
) -> Texts:
    """What reward functions read of rows with given responses: in the form of `texts.prompts_and_completions`."""
    prompts, completions = prompts_and_completions(rows, queries, responses, tokenizer)
    for number, row in enumerate(rows):
        if (text := _completion_text(row)) is not None and (prompt := prompt_of(row)) is not None:
            prompts[number], completions[number] = as_completion(prompt, text)
    return prompts, completions


def rollouts_of(
    rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, policy: Network, args: OfflineConfig
) -> Rollouts:
    """The data set as one batch on the CPU.

    Args:
        rows: each with a prompt (`prompt`, `query` or `input_ids`), a response (`completion` or `completion_ids`) and
            a `reward`, for QRPO also `ref_rewards`.
        tokenizer: the policy's.
        policy: knows how long a sequence and which tokens it can read.
        args: lengths, EOS, chat template.

    Raises:
        ValueError: if a row cannot be learned from, with the numbers of all such rows, from 1, and why.
    """
    queries, responses, rewards, ref_rewards, bad_rows = [], [], [], [], []
    num_ids = num_token_ids(policy)
    for number, row in enumerate(as_rows(rows), start=1):
        try:
            reward = as_float(row.get("reward"))
            if reward is None or math.isnan(reward):
                raise ValueError(f"reward is {shown(row.get('reward'))}, it should be a finite number")
            if abs(reward) > LARGEST_SCORE:
                raise ValueError(f"reward is {reward:g}, it should be at most {LARGEST_SCORE:g} in size")
            others = as_ref_rewards("ref_rewards", row.get("ref_rewards")) if args.loss_type == "qrpo" else None
            query = query_of(row, tokenizer, args.max_prompt_length, args.chat_template_kwargs)
            response = completion_ids(row, tokenizer, args.add_eos)[: args.max_completion_length]
            check_tokens("the prompt", query, num_ids, tokenizer)
            check_tokens("the response", response, num_ids, tokenizer)
            check_positions([query], [len(response)], policy, "prompt + response")
        except ValueError as error:
            bad_rows.append(BadRow(number, str(error)))
            continue
        queries.append(query)
        responses.append(response)
        rewards.append(reward)
        ref_rewards.append(others)
    if bad_rows or not queries:
        raise ValueError(report("train_dataset", len(queries), "rows to learn from", bad_rows))
    rollouts = Rollouts(queries, responses, response_mask(responses), torch.tensor(rewards))
    known = [rewards for rewards in ref_rewards if rewards is not None]
    rollouts.ref_rewards_BN = padded_ref_rewards(known, rollouts.device) if known else None
    return rollouts
