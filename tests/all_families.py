"""Every decoder family that transformers knows, small, found by walking its registry; and what holds for each."""

import inspect
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCABULARY, POSITIONS, LAYERS = 64, 128, 2
LARGEST = 5_000_000  # parameters
# Names of options, and what they become; others keep their defaults.
SIZES = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input embedding_vocab_size"),
    (POSITIONS, "n_positions max_position_embeddings n_ctx seq_length context_length max_seq_len max_sequence_length"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    (64, "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_hidden_size"),
    (
        32,
        "hidden_size n_embd d_model embedding_size embed_dim dim word_embed_proj_dim attention_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size intermediate_size_mlp",
    ),
    (16, "sliding_window attention_window_size local_attention window_size attention_chunk_size"),
    (
        8,
        "head_dim attention_head_dim kv_channels q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim qk_head_dim state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim "
        "time_step_rank mamba_dt_rank",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts num_routed_experts rotary_dim",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_k moe_topk top_k_experts "
        "num_experts_per_token n_experts_per_token",
    ),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_expert_group bos_token_id "
        "eos_token_id decoder_start_token_id",
    ),
    (0, "pad_token_id"),
)
SIZE_OF = {name: size for size, names in SIZES for name in names.split()}


def families():
    """Kinds of models in `AutoModelForCausalLM`'s registry, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind):
    """The family's config with few and small layers; of one made of several, of each of them.

    Raises:
        Exception: what the config's class raises.
    """
    config_class = CONFIG_MAPPING[kind]
    default, chosen = config_class(), OVERRIDES.get(kind, {})
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    options = {name: _small(part) | chosen.get(name, {}) for name, part in parts.items() if part is not None}
    own = {name: value for name, value in chosen.items() if name not in parts}
    if default.get_text_config() is default:
        options |= _small(default)
    return config_class(**{**options, **own})


def _small(config):
    known = {*config.to_dict(), *config.attribute_map, *inspect.signature(type(config).__init__).parameters}
    options = {}
    for name in known:
        if name in SIZE_OF and not isinstance(config.to_dict().get(name), list | tuple | dict):
            options[name] = SIZE_OF[name]
    if "is_decoder" in known and not config.is_decoder:  # BERT's relatives look ahead otherwise
        options["is_decoder"] = True
    if {"kv_lora_rank", "num_key_value_heads"} <= known:  # latent attention has as many of both
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        is_computed = isinstance(getattr(type(config), name, None), property)
        if not is_computed and (kinds := config.to_dict().get(name)):
            options[name] = [*dict.fromkeys(kinds), *kinds][:LAYERS]
    return options


# Where sizes have to fit each other in ways that names do not tell.
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
OVERRIDES = {
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "dory": {
        **{"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**STATES, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**STATES, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"is_decoder": True},
    "longcat_flash": {"qk_head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"], "mamba_num_heads": 8, "n_groups": 1},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        **{"mamba_headdim": 8, "n_mamba_heads": 8, "attention_head_dim": 16, "attention_hidden_size": 64},
        **{"num_query_groups": 4, "num_key_value_heads": 4, "hybrid_layer_ids": [1], "kv_channels": 8},
    },
    "zaya": {"num_experts_per_tok": 1},
}


@lru_cache
def why_left_out(kind):
    """Why a family is not in the battery; None if it is."""
    try:
        config = small_config(kind)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} parameters" if count > LARGEST else None


def small_model(kind, scale=2.0):
    """In eval mode, with weights so large that positions and neighbours matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


if __name__ == "__main__":
    for kind in families():
        print(f"{kind:<28}{why_left_out(kind) or 'ok'}", flush=True)
