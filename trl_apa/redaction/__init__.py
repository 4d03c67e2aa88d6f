"""Keys and tokens among a run's options: there for the run, left out of all that is written, logged or printed."""

import copy
import functools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from trl_apa.redaction.patterns import (
    HIDDEN,
    is_harmless_in_text,
    is_harmless_under,
    is_secret_name,
    is_surely_secret_name,
    mask_quotations,
    mask_text,
    note_secret,
)


# Options that are None in a pickle: a process that loads it has to log in again.
SECRET_OPTIONS = ("hub_token", "push_to_hub_token")
# Where it does not stand under its own name, a shorter secret cannot be told from a word. One of small letters only is
# looked for by itself, not as a part of words.
SHORTEST_KNOWN = 6
DEEPEST = 50
NOT_LOOKED_INTO = (Enum, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def without_secrets(value: Any, *holders: Any) -> Any:
    """A copy of an option's value without keys, tokens and passwords; the value itself where it has none.

    Hidden are texts and objects under names that `patterns.is_secret_name` knows, in dicts, pairs, command
    lines, dataclasses and other objects, however deep; what `patterns.mask_text` finds in texts, among them
    JSON; and the secrets that are found in this way wherever else they stand. Numbers, True, False and None are shown.

    Args:
        value: of any kind; it is left as it is.
        holders: more options, whose secrets are hidden in `value` too.
    """
    return _Redactor(secrets_in(value, *holders)).shown(value)


def secrets_in(*holders: Any) -> set[str]:
    """The keys, tokens and passwords that `without_secrets` hides for their names or patterns."""
    redactor = _Redactor()
    for holder in holders:
        redactor.shown(holder)
    return redactor.found


def without_secrets_in_error(text: str, *holders: Any) -> str:
    """What an error says, without secrets, also where a server quotes a part of one: `sk-ab***yz`.

    Args:
        text: the new text.
        holders: options whose secrets it may quote. Secrets of the environment's variables are hidden too.
    """
    known = secrets_in(*holders)
    # PWD, and a path of a file with credentials, are no secrets.
    variables = {name: value for name, value in os.environ.items() if not os.path.exists(value)}
    return _Redactor(known | secrets_in(variables)).text(mask_quotations(text, known))


@contextmanager
def errors_without_secrets(*holders: Any, quoted: bool = True) -> Iterator[None]:
    """Hide secrets, also those of `holders`, in the text of an error raised inside and of its causes.

    Args:
        holders: options whose secrets it may show.
        quoted: whether it may quote a part of one, as a server does.
    """
    hidden = without_secrets_in_error if quoted else without_secrets
    try:
        yield
    except Exception as error:
        said = hidden(str(error), *holders)
        if not _says(error, said):
            raise RuntimeError(f"{type(error).__name__}: {said}") from None
        last: BaseException = error
        while (behind := last.__cause__ or last.__context__) is not None:
            if _says(behind, hidden(str(behind), *holders)):
                last = behind
            else:
                last.__cause__ = last.__context__ = None
        raise


def _says(error: BaseException, text: str) -> bool:
    """Make the text of an error this one, unless it is; False for an error that makes its text of something else."""
    if str(error) != text:
        error.args = (text,)
    return str(error) == text


class _Redactor:
    """Copies values without their secrets.

    Args:
        known: secrets to hide wherever they stand in a text.

    Attributes:
        found: the secrets that were hidden for their names or their looks.
    """

    def __init__(self, known: Iterable[str] = ()):
        self.found: set[str] = set()
        known = sorted((s for s in known if len(s) >= SHORTEST_KNOWN and s not in HIDDEN), key=len, reverse=True)
        patterns = [rf"(?<!\w){s}(?!\w)" if re.fullmatch("[a-z_]+", s) else re.escape(s) for s in known]
        self._known = re.compile("|".join(patterns)) if known else None
        self._looked_into: list[int] = []

    def shown(self, value: Any) -> Any:
        """See `without_secrets`."""
        if _is_number(value) or isinstance(value, NOT_LOOKED_INTO):
            return value
        if isinstance(value, str):
            return self._shown_json(value)
        if id(value) in self._looked_into or len(self._looked_into) == DEEPEST:
            return HIDDEN
        self._looked_into.append(id(value))
        try:
            return self._copied(value)
        finally:
            self._looked_into.pop()

    def text(self, text: str) -> str:
        """A text without the known secrets and without anything that looks like one."""
        shown = mask_text(text if self._known is None else self._known.sub(HIDDEN, text), self.found)
        return text if shown == text else shown

    def _shown_json(self, text: str) -> str:
        if text.lstrip().startswith(("{", "[")):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                return self.text(text)
            shown = self.shown(value)
            if shown is not value:
                return json.dumps(shown)
        return self.text(text)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, bytes | bytearray):
            text = value.decode("utf-8", "surrogateescape")
            shown = self.text(text)
            return value if shown is text else shown.encode("utf-8", "surrogateescape")
        if isinstance(value, os.PathLike):
            path = os.fspath(value)
            shown = self.shown(path)
            return value if shown is path else shown
        if isinstance(value, functools.partial):
            given, shown = [*value.args, value.keywords], self.shown([*value.args, value.keywords])
            same = all(old is new for old, new in zip(given, shown, strict=True))
            return value if same else functools.partial(value.func, *shown[:-1], **shown[-1])
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return _rebuilt(value, self.attributes(value._asdict()).values(), lambda elements: type(value)(*elements))
        if isinstance(value, Sequence):
            return _rebuilt(value, self._elements(value), tuple if isinstance(value, tuple) else list)
        if isinstance(value, Set):
            return _rebuilt(value, map(self.shown, value), frozenset if isinstance(value, frozenset) else set)
        return self._object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        shown = {self._shown_name(name): element for name, element in self.attributes(value).items()}
        # `{"name": "x-api-key", "value": "abc"}`, as headers and environments are listed.
        names = [value[name] for name in ("name", "key") if isinstance(value.get(name), str)]
        for name in filter(is_secret_name, names if "value" in shown else ()):
            shown["value"] = self._hidden(name, value["value"])
        unchanged = len(shown) == len(value) and all(
            name in shown and shown[name] is element for name, element in value.items()
        )
        return value if unchanged else shown

    def _shown_name(self, name: Any) -> Any:
        is_word = isinstance(name, str) and re.fullmatch("[a-z_]+", name)
        return name if is_word else self.shown(name)

    def attributes(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Names as they are, with what is shown of their values."""
        return {name: self._under(_as_text(name), element) for name, element in value.items()}

    def _under(self, name: str, value: Any) -> Any:
        return self._hidden(name, value) if is_secret_name(name) else self.shown(value)

    def _hidden(self, name: str, value: Any) -> Any:
        """What is shown of a secret, or of a number or a special token that has a secret's name."""
        leaves = list(_leaves(value))
        if all(_is_number(leaf) or (isinstance(leaf, str) and is_harmless_under(name, leaf)) for leaf in leaves):
            return self.shown(value)
        for leaf in _leaves(value, names_too=True):
            if not isinstance(leaf, str | bytes | bytearray):
                self.shown(leaf)
            elif not (re.fullmatch("[A-Za-z_-]+", _as_text(leaf)) and is_secret_name(_as_text(leaf))):
                note_secret(_as_text(leaf), self.found)
        return HIDDEN

    def _elements(self, value: Sequence[Any]) -> list[Any]:
        """With a pair of a name and its value, and the options of a command line, hidden by their names."""
        name = _as_text(value[0]) if len(value) == 2 and isinstance(value[0], str | bytes) else ""
        if re.fullmatch(r"[\w.-]+", name) and is_surely_secret_name(name):
            return [self.shown(value[0]), self._hidden(name, value[1])]
        shown, flag = [], None
        for element in value:
            is_text = isinstance(element, str)
            if flag is not None and is_text and not element.startswith("--"):
                hides = not is_harmless_in_text(flag, element)
                shown.append(self._hidden(flag, element) if hides else element)
            else:
                shown.append(self.shown(element))
            is_flag = is_text and re.fullmatch(r"--?[A-Za-z][\w.-]*", element) and is_secret_name(element)
            flag = element if is_flag else None
        return shown

    def _object(self, value: Any) -> Any:
        """A copy with other attributes; the object itself where none is a secret."""
        attributes = _attributes_of(value)
        shown = self.attributes(attributes)
        changed = {name: shown[name] for name, element in attributes.items() if shown[name] is not element}
        if not changed:
            return value
        try:
            copied = copy.copy(value)
            if copied is value:
                return HIDDEN
            for name, element in changed.items():
                object.__setattr__(copied, name, element)
        except Exception:
            return HIDDEN
        return copied


def _rebuilt(value: Collection[Any], elements: Iterable[Any], kind: Any) -> Any:
    elements = list(elements)
    unchanged = all(element is old for element, old in zip(elements, value, strict=True))
    return value if unchanged else kind(elements)


def _is_number(value: Any) -> bool:
    """Also None, and arrays and tensors of numbers."""
    return value is None or isinstance(value, Number | range) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def _as_text(name: Any) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes | bytearray) else str(name)


def _leaves(value: Any, names_too: bool = False, depth: int = 0) -> Iterator[Any]:
    """The elements of containers; of dicts the values, and the names if requested."""
    if isinstance(value, str | bytes | bytearray) or depth == DEEPEST or not isinstance(value, Collection):
        yield value
        return
    if isinstance(value, Mapping):
        value = [*value.values(), *(value if names_too else ())]
    for element in value:
        yield from _leaves(element, names_too, depth + 1)


def _attributes_of(value: Any) -> dict[str, Any]:
    slots = [name for cls in type(value).__mro__ for name in _as_tuple(vars(cls).get("__slots__", ()))]
    named = {name: getattr(value, name) for name in slots if name.isidentifier() and hasattr(value, name)}
    return {**named, **getattr(value, "__dict__", {})}


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class RedactedOptions:
    """A mixin: what options show of themselves to trackers, on the terminal or in a pickle has no secret.

    The Trainer pickles its options into `training_args.bin` beside the weights, and uploads that. Copies keep
    everything; a process that loads the pickle has to log in again.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            # Where a class has one of its own, `dataclass` makes none, which would show keys.
            cls.__repr__ = RedactedOptions.__repr__  # type: ignore[method-assign]  # as `dataclass` does

    def to_dict(self) -> dict[str, Any]:
        """As transformers' (which leaves `hub_token` out), without the secrets inside other options."""
        options = super().to_dict()  # type: ignore[misc]  # of the options that this is mixed into
        return _Redactor(secrets_in(vars(self))).attributes(options)

    def shown(self) -> Any:
        """A copy without secrets, for those who tell others of it: trackers."""
        return _with_attributes(type(self), self.__getstate__())

    def __repr__(self) -> str:
        # Once more as text: an object among the options may show what it holds.
        shown = _Redactor(secrets_in(vars(self))).text
        lines = [f"{name}={shown(str(value))},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        shown = _Redactor(secrets_in(vars(self))).attributes(vars(self))
        return shown | {name: None for name in SECRET_OPTIONS if name in shown}

    def __copy__(self) -> Any:
        return _with_attributes(type(self), vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _with_attributes(type(self), copy.deepcopy(vars(self), memo))


def _with_attributes(cls: type, attributes: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(attributes)
    return made
