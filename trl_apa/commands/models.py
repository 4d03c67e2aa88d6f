"""Loads models, tokenizers and reward functions from the commands' options."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_quantization_config

from trl_apa.models import gguf, load_language_model, load_reward_model
from trl_apa.models.critic import ADAPTER_PREFIX
from trl_apa.rollout.scoring import JUDGE
from trl_apa.rollout.served_rewards import ServedReward, is_address


@contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Inside, any exception of `from_pretrained` becomes a ValueError that names what could not be loaded."""
    try:
        yield
    except Exception as error:
        if not any(frame.name == "from_pretrained" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        reason = str(error) or type(error).__name__
        if not os.path.exists(path):
            reason = f"there is no such folder, and the hub says: {reason}"
        raise ValueError(f"the {what} {path!r} cannot be loaded: {reason}") from error


def loading_options(arguments: ModelConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`."""
    dtype = arguments.dtype
    options: dict[str, Any] = {
        "dtype": dtype if dtype in (None, "auto") else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if (quantization := get_quantization_config(arguments)) is not None:
        # bitsandbytes quantises while it loads: each process onto its own device.
        device_map = {"": PartialState().local_process_index} if torch.cuda.is_available() else None
        options |= {"quantization_config": quantization, "device_map": device_map}
    return options


def load_policy(path: str, arguments: ModelConfig, trust_remote_code: bool, is_trainable: bool = True) -> Any:
    """A language model, or an adapter on its base.

    Args:
        path: folder or hub name; `arguments.model_revision` is read if it is `arguments.model_name_or_path`.
        arguments: precision, attention and quantization.
        trust_remote_code: whether code that comes with the model may run.
        is_trainable: whether an adapter is trained further.

    Raises:
        ValueError: if it cannot be loaded.
    """
    options, hub = loading_options(arguments, trust_remote_code), {}
    if path == arguments.model_name_or_path and arguments.model_revision != "main":
        hub = {"revision": arguments.model_revision}
    with loading("model", path):
        return load_language_model(path, is_trainable=is_trainable, hub=hub, **hub, **options)


def load_tokenizer(path: str, arguments: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model.

    Raises:
        ValueError: if it cannot be loaded.
    """
    revision = arguments.model_revision if path == arguments.model_name_or_path else "main"
    with loading("tokenizer of", path):
        return gguf.load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)


# What a checkpoint is made of, as patterns of names. Logs, and answers that someone keeps beside it, are not.
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",
)


def checkpoint_stamp(name: str, revision: str = "main") -> str:
    """Tells a checkpoint from one that was trained into the same folder later, or a later commit on the hub.

    Args:
        name: folder or hub name of a model or an adapter, whose base is looked at too.
        revision: on the hub.
    """
    if os.path.isfile(name):
        return _stamp([_file_stamp(Path(name))])
    try:
        adapter = find_adapter_config_file(name, revision=revision)
        config = adapter or cached_file(name, "config.json", revision=revision)
    except OSError:
        return ""  # whoever loads it says why
    stamps = [extract_commit_hash(config, None) or ""]
    if Path(name).is_dir():
        files = [file for file in sorted(Path(name).iterdir()) if any(map(file.match, CHECKPOINT_FILES))]
        stamps = [_file_stamp(file) for file in files if file.is_file()]
    if adapter is not None:
        base = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
        stamps.append(checkpoint_stamp(base) if base else "")
    return _stamp(stamps)


def _file_stamp(file: Path) -> str:
    return f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _stamp(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def import_reward_function(name: str) -> Callable[..., Any]:
    """The function that a dotted name means; modules in the working directory are found.

    Only names that the user wrote, in the YAML or on the command line, come here; none is read from a checkpoint.

    Raises:
        ValueError: if it cannot be imported or called.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"reward_funcs has {name!r}; it should be a dotted name (module.function), a server's address, judge:FILE"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"reward_funcs has {name!r}, which cannot be imported: {reason}") from error
    if not callable(function):
        raise ValueError(f"reward_funcs has {name!r}, a {type(function).__name__}; it should be a function")
    return function


def reward_function(name: str) -> Callable[..., Any]:
    """The function that a dotted name means, a server's address, or `judge:FILE`.

    Raises:
        ValueError: if it cannot be imported or called, or the address or file is wrong.
        OSError, ImportError: without that file, or the package that asks the judge.
    """
    if is_address(name):
        return ServedReward(name)
    if name.startswith(JUDGE):
        from trl_apa.winrate.rubric import JudgeReward  # needs the openai package

        return JudgeReward(name.removeprefix(JUDGE))
    return import_reward_function(name)


def load_rewards(
    models: Sequence[str] | None, functions: Sequence[Callable[..., Any]], trust_remote_code: bool
) -> list[Callable[..., Any] | PreTrainedModel | str]:
    """Reward models and reward functions, in the order of `reward_weights`: models first.

    What is to be an adapter on the policy's base ("adapter:PATH") stays a name, for the trainer to load.

    Raises:
        ValueError: if one cannot be loaded.
    """
    found: list[Callable[..., Any] | PreTrainedModel | str] = []
    for path in models or ():
        if path.startswith(ADAPTER_PREFIX):
            found.append(path)
        else:
            with loading("reward model", path):
                found.append(load_reward_model(path, trust_remote_code=trust_remote_code))
    return [*found, *functions]
