"""Responses of a model to prompts, outside training."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from texts import encode_prompt
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_apa.data import STOP_STRINGS
from trl_apa.rollout.generation import end_token_ids, generate_responses


# Pure sampling from the model, as in the paper: no truncation of the distribution, temperature 1.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def load_policy(path: str | Path) -> PreTrainedModel:
    """A policy, or a LoRA adapter on its base, in float32 and ready to sample from."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def encode_queries(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: argparse.Namespace
) -> list[torch.Tensor]:
    """Prompts as 1-D int64 tensors."""
    return [torch.tensor(encode_prompt(tokenizer, prompt, options.max_prompt_length)) for prompt in prompts]


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[torch.Tensor],
    options: argparse.Namespace,
    seed: int,
) -> list[torch.Tensor]:
    """One sampled response to each query, up to and with EOS or the marker of the next turn, the same for a `seed`."""
    set_seed(seed)
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_token_ids(model, tokenizer),
        **SAMPLING,
    )
    return generate_responses(
        model,
        queries,
        config,
        tokenizer,
        stop_strings=list(STOP_STRINGS),
        batch_size=options.generation_batch_size,
    )
