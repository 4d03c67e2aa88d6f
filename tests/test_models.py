"""The value model stands alone, the reference stays what it was, and both come back from disk."""

import copy
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

from tests.tiny import (
    CONFIGS,
    FAMILIES,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
    tiny_trainer,
)
from trl_apa import APATrainer
from trl_apa.models import (
    ValueHead,
    ValueModel,
    create_reference_model,
    independent_copy,
    resolve_value_model,
)
from trl_apa.models.quantization import use_one_kernel
from trl_apa.rollout.batch import pad_tokens


def batch():
    queries, responses, _ = tiny_rollouts()
    tokens = pad_tokens(queries, responses, 0)
    width = max(len(response) for response in responses)
    return tokens, width


def values_of(value_model):
    with torch.no_grad():
        return value_model(*batch())


def opinionated(value_model, seed=1):
    """With a head that is not zero, so that two value models can be told apart."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(value_model.head.out.weight)
    return value_model


def reward_model(family="llama", num_labels=1):
    torch.manual_seed(2)
    config = CONFIGS[family]()
    config.num_labels = num_labels
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_model_is_a_network_of_its_own(tmp_path, family):
    trainer = tiny_trainer(tmp_path, tiny_model(family))
    policy, value_model = trainer.model.policy, trainer.model.value_model
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in value_model.parameters()}
    # The last layer starts at zero: no value is claimed before it is learned.
    assert float(values_of(value_model).abs().max()) == 0.0
    for loss_of, network, other in (
        (lambda out: out["logprobs"].sum(), policy, value_model),
        (lambda out: out["values"].sum(), opinionated(value_model), policy),
    ):
        trainer.model.zero_grad()
        loss_of(trainer.model(**batch()[0], response_width=batch()[1])).backward()
        assert any(p.grad is not None and p.grad.any() for p in network.parameters())
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_saved_policy_and_value_model_come_back(tmp_path, family, lora):
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "run", base, {"peft_config": lora_config()} if lora else None)
    opinionated(trainer.model.value_model)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "new" / "saved")
    loader = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    policy = loader.from_pretrained(tmp_path / "new" / "saved", **({"is_trainable": True} if lora else {}))
    input_ids = batch()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids).logits, trainer.model.policy(input_ids).logits)
    value_model = ValueModel.from_pretrained(tmp_path / "new" / "saved" / "value_model")
    expected = values_of(trainer.model.value_model)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(values_of(value_model), expected)
    again = APATrainer(
        tiny_config(tmp_path / "run"),
        policy,
        tokenizer=tiny_tokenizer(),
        value_model=str(tmp_path / "new" / "saved" / "value_model"),
    )
    torch.testing.assert_close(values_of(again.model.value_model), expected)
    before = values_of(again.model.value_model)
    again.step(*tiny_rollouts())
    assert not torch.equal(values_of(again.model.value_model), before)
    files = {path.name for path in (tmp_path / "new" / "saved").rglob("*")}
    assert "tokenizer.json" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_the_models_config_is_saved_as_it_came(tmp_path):
    model = tiny_model()
    use_cache = model.config.use_cache
    tiny_trainer(tmp_path, model).save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.use_cache is use_cache


def test_a_value_model_from_a_reward_model_starts_as_its_score(tmp_path):
    classifier = reward_model()
    value_model = resolve_value_model(classifier, tiny_model())
    tokens = pad_tokens([torch.tensor([5, 6, 7, 8])], [torch.tensor([9])], 0)
    with torch.no_grad():
        score = classifier(**{name: tokens[name][:, :4] for name in ("input_ids", "attention_mask")}).logits[0, 0]
        # V of the state before the fifth token is the score of the first four.
        value = value_model(tokens, 1)[0, 0]
    assert float(value) == pytest.approx(float(score), rel=1e-5)
    classifier.save_pretrained(tmp_path / "rm")
    loaded = resolve_value_model(str(tmp_path / "rm"), tiny_model())
    torch.testing.assert_close(values_of(loaded), values_of(value_model))
    # Trained on, the value model leaves the reward model alone.
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"value_model": classifier})
    weight = classifier.score.weight.detach().clone()
    trainer.step(*tiny_rollouts())
    assert torch.equal(classifier.score.weight, weight)
    assert not torch.equal(trainer.model.value_model.head.out.weight, weight)
    with pytest.raises(ValueError, match="linear `score` of one label"):
        resolve_value_model(reward_model(num_labels=2), tiny_model())


def test_a_value_model_of_another_architecture_from_a_path(tmp_path):
    """A small GPT-2 as value model of a Llama policy; they share the tokenizer."""
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"value_model": str(tmp_path / "gpt2")})
    assert trainer.model.value_model.config.model_type == "gpt2"
    before = values_of(trainer.model.value_model)
    trainer.step(*tiny_rollouts())
    assert not torch.equal(values_of(trainer.model.value_model), before)
    assert isinstance(resolve_value_model(tiny_model("opt").base_model, tiny_model()), ValueModel)
    with pytest.raises(ValueError, match="'mlp' or 'linear'"):
        ValueHead(4, "deep")


def test_a_partly_frozen_policy_gets_a_value_model_that_learns_throughout():
    policy = tiny_model()
    policy.model.layers[0].requires_grad_(False)
    value_model = ValueModel.from_policy(policy)
    assert all(p.requires_grad for p in value_model.parameters())
    assert not any(p.requires_grad for p in policy.model.layers[0].parameters())


def test_the_reference_is_frozen_and_does_not_move(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert not trainer.ref_model.training
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(*tiny_rollouts())
    assert all(torch.equal(before[name], p) for name, p in trainer.ref_model.state_dict().items())


def patched_by_trl(model):
    """As SFTTrainer leaves a model: its forward is a function that remembers the model."""
    add_fused_lm_head(model)
    return model


def patched_by_accelerate(model):
    """As a Trainer with bf16 leaves it."""
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


def hooked_by_accelerate(model):
    """As a device map leaves it, and then TRL."""
    for module in (model, model.model, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return patched_by_trl(model)


@pytest.mark.parametrize("patch", [patched_by_trl, patched_by_accelerate, hooked_by_accelerate])
def test_copies_of_a_model_that_another_trainer_has_patched_do_not_follow_its_training(tmp_path, patch):
    """deepcopy alone would anchor APA to the policy itself: its KL would always be 0."""
    trainer = tiny_trainer(tmp_path, patch(tiny_model()), learning_rate=0.1)
    expected = reference_logprobs(tiny_trainer(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(reference_logprobs(trainer), expected)
        stats = trainer.step(*tiny_rollouts())
    assert abs(stats["objective/kl"]) > 1e-3
    clone = independent_copy(trainer.model.policy)
    ids = torch.arange(2, 8)[None]
    with torch.no_grad():
        before = clone(ids).logits.clone()
        trainer.model.policy.lm_head.weight.zero_()
        assert torch.equal(clone(ids).logits, before)
        assert not trainer.model.policy(ids).logits.any()


def test_half_precision_weights_are_not_trained_unawares_and_names_load_in_float32(tmp_path):
    with pytest.warns(UserWarning, match="trainable weights in bfloat16"):
        tiny_trainer(tmp_path, tiny_model(dtype=torch.bfloat16))
    model = tiny_model(dtype=torch.float16)
    with pytest.raises(ValueError, match="trainable weights in float16"):
        tiny_trainer(tmp_path, model)
    model.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="no dataset")
        half = str(tmp_path / "half")
        trainer = APATrainer(tiny_config(tmp_path), half, value_model=half)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_given_reference_is_the_anchor(tmp_path):
    """Against a reference that equals the policy there is no KL before the first update; against another there is."""
    own = tiny_trainer(tmp_path).step(*tiny_rollouts())
    other = tiny_trainer(tmp_path, trainer_kwargs={"ref_model": tiny_model(seed=9)}).step(*tiny_rollouts())
    assert abs(own["objective/kl"]) < 1e-5
    assert abs(other["objective/kl"]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_layers_are_frozen_and_are_one_tensor_with_the_reference(tmp_path, family):
    trainer = tiny_trainer(tmp_path, tiny_model(family), {"num_shared_layers": 1}, learning_rate=0.1)
    names = dict(trainer.model.policy.named_parameters())
    pointers = {p.data_ptr() for p in trainer.ref_model.parameters()}
    shared = {name for name, p in names.items() if p.data_ptr() in pointers}
    assert any("layers.0." in name or "h.0." in name for name in shared)
    assert not any("layers.1." in name or "h.1." in name for name in shared)
    assert all(names[name].requires_grad == (name not in shared) for name in names)
    before = {name: p.detach().clone() for name, p in names.items()}
    trainer.step(*tiny_rollouts())
    assert all(torch.equal(names[name], before[name]) for name in shared)
    assert any(not torch.equal(names[name], before[name]) for name in names)
    with pytest.raises(ValueError, match="num_shared_layers=3, but LlamaForCausalLM has 2 layers"):
        create_reference_model(tiny_model(), num_shared_layers=3)
    with pytest.warns(UserWarning, match="num_shared_layers has no effect"):
        tiny_trainer(tmp_path, trainer_kwargs={"num_shared_layers": 1, "ref_model": tiny_model()})


def sft_policy(**kwargs):
    """A policy that starts from a trained adapter, far from its base."""
    policy = get_peft_model(tiny_model(), lora_config(**kwargs))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return policy


def reference_logprobs(trainer):
    trainer._prepare_for_updates()
    queries, responses, scores = tiny_rollouts()
    rollouts, _ = trainer._collect(queries, responses, scores, None)
    trainer._evaluate_rollouts(rollouts)
    return rollouts.ref_logprobs_BR[rollouts.response_mask_BR]


def test_a_fresh_adapter_is_anchored_to_its_base_without_a_second_copy(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"peft_config": lora_config(lora_dropout=0.5)}, learning_rate=0.1)
    assert trainer.ref_model is None and trainer.is_peft_model
    assert list(trainer.model.policy.peft_config) == ["default"]
    expected = reference_logprobs(tiny_trainer(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(reference_logprobs(trainer), expected)
        trainer.step(*tiny_rollouts())
        assert trainer.model.policy.active_adapter == "default"


def test_a_fresh_adapter_beside_another_trained_one_needs_no_copy_either(tmp_path):
    """A reward adapter, say, which is not active."""
    policy = get_peft_model(tiny_model(), lora_config())
    policy.add_adapter("reward", lora_config(init_lora_weights=False, inference_mode=True))
    trainer = tiny_trainer(tmp_path, policy, learning_rate=0.1)
    assert list(trainer.model.policy.peft_config) == ["default", "reward"]
    expected = reference_logprobs(tiny_trainer(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(reference_logprobs(trainer), expected)
        trainer.step(*tiny_rollouts())


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_trained_adapter_is_anchored_to_a_frozen_copy_of_itself(tmp_path, kwargs):
    """Switching it off would anchor APA to the base, which is another model."""
    policy = sft_policy(**kwargs)
    merged = copy.deepcopy(policy).merge_and_unload().requires_grad_(True)
    expected = reference_logprobs(tiny_trainer(tmp_path, merged))
    trainer = tiny_trainer(tmp_path, policy, learning_rate=0.1)
    base = reference_logprobs(tiny_trainer(tmp_path))
    assert float((expected - base).abs().max()) > 0.1
    for _ in range(2):
        torch.testing.assert_close(reference_logprobs(trainer), expected, atol=1e-4, rtol=1e-4)
        stats = trainer.step(*tiny_rollouts())
    assert abs(stats["objective/kl"]) > 1e-3
    assert all(not p.requires_grad for name, p in policy.named_parameters() if ".trl_apa_reference" in name)
    trainer.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*reference*"))
    assert all("reference" not in name for name, _ in trainer.model.value_model.named_parameters())


@pytest.mark.parametrize("kwargs", [{"bias": "lora_only"}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {}])
def test_the_reference_of_a_peft_policy_is_the_model_that_was_given(tmp_path, kwargs):
    """Whatever is trained beside LoRA's matrices (here biases and a norm), and whatever making the adapter did."""
    policy = get_peft_model(tiny_model("gpt_neox"), lora_config(**kwargs))
    if not kwargs:
        policy.base_model.model.gpt_neox.final_layer_norm.requires_grad_(True)
    expected = reference_logprobs(
        tiny_trainer(tmp_path, copy.deepcopy(policy).merge_and_unload().requires_grad_(True))
    )
    trainer = tiny_trainer(tmp_path, policy, learning_rate=0.1)
    for _ in range(3):
        torch.testing.assert_close(reference_logprobs(trainer), expected, atol=1e-5, rtol=1e-5)
        stats = trainer.step(*tiny_rollouts())
    assert abs(stats["objective/kl"]) > 1e-3


def test_a_second_trainer_on_the_same_peft_policy_is_anchored_to_where_it_starts(tmp_path):
    policy = sft_policy()
    first = tiny_trainer(tmp_path, policy, learning_rate=0.1)
    for _ in range(3):
        first.step(*tiny_rollouts())
    second = tiny_trainer(tmp_path, policy)
    assert abs(second.step(*tiny_rollouts())["objective/kl"]) < 1e-4


def test_an_adapter_of_another_name_is_saved_where_it_is_looked_for(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = get_peft_model(base, lora_config(), adapter_name="sft")
    trainer = tiny_trainer(tmp_path, policy)
    opinionated(trainer.model.value_model)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = batch()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy(ids).logits)
    value_model = ValueModel.from_pretrained(tmp_path / "saved" / "value_model", base_model=policy)
    torch.testing.assert_close(values_of(value_model), values_of(trainer.model.value_model))


def test_set_ups_in_which_the_policy_would_not_train_are_refused(tmp_path):
    model = tiny_model()
    shared = "ref_model shares trainable parameters with model"
    with pytest.raises(ValueError, match=shared):
        tiny_trainer(tmp_path, model, {"ref_model": model})
    assert all(p.requires_grad for p in model.parameters())
    base = tiny_model()
    with pytest.raises(ValueError, match=shared):
        tiny_trainer(tmp_path, base, {"ref_model": base, "peft_config": lora_config()})
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer lacks 28 of the 28 trainable tensors"):
        tiny_trainer(tmp_path, model, {"optimizer": optimizer, "peft_config": lora_config()})
    with pytest.raises(ValueError, match="no trainable parameter"):
        tiny_trainer(tmp_path, tiny_model().requires_grad_(False))
    model = tiny_model()
    with pytest.raises(ValueError, match="value_model shares parameters with model"):
        tiny_trainer(tmp_path, model, {"value_model": ValueModel(model.model, ValueHead(16))})
    with pytest.raises(ValueError, match="adapters already"):
        tiny_trainer(tmp_path, sft_policy(), {"peft_config": lora_config()})
    with pytest.raises(ValueError, match="num_shared_layers=-1"):
        tiny_trainer(tmp_path, trainer_kwargs={"num_shared_layers": -1})


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_policy_trains_its_adapter(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny_model(scale=1.0).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)

    with pytest.raises(ValueError, match="model is quantised"):
        tiny_trainer(tmp_path, load())
    trainer = tiny_trainer(tmp_path, load(), {"peft_config": lora_config()})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    # Policy and reference go through the same kernels from the first step on.
    assert abs(trainer.step(*tiny_rollouts())["objective/kl"]) < 1e-7
    trainer.step(*tiny_rollouts())
    moved = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("value_model.network.") for name in moved)
    assert len(trainer.generate(tiny_rollouts()[0], return_prompt=False, max_new_tokens=3)) == 4
    trainer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_a_4bit_layer_computes_the_same_in_eval_mode_and_stays_trainable(tmp_path):
    """As on a CPU with AVX512-BF16, where bitsandbytes packs weights in eval mode for a kernel without gradient."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer = layer.to("cpu").requires_grad_(False)
    x = torch.randn(3, 64)
    expected = layer.train()(x)
    packed, state = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    layer.support_avx512bf16_for_cpu = True
    use_one_kernel(layer)
    for mode in (layer.eval(), layer.train()):
        # Packing had rounded the scale of each block to bfloat16, whose numbers are 2^-8 apart.
        torch.testing.assert_close(mode(x), expected, rtol=0, atol=2**-8 * float(x.abs().sum(1).max()))
        assert torch.equal(mode(x), layer(x))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_reference_adapter_has_no_dropout_either(tmp_path):
    trainer = tiny_trainer(tmp_path, sft_policy(lora_dropout=0.5))
    assert "trl_apa_reference" in trainer.model.policy.peft_config
    assert trainer.step(*tiny_rollouts())["objective/kl"] == pytest.approx(0.0, abs=1e-6)


def test_lora_trains_adapters_and_value_head_and_nothing_else(tmp_path):
    trainer = tiny_trainer(tmp_path, sft_policy())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("value_model.network.") for name in moved)
    assert any(name.startswith("value_model.head.") for name in moved)
    assert all("lora_" in name or "head." in name for name in moved)
    assert all("reference" not in name for name in moved)


def test_prompt_tuning_is_refused(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters are not supported"):
        tiny_trainer(tmp_path, trainer_kwargs={"peft_config": config})


def test_a_model_given_by_name_brings_its_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = APATrainer(tiny_config(tmp_path), str(tmp_path / "model"))
    assert trainer.tokenizer.eos_token == "<eos>"
    trainer.step(*tiny_rollouts())
