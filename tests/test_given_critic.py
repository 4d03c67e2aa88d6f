"""`trainer.model.policy` and `.value_model` as scripts of the second generation read them: by the given names."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_apa.experimental.ppo import PPOTrainer

from tests.tiny import CONFIGS, FAMILIES, lora_config, tiny_model, tiny_tokenizer
from trl_apa import PPOConfig
from trl_apa.models import ValueModel
from trl_apa.models.critic import resolve_value_model
from trl_apa.offline import OfflineAPATrainer, OfflineConfig


KINDS = {
    "classifier": AutoModelForSequenceClassification,
    "language model": AutoModelForCausalLM,
    "bare trunk": AutoModel,
}


def given(family, kind):
    config = CONFIGS[family]()
    config.num_labels = 1
    torch.manual_seed(4)
    return KINDS[kind].from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_model_has_the_parameter_names_of_the_network_that_was_given(family, kind):
    network = given(family, kind)
    value_model = resolve_value_model(network, tiny_model(family))
    expected = {name: p for name, p in network.named_parameters() if not name.startswith(("lm_head", "embed_out"))}
    found = dict(value_model.named_parameters())
    of_head = {name for name in found if name.startswith("head.")}
    assert found.keys() - of_head - {"score.bias"} == expected.keys() and bool(of_head) == (kind != "classifier")
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter) and found[name] is not parameter
    assert [id(p) for p in value_model.parameters()] == [id(p) for p in found.values()]
    assert all(name.startswith(("network.", "head.")) for name in value_model.state_dict())


def test_names_are_told_apart_and_kept_by_copies():
    value_model = resolve_value_model(given("gpt2", "classifier"), tiny_model("gpt2"))
    assert torch.equal(value_model.score.weight, dict(value_model.named_parameters())["score.weight"])
    assert dict(copy.deepcopy(value_model).named_parameters()).keys() == dict(value_model.named_parameters()).keys()
    prefixed = dict(value_model.named_parameters(prefix="critic"))
    assert "critic.score.weight" in prefixed and "critic.transformer.wte.weight" in prefixed
    own = ValueModel.from_policy(tiny_model())
    assert all(name.startswith(("network.", "head.")) for name, _ in own.named_parameters())
    assert not hasattr(own, "score")


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_script_that_compares_weights_by_name_sees_both_networks_move(tmp_path, family, peft):
    """As TRL 1.9's own test of PPO does, with a pad beyond the embedding, which nobody resizes."""
    model, value_model, reward_model = tiny_model(family), given(family, "classifier"), given(family, "classifier")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    before = {
        part: {name: p.clone().detach() for name, p in network.named_parameters()}
        for part, network in (("value_model", value_model), ("policy", model))
    }
    options = {"per_device_train_batch_size": 2, "num_ppo_epochs": 2, "response_length": 5, "total_episodes": 4}
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=1e-2, **options)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model,
        ref_model=None if peft else tiny_model(family),
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=[{"input_ids": [3, 4 + i % 5, 1]} for i in range(8)],
        peft_config=lora_config() if peft else None,
    )
    trainer.train()
    for part in ("value_model", "policy"):
        network = getattr(trainer.model, part)
        names = {name for name, p in network.named_parameters() if p.requires_grad}
        if peft and part == "policy":
            assert names and all("lora" in name for name in names)
            assert any(p.any() for name, p in network.named_parameters() if "lora_B" in name)
        else:
            after = dict(network.named_parameters())
            assert after.keys() - before[part].keys() <= {"score.bias"}  # the critic's own, which starts at 0
            moved = {name for name, p in before[part].items() if not torch.equal(after[name], p)}
            assert moved and moved <= names
    assert "score.weight" in dict(trainer.model.value_model.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    assert set(ValueModel.from_pretrained(tmp_path / "saved" / "value_model").state_dict()) == set(
        trainer.model.value_model.state_dict()
    )


def test_names_do_not_choose_which_weights_decay(tmp_path):
    """The Trainer goes by the names of parameters and those of modules, which are to agree."""
    rows = [{"prompt": f"w{i} w3", "completion": f" w{i + 1} w5", "reward": float(i)} for i in range(2, 6)]
    fitted = []
    for names in (True, False):
        value_model = ValueModel.from_reward_model(given("llama", "classifier"))
        value_model.given_names = value_model.given_names if names else {}
        options = {"loss_type": "awr", "value_epochs": 2, "weight_decay": 0.5, "learning_rate": 1e-2, "max_steps": 1}
        config = OfflineConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
        trainer = OfflineAPATrainer(config, tiny_model(), None, tiny_tokenizer(), rows, value_model=value_model)
        trainer.train()
        fitted.append(trainer.networks.value_model)
        assert bool(fitted[-1].given_names) is names
    assert all(map(torch.equal, fitted[0].parameters(), fitted[1].parameters()))
