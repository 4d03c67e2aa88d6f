"""Networks compute the same while they sample, as a reference and while they learn: nothing random is left on."""

import copy

import pytest
import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.families import alone_logprobs, family_model
from tests.test_training import trainer_for
from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa import ValueModel


RANDOM = ["dropout of the config", "gptj", "layer drop", "biogpt", "sampled experts", "noise in the router"]
ENCODER_DECODERS = ["switch", "bart"]
LAYERS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, **LAYERS),
    "loha": LoHaConfig(r=4, rank_dropout=0.5, module_dropout=0.5, init_weights=False, **LAYERS),
    "lokr": LoKrConfig(r=4, rank_dropout=0.5, module_dropout=0.5, init_weights=False, **LAYERS),
    "boft": BOFTConfig(boft_block_size=4, boft_dropout=0.5, init_weights=False, target_modules=["q_proj"]),
}


def is_random(model):
    tokens = torch.arange(2, 14)[None]
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        return not torch.equal(model(**inputs).logits, model(**inputs).logits)


def assert_nothing_moves(trainer, expected):
    """At a learning rate of 0 the policy stays pi_init, whose log-probs are those of each row alone, in eval mode."""
    queries, responses, scores = tiny_rollouts()
    for _ in range(2):
        stats = trainer.step(queries, responses, scores)
        assert abs(stats["objective/kl"]) < 1e-5
        for of_row, row in zip(stats["objective/logprobs"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(of_row)[: len(row)].float(), row, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", RANDOM + ENCODER_DECODERS)
def test_at_rate_zero_kl_is_zero_whatever_train_mode_adds(tmp_path, family):
    model = family_model(family).train()
    assert is_random(model)
    expected = alone_logprobs(copy.deepcopy(model).eval(), *tiny_rollouts()[:2])
    trainer = tiny_trainer(tmp_path, model, learning_rate=0.0, mini_batch_size=2, ppo_epochs=2)
    assert_nothing_moves(trainer, expected)
    assert not is_random(trainer.model.policy)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_nor_does_the_dropout_of_adapters(tmp_path, kind):
    policy = get_peft_model(tiny_model(), ADAPTERS[kind]).train()
    assert is_random(policy)
    expected = alone_logprobs(copy.deepcopy(policy).eval(), *tiny_rollouts()[:2])
    assert_nothing_moves(tiny_trainer(tmp_path, policy, learning_rate=0.0), expected)


def test_noise_on_the_embeddings_is_off_and_a_warning_says_so(tmp_path):
    model = tiny_model().train()
    expected = alone_logprobs(model, *tiny_rollouts()[:2])
    activate_neftune(model, 5.0)
    assert is_random(model)
    assert_nothing_moves(tiny_trainer(tmp_path, model, learning_rate=0.0), expected)
    with pytest.warns(UserWarning, match=r"neftune_noise_alpha=5.0 has no effect"):
        trainer = trainer_for(tmp_path, learning_rate=0.0, neftune_noise_alpha=5.0)
    trainer.train()
    kl = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row]
    assert kl == [pytest.approx(0.0, abs=1e-6)]


class Random(torch.nn.Linear):
    """Noise that no mode switches off."""

    def forward(self, hidden):
        output = super().forward(hidden)
        return output + torch.randn_like(output)


def test_a_network_that_is_random_all_the_same_is_refused(tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.down_proj = Random(32, 16)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is random even in eval mode: the same tokens"):
        tiny_trainer(tmp_path, model)


def test_networks_stay_in_eval_mode_whoever_says_that_training_begins(tmp_path):
    value_model = ValueModel.from_policy(family_model("dropout of the config"))
    trainer = tiny_trainer(tmp_path, family_model("layer drop"))
    wrapped = torch.nn.Sequential(trainer.model)  # as an engine wraps it
    wrapped.train()
    value_model.train()
    assert wrapped.training and trainer.model.training and value_model.training
    for network in (*trainer.model.networks(), value_model.network):
        assert not any(module.training for module in network.modules())


def calls_in_a_step(trainer):
    """How often a layer's first linear module is called."""
    layer = next(m for m in trainer.model.policy.modules() if isinstance(m, GradientCheckpointingLayer))
    linear = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    calls = []
    hook = linear.register_forward_hook(lambda *_: calls.append(1))
    trainer.step(*tiny_rollouts())
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("family", ["dropout of the config", "layer drop", "mamba", "griffin", "bart"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_compute_in_eval_mode_in_both_passes(tmp_path, family, use_reentrant):
    """Falcon's and OPT's layers have dropout of their own, which reads the mode of the layer itself."""
    results, calls = [], []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing}
        if checkpointing:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        trainer = learner(tmp_path, family_model(family, scale=1.0).train(), **options)
        results.append(parameters_after_step(trainer, *tiny_rollouts()))
        calls.append(calls_in_a_step(trainer))
    assert_same(*results)
    assert calls[1] > calls[0]


@pytest.mark.parametrize("family", ["dropout of the config", "layer drop", "bart"])
def test_a_pass_without_gradient_is_in_eval_mode_too(tmp_path, family):
    """Rollouts are evaluated so, before the update and between two of them."""
    found = []
    for checkpointing in (True, True, False):
        torch.manual_seed(len(found))
        model = family_model(family, scale=1.0).train()
        trainer = learner(tmp_path, model, gradient_checkpointing=checkpointing, learning_rate=0.0)
        queries, responses, scores = tiny_rollouts()
        trainer.step(queries, responses, scores)
        rollouts, _ = trainer._collect(queries, responses, scores, None)
        trainer._evaluate_rollouts(rollouts)
        found.append(torch.cat([rollouts.values_BR, rollouts.old_logprobs_BR]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=2e-6)


def test_rwkv_keeps_its_weights(tmp_path):
    """In eval mode it would divide them in place, by more in each layer, and they would be saved so."""
    model = family_model("rwkv", rescale_every=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = tiny_trainer(tmp_path, model, learning_rate=0.0)
    trainer.step(*tiny_rollouts())
    trainer.generate(tiny_rollouts()[0], generate_ref_response=True, max_new_tokens=2)
    trainer.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for state in (dict(model.named_parameters()), trainer.ref_model.state_dict(), saved):
        assert all(torch.equal(state[name], parameter) for name, parameter in before.items())


def test_long_rows_of_xlstm_have_a_gradient(tmp_path):
    trainer = learner(tmp_path, family_model("xlstm", scale=1.0, max_inference_chunksize=4))
    before = trainer.model.policy.backbone.embeddings.weight.detach().clone()
    trainer.step(*tiny_rollouts())
    assert not torch.equal(trainer.model.policy.backbone.embeddings.weight, before)


def test_an_8bit_layer_computes_the_same_while_it_samples_and_while_it_learns(tmp_path):
    """bitsandbytes has a kernel for each mode on CPUs."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model(scale=1.0).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    trainer = tiny_trainer(tmp_path, model, {"peft_config": lora_config()}, learning_rate=0.0)
    layers = [m for m in trainer.model.policy.modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: seen.append(module.state.is_training))
    assert trainer.step(*tiny_rollouts())["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    trainer.generate(tiny_rollouts()[0], max_new_tokens=2)
    assert layers and set(seen) == {True}


class FromTheHub(LlamaForCausalLM):
    """What `use_kernels=True` makes of a model: kernels are chosen whenever its mode changes."""

    use_kernels, chosen_for = True, "no mode"

    def set_use_kernels(self, *args, **kwargs):
        self.chosen_for = "training" if self.training else "inference"


def test_kernels_from_the_hub_are_those_for_training(tmp_path):
    model = FromTheHub(tiny_model().config).eval()
    assert model.chosen_for == "inference"
    trainer = tiny_trainer(tmp_path, model)
    trainer.step(*tiny_rollouts())
    trainer.generate(tiny_rollouts()[0], max_new_tokens=2)
    assert trainer.model.policy.chosen_for == trainer.ref_model.chosen_for == "training"
    assert not trainer.model.policy.training


def test_adapters_on_weights_that_a_network_reads_by_itself_are_named(tmp_path):
    """A mixer of Mamba multiplies by the weight of its dt_proj, whatever lies on it."""
    lora = lora_config(target_modules=["in_proj", "dt_proj"])
    with pytest.warns(UserWarning, match=r"adapters on dt_proj have no effect: MambaForCausalLM"):
        tiny_trainer(tmp_path, family_model("mamba"), {"peft_config": lora, "value_model": "adapter"})
