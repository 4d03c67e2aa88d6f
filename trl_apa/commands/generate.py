"""`trl-apa generate`: responses of a model to prompts, as JSON lines."""

import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from trl_apa.commands.evaluate import MODEL_NAMES, SAMPLING_NAMES
from trl_apa.commands.groups import apa_part, model_part
from trl_apa.commands.models import load_policy, load_tokenizer
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.rows import PROMPT_NAMES, DataArguments, load_prompts
from trl_apa.config import APAConfig
from trl_apa.generation import decoder_start_token_id, end_token_ids, generate_responses, generation_options
from trl_apa.prompts import prompt_of, query_of
from trl_apa.texts import answer_text, is_ended


@dataclass
class GenerateArguments:
    """What is asked, and where the answers go."""

    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts, in place of those of a data set."})
    output: str | None = field(default=None, metadata={"help": "File for the JSON lines; stdout by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the model run."})


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "generate",
        "Responses of a model to prompts, as JSON lines with prompt and completion.",
        Part(GenerateArguments, lambda name: "model" if name == "trust_remote_code" else "prompts"),
        Part(DataArguments, lambda name: "prompts", PROMPT_NAMES),
        model_part({*MODEL_NAMES, "model_name_or_path", "model_revision"}),
        apa_part({*SAMPLING_NAMES, "num_generations"}),
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    with parser.errors_end_the_command(), tempfile.TemporaryDirectory() as scratch:
        values = parser.parse(argv)
        batch_size = values["num_generations"]
        arguments, data, model, config = parser.build({**values, "output_dir": scratch, "batch_size": batch_size})
        if model.model_name_or_path is None:
            raise ValueError("model_name_or_path is not set: name the folder or the hub name of the model")
        if (arguments.prompt is None) == (data.dataset_name is None):
            raise ValueError("set either prompt or dataset_name: the prompts to ask")
        prompts = Dataset.from_dict({"prompt": arguments.prompt}) if arguments.prompt else load_prompts(data)
        name, trust = model.model_name_or_path, arguments.trust_remote_code
        policy, tokenizer = load_policy(name, model, trust), load_tokenizer(name, model, trust)
    rows = [row for row in prompts for _ in range(config.num_generations)]
    answers = _answers(policy, tokenizer, rows, config)
    with open(arguments.output, "w", encoding="utf-8") if arguments.output else nullcontext(sys.stdout) as file:
        for row, answer in zip(rows, answers, strict=True):
            file.write(json.dumps({"prompt": prompt_of(row), **answer}, ensure_ascii=False) + "\n")
    return 0


def _answers(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], config: APAConfig
) -> list[dict[str, Any]]:
    """A response to each row, sampled as `APATrainer.generate` does: see `_answer`."""
    of_prompts = (config.max_prompt_length, config.chat_template_kwargs, policy.config.is_encoder_decoder)
    queries = [query_of(row, tokenizer, *of_prompts) for row in rows]
    ends, pad = end_token_ids(policy, tokenizer), tokenizer.pad_token_id
    if pad is None and not ends:
        raise ValueError("the tokenizer has neither a pad nor an EOS token")
    options = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
    options |= {"max_new_tokens": config.max_completion_length, "pad_token_id": ends[0] if pad is None else pad}
    options |= {"eos_token_id": ends or None, "decoder_start_token_id": decoder_start_token_id(policy)}
    options = generation_options(options, {"stop_strings": config.stop_strings})
    if not getattr(policy, "is_quantized", False):
        policy.to(config.device)
    set_seed(config.seed)
    responses = generate_responses(
        policy.eval(), queries, tokenizer=tokenizer, batch_size=config.generation_batch_size or 8, **options
    )
    sampled = zip(rows, queries, responses, strict=True)
    return [_answer(tokenizer, prompt_of(row), query, response, ends) for row, query, response in sampled]


def _answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, query: Tensor, response: Tensor, ends: Collection[int]
) -> dict[str, Any]:
    """A response as text; with `ended: False` if it met a limit, or a stop string, before its end."""
    answer: dict[str, Any] = {"completion": answer_text(tokenizer, query, response, prompt)}
    return answer if is_ended(response, ends) else {**answer, "ended": False}
