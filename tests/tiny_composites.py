"""Tiny models whose config is made of several, or whose base_model_prefix names no attribute."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.families import DECODER
from tests.tiny import SHARED, VOCABULARY


# Ids that stand for images: no text has them.
IMAGE_TOKENS = {"image_token_id": 31, "video_token_id": 30}
FIRST_IMAGE_TOKEN = 28
TEXT = {**SHARED, **DECODER}
# As many layers as the text has: which stack is frozen must not depend on the first one found.
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _gemma3():
    text = {**TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_id=31,
        boi_token_id=30,
        eoi_token_id=29,
    )


def _gemma4():
    text = {**TEXT, "head_dim": 8, "global_head_dim": 8, "sliding_window": 4, "hidden_size_per_layer_input": 8}
    text |= {"vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=31, audio_token_id=29
    )


def _llama4():
    text = {**TEXT, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 4, "attention_chunk_size": 4}
    return transformers.Llama4Config(
        text_config=text, vision_config={**VISION, "vision_output_dim": 16, "projector_output_dim": 16}
    )


def _mllama():
    text = {**TEXT, "cross_attention_layers": []}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "max_num_tiles": 1,
    }
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=31)


def _qwen3_5():
    text = {**TEXT, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    text |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
    text |= {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **IMAGE_TOKENS)


def _mistral3():
    vision = {**VISION, "model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"}, vision_config=vision, image_token_index=31
    )


def _qwen2_5_vl():
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **IMAGE_TOKENS,
    )


CAUSAL, WITH_IMAGES = AutoModelForCausalLM, AutoModelForImageTextToText
# Name -> what makes the config, and the class that makes the model: the one that reads text alone, or images too.
MODELS = {
    "gemma3": (_gemma3, CAUSAL),
    "gemma4": (_gemma4, CAUSAL),
    "llama4_text": (_llama4, CAUSAL),
    "llama4": (_llama4, WITH_IMAGES),
    "mllama_text": (_mllama, CAUSAL),
    "qwen3_5_text": (_qwen3_5, CAUSAL),
    "qwen3_5": (_qwen3_5, WITH_IMAGES),
    "mistral3": (_mistral3, WITH_IMAGES),
    "qwen2_5_vl": (_qwen2_5_vl, WITH_IMAGES),
}
# Families that the oldest transformers does not have.
NEW = {"gemma4": "Gemma4Config", "qwen3_5": "Qwen3_5Config", "qwen3_5_text": "Qwen3_5Config"}
MODELS = {name: made for name, made in MODELS.items() if hasattr(transformers, NEW.get(name, "Gemma3Config"))}


def tiny_composite(name, seed=0):
    """A random model with logits far enough apart for its log-probs to matter."""
    make_config, auto_class = MODELS[name]
    torch.manual_seed(seed)
    model = auto_class.from_config(make_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    model.generation_config.eos_token_id = SHARED["eos_token_id"]
    return model
