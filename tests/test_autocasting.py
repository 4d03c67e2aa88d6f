"""While responses are sampled under autocast, each frozen weight is cast once; nothing else changes."""

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from tests.tiny import CONFIGS, lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models.autocasting import frozen_weights_cast_once
from trl_apa.rollout import generation


QUERIES = tiny_rollouts(5, seed=3)[0]


class Casts(TorchDispatchMode):
    """How often tensors of each shape were cast from float32 to bfloat16 or float16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_half = kwargs.get("dtype") in (torch.bfloat16, torch.float16)
        if func is torch.ops.aten._to_copy.default and to_half and args[0].dtype == torch.float32:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


def with_adapters():
    return get_peft_model(tiny_model(), lora_config(init_lora_weights=False))


def tied():
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(config), lora_config(init_lora_weights=False))


def frozen():
    return tiny_model("gpt2").requires_grad_(False)


def partly_frozen():
    model = tiny_model("qwen2")
    model.model.layers[0].requires_grad_(False)
    return model


def flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


def logits_of(model, casts, dtype, around):
    inputs = torch.arange(2, 12)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype), around, casts:
        return [model(inputs[:, : length + 5]).logits for length in range(5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [with_adapters, tied, frozen, partly_frozen])
def test_each_weight_is_cast_once_and_the_numbers_are_autocasts(make, dtype):
    model = make().eval()
    before, weights = flags(model), {tuple(parameter.shape) for parameter in model.parameters()}
    plain, kept = Casts(), Casts()
    expected = logits_of(model, plain, dtype, nullcontext())
    found = logits_of(model, kept, dtype, frozen_weights_cast_once(model))
    assert all(map(torch.equal, found, expected))
    assert flags(model) == before
    assert all(logits.grad_fn is None and not logits.requires_grad for logits in found)
    owned = sum(parameter.dim() == 2 for parameter in model.parameters())
    assert sum(shape in weights for shape in kept.shapes if len(shape) == 2) <= owned
    assert len(plain.shapes) > len(kept.shapes) + 10


def test_a_weight_that_moves_afterwards_is_read_anew():
    """Also inside an autocast that goes on."""
    model = with_adapters().eval()
    inputs = torch.arange(2, 12)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with frozen_weights_cast_once(model):
            old = model(inputs).logits
        for parameter in model.parameters():
            parameter.mul_(1.5)
        new = model(inputs).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs).logits, new) and not torch.equal(new, old)


def test_an_error_leaves_the_weights_frozen():
    model = with_adapters()
    before = flags(model)
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), frozen_weights_cast_once(model):
        raise KeyError
    assert flags(model) == before


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)])
def test_nothing_is_done_where_autocast_keeps_no_copies(context):
    model = with_adapters()
    before = flags(model)
    with context(), frozen_weights_cast_once(model):
        assert flags(model) == before


def test_generate_casts_the_base_once_a_call(tmp_path, monkeypatch):
    """As many casts for many tokens as for few, and the responses of autocast without copies."""
    trainer = tiny_trainer(tmp_path, None, {"peft_config": lora_config(init_lora_weights=False)}, bf16=True)
    base_shapes = {tuple(p.shape) for name, p in trainer.model.policy.named_parameters() if "base_layer" in name}

    def sampled(max_new_tokens):
        torch.manual_seed(5)
        with Casts() as casts:
            options = {"max_new_tokens": max_new_tokens, "batch_size": 2, "return_prompt": False}
            responses = trainer.generate(QUERIES, **options)
        return responses, sum(shape in base_shapes for shape in casts.shapes)

    sampled(12)  # trials
    few, many = sampled(3), sampled(12)
    assert few[1] == many[1] > 0
    monkeypatch.setattr(generation, "frozen_weights_cast_once", lambda model: torch.no_grad())
    expected, casts = sampled(12)
    assert all(map(torch.equal, many[0], expected)) and casts > 5 * many[1]
