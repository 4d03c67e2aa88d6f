"""`trl-apa generate`: responses of a model to prompts, as JSON lines."""

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from trl_apa.commands.generate_options import BATCH_SIZE, GenerateSampling
from trl_apa.commands.lengths import check_prompt_lengths, config_of
from trl_apa.commands.models import checkpoint_stamp, load_policy, load_tokenizer
from trl_apa.commands.options import CommandParser
from trl_apa.commands.outputs import check_output_file
from trl_apa.commands.row_file import RowFile, Write, digest
from trl_apa.commands.rows import load_prompts
from trl_apa.commands.sampling_options import LoadingOptions
from trl_apa.config.apa import APAConfig
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_parts import Network, num_token_ids
from trl_apa.redaction import without_secrets
from trl_apa.rollout.generation import decoder_start_token_id, end_token_ids, generate_responses, generation_options
from trl_apa.rollout.prompts import prompt_of, query_of
from trl_apa.rollout.texts import answer_text, is_ended
from trl_apa.trainer.validation import check_positions, check_tokens


STANDARD_OUTPUT = (None, "-", "/dev/stdout")


def run(parser: CommandParser, values: dict[str, Any]) -> int:
    """Run the command with its options, read; returns the exit status.

    Args:
        parser: that has read them.
        values: every option.
    """
    arguments, data, loading, sampling = parser.build(values)
    model = ModelConfig(**vars(loading))
    with tempfile.TemporaryDirectory() as scratch:
        config = APAConfig(output_dir=scratch, batch_size=sampling.num_generations, **vars(sampling))
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name the folder or the hub name of the model")
    if (arguments.prompt is None) == (data.dataset_name is None):
        raise ValueError("set either prompt or dataset_name")
    prompts = Dataset.from_dict({"prompt": arguments.prompt}) if arguments.prompt else load_prompts(data)
    rows = [row for row in prompts for _ in range(config.num_generations)]
    file, done = None, 0
    if arguments.output not in STANDARD_OUTPUT:
        check_output_file("output", arguments.output)
        about = _what_rows_depend_on(values, rows, config)
        file = RowFile(arguments.output, about, [prompt_of(row) for row in rows], arguments.overwrite)
        if done := file.count():
            print(f"{arguments.output}: {done} of {len(rows)} responses are done already", file=sys.stderr, flush=True)
    if done == len(rows):
        return 0
    name, trust = model.model_name_or_path, arguments.trust_remote_code
    tokenizer = load_tokenizer(name, model, trust)
    check_prompt_lengths(prompts, tokenizer, config_of(name, model, trust), config)
    answers = _answers(load_policy(name, model, trust), tokenizer, rows, config, done)
    with file.writing(done) if file else _standard_output() as write:
        for row, answer in zip(rows[done:], answers, strict=True):
            write({"prompt": prompt_of(row), **answer})
    return 0


def _what_rows_depend_on(values: dict[str, Any], rows: Sequence[dict[str, Any]], config: APAConfig) -> dict[str, Any]:
    """By name of the option, with what was found for it where that can change: files, rows, the device."""
    name = values["model_name_or_path"]
    of_loading = {*LoadingOptions.__dataclass_fields__, "model_revision"}
    of_sampling = GenerateSampling.__dataclass_fields__.keys() - {"use_cpu"}
    loading = {option: values[option] for option in sorted(of_loading)}
    sampling = {option: getattr(config, option) for option in sorted(of_sampling)}
    return {
        "command": "generate",
        "model_name_or_path": os.path.normpath(name) if os.path.isdir(name) else name,
        "files of the model": checkpoint_stamp(name, values["model_revision"]),
        "prompts": digest([[prompt_of(row), row.get("input_ids")] for row in rows]),
        **without_secrets({**loading, **sampling}),
        "generation_batch_size": config.generation_batch_size or BATCH_SIZE,
        "device": config.device.type,
    }


@contextmanager
def _standard_output() -> Iterator[Write]:
    yield lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)


def _answers(
    policy: Network,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    config: APAConfig,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """A response to each row from `first` on, sampled as `APATrainer.generate` does: see `_answer`.

    A batch is of rows that follow each other, and its random numbers depend on the seed and its own number alone, so
    that it does not matter where a command was interrupted. A batch is sampled whole, though its first rows be known.
    """
    of_prompts = (config.max_prompt_length, config.chat_template_kwargs, policy.config.is_encoder_decoder)
    queries = [query_of(row, tokenizer, *of_prompts) for row in rows]
    num_ids = num_token_ids(policy)
    for number, query in enumerate(queries):
        check_tokens(f"the prompt of row {number}", query, num_ids, tokenizer)
    ends, pad = end_token_ids(policy, tokenizer), tokenizer.pad_token_id
    if pad is None and not ends:
        raise ValueError("the tokenizer has neither a pad nor an EOS token")
    options = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
    options |= {"max_new_tokens": config.max_completion_length, "pad_token_id": ends[0] if pad is None else pad}
    options |= {"eos_token_id": ends or None, "decoder_start_token_id": decoder_start_token_id(policy)}
    options = generation_options(options, {"stop_strings": config.stop_strings})
    check_positions(queries, [config.max_completion_length] * len(queries), policy, "query + max_completion_length")
    if not getattr(policy, "is_quantized", False):
        policy.to(config.device)
    make_repeatable(policy)
    size = config.generation_batch_size or BATCH_SIZE
    for start in range(first - first % size, len(queries), size):
        batch = queries[start : start + size]
        set_seed(_batch_seed(config.seed, start // size))
        with torch.autocast(config.device.type, torch.bfloat16, enabled=bool(config.bf16)):
            responses = generate_responses(policy, batch, tokenizer=tokenizer, batch_size=size, **options)
        sampled = list(zip(rows[start : start + size], batch, responses, strict=True))
        for row, query, response in sampled[max(first - start, 0) :]:
            yield _answer(tokenizer, prompt_of(row), query, response, ends)


def _batch_seed(seed: int, batch: int) -> int:
    return int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])


def _answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, query: Tensor, response: Tensor, ends: Collection[int]
) -> dict[str, Any]:
    """A response as text; with `ended: False` if it met a limit, or a stop string, before its end."""
    answer: dict[str, Any] = {"completion": answer_text(tokenizer, query, response, prompt)}
    return answer if is_ended(response, ends) else {**answer, "ended": False}
