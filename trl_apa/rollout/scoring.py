"""Responses to scores: reward functions in Python and reward models, weighted and summed."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational

from trl_apa._trl import is_peft_model
from trl_apa.config.checks import check_reward_weights
from trl_apa.models.adapter_kinds import refuse_prompt_learning
from trl_apa.models.layouts import readable_batches
from trl_apa.models.loaders import load_reward_model
from trl_apa.models.logprobs import network_inputs
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_checks import check_has_positions, check_reads
from trl_apa.models.network_parts import (
    Network,
    inner_model,
    max_positions,
    num_token_ids,
    padding_id,
    token_in_words,
    trunk_of,
)
from trl_apa.models.policy_and_value import PolicyAndValue
from trl_apa.rollout.batch import pad_queries
from trl_apa.rollout.reward_calls import call, call_functions
from trl_apa.rollout.reward_values import Value, check_sizes, read_answer, total
from trl_apa.rollout.served_rewards import ServedReward, is_address
from trl_apa.rollout.texts import (
    answer_text,
    as_read,
    end_ids,
    is_ended,
    sampled_ids,
    scored_conversation_ids,
    scored_ids,
)
from trl_apa.rollout.tokenizing import warn_once
from trl_apa.values import described_error


# As a reward function: the reward model on the policy's own base.
ADAPTER = "adapter"
# Before the file with the rubric of a judge.
JUDGE = "judge:"
# Runs work, and sees to it that it fails in all processes if it fails in one.
OnAllProcesses = Callable[[Callable[[], Any]], Any]


class RewardModel:
    """Scores of a sequence classifier, after the last token of prompt and response.

    Args:
        model: a classifier with one label; it is frozen.
        policy_tokenizer: the policy's, which decodes the response as it follows the prompt.
        tokenizer: the classifier's own, which tokenises prompt and response again; None if it reads the policy's token
            ids.
        batch_size: sequences a forward pass.
        end_token_ids: of the policy; a response that ends with one has an end, which the classifier reads as its own.
            The policy tokenizer's EOS by default.

    Raises:
        ValueError: if the classifier has several labels, or adapters that work by prompt learning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        end_token_ids: Collection[int] | None = None,
    ):
        if model.config.num_labels != 1:
            raise ValueError(f"reward model {type(model).__name__} has {model.config.num_labels} labels, not one")
        if is_peft_model(model):
            refuse_prompt_learning(model.active_peft_config)
        self.model = model.requires_grad_(False)
        make_repeatable(model)
        self.policy_tokenizer, self.tokenizer = policy_tokenizer, tokenizer
        self.batch_size = batch_size
        self.end_token_ids = end_ids(end_token_ids, policy_tokenizer)
        self.__name__ = os.path.basename(model.config._name_or_path.rstrip("/")) or type(model).__name__

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        **_: Any,
    ) -> list[float]:
        rows = zip(prompts, completions, prompt_ids, completion_ids, strict=True)
        sequences = [self._tokens(*row) for row in rows]
        self._check_lengths(sequences)
        return self.score_ids(sequences)

    def score_ids(self, sequences: Sequence[list[int]]) -> list[float]:
        """The score of each sequence of token ids that the classifier reads."""
        tensors = [torch.tensor(sequence) for sequence in sequences]
        self._check_ids(tensors)
        starts = range(0, len(tensors), self.batch_size)
        return [score for start in starts for score in self._scores(tensors[start : start + self.batch_size])]

    def text_ids(self, prompt: Any, answer: str, ended: bool) -> list[int]:
        """Prompt and answer as the token ids that the classifier reads: see `texts.scored_ids`."""
        tokenizer = self.policy_tokenizer if self.tokenizer is None else self.tokenizer
        return scored_ids(prompt, answer, ended, tokenizer, needs_frame=self._last_token_head is None)

    def _tokens(self, prompt: Any, completion: Any, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
        if self.tokenizer is None:
            return sampled_ids(prompt, prompt_ids, completion_ids, self.policy_tokenizer, self.end_token_ids)
        ended = is_ended(completion_ids, self.end_token_ids)
        if is_conversational({"prompt": prompt}) and len(completion) > 1:
            try:
                return scored_conversation_ids([*prompt, *completion], ended, self.tokenizer)
            except Exception as error:  # a template may refuse roles, orders and arguments of tool calls
                warn_once(
                    self.tokenizer,
                    f"the chat template of reward model {self.__name__} cannot render a response of several messages "
                    f"({described_error(error)}): the model reads it as one message, decoded from its token ids",
                )
                response = self.policy_tokenizer.decode(completion_ids, skip_special_tokens=True)
                return self.text_ids(prompt, response, ended)
        if is_conversational({"prompt": prompt}):
            return self.text_ids(prompt, completion[-1]["content"], ended)
        prompt = as_read(prompt, prompt_ids, self.policy_tokenizer)
        query, response = torch.tensor(prompt_ids), torch.tensor(completion_ids)
        return self.text_ids(prompt, answer_text(self.policy_tokenizer, query, response, prompt), ended)

    @property
    def _last_token_head(self) -> nn.Linear | ModulesToSaveWrapper | None:
        """What makes a score of the last token's state; None for a classifier that reads its score elsewhere."""
        head = getattr(inner_model(self.model), "score", None)
        return head if isinstance(head, nn.Linear | ModulesToSaveWrapper) else None

    def check_fits(self, policy: Network, max_prompt_length: int | None, max_completion_length: int) -> None:
        """Raise ValueError if the classifier reads the policy's ids and has too few rows or positions for them.

        Args:
            policy: the language model that is aligned.
            max_prompt_length, max_completion_length: tokens; None is not known.
        """
        if self.tokenizer is None:
            name = f"reward model {self.__name__}"
            check_reads(name, self.model, policy, self.policy_tokenizer)
            check_has_positions(name, self.model, policy, max_prompt_length, max_completion_length)

    def _check_lengths(self, sequences: Sequence[list[int]]) -> None:
        """Raise ValueError, naming the row, for more of the policy's tokens than the classifier has positions.

        A classifier with a tokenizer of its own may read more than its config says: some positions are relative.
        """
        limit = max_positions(self.model) if self.tokenizer is None else None
        for row, sequence in enumerate(sequences):
            if limit is not None and len(sequence) > limit:
                raise ValueError(f"row {row} has {len(sequence)} tokens; the reward model has {limit} positions")

    def _check_ids(self, sequences: list[Tensor]) -> None:
        """Raise ValueError, naming the row, for an id that the classifier has no row for."""
        known = num_token_ids(self.model)
        for row, sequence in enumerate(sequences):
            largest = int(sequence.max()) if len(sequence) else 0
            if known is not None and largest >= known:
                token = token_in_words(largest, self.tokenizer or self.policy_tokenizer)
                raise ValueError(f"row {row} has the token id {token}; the reward model knows 0 to {known - 1}")

    @torch.no_grad()
    def _scores(self, sequences: list[Tensor]) -> list[float]:
        scores = [0.0] * len(sequences)
        for rows in readable_batches(self._read, self.model, sequences):
            read_BK = self._read([sequences[row] for row in rows])
            head = self._last_token_head
            of_rows = read_BK if head is None else head(read_BK.to(head.weight.dtype))
            for row, score in zip(rows, of_rows[:, 0].float().tolist(), strict=True):
                scores[row] = score
        return scores

    def _read(self, sequences: list[Tensor]) -> Tensor:
        """The last hidden state of each sequence `(B, H)`, or `(B, 1)` scores where there is no head to put on it.

        By lengths, not by pad ids: classifiers that look for the last pad miss an EOS that is also the pad.
        """
        filler = padding_id(self.model.config.get_text_config().pad_token_id or 0, [self.model])
        tokens = pad_queries(sequences, filler, padding_side="right")
        tokens = {name: tensor.to(self.model.device) for name, tensor in tokens.items()}
        if self._last_token_head is None:
            scores_B1: Tensor = self.model(**tokens).logits
            return scores_B1
        trunk = trunk_of(inner_model(self.model))
        lengths_B = tokens["attention_mask"].sum(1)
        if len({len(sequence) for sequence in sequences}) == 1:
            inputs = {"input_ids": tokens["input_ids"], "use_cache": False}
        else:
            tokens["position_ids"] = (tokens["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs = network_inputs(trunk, tokens)
        hidden_BTH: Tensor = trunk(**inputs).last_hidden_state
        return hidden_BTH[torch.arange(len(sequences), device=hidden_BTH.device), lengths_B - 1]


class AdapterReward:
    """Scores of a reward model that is an adapter on the policy's own base, after the last token of each response.

    Args:
        module: holds the policy, and gets the reward adapter if it has none.
        path: folder or hub name of an adapter with one label, trained on the policy's base; None for the adapter that
            the policy came with.
        batch_size: sequences a forward pass.
        tokenizer: the policy's; with it a chat message that ended is read up to the end that its chat template writes.
        end_token_ids: see `RewardModel`.

    Raises:
        ValueError: if the adapter does not fit the policy, has several labels, or is the second one; or if there is
            none.
    """

    def __init__(
        self,
        module: PolicyAndValue,
        path: str | None = None,
        batch_size: int = 8,
        tokenizer: PreTrainedTokenizerBase | None = None,
        end_token_ids: Collection[int] | None = None,
    ):
        if path is not None:
            module.add_reward_adapter(path)
        if module.reward_adapter is None:
            raise ValueError(
                f"reward_funcs={ADAPTER!r}: the policy has no reward adapter; set its path, 'adapter:PATH'"
            )
        if (labels := module.reward_adapter.score.out_features) != 1:
            raise ValueError(f"reward_funcs={ADAPTER!r}: the reward adapter has {labels} labels; it should have one")
        self.module, self.batch_size = module, batch_size
        self.tokenizer, self.end_token_ids = tokenizer, end_ids(end_token_ids, tokenizer)
        self.__name__ = os.path.basename((path or "reward_adapter").rstrip("/"))

    @torch.no_grad()
    def __call__(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        prompts: list[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        given = zip(prompts or [""] * len(prompt_ids), prompt_ids, completion_ids, strict=True)
        sequences = [torch.tensor(sampled_ids(*row, self.tokenizer, self.end_token_ids)) for row in given]
        by_length = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        scores = [0.0] * len(sequences)
        device = next(self.module.policy.parameters()).device
        for start in range(0, len(sequences), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            chosen = [sequences[row].to(device) for row in rows]
            for part in readable_batches(self._read, self.module.policy, chosen):
                scores_P = self._read([chosen[row] for row in part])[:, 0].tolist()
                for row, score in zip(part, scores_P, strict=True):
                    scores[rows[row]] = score
        return scores

    def _read(self, sequences: list[Tensor]) -> Tensor:
        """The score after the last token of each sequence, `(B, 1)`."""
        tokens = pad_queries(sequences, 0)
        if len({len(sequence) for sequence in sequences}) == 1:
            del tokens["attention_mask"]
        return self.module.compute_reward_score(**tokens)[:, -1]


# Runs on the device, like training: never in a thread, and on all processes together if weights are sharded.
NETWORKS = (RewardModel, AdapterReward)


def in_this_process(work: Callable[[], Any]) -> Any:
    """Do `work`, whatever other processes do."""
    return work()


@dataclass
class Scores:
    """What the reward functions say of `B` responses.

    Args:
        names: of the functions.
        by_function_BF: for each function one number a response, reward units, before its weight: the value it gave, or
            the sum of the values it gave token by token. NaN where a response is left out.
        per_token: for each response the weighted sum of the functions that give a value a token, reward units,
            `(tokens,)`; None if no function does.
        total_B: weighted sum over the functions, reward units; 0 where a response is left out.
        kept_B: bool, False = the response is left out of the update.
    """

    names: list[str]
    by_function_BF: Tensor
    per_token: list[Tensor] | None
    total_B: Tensor
    kept_B: Tensor


class Scorer:
    """The weighted sum of reward functions.

    Args:
        functions: called as `(prompts, completions, completion_ids, **columns) -> list of floats`, or of lists of
            floats, one per token. Coroutine functions run together. Other keywords are the data set's columns,
            one value a response.
        weights: one a function; 1 each by default.
        skip_unscored: leave out a response to which a function gives None or NaN, instead of raising.
        timeout: seconds that the functions in Python may take together; no limit by default.

    Raises:
        ValueError: if there are not as many weights as functions, or one is no finite number.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        weights: Sequence[float] | None = None,
        skip_unscored: bool = False,
        timeout: float | None = None,
    ):
        self.functions = list(functions)
        self.names = _different([getattr(function, "__name__", type(function).__name__) for function in functions])
        self.networks = [number for number, function in enumerate(functions) if isinstance(function, NETWORKS)]
        given = check_reward_weights(weights)
        self.weights = [1.0] * len(self.functions) if given is None else given
        self.skip_unscored, self.timeout = skip_unscored, timeout
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(self.weights)} elements; there are {len(self.functions)} reward functions"
            )

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        columns: dict[str, list[Any]],
        on_all_processes: OnAllProcesses = in_this_process,
    ) -> Scores:
        """What each function says of each response.

        Args:
            prompts: texts or chat messages. Of these and all the other lists each function gets copies of its own.
            completions: texts, or for chat messages the assistant's message in a list.
            queries, responses: their token ids, 1-D.
            columns: what else the data set holds, one value a response.
            on_all_processes: runs first the functions in Python, then the networks, which may talk to other processes:
                none begins with them where a function has failed in one process.

        Raises:
            ValueError: naming the function, if it gives another number of values than responses or tokens, or a value
                that is not a finite number, or one that is too large to learn from.
            RuntimeError, KeyboardInterrupt: naming the function that failed.
            TimeoutError: naming the function that was at work when the time was up.
        """
        # Columns of the same names give way: UltraFeedback has `completions`, say.
        arguments = {**columns, "prompts": prompts, "completions": completions}
        arguments["completion_ids"] = [response.tolist() for response in responses]
        of_networks = {**arguments, "prompt_ids": [query.tolist() for query in queries]}
        lengths = [len(response) for response in responses]
        values_of = on_all_processes(lambda: self._values_of_functions(arguments, lengths))
        if self.networks:
            values_of |= on_all_processes(lambda: self._values_of_networks(of_networks, lengths))
        values = [values_of[number] for number in range(len(self.functions))]
        on_all_processes(lambda: check_sizes(self.names, values, self.weights))
        by_function_BF = torch.tensor([[total(value) for value in column] for column in values]).float().T
        kept_B = by_function_BF.isfinite().all(dim=1)
        total_B = torch.where(
            kept_B, by_function_BF.nan_to_num() @ torch.tensor(self.weights, dtype=torch.float32), 0.0
        )
        return Scores(self.names, by_function_BF, self._per_token(values, lengths, kept_B), total_B, kept_B)

    def _values_of_functions(self, arguments: dict[str, Any], lengths: list[int]) -> dict[int, list[Value]]:
        """What every Python function gives, under the function's number."""
        numbers = [number for number in range(len(self.functions)) if number not in self.networks]
        functions = [(self.names[number], self.functions[number]) for number in numbers]
        answers = call_functions(functions, arguments, self.timeout)
        return {n: self._read(n, answer, lengths) for n, answer in zip(numbers, answers, strict=True)}

    def _values_of_networks(self, arguments: dict[str, Any], lengths: list[int]) -> dict[int, list[Value]]:
        answers = {n: call(self.names[n], self.functions[n], arguments) for n in self.networks}
        return {n: self._read(n, answer, lengths) for n, answer in answers.items()}

    def _read(self, number: int, answer: Any, lengths: list[int]) -> list[Value]:
        return read_answer(self.names[number], answer, lengths, self.skip_unscored)

    def _per_token(self, values: list[list[Value]], lengths: list[int], kept_B: Tensor) -> list[Tensor] | None:
        dense = [any(isinstance(value, list) for value in column) for column in values]
        if not any(dense):
            return None
        sums = [torch.zeros(length) for length in lengths]
        for column, weight, is_dense in zip(values, self.weights, dense, strict=True):
            for row in torch.nonzero(kept_B).flatten().tolist() if is_dense else []:
                sums[row] += weight * torch.tensor(column[row])
        return sums


def _different(names: list[str]) -> list[str]:
    """Functions with the same name (such as lambdas) get a number each after the first."""
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]


def reward_functions(
    functions: Any,
    processing_classes: Any,
    policy_tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    module: PolicyAndValue | None,
    end_token_ids: Collection[int] | None = None,
) -> list[Callable[..., Any]]:
    """What the trainer's `reward_funcs` and `reward_processing_classes` mean.

    Args:
        functions: one of, or a list of: a callable, a sequence classifier, folder or hub name of one, or
            "adapter:PATH" for one that is an adapter on the policy's base ("adapter" for the one that is there), or
            the address of a server, "https://HOST/PATH", or "judge:FILE" for a judge with that rubric.
        processing_classes: for each the classifier's tokenizer; None means the one where the classifier came from, or,
            if there is none, that it reads the policy's token ids.
        policy_tokenizer: the policy's; a classifier whose tokenizer agrees with it reads the ids as they are.
        device: where classifiers are put.
        module: holds the policy; None where there is none, and no reward model can be an adapter on its base.
        end_token_ids: of the policy, see `RewardModel`.

    Raises:
        ValueError: naming what is of another type; if the lists differ in length; for a name without a trained
            classifier.
    """
    functions = list(functions) if isinstance(functions, list | tuple) else [functions]
    if not isinstance(processing_classes, list | tuple):
        processing_classes = [processing_classes] * len(functions)
    if len(processing_classes) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(processing_classes)} elements; reward_funcs has {len(functions)}"
        )
    made: list[Callable[..., Any]] = []
    for function, tokenizer in zip(functions, processing_classes, strict=True):
        if function == ADAPTER or (isinstance(function, str) and function.startswith(f"{ADAPTER}:")):
            if module is None:
                raise ValueError(
                    f"reward_funcs has {ADAPTER!r}: here is no policy with adapters; give the reward model itself"
                )
            path = function.removeprefix(ADAPTER).removeprefix(":") or None
            function = AdapterReward(module, path, tokenizer=policy_tokenizer, end_token_ids=end_token_ids)
        elif isinstance(function, str) and function.startswith(JUDGE):
            from trl_apa.winrate.rubric import JudgeReward  # needs the openai package

            function = JudgeReward(function.removeprefix(JUDGE))
        elif is_address(function):
            function = ServedReward(function)
        elif isinstance(function, str | os.PathLike):
            function = load_reward_model(os.fspath(function))
        if isinstance(function, PreTrainedModel | PeftModel):
            tokenizer = tokenizer or _tokenizer_of(function)
            same = tokenizer is None or _agree(tokenizer, policy_tokenizer)
            own = None if same else tokenizer
            function = RewardModel(function.to(device), policy_tokenizer, own, end_token_ids=end_token_ids)
        elif not callable(function):
            raise ValueError(
                f"reward_funcs has a {type(function).__name__}; it should hold functions, classifiers or their names"
            )
        made.append(function)
    return made


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved in the folder or repository of `model`, if there is one."""
    name = model.config._name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError):
        return None
    # A folder without a tokenizer's files gives one that knows nothing but special tokens.
    is_empty = tokenizer is None or len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens)
    return None if is_empty else tokenizer


def _agree(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both write a text with the same ids, in the same chat template.

    Every token of the smaller vocabulary has the same id in the larger (to which a pad was added, say), and both put
    the same special tokens around a text.
    """
    smaller, larger = sorted((one.get_vocab(), other.get_vocab()), key=len)
    same_ids = all(larger.get(token) == index for token, index in smaller.items())
    around = [tokenizer("a")["input_ids"] for tokenizer in (one, other)]
    return same_ids and around[0] == around[1] and one.chat_template in (None, other.chat_template)
