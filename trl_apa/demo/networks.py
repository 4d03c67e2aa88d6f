"""The demo's tokenizer and language model, and how it samples from a model outside the training loop."""

import random
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_apa.evaluation.held_out import random_numbers_of_its_own
from trl_apa.rollout.generation import generate_responses

from .corpus import vocabulary


AT_ONCE = 512  # responses that are sampled together
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_tokenizer(words: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with distinct padding and end-of-sequence tokens.

    Args:
        words: that it knows; those of the grammar by default.
    """
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = WordLevelTrainer(special_tokens=[PAD, EOS, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(vocabulary() if words is None else words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A randomly initialised GPT-NeoX of about 110,000 parameters."""
    set_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        # At this width the usual 0.02 makes it slow to learn to copy words from the question.
        initializer_range=0.06,
        classifier_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tensor]:
    """Each text as a 1-D int64 tensor of token ids."""
    return [torch.tensor(ids) for ids in tokenizer(list(texts))["input_ids"]]


def decode(tokenizer: PreTrainedTokenizerFast, responses: Sequence[Tensor]) -> list[str]:
    """The words of each response, without special tokens."""
    texts: list[str] = tokenizer.batch_decode([response.tolist() for response in responses], skip_special_tokens=True)
    return texts


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
) -> list[Tensor]:
    """One response to each prompt, at temperature 1 over the whole vocabulary; the same seed gives the same responses.

    Returns:
        1-D int64 tensors, each up to and with its end-of-sequence token, if it has one.
    """
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    queries = encode(tokenizer, prompts)
    with random_numbers_of_its_own(seed, devices=[]):
        # Rows that take the places of others would draw other numbers than the published results.
        return generate_responses(model, queries, config, tokenizer, batch_size=AT_ONCE, refills=False)


def draw_prompts(rng: random.Random, prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts, without repeating one before all have been drawn."""
    whole, rest = divmod(count, len(prompts))
    return [prompt for size in [len(prompts)] * whole + [rest] for prompt in rng.sample(prompts, size)]
