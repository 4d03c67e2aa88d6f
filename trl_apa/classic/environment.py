"""Classic's `TextEnvironment` and `TextHistory`: tools that the policy calls in plain text, for the classic loop."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_apa.models.adapters import held_repeatable
from trl_apa.models.network_parts import max_positions, pad_token_id_of
from trl_apa.rollout.generation import generate_responses, generation_options
from trl_apa.rollout.tokenizing import prompt_ids
from trl_apa.tools.calling import as_text


# What transformers' `generate` samples where nobody says how many.
DEFAULT_MAX_NEW_TOKENS = 20
PROMPT, SYSTEM, MODEL, REWARD = "black on grey85", "black on cyan3", "black on deep_sky_blue1", "black on plum1"


class TextHistory:
    """What the policy and its environment have written, as text and as tokens, in segments.

    Args:
        text (`str`): the first segment, the query.
        tokens (`Tensor` `(L,)`): its token ids.
        system (`bool`, *optional*, defaults to `True`): whether it is not the policy's.

    Raises:
        ValueError: if the segment is empty.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True):
        self.system_spans: list[bool] = []
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.token_masks = torch.tensor([], dtype=torch.long, device=tokens.device)
        self.text = ""
        self.tokens = torch.tensor([], dtype=torch.long, device=tokens.device)
        self.completed = False
        self.truncated = False
        self.reward: Any = 0.0
        self.append_segment(text, tokens, system=system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Append a segment; its tokens count for the loss unless it is the `system`'s.

        Raises:
            ValueError: if it has no text or no token.
        """
        if len(text) == 0 or len(tokens) == 0:
            raise ValueError(f"a segment should have text and tokens; this one has {text!r} and {tokens.tolist()}")
        self._append(text, tokens, system)

    def _append(self, text: str, tokens: Tensor, system: bool) -> None:
        text_start, token_start = len(self.text), len(self.tokens)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens)])
        mask = torch.zeros_like(tokens) if system else torch.ones_like(tokens)
        self.token_masks = torch.cat([self.token_masks, mask.to(self.token_masks)])
        self.text_spans.append((text_start, len(self.text)))
        self.token_spans.append((token_start, len(self.tokens)))
        self.system_spans.append(system)

    def complete(self, truncated: bool = False) -> None:
        """Nothing follows; `truncated` if only because there is no room."""
        self.completed, self.truncated = True, truncated

    @property
    def last_text_segment(self) -> str:
        """The text of the last segment."""
        start, end = self.text_spans[-1]
        return self.text[start:end]

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first segment's tokens, all that follow, and their mask, int64, 1 = written by the policy."""
        split = self.token_spans[0][1]
        return self.tokens[:split], self.tokens[split:], self.token_masks[split:]

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text, coloured by who wrote it, and the reward. Needs the library rich."""
        spans = zip(self.text_spans, self._styles(), strict=True)
        self._show([(self.text[start:end], style) for (start, end), style in spans], show_legend)

    def show_tokens(self, tokenizer: PreTrainedTokenizerBase, show_legend: bool = False) -> None:
        """Print the tokens, coloured by who wrote them, and the reward. Needs the library rich."""
        pieces = []
        for (start, end), style in zip(self.token_spans, self._styles(), strict=True):
            for token in tokenizer.convert_ids_to_tokens(self.tokens[start:end].tolist()):
                pieces += [(token, style), (" ", "")]
        self._show(pieces, show_legend)

    def show_colour_legend(self) -> None:
        """Print what the colours mean."""
        pieces = [("(Colour Legend: ", ""), ("Prompt", PROMPT), ("|", ""), ("System", SYSTEM), ("|", "")]
        _print([*pieces, ("Model", MODEL), ("|", ""), ("Reward", REWARD), (")", "")])

    def _styles(self) -> list[str]:
        return [PROMPT, *(SYSTEM if system else MODEL for system in self.system_spans[1:])]

    def _show(self, pieces: list[tuple[str, str]], show_legend: bool) -> None:
        _print([*pieces, (f"\n\nReward: {self.reward}", REWARD)])
        if show_legend:
            self.show_colour_legend()


def _print(pieces: Sequence[tuple[str, str]]) -> None:
    if find_spec("rich") is None:
        warnings.warn("showing a TextHistory needs the library rich", stacklevel=4)
        return
    from rich import print as print_coloured
    from rich.text import Text

    print_coloured(Text.assemble(*pieces))


class TextEnvironment:
    """Lets the policy call tools in plain text: `<request><Tool>query<call>`, answered by `answer<response>`.

    A rollout ends at `<submit>`, at the tokenizer's EOS, after a turn without a call, or after `max_turns`.

    Args:
        model: a language model, with or without a value-head wrapper; the one that the trainer trains.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        tools (`list` or `dict`): callables, each from a text to a text, by name or named after their class.
        reward_fn (`Callable`): the last segments' texts, and what `run` got beside the queries, to one reward each.
        prompt (`str`, *optional*): put before each query.
        max_turns (`int`, *optional*, defaults to `4`): most turns of the policy.
        max_tool_reponse (`int`, *optional*, defaults to `100`): most characters of a tool's answer.
        max_length (`int`, *optional*): a rollout with more tokens ends.
        generation_kwargs (`dict`, *optional*): of the model's `generate`. Without them it answers greedily.

    Raises:
        ValueError: for an encoder-decoder, or tools that cannot be called.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        tools: Any = None,
        reward_fn: Callable[..., Any] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.tools: dict[str, Callable[[str], Any]] = _tools_by_name(tools)
        self.reward_fn, self.prompt = reward_fn, prompt
        self.max_turns, self.max_tool_response, self.max_length = max_turns, max_tool_reponse, max_length
        self.request_token, self.call_token = "<request>", "<call>"
        self.response_token, self.submit_token = "<response>", "<submit>"
        self.generation_kwargs = {} if generation_kwargs is None else generation_kwargs
        self.is_encoder_decoder = bool(self._network.config.is_encoder_decoder)
        if self.is_encoder_decoder:
            raise ValueError(
                "model is an encoder-decoder; a TextEnvironment needs a decoder, which reads its own turns"
            )

    @property
    def _network(self) -> Any:
        model = extract_model_from_parallel(self.model)
        return getattr(model, "pretrained_model", model)

    @property
    def current_device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self._network.parameters()).device
        return device

    def run(
        self, queries: Sequence[str], **rewards_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """Play one rollout for each query.

        Args:
            queries: texts.
            rewards_kwargs: more for `reward_fn`.

        Returns:
            Queries, responses and masks (1 = written by the policy), 1-D int64 tensors; rewards as `reward_fn` gave
            them; histories. `trainer.step(queries, responses, rewards, masks)` learns from them.

        Raises:
            ValueError: without a query, or if `reward_fn` gives another number of rewards.
        """
        if not queries:
            raise ValueError("queries is empty; it should hold at least one text")
        if self.reward_fn is None and type(self).compute_reward is TextEnvironment.compute_reward:
            raise ValueError("reward_fn is None; it should be a function from texts to rewards")
        texts = [(self.prompt or "") + task for task in queries]
        histories = [
            TextHistory(text, torch.tensor(prompt_ids(text, self.tokenizer), device=self.current_device))
            for text in texts
        ]
        turns = 0
        while any(not history.completed for history in histories) and turns < self.max_turns:
            histories = self.generate(histories)
            histories = self.tasks_end_check(histories)
            histories = [self.step(history) for history in histories]
            histories = self.tasks_end_check(histories, model_turn=False)
            turns += 1
        self.compute_reward(histories, **rewards_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        asked, responses, masks = (list(column) for column in zip(*parts, strict=True))
        return asked, responses, masks, [history.reward for history in histories], histories

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the call in the last segment, unless the rollout has ended."""
        truncated, ended = self.task_end_check(history)
        if ended:
            history.complete(truncated=truncated)
        if history.completed:
            return history
        response = self._answer(history.last_text_segment)
        if len(response) > self.max_tool_response:
            response = response[: self.max_tool_response - 3] + "..."
        response += self.response_token
        # Without the special tokens that a tokenizer puts around a text: this is the middle of one.
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        history.append_segment(response, torch.tensor(ids, device=self.current_device), system=True)
        return history

    def _answer(self, text: str) -> str:
        tool, query = self.parse_tool_call(text)
        if tool is None or query is None:
            return f"Unknown tool call: {text}"
        if tool not in self.tools:
            return f"Unknown tool {tool}."
        try:
            return as_text(str(self.tools[tool](query)))
        except Exception as error:
            return as_text(f"Tool error: {error}")

    def parse_tool_call(self, text: str) -> tuple[str | None, str | None]:
        """Name of the tool and its query in `<request><name>query<call>`; None, None if there is no such call."""
        begin, end = re.escape(self.request_token), re.escape(self.call_token)
        request = re.search(f"(?<={begin}).*?(?={end})", text, re.DOTALL)
        name = None if request is None else re.search(r"<(.*?)>", request.group())
        if request is None or name is None:
            return None, None
        return name.group(1), request.group().partition(">")[2]

    def compute_reward(self, histories: list[TextHistory], **reward_kwargs: Any) -> list[TextHistory]:
        """Give each history its reward.

        Raises:
            ValueError: if `reward_fn` gives another number of rewards.
        """
        assert self.reward_fn is not None
        rewards = self.reward_fn([history.last_text_segment for history in histories], **reward_kwargs)
        if len(rewards) != len(histories):
            raise ValueError(f"reward_fn gave {len(rewards)} rewards for {len(histories)} texts")
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward
        return histories

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """Let the policy continue those that have not ended; one without a position left has."""
        room = max_positions(self._network)
        for history in histories:
            if not history.completed and room is not None and len(history.tokens) >= room:
                history.complete(truncated=True)
        active = [history for history in histories if not history.completed]
        if not active:
            return histories
        responses = self._generate_batched([history.tokens for history in active])
        for history, response in zip(active, responses, strict=True):
            history._append(self.tokenizer.decode(response), response, system=False)
        return histories

    def tasks_end_check(self, histories: list[TextHistory], model_turn: bool = True) -> list[TextHistory]:
        """Mark those that have ended."""
        for history in histories:
            if not history.completed:
                truncated, ended = self.task_end_check(history, model_turn=model_turn)
                if ended:
                    history.complete(truncated=truncated)
        return histories

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """Whether a history is truncated, and whether it has ended; of one that is marked already, neither.

        Args:
            model_turn: whether the last segment is the policy's, which ends the rollout if it calls nothing.
        """
        if history.completed:
            return False, False
        if self.max_length is not None and len(history.tokens) > self.max_length:
            return True, True
        last, eos_token = history.last_text_segment, self.tokenizer.eos_token
        calls = self.request_token in last and self.call_token in last
        ended = (eos_token is not None and eos_token in history.text) or self.submit_token in last
        return False, ended or (model_turn and not calls)

    def _generate_batched(
        self, query_tensors: Sequence[Tensor], batch_size: int = 16, pad_to_multiple_of: int | None = None
    ) -> list[Tensor]:
        """A turn of the policy behind each query, up to a call, a submission, the EOS or the limit."""
        network, given = self._network, dict(self.generation_kwargs)
        given.setdefault("do_sample", False)
        defaults = {"temperature": given.get("temperature", 1.0), "top_p": 1.0, "top_k": 0}
        defaults |= {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "pad_token_id": pad_token_id_of(self.tokenizer)}
        options = generation_options({**defaults, "eos_token_id": self.tokenizer.eos_token_id}, given)
        stop_strings = options["stop_strings"] or []
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        options["stop_strings"] = [*stop_strings, self.call_token, self.submit_token]
        room = max_positions(network)
        if room is not None and options["max_length"] is None:
            most = options["generation_config"].max_new_tokens
            options["row_limits"] = [min(most, room - len(query)) for query in query_tensors]
        batching: dict[str, Any] = {"batch_size": batch_size, "pad_to_multiple_of": pad_to_multiple_of}
        with held_repeatable(network):
            return generate_responses(network, query_tensors, tokenizer=self.tokenizer, **options, **batching)


def _tools_by_name(tools: Any) -> dict[str, Callable[[str], Any]]:
    if tools is None:
        return {}
    if not isinstance(tools, Mapping):
        if callable(tools) or isinstance(tools, str):
            raise ValueError(f"tools is a {type(tools).__name__}; it should be a list or a dict of callables")
        tools = {getattr(tool, "__name__", type(tool).__name__): tool for tool in tools}
    for name, tool in tools.items():
        if not callable(tool):
            raise ValueError(f"tools has {name!r}, a {type(tool).__name__}; it should be callable")
    return dict(tools)
