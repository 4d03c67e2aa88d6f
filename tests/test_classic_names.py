"""The smaller names of classic scripts: lengths, plain sampling, references by pattern, the helpers of trl.core."""

import copy
import math
import random

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import log_softmax

from tests.test_value_head import away_from_identity, tiny_t5
from tests.tiny import EOS, FAMILIES, lora_config, tiny_model
from trl_apa.classic import core
from trl_apa.classic import names as classic
from trl_apa.classic.names import LengthSampler, create_reference_model, respond_to_batch, set_seed
from trl_apa.models.value_head import AutoModelForCausalLMWithValueHead


QUERIES = torch.arange(2, 14).reshape(3, 4)


def test_every_name_that_is_promised_is_there():
    for module in (classic, core):
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert core.LengthSampler is LengthSampler and core.set_seed is set_seed


# ---- LengthSampler ----


def test_lengths_lie_in_the_half_open_interval_and_come_equally_often():
    sampler = LengthSampler(4, 8)
    set_seed(0)
    draws = [sampler() for _ in range(4000)]
    assert {type(draw) for draw in draws} == {int}
    # Each of 4, 5, 6, 7: 1000 +- 27 (one standard deviation); five of them are left but for odds below 1e-5.
    assert {value: abs(draws.count(value) - 1000) < 137 for value in set(draws)} == dict.fromkeys(range(4, 8), True)


def test_lengths_follow_the_seed_and_take_nothing_from_torchs_generator():
    sampler, torch_state = LengthSampler(1, 1000), torch.get_rng_state()
    random.seed(3)
    first = [sampler() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(3)
    assert [sampler() for _ in range(5)] == first
    with pytest.raises(ValueError, match="max_value is 4, it should be above min_value, 4"):
        LengthSampler(4, 4)


# ---- respond_to_batch ----


def sample_slowly(model, queries, txt_len):
    """Ancestral sampling from whole sequences, token by token, without a cache."""
    tokens = queries
    for _ in range(txt_len):
        with torch.no_grad():
            logits = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return tokens[:, queries.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_ancestral_samples_of_the_asked_length(family):
    model = tiny_model(family).eval()
    # What the model's own generation config says has no influence.
    model.generation_config.update(top_k=1, temperature=9.0, max_new_tokens=2, repetition_penalty=5.0)
    torch.manual_seed(1)
    expected = sample_slowly(model, QUERIES, 7)
    torch.manual_seed(1)
    assert torch.equal(respond_to_batch(model, QUERIES, txt_len=7), expected)
    assert model.generation_config.top_k == 1
    assert respond_to_batch(model, QUERIES).shape == (3, 20)


def test_an_eos_ends_nothing():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 0.1 * model.model(QUERIES).last_hidden_state[0, -1]
    torch.manual_seed(0)
    responses = respond_to_batch(model, QUERIES.repeat(20, 1), txt_len=10)
    assert responses.shape == (60, 10)
    after = responses[:, 1:][responses[:, :-1] == EOS]
    assert len(after) and (after > EOS).any()  # neither another EOS nor padding


def test_top_k_and_top_p_restrict_the_samples():
    model = tiny_model().eval()
    greedy = model.generate(
        QUERIES, attention_mask=torch.ones_like(QUERIES), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(respond_to_batch(model, QUERIES, 5, top_k=1), greedy[:, 4:])
    assert torch.equal(respond_to_batch(model, QUERIES, 5, top_p=1e-6), greedy[:, 4:])
    assert not torch.equal(respond_to_batch(model, QUERIES, 5), greedy[:, 4:])


def test_wrappers_adapters_and_encoder_decoders_respond_too():
    model = tiny_model().eval()
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    set_seed(5)
    expected = respond_to_batch(model, QUERIES, 6)
    set_seed(5)
    assert torch.equal(respond_to_batch(wrapper, QUERIES, 6), expected)
    # Dropout, which would change an adapter's tokens, is off while sampling, and the mode is then what it was.
    adapted = away_from_identity(get_peft_model(tiny_model(), lora_config(lora_dropout=0.9)))
    set_seed(5)
    expected = respond_to_batch(copy.deepcopy(adapted).merge_and_unload(), QUERIES, 6)
    adapted.train()
    set_seed(5)
    assert torch.equal(respond_to_batch(adapted, QUERIES, 6), expected)
    assert all(module.training for module in adapted.modules())
    t5 = tiny_t5()
    assert respond_to_batch(t5, QUERIES, 6).shape == (3, 6)
    with pytest.raises(ValueError, match=r"queries has shape \(4,\)"):
        respond_to_batch(model, QUERIES[0])


# ---- create_reference_model ----

PATTERNS = {
    "llama": "model.layers.{layer}",
    "qwen2": "layers.{layer}",
    "gpt_neox": "gpt_neox.layers.{layer}",
    "gpt2": "transformer.h.{layer}",
    "opt": "model.decoder.layers.{layer}",
}


def shared_names(model, reference):
    pointers = {p.data_ptr() for p in reference.parameters()}
    return {name for name, p in model.named_parameters() if p.data_ptr() in pointers}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_pattern_names_the_layers_that_are_shared(family, wrap):
    def model():
        plain = tiny_model(family)
        return AutoModelForCausalLMWithValueHead.from_pretrained(plain) if wrap else plain

    with_pattern, without = model(), model()
    reference = create_reference_model(with_pattern, 1, PATTERNS[family])
    shared = shared_names(with_pattern, reference)
    assert shared == shared_names(without, create_reference_model(without, num_shared_layers=1))
    layer = PATTERNS[family].format(layer=0)
    in_layer = {name for name, _ in with_pattern.named_parameters() if f"{layer}." in name}
    # Older transformers call the vocabulary head of GPT-NeoX "embed_out".
    names = {name for name, _ in with_pattern.named_parameters() if "embed_out" not in name}
    embeddings = {name for name in names if "embed" in name or "wte" in name or "project_in" in name}
    positions = {name for name, _ in with_pattern.named_parameters() if "wpe" in name}
    assert in_layer and shared == in_layer | embeddings | positions
    assert {name for name, p in with_pattern.named_parameters() if not p.requires_grad} == shared


def test_patterns_that_name_no_layers_are_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"'model\.layers\.\{layer\}' matches nothing in GPT2LMHeadModel"):
        create_reference_model(model, num_shared_layers=1, pattern="model.layers.{layer}")
    with pytest.raises(ValueError, match=r"'transformer\.h\.0' has no \{layer\}"):
        create_reference_model(model, num_shared_layers=1, pattern="transformer.h.0")
    with pytest.raises(ValueError, match="num_shared_layers=5, but GPT2LMHeadModel has 2 layers"):
        create_reference_model(model, num_shared_layers=5, pattern="transformer.h.{layer}")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("pattern", "stack"), [(None, "encoder"), ("decoder.block.{layer}", "decoder")])
def test_an_encoder_decoder_shares_the_lower_layers_of_one_stack(pattern, stack):
    model = tiny_t5()
    shared = shared_names(model, create_reference_model(model, 1, pattern))
    layers = {name for name in shared if ".block." in name}
    assert layers and all(name.startswith(f"{stack}.block.0.") for name in layers)
    assert shared - layers == {"shared.weight"}


# ---- trl.core ----


def test_logprobs_and_entropy_of_two_tokens_worked_by_hand():
    # softmax(ln 1, ln 3) = (1/4, 3/4); entropy = (1/4) ln 4 + (3/4) ln (4/3).
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert float(core.logprobs_from_logits(logits, torch.tensor([[1]]))) == pytest.approx(math.log(0.75))
    assert core.logprobs_from_logits(logits, None, gather=False).exp().flatten().tolist() == pytest.approx(
        [0.25, 0.75]
    )
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert float(core.entropy_from_logits(logits)) == pytest.approx(expected)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(6).reshape(2, 3)
    expected = log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels), expected)
    assert core.entropy_from_logits(logits).dtype == torch.float32


VALUES = torch.tensor([[1.0, 2.0, 9.0], [3.0, float("nan"), 6.0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
def test_masked_statistics_worked_by_hand(dtype):
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).to(dtype)
    # Counted: 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14.
    assert float(core.masked_mean(VALUES, mask)) == 3.0
    assert core.masked_mean(VALUES, mask, axis=1).tolist() == [1.5, 4.5]
    assert core.masked_mean(VALUES, mask, axis=0).tolist() == [2.0, 2.0, 6.0]
    assert float(core.masked_var(VALUES, mask)) == pytest.approx(14 / 3)
    assert float(core.masked_var(VALUES, mask, unbiased=False)) == pytest.approx(14 / 4)
    scale = math.sqrt(3 / 14)
    expected = [-2 * scale, -1 * scale, 0.0, 0.0, 0.0, 3 * scale]
    assert core.masked_whiten(VALUES, mask).flatten().tolist() == pytest.approx(expected)
    kept = [value + 3.0 if counted else 0.0 for value, counted in zip(expected, mask.flatten().tolist(), strict=True)]
    assert core.masked_whiten(VALUES, mask, shift_mean=False).flatten().tolist() == pytest.approx(kept)


def test_whitening_has_a_gradient_and_needs_two_entries():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    whitened = core.whiten(values)
    torch.testing.assert_close(whitened, (values - values.mean()) / values.std())
    # Moving every value by the same amount changes nothing.
    (gradient,) = torch.autograd.grad(whitened[0], values)
    assert gradient.any() and float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="mask counts 1 entries; a variance needs at least 2"):
        core.masked_var(VALUES, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="mask counts 0 entries; a variance needs at least 1"):
        core.masked_var(VALUES, torch.zeros(2, 3), unbiased=False)


def test_clipping_between_numbers_and_tensors():
    x = torch.tensor([-2.0, 0.5, 2.0])
    assert core.clip_by_value(x, -1.0, 1.0).tolist() == [-1.0, 0.5, 1.0]
    assert core.clip_by_value(x, torch.tensor([-3.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 1.5])).tolist() == [
        -2,
        1,
        1.5,
    ]


def test_padding_to_a_size():
    ids = torch.tensor([[1, 2], [3, 4]])
    assert core.pad_to_size(ids, 3).tolist() == [[1, 2, 50256], [3, 4, 50256]]
    assert core.pad_to_size(ids, 3, dim=0, padding=0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert torch.equal(core.pad_to_size(ids, 2), ids)
    with pytest.raises(ValueError, match="more than size=1"):
        core.pad_to_size(ids, 1)
    assert [row.tolist() for row in core.listify_batch(ids)] == [[[1, 2]], [[3, 4]]]


def test_dicts_of_statistics():
    nested = {"loss": {"policy": 1, "value": {"clipped": 2}}, "kl": 3}
    assert core.flatten_dict(nested) == {"loss/policy": 1, "loss/value/clipped": 2, "kl": 3}
    assert core.flatten_dict(nested, sep=".")["loss.value.clipped"] == 2
    with pytest.raises(ValueError, match="become 'a/b'"):
        core.flatten_dict({"a": {"b": 1}, "a/b": 2})
    assert core.add_suffix({"kl": 1}, "/mean") == {"kl/mean": 1}
    stacked = core.stack_dicts([{"a": torch.tensor([[1.0, 2.0]])}, {"a": torch.tensor(3.0)}])
    assert stacked["a"].tolist() == [[1.0, 2.0], [3.0, core.WANDB_PADDING]]
    averaged = core.average_torch_dicts([{"a": torch.tensor([1, 2])}, {"a": torch.tensor([2, 4])}])
    assert averaged["a"].tolist() == [1.5, 3.0]


def test_statistics_as_numbers_and_arrays():
    stats = {"a": torch.tensor(1.5), "b": torch.tensor([2]), "c": torch.ones(2), "d": "text", "e": [1]}
    scalars = core.convert_to_scalar({**stats, "f": torch.tensor(3.0).numpy(), "g": torch.ones(2).numpy()[0]})
    assert scalars["c"] is stats["c"] and scalars["e"] is stats["e"]
    assert (scalars["a"], scalars["b"], scalars["d"], scalars["f"], scalars["g"]) == (1.5, 2, "text", 3.0, 1.0)
    arrays = core.stats_to_np({"a": torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True), "b": 2})
    assert arrays["a"].tolist() == [1.5, 2.5] and type(arrays["a"]).__module__ == "numpy"
    assert arrays["b"] == 2.0 and type(arrays["b"]) is float
    assert core.stats_to_np({"a": "text", "b": torch.ones(2).numpy()[0]}) == {"a": "text", "b": 1.0}


def test_a_decorated_step_returns_what_it_computes_and_frees_the_cache_when_asked(monkeypatch):
    freed = []
    monkeypatch.setattr(core, "release_memory", lambda: freed.append(True))

    @core.PPODecorators.empty_device_cache()
    def step(a, b):
        return a + b

    assert step(1, b=2) == 3 and not freed
    monkeypatch.setattr(core.PPODecorators, "optimize_device_cache", True)
    assert step(1, b=2) == 3 and len(freed) == 1
