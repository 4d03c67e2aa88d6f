"""The classic wrappers: what forward returns, what is written and read, the reward adapter on the policy's base."""

import copy
import json

import pytest
import torch
import transformers.utils.hub as hub
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
)

from tests.tiny import (
    CONFIGS,
    EOS,
    FAMILIES,
    PAD,
    VOCABULARY,
    lora_config,
    tiny_model,
    tiny_rollouts,
    tiny_trainer,
)
from trl_apa.models import create_reference_model
from trl_apa.models.value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    SummaryHead,
    read_value_head,
)


IDS = torch.arange(2, 14).reshape(2, 6)


def tiny_t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def wrapped(model=None, **kwargs):
    model = tiny_model() if model is None else model
    kwargs = {"v_head_init_strategy": "normal", **kwargs}
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, **kwargs).eval()


def away_from_identity(model, seed=5):
    """A PEFT model whose LoRA adapters all change something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def outputs(model, *args, **kwargs):
    with torch.no_grad():
        logits, _, values = model(*(args or (IDS,)), **kwargs)
    return logits, values


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- forward ----


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_language_model_and_a_line_through_its_last_hidden_state(family):
    model = tiny_model(family).eval()
    wrapper = wrapped(model)
    logits, loss, values = wrapper(IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    plain = model(IDS, labels=IDS)
    assert torch.equal(logits, plain.logits) and torch.equal(loss, plain.loss)
    hidden = model.base_model(IDS).last_hidden_state
    weight, bias = wrapper.v_head.summary.weight[0], wrapper.v_head.summary.bias[0]
    torch.testing.assert_close(values, (hidden * weight).sum(-1) + bias)
    assert values.shape == IDS.shape and wrapper(IDS)[1] is None
    *_, cache = wrapper(IDS, return_past_key_values=True, use_cache=True)
    assert cache.get_seq_length() == IDS.shape[1]
    # One more token on the cache is the last token of the whole sequence.
    more = wrapper(torch.full((2, 1), 3), past_key_values=cache)
    whole = wrapper(torch.cat([IDS, torch.full((2, 1), 3)], dim=1))
    torch.testing.assert_close(more[2][:, -1], whole[2][:, -1])


def test_half_precision_models_give_float32_logits_and_values():
    logits, _, values = wrapped(tiny_model(dtype=torch.bfloat16))(IDS)
    assert logits.dtype == values.dtype == torch.float32


def test_the_head_of_an_encoder_decoder_sits_on_its_decoder():
    model = tiny_t5().eval()
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model).eval()
    decoder_ids = IDS[:, :4].contiguous()
    logits, loss, values = wrapper(IDS, decoder_input_ids=decoder_ids, labels=decoder_ids)
    plain = model(IDS, decoder_input_ids=decoder_ids, labels=decoder_ids, output_hidden_states=True)
    assert torch.equal(logits, plain.logits) and torch.equal(loss, plain.loss)
    torch.testing.assert_close(values, wrapper.v_head.summary(plain.decoder_hidden_states[-1])[..., 0])
    assert values.shape == decoder_ids.shape


def test_head_initialisation_and_dropout():
    head = SummaryHead(400, dropout=0.5, init_strategy="normal", initializer_range=0.2)
    # The standard deviation of 400 draws is within 20 % of theirs but for odds below 1e-7.
    assert 0.16 < float(head.summary.weight.detach().std()) < 0.24 and not head.summary.bias.any()
    ones = torch.ones(1, 1, 400)
    assert not torch.equal(head(ones), head(ones))
    assert torch.equal(head.eval()(ones), head(ones)) and head(ones).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="v_head_init_strategy='xavier'"):
        wrapped(v_head_init_strategy="xavier")
    assert wrapped(summary_dropout_prob=0.0).v_head.dropout.p == 0.0


def test_generate_and_config_are_the_language_models():
    wrapper = wrapped()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(wrapper.generate(IDS, **options), wrapper.pretrained_model.generate(IDS, **options))
    assert wrapper.config is wrapper.pretrained_model.config
    assert wrapper.generation_config is wrapper.pretrained_model.generation_config
    assert wrapper.device.type == "cpu" and wrapper.dtype == torch.float32 and not wrapper.is_peft_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(family):
    wrapper = wrapped(tiny_model(family)).train()
    wrapper.v_head.eval()
    for module in wrapper.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for toggle in (wrapper.gradient_checkpointing_disable, wrapper.gradient_checkpointing_enable):
        toggle()
        wrapper.zero_grad()
        _, loss, values = wrapper(IDS, labels=IDS, use_cache=False)
        (loss + values.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in wrapper.named_parameters()})
    assert wrapper.is_gradient_checkpointing
    assert gradients[0]["v_head.summary.weight"].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---- files ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_it_gives_the_same_numbers(tmp_path, family, lora):
    tiny_model(family).save_pretrained(tmp_path / "base")
    kwargs = {"peft_config": lora_config()} if lora else {}
    wrapper = away_from_identity(wrapped(str(tmp_path / "base"), **kwargs))
    assert wrapper.is_peft_model is lora
    wrapper.save_pretrained(tmp_path / "new" / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new" / "saved").eval()
    assert_same(outputs(again), outputs(wrapper))
    plain = (AutoPeftModelForCausalLM if lora else AutoModelForCausalLM).from_pretrained(tmp_path / "new" / "saved")
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, outputs(wrapper)[0])
    head = load_file(tmp_path / "new" / "saved" / "v_head.safetensors")
    assert sorted(head) == ["v_head.summary.bias", "v_head.summary.weight"]
    pickles = [path for path in (tmp_path / "new" / "saved").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    # Beside an adapter classic's wrappers look for the head, and for nothing else, in this file.
    assert [path.name for path in pickles] == (["pytorch_model.bin"] if lora else [])
    for path in pickles:
        assert_same(
            [t for _, t in sorted(torch.load(path, weights_only=True).items())], [head[n] for n in sorted(head)]
        )


def test_an_encoder_decoder_comes_back(tmp_path):
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5()).eval()
    wrapper.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(tmp_path)).eval()
    assert_same(outputs(again, decoder_input_ids=IDS), outputs(wrapper, decoder_input_ids=IDS))
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(IDS, decoder_input_ids=IDS).logits, outputs(wrapper, decoder_input_ids=IDS)[0])


@pytest.mark.parametrize("lora", [False, True])
def test_the_state_dict_names_weights_as_the_language_model_does(tmp_path, lora):
    def model():
        return get_peft_model(tiny_model("gpt2"), lora_config()) if lora else tiny_model("gpt2")

    wrapper = wrapped(away_from_identity(model()))
    state = wrapper.state_dict()
    names = {*wrapper.pretrained_model.state_dict(), "v_head.summary.weight", "v_head.summary.bias"}
    assert set(state) == names
    other = wrapped(model())
    assert not torch.equal(outputs(other)[1], outputs(wrapper)[1])
    other.load_state_dict(state)
    assert_same(outputs(other), outputs(wrapper))
    # Inside another module the names carry that module's prefix, and nothing of its other children is renamed.
    outer = torch.nn.ModuleDict({"policy": wrapper, "pretrained_model": torch.nn.Linear(2, 2)})
    outer_names = {f"policy.{name}" for name in names} | {"pretrained_model.weight", "pretrained_model.bias"}
    assert set(outer.state_dict()) == outer_names
    outer.load_state_dict(outer.state_dict())
    # A state that was gathered elsewhere is what is written.
    zeroed = {name: torch.zeros_like(t) if name.startswith("v_head.") else t for name, t in state.items()}
    wrapper.save_pretrained(tmp_path, state_dict=zeroed)
    assert not any(tensor.any() for tensor in read_value_head(str(tmp_path)).values())


def classic_state(wrapper):
    """What classic TRL wrote into one file: the language model's weights under their names, and the head's."""
    return {name: tensor.clone() for name, tensor in wrapper.state_dict().items()}


@pytest.mark.parametrize("kind", ["bin", "safetensors", "sharded"])
def test_a_classic_checkpoint_is_read(tmp_path, kind):
    wrapper = wrapped(tiny_model("gpt2"))
    expected, state = outputs(wrapper), classic_state(wrapper)
    wrapper.config.save_pretrained(tmp_path)
    if kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        # The head's two tensors lie in two shards.
        first = {name: tensor for name, tensor in state.items() if name != "v_head.summary.bias"}
        shards = {"model-1.safetensors": first, "model-2.safetensors": {k: state[k] for k in state.keys() - first}}
        for name, shard in shards.items():
            save_file(shard, tmp_path / name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {k: name for name, shard in shards.items() for k in shard}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval()
    assert_same(outputs(again), expected)


def test_a_classic_adapter_with_its_head_in_a_bin_file_is_read(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    wrapper = away_from_identity(wrapped(str(tmp_path / "base"), peft_config=lora_config()))
    wrapper.pretrained_model.save_pretrained(tmp_path / "adapter")
    head = {name: tensor for name, tensor in wrapper.state_dict().items() if name.startswith("v_head.")}
    torch.save(head, tmp_path / "adapter" / "pytorch_model.bin")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter")).eval()
    assert_same(outputs(again), outputs(wrapper))


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_executes_something_is_refused(tmp_path, capsys):
    wrapped().pretrained_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"v_head.summary.weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_value_head(str(tmp_path))
    assert "executed" not in capsys.readouterr().out


def test_a_checkpoint_without_a_head_gets_a_new_one(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert read_value_head(str(tmp_path)) == {}
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), v_head_init_strategy="normal")
    assert wrapper.v_head.summary.weight.any() and not wrapper.v_head.summary.bias.any()


def test_push_to_hub_uploads_model_and_head(tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})()

    class Card:
        def save(self, path):
            pass

    def upload(self, folder, repo_id, **kwargs):
        again = AutoModelForCausalLMWithValueHead.from_pretrained(folder).eval()
        uploaded[repo_id] = outputs(again)

    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub, "create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    tiny_model().save_pretrained(tmp_path)
    for name, kwargs in (("someone/policy", {}), ("someone/adapter", {"peft_config": lora_config()})):
        wrapper = away_from_identity(wrapped(str(tmp_path), **kwargs))
        wrapper.push_to_hub(name)
        assert_same(uploaded[name], outputs(wrapper))


# ---- loading ----


def test_weights_load_in_float32_unless_told_otherwise(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)

    def dtype(**kwargs):
        return AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), **kwargs).dtype

    assert dtype() == torch.float32
    assert dtype(torch_dtype=torch.bfloat16) == dtype(dtype="auto") == dtype(torch_dtype="auto") == torch.bfloat16
    with pytest.raises(ValueError, match="torch_dtype and dtype"):
        dtype(torch_dtype=torch.float32, dtype=torch.bfloat16)


def test_a_loaded_adapter_is_frozen_unless_is_trainable(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    wrapped(str(tmp_path / "base"), peft_config=lora_config()).save_pretrained(tmp_path / "adapter")
    for is_trainable in (False, True):
        wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(
            str(tmp_path / "adapter"), is_trainable=is_trainable
        )
        trainable = {name for name, p in wrapper.named_parameters() if p.requires_grad}
        assert all("lora_" in name or name.startswith("v_head.") for name in trainable)
        assert any("lora_" in name for name in trainable) is is_trainable
    with pytest.warns(UserWarning, match="peft_config is ignored"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"), peft_config=lora_config())


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit", "quantization_config"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_bases_train_adapter_and_head_and_come_back(tmp_path, option):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    kwargs = {option: nf4 if option == "quantization_config" else True}
    wrapper = wrapped(str(tmp_path / "base"), peft_config=lora_config(), **kwargs).train()
    kinds = {
        "load_in_8bit": bitsandbytes.nn.Linear8bitLt,
        "load_in_4bit": bitsandbytes.nn.Linear4bit,
        "quantization_config": bitsandbytes.nn.Linear4bit,
    }
    assert any(isinstance(module, kinds[option]) for module in wrapper.modules())
    assert wrapper.is_loaded_in_8bit is (option == "load_in_8bit")
    assert wrapper.is_loaded_in_4bit is (option != "load_in_8bit")
    # As peft prepares a quantised model for training.
    assert wrapper.is_gradient_checkpointing and wrapper.v_head.summary.weight.dtype == torch.float32
    optimizer = torch.optim.SGD([p for p in wrapper.parameters() if p.requires_grad], lr=0.1)
    before = outputs(wrapper.eval())
    _, loss, values = wrapper.train()(IDS, labels=IDS, use_cache=False)
    (loss + values.square().mean()).backward()
    optimizer.step()
    after = outputs(wrapper.eval())
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    wrapper.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"), **kwargs).eval()
    for ours, theirs in zip(outputs(again), after, strict=True):
        torch.testing.assert_close(ours, theirs)
    if option == "quantization_config":
        with pytest.raises(ValueError, match="parts of quantization_config"):
            wrapped(str(tmp_path / "base"), load_in_8bit=True, **kwargs)


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_model_without_adapters_comes_back(tmp_path, option):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    wrapper = wrapped(str(tmp_path / "base"), **{option: True})
    wrapper.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved")).eval()
    assert getattr(again, f"is_loaded_in_{option[-4:]}")
    assert_same(outputs(again), outputs(wrapper))


def test_an_adapter_of_another_name_comes_back(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapper = wrapped(away_from_identity(get_peft_model(model, lora_config(), adapter_name="policy")))
    wrapper.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved")).eval()
    assert_same(outputs(again), outputs(wrapper))


def test_what_cannot_be_wrapped_is_refused(tmp_path):
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    prompt_tuning = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for source in (3, torch.nn.Linear(2, 2), wrapped(), None):
        with pytest.raises(ValueError, match="pretrained_model_name_or_path is a"):
            load(source)
    with pytest.raises(ValueError, match="peft_config is a dict; it should be a PeftConfig"):
        load(tiny_model(), peft_config={"r": 4})
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters are not supported"):
        load(tiny_model(), peft_config=prompt_tuning)
    prompted = get_peft_model(tiny_model(), prompt_tuning)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters are not supported"):
        load(prompted)
    prompted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters are not supported"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="pretrained_model is a LlamaModel; it should be a language model"):
        load(tiny_model().base_model)
    with pytest.raises(ValueError, match="wraps a decoder, but pretrained_model is a T5"):
        load(tiny_t5())
    with pytest.raises(ValueError, match="wraps an encoder-decoder, but pretrained_model is a Llama"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_model())
    with pytest.raises(OSError):
        load(str(tmp_path / "nothing"))


def test_a_device_map_may_name_the_cpu_but_not_offload_to_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert wrapped(str(tmp_path), device_map={"": "cpu"}).device.type == "cpu"
    for devices in ({"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}):
        model = tiny_model()
        model.hf_device_map = devices
        with pytest.raises(ValueError, match="offloaded weights cannot be trained"):
            wrapped(model)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the first GPU is there")
@pytest.mark.parametrize("device_map", [{"": 0}, 0, {"model": 1, "lm_head": "cpu"}], ids=str)
def test_the_number_of_a_gpu_means_the_cpu_where_there_is_none(tmp_path, device_map):
    tiny_model().save_pretrained(tmp_path)
    assert wrapped(str(tmp_path), device_map=device_map).device.type == "cpu"


# ---- the reward adapter ----


def save_reward_adapter(path, base, num_labels=2, **kwargs):
    """A sequence classifier's adapter on `base`, and the classifier."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    config = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", **{"target_modules": "all-linear", **kwargs})
    classifier = away_from_identity(get_peft_model(classifier, config), seed=7).eval()
    classifier.save_pretrained(path)
    return classifier


@pytest.fixture
def base(tmp_path, request):
    tiny_model(getattr(request, "param", "llama")).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def snapshot(wrapper):
    policy = wrapper.pretrained_model
    return {
        "active": policy.active_adapter,
        "active in layers": list(policy.base_model.active_adapters),
        "trainable": {name: p.requires_grad for name, p in wrapper.named_parameters()},
        "training": {name: module.training for name, module in wrapper.named_modules()},
        "config": policy.peft_config["default"].to_dict(),
    }


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
@pytest.mark.parametrize("num_labels", [1, 2])
def test_the_reward_adapter_scores_as_the_classifier_does(tmp_path, base, num_labels):
    classifier = save_reward_adapter(tmp_path / "reward", base, num_labels)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config())
    trained = copy.deepcopy(get_peft_model_state_dict(away_from_identity(policy, seed=8)))
    wrapper = wrapped(policy, reward_adapter=tmp_path / "reward")
    logits = outputs(wrapper)[0]
    # Padding on the left changes no score; the classifier itself reads its score at the last real token.
    padded, mask = torch.nn.functional.pad(IDS, (3, 0), value=PAD), torch.ones_like(IDS)
    scores = wrapper.compute_reward_score(padded, torch.nn.functional.pad(mask, (3, 0)))
    with torch.no_grad():
        expected = classifier(input_ids=IDS, attention_mask=mask).logits
    assert scores.shape == (2, 9, num_labels) and scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores[:, -1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wrapper.compute_reward_score(IDS)[:, -1], expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wrapper.compute_reward_score(IDS).dtype == torch.float32
    assert torch.equal(outputs(wrapper)[0], logits)
    assert_same(get_peft_model_state_dict(policy, adapter_name="default").values(), trained.values())
    wrapper.save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy" / "reward_adapter").exists()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"], ["embed_tokens"]])
def test_scoring_leaves_the_policy_as_it_was_even_when_it_fails(tmp_path, base, modules_to_save):
    save_reward_adapter(tmp_path / "reward", base, lora_dropout=0.5)
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = away_from_identity(get_peft_model(model, lora_config(modules_to_save=modules_to_save)))
    # Some of the adapter frozen by the user, and one module in eval mode, stay so.
    frozen = next(p for name, p in policy.named_parameters() if "layers.0" in name and "lora_A" in name)
    frozen.requires_grad_(False)
    weights, before = copy.deepcopy(policy.state_dict()), {n for n, p in policy.named_parameters() if p.requires_grad}
    # The adapter's name is part of the names of the policy's own weights (`q_proj`), which peft matches loosely.
    wrapper = wrapped(policy, reward_adapter=str(tmp_path / "reward"), reward_adapter_name="proj").train()
    wrapper.v_head.eval()
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == before
    expected, state = policy(IDS).logits, snapshot(wrapper)
    scores = wrapper.compute_reward_score(IDS, torch.ones_like(IDS))
    assert torch.equal(scores, wrapper.compute_reward_score(IDS, torch.ones_like(IDS)))
    assert snapshot(wrapper) == state
    with pytest.raises(RuntimeError):
        wrapper.compute_reward_score(IDS, torch.ones(2, 99, dtype=torch.long))
    assert snapshot(wrapper) == state
    assert torch.equal(policy(IDS).logits, expected)
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in weights.items())
    # And it still learns, alone.
    others = {name: p.detach().clone() for name, p in wrapper.named_parameters() if ".proj." in name}
    others |= {f"score.{name}": p.detach().clone() for name, p in wrapper.score.named_parameters()}
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    wrapper(IDS, labels=IDS)[1].backward()
    optimizer.step()
    assert not torch.equal(policy(IDS).logits, expected)
    parameters = dict(wrapper.named_parameters())
    assert others and all(torch.equal(parameters[name], p) for name, p in others.items())
    assert torch.equal(wrapper.compute_reward_score(IDS).isfinite(), torch.ones(2, 6, 2, dtype=torch.bool))


def test_a_gradient_that_waits_for_its_step_survives_scoring(tmp_path, base):
    save_reward_adapter(tmp_path / "reward", base)
    wrapper = wrapped(base, peft_config=lora_config(), reward_adapter=str(tmp_path / "reward")).train()
    wrapper(IDS, labels=IDS)[1].backward()
    gradients = {name: p.grad.clone() for name, p in wrapper.named_parameters() if p.grad is not None}
    wrapper.compute_reward_score(IDS)
    assert gradients and all(
        torch.equal(p.grad, gradients[n]) for n, p in wrapper.named_parameters() if n in gradients
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
def test_policy_and_reward_adapter_share_a_quantised_base(tmp_path, base, option):
    pytest.importorskip("bitsandbytes")
    classifier = save_reward_adapter(tmp_path / "reward", base)
    wrapper = wrapped(base, peft_config=lora_config(), reward_adapter=str(tmp_path / "reward"), **{option: True})
    scores = wrapper.compute_reward_score(IDS, torch.ones_like(IDS))[:, -1]
    with torch.no_grad():
        expected = classifier(input_ids=IDS).logits
    # Quantisation moves scores a little, and far less than the adapter's absence would.
    for name, parameter in wrapper.named_parameters():
        if "lora_B.reward_adapter" in name:
            parameter.zero_()
    without = wrapper.compute_reward_score(IDS, torch.ones_like(IDS))[:, -1]
    error, effect = (scores - expected).abs().mean(), (without - expected).abs().mean()
    assert float(error) < 0.5 * float(effect)


def test_a_trainer_scores_with_the_reward_adapter_and_trains_the_policys_alone(tmp_path, base):
    save_reward_adapter(tmp_path / "reward", base)
    wrapper = wrapped(base, peft_config=lora_config(), reward_adapter=str(tmp_path / "reward"))
    expected = wrapper.compute_reward_score(IDS)
    trainer = tiny_trainer(tmp_path, wrapper)
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert torch.equal(model.compute_reward_score(input_ids=IDS, attention_mask=torch.ones_like(IDS)), expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step(*tiny_rollouts())
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved and not any("reward_adapter" in name for name in moved)
    assert torch.equal(model.compute_reward_score(input_ids=IDS), expected)
    with pytest.raises(ValueError, match="there is no reward adapter"):
        tiny_trainer(tmp_path).model.compute_reward_score(IDS)


def test_reward_adapters_that_do_not_fit_are_refused(tmp_path, base):
    reward = str(tmp_path / "reward")
    save_reward_adapter(reward, base)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match="needs a PEFT policy"):
        load(base, reward_adapter=reward)
    with pytest.raises(ValueError, match="reward_adapter is a int"):
        load(base, peft_config=lora_config(), reward_adapter=3)
    with pytest.raises(ValueError, match="there is no reward adapter"):
        load(base, peft_config=lora_config()).compute_reward_score(IDS)
    seq2seq = AutoModelForSeq2SeqLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match="needs a decoder policy"):
        seq2seq(tiny_t5(), peft_config=LoraConfig(target_modules=["q"]), reward_adapter=reward)
    wrapped(base, peft_config=lora_config()).pretrained_model.save_pretrained(tmp_path / "no_score")
    with pytest.raises(ValueError, match=r"no score\.weight"):
        load(base, peft_config=lora_config(), reward_adapter=str(tmp_path / "no_score"))
    with pytest.raises(ValueError, match="reward_adapter_name='default' is taken"):
        load(base, peft_config=lora_config(), reward_adapter=reward, reward_adapter_name="default")
    prompted = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), prompted).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="is a PROMPT_TUNING adapter"):
        load(base, peft_config=lora_config(), reward_adapter=str(tmp_path / "prompt"))


@pytest.mark.parametrize("change", ["deeper", "wider", "incomplete"])
def test_a_reward_adapter_of_another_base_is_refused_and_leaves_no_trace(tmp_path, base, change):
    reward = tmp_path / "reward"
    save_reward_adapter(reward, base)
    if change == "incomplete":
        weights = load_file(reward / "adapter_model.safetensors")
        del weights[next(name for name in weights if "lora_A" in name)]
        save_file(weights, reward / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        config = CONFIGS["llama"]()
        config.update({"num_hidden_layers": 3} if change == "deeper" else {"intermediate_size": 48})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        save_reward_adapter(reward, str(tmp_path / "other"))
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config())
    names = {name for name, _ in policy.named_parameters()}
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="does not fit the policy's base"):
        wrapped(policy, reward_adapter=str(reward))
    assert list(policy.peft_config) == ["default"] and policy.active_adapter == "default"
    assert {name for name, _ in policy.named_parameters()} == names
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable


# ---- as reference ----


@pytest.mark.parametrize("num_shared_layers", [None, 1])
def test_a_wrapper_gives_a_frozen_reference(num_shared_layers):
    wrapper = wrapped(tiny_model("gpt2")).train()
    reference = create_reference_model(wrapper, num_shared_layers)
    assert isinstance(reference, AutoModelForCausalLMWithValueHead)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    expected = outputs(reference)
    shared = {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in wrapper.parameters()}
    assert bool(shared) is (num_shared_layers is not None)
    optimizer = torch.optim.SGD([p for p in wrapper.parameters() if p.requires_grad], lr=0.1)
    _, loss, values = wrapper(IDS, labels=IDS)
    (loss + values.square().mean()).backward()
    optimizer.step()
    assert_same(outputs(reference), expected)
    assert not torch.equal(outputs(wrapper.eval())[1], expected[1])
