"""A tiny Llama with a chat template, written as a quantised GGUF file."""

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel


NAME = "tiny.gguf"
WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 32, 2, 4, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(folder, seed=0, kind=None, scale=0.5):
    """Write `tiny.gguf` into `folder`; `kind` of its matrices is Q8_0 by default. Returns the file's path."""
    kind = gguf.GGMLQuantizationType.Q8_0 if kind is None else kind
    random = np.random.default_rng(seed)
    path = folder / NAME
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer)

    def add(name, *shape):
        weights = (scale * random.standard_normal(shape)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def add_norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))

    add("token_embd", len(_tokens()), WIDTH)
    for layer in range(LAYERS):
        block, key_width = f"blk.{layer}", WIDTH // HEADS * KV_HEADS
        add(f"{block}.attn_q", WIDTH, WIDTH)
        add(f"{block}.attn_k", key_width, WIDTH)
        add(f"{block}.attn_v", key_width, WIDTH)
        add(f"{block}.attn_output", WIDTH, WIDTH)
        add(f"{block}.ffn_gate", FEED_FORWARD, WIDTH)
        add(f"{block}.ffn_up", FEED_FORWARD, WIDTH)
        add(f"{block}.ffn_down", WIDTH, FEED_FORWARD)
        add_norm(f"{block}.attn_norm")
        add_norm(f"{block}.ffn_norm")
    add_norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokens():
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "ll"]


def _describe(writer):
    tokens = _tokens()
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
