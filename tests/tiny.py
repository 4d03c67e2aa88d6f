"""Models of every family that the trainer promises to handle, a tokenizer and rollouts, made on the spot."""

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from trl_apa import APAConfig, APATrainer


VOCABULARY = 32
PAD, EOS = 0, 1
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED, **LAYERS, intermediate_size=32, num_key_value_heads=1),
    "qwen2": lambda: Qwen2Config(**SHARED, **LAYERS, intermediate_size=32, num_key_value_heads=1),
    "gpt_neox": lambda: GPTNeoXConfig(**SHARED, **LAYERS, intermediate_size=32),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": lambda: OPTConfig(**SHARED, **LAYERS, ffn_dim=32, word_embed_proj_dim=8),
}
FAMILIES = tuple(CONFIGS)
START = 2
TWO_STACKS = {**SHARED, "d_model": 16, "decoder_start_token_id": START}
CONFIGS |= {
    "t5": lambda: T5Config(**TWO_STACKS, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    "bart": lambda: BartConfig(
        **TWO_STACKS,
        **{f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")},
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
    ),
}
ENCODER_DECODERS = ("t5", "bart")


def tiny_model(family="llama", seed=0, scale=None, dtype=torch.float32):
    """A random language model with logits far enough apart for its log-probs to matter.

    T5 does not divide its attention scores by anything, so that its logits lie far apart without help.
    """
    scale = (1.0 if family == "t5" else 3.0) if scale is None else scale
    torch.manual_seed(seed)
    auto_class = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    model = auto_class.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def tiny_tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    return PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(words), pad_token="<pad>", eos_token="<eos>")


def word_tokenizer(words):
    """Word to id, between spaces."""
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def byte_tokenizer():
    """A token a byte, and EOS: any text can be encoded, 257 tokens."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def lora_config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})


def tiny_config(tmp_path, **kwargs):
    defaults = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    return APAConfig(output_dir=str(tmp_path), use_cpu=True, **{"report_to": "none", **defaults, **kwargs})


def tiny_trainer(tmp_path, model=None, trainer_kwargs=None, **config):
    model = tiny_model() if model is None else model
    return APATrainer(tiny_config(tmp_path, **config), model, tokenizer=tiny_tokenizer(), **(trainer_kwargs or {}))


def tiny_pairs(num_rows=4, seed=0):
    """`tiny_rollouts`, each query asked twice: rows 0 and 2, 1 and 3, ..."""
    queries, *rest = tiny_rollouts(num_rows, seed)
    half = queries[: num_rows // 2]
    return [*half, *half], *rest


def tiny_rollouts(num_rows=4, seed=0, max_query=9, max_response=7):
    """Ragged queries and responses with scores; every other response ends with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(limit):
        length = int(torch.randint(1, limit + 1, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator)

    queries = [tokens(max_query) for _ in range(num_rows)]
    responses = [tokens(max_response) for _ in range(num_rows)]
    responses = [torch.cat([r, torch.tensor([EOS])]) if i % 2 else r for i, r in enumerate(responses)]
    scores = list(torch.randn(num_rows, generator=generator).unbind())
    return queries, responses, scores
