"""A tokenizer with a template for tools, a policy whose words are written down, and trainers with both."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import chat_template_utils

from tests.tiny import tiny_config
from trl_apa import APATrainer


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
TEMPLATES = Path(chat_template_utils.__file__).parent / "chat_templates"


def tool_tokenizer(template="qwen3"):
    """A token a byte, some pairs of digits as one token too, and TRL's copy of a family's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("4", "2"), ("1", "2"), ("3", "0")]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *map("".join, merges)])}
    inside = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = ByteLevelDecoder()
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "additional_special_tokens": SPECIAL[1:2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, **names)
    tokenizer.add_tokens(SPECIAL[3:])
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def tool_model(seed=0, positions=4096):
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def call(name, **arguments):
    """A tool call as Qwen writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Script:
    """A sampler that says what is written down, the next turn each time that a conversation comes back.

    Args:
        tokenizer: of the policy.
        turns: for each user's question in order of their appearance a list of turns, texts or token ids.
    """

    def __init__(self, tokenizer, turns, end="<|im_end|>"):
        self.tokenizer, self.turns, self.end = tokenizer, turns, end
        self.asked = []

    def sample(self, policy, prompts, request):
        replies = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            key = next(key for key in self.turns if key in text)
            number = text.rpartition(key)[2].count("<|im_start|>assistant") - 1
            said = self.turns[key][min(number, len(self.turns[key]) - 1)]
            ids = said if isinstance(said, list) else self.tokenizer(said + self.end)["input_ids"]
            replies.append(ids)
        self.asked.append((prompts, list(request.limits)))
        return replies


def ask(*questions):
    return [{"prompt": [{"role": "user", "content": question}]} for question in questions]


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def tool_trainer(tmp_path, turns, rows, tokenizer=None, reward=None, model=None, config=None, **kwargs):
    tokenizer = tokenizer or tool_tokenizer()
    options = {
        "batch_size": len(rows or ()),
        "mini_batch_size": len(rows or ()),
        "max_completion_length": 400,
        "max_steps": 1,
    }
    options |= {"logging_steps": 1, "save_strategy": "no", **(config or {})}
    script = None if turns is None else Script(tokenizer, turns)
    trainer = APATrainer(
        tiny_config(tmp_path, **options),
        model or tool_model(),
        processing_class=tokenizer,
        train_dataset=rows,
        reward_funcs=reward,
        sampler=script,
        **kwargs,
    )
    return trainer, script
