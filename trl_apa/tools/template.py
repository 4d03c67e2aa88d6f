"""Chat templates with tools: what the policy's tokens ask for, and what a tool's answer looks like as tokens."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import add_response_schema, supports_tool_calling

from trl_apa._trl import parse_response
from trl_apa.tools.messages import Message, without_surrogates


# In the place of the policy's own turn, of which only the end matters.
QUESTION = {"role": "user", "content": "?"}
UNKNOWN_TOOL = "tool"
PROBE = "7391"


class ToolTemplate:
    """A tokenizer's chat template, as rollouts of several turns need it.

    Only what follows the policy's turn is ever rendered, on a short conversation in place of the real one: the tokens
    that were sampled stay, whether or not the template would write them again.

    Args:
        tokenizer: the policy's. It gets TRL's response template if it has none and its chat template is one that TRL
            knows.
        end_token_ids: what ends a turn of the policy's.
        chat_template_kwargs: more for the chat template.

    Raises:
        ValueError: naming what the tokenizer lacks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Collection[int],
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.end_token_ids = tokenizer, frozenset(end_token_ids)
        self.chat_template_kwargs = copy.deepcopy(chat_template_kwargs or {})
        self._known: dict[str, tuple[list[int], str]] = {}
        if not supports_tool_calling(tokenizer):
            raise ValueError(
                "tools need a tokenizer whose chat_template renders tool calls and messages of the role 'tool'; the "
                "one of processing_class does not"
            )
        if getattr(tokenizer, "response_template", None) is None:
            try:
                add_response_schema(tokenizer)
            except ValueError as error:
                raise ValueError(
                    "tools need a tokenizer with a response_template, by which transformers reads tool calls out of a "
                    "response; TRL has none for this chat_template: set processing_class.response_template"
                ) from error
        self._check()

    def read(self, ids: Sequence[int], context: Sequence[int], tools: Sequence[Any]) -> Message:
        """A turn of the policy's as the assistant's message, with `tool_calls` if it asks for any.

        What cannot be read as tool calls is text, and so are calls whose arguments are nested too deep. The arguments
        of a call may be of any type; every text can be encoded.

        Args:
            ids: what was sampled.
            context: everything before it, token ids.
            tools: JSON schemas, by which the arguments get their types.
        """
        try:
            parsed: Message = parse_response(self.tokenizer, list(ids), list(context), list(tools) or None)
            message: Message = without_surrogates(parsed)
        except Exception:  # the policy may write anything, and the parser is made for what a template writes
            message = {"content": self.tokenizer.decode(list(ids), skip_special_tokens=True)}
        message = {"role": "assistant", **message}
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        return message

    def told_ids(self, messages: Sequence[Message], last_token: int) -> list[int]:
        """Messages of tools, and the beginning of the policy's next turn, as they follow its last one.

        Args:
            messages: of the role "tool", at least one.
            last_token: the last one that was sampled. If it ended the turn, what the template writes after that end
                follows; otherwise the end too.
        """
        name = messages[0]["name"]
        before, before_text = self._before(name)
        after = self._rendered(name, messages, add_generation_prompt=True)
        ended = last_token in self.end_token_ids
        if count := self._ends_up_to_the_turn_s(before):
            # Counted, because some templates write an earlier turn otherwise than the last one: without its thoughts.
            end = [place for place, token in enumerate(after) if token in self.end_token_ids][count - 1]
            return after[end + 1 :] if ended else after[end:]
        if after[: len(before)] == before:
            told = after[len(before) :]
        else:
            text = self._rendered_text(name, messages, add_generation_prompt=True)
            if not text.startswith(before_text):
                raise ValueError("the chat template writes a turn with a tool call otherwise once it is answered")
            told = list(self.tokenizer(text[len(before_text) :], add_special_tokens=False)["input_ids"])
        return told[1:] if ended and told[:1] == [last_token] else told

    def _ends_up_to_the_turn_s(self, before: list[int]) -> int:
        """How many end tokens there are up to the one that the template closes a turn with; 0 if it writes none."""
        ends = [place for place, token in enumerate(before) if token in self.end_token_ids]
        if not ends or self.tokenizer.decode(before[ends[-1] + 1 :]).strip():
            return 0
        return len(ends)

    def _before(self, name: str) -> tuple[list[int], str]:
        """The conversation up to the end of the policy's turn, as token ids and as text."""
        if name not in self._known:
            self._known[name] = self._rendered(name, ()), self._rendered_text(name, ())
        return self._known[name]

    def _rendered(self, name: str, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._render(name, messages, tokenize=True, return_dict=False, **options))

    def _rendered_text(self, name: str, messages: Sequence[Message], **options: Any) -> str:
        return str(self._render(name, messages, tokenize=False, **options))

    def _render(self, name: str, messages: Sequence[Message], **options: Any) -> Any:
        def rendered(arguments: Any) -> Any:
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            conversation = [QUESTION, turn, *messages]
            return self.tokenizer.apply_chat_template(conversation, **options, **self.chat_template_kwargs)

        try:
            return rendered({})
        except TypeError:  # templates that add up texts (DeepSeek's) want the arguments as one
            return rendered("{}")

    def _check(self) -> None:
        """Raise ValueError if the template's answer to a tool call cannot be told from the call."""
        end = next(iter(self.end_token_ids), -1)
        try:
            ids = self.told_ids([{"role": "tool", "name": UNKNOWN_TOOL, "content": PROBE}], end)
        except Exception as error:
            raise ValueError(f"tools: the chat_template cannot render what a tool answers: {error}") from error
        if PROBE not in self.tokenizer.decode(ids).replace(" ", ""):
            raise ValueError("tools: the chat_template leaves out what a tool answers")
        if not self.told_ids([{"role": "tool", "name": UNKNOWN_TOOL, "content": ""}], end):
            raise ValueError("tools: the chat_template puts no token between two turns if a tool answers nothing")
