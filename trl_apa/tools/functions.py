"""Tools: Python functions that the policy may call, under their names and with what it is told of them."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema


Tool = Callable[..., Any]
# Methods of an environment that are no tools.
NO_TOOLS = ("reset", "get_reward")


@dataclass(frozen=True)
class Toolbox:
    """Tools by name.

    Args:
        functions: under their names.
        schemas: what the chat template tells of them.
    """

    functions: dict[str, Tool]
    schemas: list[dict[str, Any]]

    @classmethod
    def of(cls, tools: Iterable[Tool], schemas: list[dict[str, Any]] | None = None) -> "Toolbox":
        """
        Args:
            tools: functions or methods with type hints and a docstring in Google's style.
            schemas: of these tools, where they are known.

        Raises:
            ValueError: naming the tool, if it cannot be called, has no name, or that of another, or cannot be
                described.
        """
        functions: dict[str, Tool] = {}
        for number, tool in enumerate(tools):
            name = getattr(tool, "__name__", None)
            if not callable(tool) or not isinstance(name, str):
                raise ValueError(f"tools[{number}] is {tool!r}; it should be a function")
            if name in functions:
                raise ValueError(f"tools has two functions of the name {name!r}")
            functions[name] = tool
        return cls(functions, [schema_of(tool) for tool in functions.values()] if schemas is None else schemas)


def schema_of(tool: Tool) -> dict[str, Any]:
    """What the chat template tells the policy of a tool: transformers' JSON schema of it.

    Raises:
        ValueError: naming the tool, if its type hints or its docstring lack something.
    """
    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:
        raise ValueError(
            f"tool {tool.__name__!r} cannot be described to the policy: it should have type hints and a docstring "
            f"that describes each argument ({error})"
        ) from error
    return schema


def methods_of(environment: Any) -> list[Tool]:
    """The public methods of an environment, which are tools: all but `reset` and `get_reward`, in alphabetical order.

    Of its class, because the properties of an object would be computed.
    """
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [getattr(environment, name) for name in names if name not in NO_TOOLS and not name.startswith("_")]


def check_tools(tools: Any) -> Sequence[Tool]:
    """The trainer's `tools`, a list.

    Raises:
        ValueError: for anything else.
    """
    if tools is None:
        return []
    if callable(tools) or not isinstance(tools, list | tuple):
        raise ValueError(f"tools is a {type(tools).__name__}; it should be a list of functions")
    return list(tools)
