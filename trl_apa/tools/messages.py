"""The assistant's message as any chat template, tokenizer and JSON can take it, whatever the policy wrote."""

from typing import Any

from trl_apa.tools.calling import as_text


Message = dict[str, Any]
# Lists and dicts inside each other in the arguments of a call; templates and copies go down by recursion.
DEEPEST = 64


def without_surrogates(value: Any, depth: int = 0) -> Any:
    """A copy of a parsed message in which every text can be encoded.

    Raises:
        ValueError: if it holds lists and dicts more than `DEEPEST` inside each other.
    """
    if depth > DEEPEST:
        raise ValueError(f"lists and dicts are more than {DEEPEST} inside each other")
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, dict):
        return {as_text(key): without_surrogates(element, depth + 1) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(element, depth + 1) for element in value]
    return value


def asked_calls(message: Message) -> list[tuple[str, Any]]:
    """Name and arguments of each call in a message, the arguments of any type."""
    called = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return [(str(call.get("name")), call.get("arguments")) for call in called]


def with_dicts_of_arguments(message: Message) -> Message:
    """The message with a dict as the arguments of each call, empty where the policy wrote none: templates need one."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        called = call.get("function") or call
        arguments = called.get("arguments")
        called = {**called, "arguments": arguments if isinstance(arguments, dict) else {}}
        calls.append({**call, "function": called} if call.get("function") else called)
    return {**message, "tool_calls": calls}
