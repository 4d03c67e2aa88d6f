"""Rows that are too many tokens for a model, or too few for a batch: found before its weights are loaded."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_apa.commands.models import loading
from trl_apa.models.gguf import adapter_config_file, load_config
from trl_apa.offline.data import completion_ids
from trl_apa.rollout.prompts import query_of


# Tokens that a tokenizer may add to a text. Otherwise a token stands for a byte at least.
ADDED_TOKENS = 8


def config_of(path: str, arguments: ModelConfig, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a language model, or of the base that an adapter names; no weight is read.

    Args:
        path: folder or hub name; `arguments.model_revision` is read if it is `arguments.model_name_or_path`.
        arguments: names of models.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if there is none.
    """
    hub = {"revision": arguments.model_revision} if path == arguments.model_name_or_path else {}
    with loading("model", path):
        if adapter_config_file(path, **hub) is not None:
            path, hub = PeftConfig.from_pretrained(path, **hub).base_model_name_or_path, {}
        return load_config(path, trust_remote_code=trust_remote_code, **hub)


def check_prompt_lengths(
    rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, options: Any
) -> None:
    """See whether every prompt leaves the model room for its longest response.

    Args:
        rows: prompts, as `prompts.query_of` reads them. None: there are none.
        tokenizer: the model's.
        config: the model's.
        options: have `max_prompt_length`, `max_completion_length` and `chat_template_kwargs`.

    Raises:
        ValueError: naming the row, if one is too long, or is none that the tokenizer can read.
    """
    positions, new = _positions(config), options.max_completion_length
    if rows is None:
        return
    if positions is not None and new >= positions:
        raise ValueError(f"max_completion_length={new}: the model has {positions} positions for prompt and response")
    # The prompt is read by a stack of its own where there are two.
    room = None if positions is None else positions - (0 if config.is_encoder_decoder else new)
    if room is not None and options.max_prompt_length is not None and options.max_prompt_length <= room:
        room = None
    for number, row in _to_look_at(rows, ("prompt", "query"), room):
        length = len(_query(number, row, tokenizer, options))
        if room is not None and length > room:
            raise ValueError(
                f"the prompt of row {number} has {length} tokens; the model has {positions} positions, and "
                f"max_completion_length={new}: lower that, or set max_prompt_length"
            )


def check_response_lengths(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, options: Any
) -> None:
    """See whether every prompt with its response, or with both of a preference, fits into the model's positions.

    Args:
        rows: as `offline.response_with_reward` leaves them.
        tokenizer: the model's.
        config: the model's.
        options: have `max_prompt_length`, `max_completion_length`, `add_eos` and `chat_template_kwargs`.

    Raises:
        ValueError: naming the row, if one is too long, or is none that the tokenizer can read.
    """
    positions = _positions(config)
    for number, row in _to_look_at(rows, ("prompt", "query", "completion", "chosen", "rejected"), positions):
        length = len(_query(number, row, tokenizer, options))
        texts = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
        for answer in [{"completion": text} for text in texts] or [row]:
            ids = completion_ids(answer, tokenizer, options.add_eos)[: options.max_completion_length]
            if positions is not None and length + len(ids) > positions:
                raise ValueError(
                    f"row {number} has {length} tokens of prompt and {len(ids)} of response; the model has "
                    f"{positions} positions: set max_prompt_length or max_completion_length"
                )


def check_row_lengths(
    rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_length: int | None,
    packing: bool = False,
) -> None:
    """See whether every row of demonstrations or preferences fits into the model's positions.

    Args:
        rows: as SFTTrainer and RewardTrainer read them. None: there are none.
        tokenizer: the model's.
        config: the model's.
        max_length: tokens of a row that are read; all by default.
        packing: whether rows are joined to `max_length` tokens.

    Raises:
        ValueError: naming the row that is too long; for a `max_length` that leaves nothing.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}: it should be at least 1")
    positions = _positions(config)
    if rows is None or positions is None or (max_length is not None and max_length <= positions):
        return
    if packing:
        raise ValueError(f"max_length={max_length} with packing: the model has {positions} positions; set it to that")
    names = ("prompt", "completion", "chosen", "rejected", "text")
    for number, row in _to_look_at(rows, names, positions):
        length = max(len(_ids(parts, tokenizer)) for parts in _sequences(row))
        if length > positions:
            raise ValueError(
                f"row {number} has {length} tokens; the model has {positions} positions: set max_length to that"
            )


def _positions(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _to_look_at(rows: Dataset, names: Sequence[str], room: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, from 1, that may hold more tokens than there is room for, or none that can be read.

    Texts with fewer bytes are left alone, which takes a second a million rows, but for the first row: it shows whether
    the tokenizer reads any. None: there is room for all, and chat messages and token ids are left alone too.
    """
    has_ids = "input_ids" in rows.column_names
    columns = [rows[name] for name in names if name in rows.column_names]
    values: Iterable[tuple[Any, ...]] = zip(*columns, strict=True) if columns else ((),) * len(rows)
    for number, cells in enumerate(values, start=1):
        given = [cell for cell in cells if cell is not None]
        if not has_ids and given and all(isinstance(cell, str) and cell for cell in given):
            size = sum(len(cell.encode("utf-8", "replace")) for cell in given)
            wanted = room is not None and size + ADDED_TOKENS > room
        else:
            wanted = room is not None or "" in given
        if wanted or number == 1:
            yield number, rows[number - 1]


def _query(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: Any) -> Tensor:
    try:
        return query_of(row, tokenizer, options.max_prompt_length, options.chat_template_kwargs)
    except Exception as error:
        raise ValueError(f"the prompt of row {number} cannot be read: {error}") from error


def _sequences(row: dict[str, Any]) -> list[list[Any]]:
    """What is read one after the other: a demonstration, or a prompt with each of two responses."""
    if row.get("chosen") is not None:
        return [[row.get("prompt"), row[name]] for name in ("chosen", "rejected") if row.get(name) is not None]
    names = ("messages",) if row.get("messages") is not None else ("text", "prompt", "completion", "input_ids")
    return [[row.get(name) for name in names]]


def _ids(parts: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    given = [part for part in parts if part]
    if all(isinstance(part, str) for part in given):
        ids: list[int] = tokenizer("".join(given))["input_ids"]
        return ids
    if isinstance(given[0], list) and isinstance(given[0][0], int):
        return given[0]
    messages = [message for part in given if isinstance(part, list) for message in part]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception:
        return []  # the trainer, which knows what it expects, refuses it
    return ids
