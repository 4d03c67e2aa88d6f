"""What scripts read of the wrappers' classes, override in subclasses, and give to `from_pretrained`."""

import warnings

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    FSMTConfig,
    PreTrainedModel,
    ProphetNetConfig,
)

from tests.tiny import ENCODER_DECODERS, FAMILIES, lora_config, tiny_model, tiny_trainer
from trl_apa import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PreTrainedModelWrapper
from trl_apa.models import value_head


WRAPPERS = {
    AutoModelForCausalLMWithValueHead: (AutoModelForCausalLM, FAMILIES),
    AutoModelForSeq2SeqLMWithValueHead: (AutoModelForSeq2SeqLM, ENCODER_DECODERS),
}
KINDS = [(wrapper, family) for wrapper, (_, families) in WRAPPERS.items() for family in families]
IDS = torch.arange(2, 14).reshape(2, 6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_classes_have_the_attributes_of_classics(wrapper):
    assert wrapper.transformers_parent_class is WRAPPERS[wrapper][0]
    assert set(wrapper.supported_args) == {"summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy"}
    assert (wrapper.supported_modules, wrapper.supported_rm_modules) == (("v_head",), ("score",))
    assert wrapper.supported_pretrained_model_architectures == (PreTrainedModel, PeftModel)
    assert PreTrainedModelWrapper.transformers_parent_class is None


@pytest.mark.parametrize("wrapper, family", KINDS)
def test_the_vocabularys_head_has_one_of_the_names_in_the_list(wrapper, family):
    assert any(hasattr(tiny_model(family), name) for name in wrapper.lm_head_namings)


def test_classics_name_of_the_hubs_token_is_read(tmp_path, monkeypatch):
    model, seen = tiny_model(), []
    for name in ("load_language_model", "read_value_head"):
        monkeypatch.setattr(value_head, name, lambda *args, name=name, **given: seen.append(given) or found[name])
    found = {"load_language_model": model, "read_value_head": None}
    for given in ({"use_auth_token": "t"}, {"use_auth_token": "t", "token": "t"}, {"use_auth_token": None}, {}):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), **given)
        expected = "t" if given.get("use_auth_token") else None
        assert [options.get("token") for options in seen] == [expected, expected]
        assert not any("use_auth_token" in options for options in seen)
        seen.clear()
    with pytest.raises(ValueError, match="use_auth_token and token"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), use_auth_token="t", token="u")


@pytest.mark.parametrize("wrapper, family", KINDS)
@pytest.mark.parametrize("in_config, given, expected", [(None, None, 0.1), (0.5, None, 0.5), (0.5, 0.0, 0.0)])
def test_the_heads_dropout_is_that_of_the_config_unless_it_is_given(
    tmp_path, wrapper, family, in_config, given, expected
):
    model = tiny_model(family)
    if in_config is not None:
        model.config.summary_dropout_prob = in_config
    model.save_pretrained(tmp_path)
    options = {} if given is None else {"summary_dropout_prob": given}
    for source in (model, tmp_path):
        assert wrapper.from_pretrained(source, **options).v_head.dropout.p == expected


FSMT = {"d_model": 16, "langs": ["en", "de"], "src_vocab_size": 32, "tgt_vocab_size": 32, "decoder_start_token_id": 2}
FSMT |= {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}
PROPHET = {"vocab_size": 32, "hidden_size": 16, "max_position_embeddings": 64, "decoder_start_token_id": 2}
PROPHET |= {f"num_{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}


@pytest.mark.parametrize("config", [FSMTConfig(**FSMT), ProphetNetConfig(**PROPHET)], ids=lambda c: c.model_type)
def test_a_model_whose_vocabularys_head_is_no_linear_layer_of_its_own_is_wrapped(config):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=IDS[:, :4], output_hidden_states=True)
        logits, _, values = wrapper(IDS, decoder_input_ids=IDS[:, :4])
    assert torch.equal(logits, plain.logits)
    torch.testing.assert_close(values, wrapper.v_head.summary(plain.decoder_hidden_states[-1])[..., 0])


class Scaled(AutoModelForCausalLMWithValueHead):
    """As scripts subclass classic's wrapper: an argument of its own, the rest handed on."""

    supported_args = (*AutoModelForCausalLMWithValueHead.supported_args, "value_scale")

    def __init__(self, pretrained_model, **kwargs):
        scale = kwargs.pop("value_scale", 1.0)
        super().__init__(pretrained_model, **kwargs)
        self.value_scale = scale

    def forward(self, *args, **kwargs):
        logits, loss, values = super().forward(*args, **kwargs)
        return logits, loss, values * self.value_scale


def test_a_subclass_gets_its_own_arguments_and_loads_as_it_says(tmp_path):
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), v_head_init_strategy="normal").eval()
    plain.save_pretrained(tmp_path)
    scaled = Scaled.from_pretrained(tmp_path, value_scale=3.0, summary_dropout_prob=0.2).eval()
    assert isinstance(scaled, Scaled) and scaled.v_head.dropout.p == 0.2
    with torch.no_grad():
        torch.testing.assert_close(scaled(IDS)[2], 3 * plain(IDS)[2])

    class OfAnyKind(PreTrainedModelWrapper):
        pass

    assert type(OfAnyKind.from_pretrained(tmp_path).pretrained_model) is type(plain.pretrained_model)
    assert OfAnyKind.from_pretrained(tiny_model("t5"))(IDS, decoder_input_ids=IDS)[2].shape == IDS.shape

    class LoadsAnother(AutoModelForCausalLMWithValueHead):
        transformers_parent_class = type(
            "Own", (AutoModelForCausalLM,), {"from_pretrained": lambda *a, **k: _frozen()}
        )

    def _frozen():
        return tiny_model().requires_grad_(False)

    assert not any(p.requires_grad for p in LoadsAnother.from_pretrained(tmp_path).pretrained_model.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_without_bitsandbytes_says_what_to_install(tmp_path, monkeypatch, bits):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(value_head, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=rf"load_in_{bits}bit=True needs bitsandbytes.*pip install bitsandbytes"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **{f"load_in_{bits}bit": True})


@pytest.mark.parametrize("bits, layer", [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_quantising_while_loading_is_what_a_quantization_config_does(tmp_path, bits, layer):
    kind = getattr(pytest.importorskip("bitsandbytes").nn, layer)
    tiny_model().save_pretrained(tmp_path)
    option = {f"load_in_{bits}bit": True}
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, peft_config=lora_config(), **option)
    assert getattr(wrapper, f"is_loaded_in_{bits}bit")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**option))
    counts = [sum(isinstance(m, kind) for m in model.modules()) for model in (wrapper, plain)]
    assert counts[0] == counts[1] > 0


def test_quantising_options_that_cannot_be_are_refused_or_warned_of(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit are both True"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, load_in_8bit=True, load_in_4bit=True)
    with pytest.warns(UserWarning, match="load_in_8bit=True has no effect on a model that is in memory"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), load_in_8bit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), load_in_8bit=False)


def test_layers_on_several_devices_are_noted(tmp_path):
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model())
    trainer = tiny_trainer(tmp_path, wrapper)
    assert not wrapper.is_sequential_parallel
    for device_map, spread in (({"": 0}, False), ({"model": 0, "lm_head": 1}, True)):
        wrapper.pretrained_model.hf_device_map = device_map
        assert wrapper.is_sequential_parallel is trainer.model.is_sequential_parallel is spread


@pytest.mark.parametrize("through_trainer", [False, True])
def test_beside_an_adapter_lies_the_file_in_which_classic_reads_the_head(tmp_path, through_trainer):
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), peft_config=lora_config())
    if through_trainer:
        tiny_trainer(tmp_path, wrapper, {"value_model": "head"}).save_pretrained(tmp_path / "saved")
    else:
        wrapper.save_pretrained(tmp_path / "saved")
    state = torch.load(tmp_path / "saved" / "pytorch_model.bin", weights_only=True)
    assert state.keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(state["v_head.summary.weight"], wrapper.v_head.summary.weight)
