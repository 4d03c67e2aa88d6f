"""Small models of families that read batches, or behave in train mode, in ways that Llama does not."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.tiny import SHARED


DECODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
RECURRENT = {"hidden_size": 16, "num_hidden_layers": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE["original_max_position_embeddings"] = 12
GPTJ = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
for stack in ("encoder", "decoder"):
    BART |= {f"{stack}_attention_heads": 2, f"{stack}_ffn_dim": 32, f"{stack}_layerdrop": 0.5}
EXPERTS = {"num_local_experts": 4, "router_jitter_noise": 0.5}
SWITCH = {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
# Doge's mask shows later tokens in older versions of transformers: the trainer refuses it.
BROKEN = {"bias in the mask"} if Version(transformers.__version__) < Version("5.20") else set()
# Name -> kind of model, and options beside the vocabulary.
MODELS = {
    "llama": ("llama", DECODER),
    "dynamic RoPE": ("llama", {**DECODER, "max_position_embeddings": 12, "rope_parameters": DYNAMIC}),
    "longrope": ("phi3", {**DECODER, "original_max_position_embeddings": 12, "rope_parameters": LONGROPE}),
    "window": ("mistral", {**DECODER, "sliding_window": 8}),
    "capped logits": ("nanochat", {**DECODER, "num_key_value_heads": 2}),
    "capped attention": ("gemma2", {**DECODER, "head_dim": 8, "sliding_window": 8}),
    "bias in the mask": ("doge", DECODER),
    "rwkv": ("rwkv", {**RECURRENT, "attention_hidden_size": 16, "context_length": 64}),
    "griffin": ("recurrent_gemma", {**DECODER, "num_hidden_layers": 3, "head_dim": 8, "attention_window_size": 8}),
    "mamba": ("mamba", {**RECURRENT, "state_size": 4}),
    "xlstm": ("xlstm", {**RECURRENT, "hidden_size": 64, "num_heads": 2, "qk_dim_factor": 1.0, "chunk_size": 16}),
    "roberta": ("roberta", {**DECODER, "is_decoder": True}),
    "alibi": ("falcon", {**DECODER, "alibi": True}),
    "dropout of the config": ("falcon", {**DECODER, "hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "gptj": ("gptj", {**GPTJ, "embd_pdrop": 0.3, "resid_pdrop": 0.3, "attn_pdrop": 0.3}),
    "layer drop": ("opt", {**DECODER, "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.5, "dropout": 0.3}),
    "biogpt": ("biogpt", {**DECODER, "layerdrop": 0.5}),
    "sampled experts": ("phimoe", {**DECODER, **EXPERTS, "input_jitter_noise": 0.3}),
    "noise in the router": ("mixtral", {**DECODER, **EXPERTS}),
    "switch": ("switch_transformers", {**SWITCH, "router_jitter_noise": 0.5, "decoder_start_token_id": 0}),
    "bart": ("bart", {**BART, "decoder_start_token_id": 1}),
}


def family_model(name, scale=4.0, **options):
    """In eval mode, with weights so large that positions and neighbours matter."""
    kind, given = MODELS[name]
    if name in BROKEN:
        pytest.skip(f"{kind} does not work in transformers {transformers.__version__}")
    try:
        config = AutoConfig.for_model(kind, **{**SHARED, **given, **options})
    except ValueError:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


@torch.no_grad()
def alone_logprobs(model, queries, responses):
    """Of each row by itself, unpadded, by nothing but the model's own forward."""
    rows = []
    for query, response in zip(queries, responses, strict=True):
        if model.config.is_encoder_decoder:
            start = response.new_full((1,), model.config.decoder_start_token_id)
            logits = model(input_ids=query[None], decoder_input_ids=torch.cat([start, response])[None]).logits
        else:
            logits = model(input_ids=torch.cat([query, response])[None], use_cache=False).logits
        log_softmax = logits[0, -len(response) - 1 : -1].float().log_softmax(-1)
        rows.append(log_softmax.gather(-1, response[:, None])[:, 0])
    return rows


def wrong_behind_its_cache(model):
    """Let a model answer otherwise where it reads one token behind a cache."""
    own = model.forward

    def forward(input_ids=None, **kwargs):
        output = own(input_ids=input_ids, **kwargs)
        if input_ids is not None and input_ids.shape[1] == 1:
            output.logits = output.logits.flip(-1)
        return output

    model.forward = forward
