"""Networks by name: quantised, with adapters, of another architecture; trained in part; merged."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from tests.test_adapter_value import learned, on_one_base
from tests.test_models import batch, reward_model
from tests.test_value_head import away_from_identity, save_reward_adapter
from tests.tiny import CONFIGS, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.models import (
    ValueModel,
    load_policy,
    load_reward_model,
    load_value_model,
    merge_and_save,
)
from trl_apa.rollout.vllm_generation import check_vllm_can_hold


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def quantised(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kinds = {bitsandbytes.nn.Linear8bitLt: "8bit", bitsandbytes.nn.Linear4bit: "4bit"}
    found = {kinds[type(module)] for module in model.modules() if type(module) in kinds}
    return found.pop() if found else None


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 9)[None]).logits


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_a_policy_is_quantised_and_gets_adapters_as_asked(base, quantization):
    policy = load_policy(base, quantization, lora=4)
    assert quantised(policy) == quantization and isinstance(policy, PeftModel)
    assert policy.peft_config["default"].r == 4 and policy.peft_config["default"].lora_alpha == 8
    # All linear layers of both blocks, A and B: 2 * 7 * 2.
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert len(trained) == 28 and {p.dtype for p in trained} == {torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(base)
    # Logits lie in [-16, 16]; rounding to 8 bits moves them a little, to 4 bits more.
    tolerance = {None: 1e-5, "8bit": 0.5, "4bit": 6.0}[quantization]
    assert float((logits(policy) - logits(whole)).abs().max()) < tolerance
    assert load_policy(base, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not isinstance(load_policy(base), PeftModel)


def test_an_adapter_is_trained_further_and_gets_no_second_one(tmp_path, base):
    away_from_identity(load_policy(base, lora=4)).save_pretrained(tmp_path / "sft")
    policy = load_policy(str(tmp_path / "sft"), "8bit")
    assert quantised(policy) == "8bit" and any(p.requires_grad for p in policy.parameters())
    with pytest.raises(ValueError, match="is an adapter already"):
        load_policy(str(tmp_path / "sft"), lora=4)


def test_what_cannot_be_loaded_is_refused(base):
    with pytest.raises(ValueError, match="quantization='2bit'; it should be '8bit', '4bit' or a BitsAndBytesConfig"):
        load_policy(base, "2bit")
    with pytest.raises(ValueError, match="lora=0: the rank should be at least 1"):
        load_policy(base, lora=0)
    with pytest.raises(ValueError, match="quantization='8bit' needs lora"):
        load_value_model(base, "8bit")
    with pytest.raises(ValueError, match=r"no trained reward model: it has no weights for score"):
        load_reward_model(base)
    with pytest.raises(OSError):
        load_policy(base + "-which-is-not-there")


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_four_quantised_models_on_weights_of_their_own(tmp_path, base, quantization):
    """The set-up that one base replaces."""
    reward_model().save_pretrained(tmp_path / "reward")
    whole, score = reward_model().eval(), load_reward_model(str(tmp_path / "reward"), quantization)
    assert quantised(score) == quantization and type(score.score) is torch.nn.Linear
    tokens = torch.arange(2, 9)[None]
    with torch.no_grad():
        assert score(tokens).logits.item() == pytest.approx(whole(tokens).logits.item(), abs=0.05)
    trainer = APATrainer(
        tiny_config(tmp_path),
        load_policy(base, quantization, lora=4),
        load_policy(base, quantization),
        tiny_tokenizer(),
        value_model=load_value_model(base, BitsAndBytesConfig(load_in_8bit=True), lora=4),
        reward_funcs=score,
    )
    assert quantised(trainer.model.value_model) == "8bit" and quantised(trainer.ref_model) == quantization
    queries, responses, _ = tiny_rollouts()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for _ in range(2):
        trainer.step(queries, responses, trainer.score(queries, responses))
    moved = {name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])}
    assert {name.split(".")[0] for name in moved} == {"policy", "value_model"}


def test_an_8bit_reward_adapter_stays_on_its_base(tmp_path, base):
    classifier = save_reward_adapter(tmp_path / "reward", base, num_labels=1)
    loaded = load_reward_model(str(tmp_path / "reward"), "8bit").eval()
    assert quantised(loaded) == "8bit"
    with torch.no_grad():
        tokens = torch.arange(2, 9)[None]
        assert loaded(tokens).logits.item() == pytest.approx(classifier(tokens).logits.item(), abs=0.5)


# ---- what is trained ----


def test_the_highest_layers_alone_are_trained_and_the_rest_is_shared_with_the_reference(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("gpt_neox"), num_unfrozen_layers=1)
    module, before = trainer.model, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    moved = {name for name, p in module.named_parameters() if not p.equal(before[name])}
    for network in ("policy", "value_model"):
        own = {name for name in moved if name.startswith(network)}
        assert any(".layers.1." in name for name in own)
        assert not any(".layers.0." in name or "embed_in" in name for name in own)
    assert any("policy.gpt_neox.final_layer_norm" in name for name in moved)
    reference = dict(trainer.ref_model.named_parameters())
    shared = {n for n, p in module.policy.named_parameters() if p.data_ptr() == reference[n].data_ptr()}
    assert shared == {name for name, p in module.policy.named_parameters() if not p.requires_grad} != set()


def test_layers_are_frozen_with_a_reference_of_the_callers_too(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(), {"ref_model": tiny_model()}, num_unfrozen_layers=1)
    frozen = {name for name, p in trainer.model.policy.named_parameters() if not p.requires_grad}
    assert any("layers.0" in name for name in frozen) and not any("layers.1" in name for name in frozen)


def test_what_has_no_layers_to_leave_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_unfrozen_layers=3, but model has 2 layers"):
        tiny_trainer(tmp_path, num_unfrozen_layers=3)
    with pytest.raises(ValueError, match="num_unfrozen_layers=2, but value_model has 1 layers"):
        smaller = CONFIGS["gpt2"]()
        smaller.n_layer = 1
        options = {"value_model": AutoModelForCausalLM.from_config(smaller)}
        tiny_trainer(tmp_path, trainer_kwargs=options, num_unfrozen_layers=2)
    with pytest.raises(ValueError, match="model has adapters"):
        tiny_trainer(tmp_path, get_peft_model(tiny_model(), lora_config()), num_unfrozen_layers=1)
    with pytest.raises(ValueError, match="model has two stacks of layers"):
        tiny_trainer(tmp_path, tiny_model("t5"), num_unfrozen_layers=1)
    with pytest.raises(ValueError, match="set the same thing"):
        tiny_trainer(tmp_path, trainer_kwargs={"num_shared_layers": 1}, num_unfrozen_layers=1)
    with pytest.raises(ValueError, match="num_unfrozen_layers=0: it should be greater than 0"):
        tiny_config(tmp_path, num_unfrozen_layers=0)


def test_a_lora_policy_with_a_value_model_of_another_architecture(tmp_path):
    tiny_model("gpt2", seed=3).save_pretrained(tmp_path / "gpt2")
    policy = get_peft_model(tiny_model(), lora_config())
    trainer = tiny_trainer(tmp_path, policy, {"value_model": str(tmp_path / "gpt2")}, gradient_checkpointing=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert {name for name in moved if name.startswith("policy")} == {n for n in before if "lora_" in n}
    assert any("value_model.network.h.0" in name for name in moved)
    trainer.save_pretrained(tmp_path / "saved")
    again = ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    with torch.no_grad():
        assert torch.equal(again(*batch()), trainer.model.value_model(*batch()))


def test_a_value_model_that_does_not_know_the_policys_tokens_is_refused(tmp_path):
    smaller = tiny_model()
    smaller.resize_token_embeddings(16)
    with pytest.raises(ValueError, match="value_model knows 16 token ids; the policy's tokenizer has 32"):
        tiny_trainer(tmp_path, trainer_kwargs={"value_model": smaller})


# ---- merging ----


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_the_merged_policy_is_a_plain_model(tmp_path, base, quantization):
    """Equal to the adapter on the whole base, whatever other adapters lie on it."""
    save_reward_adapter(tmp_path / "reward", base, num_labels=1)
    policy = away_from_identity(load_policy(base, quantization, lora=4))
    options = {"reward_funcs": f"adapter:{tmp_path / 'reward'}"}
    trainer = on_one_base(tmp_path, policy, trainer_kwargs=options)
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    before = learned(trainer)
    trainer.merge_and_save(tmp_path / "merged")
    assert all(torch.equal(weight, before[name]) for name, weight in learned(trainer).items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(merged, PeftModel) and quantised(merged) is None
    trainer.save_pretrained(tmp_path / "saved")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)
    merge_and_save(str(tmp_path / "saved"), tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "again" / "tokenizer.json").is_file() and (tmp_path / "merged" / "tokenizer.json").is_file()


def test_an_adapter_on_a_tied_vocabulary_head_is_merged_into_the_head_alone(tmp_path):
    """Both are one tensor in the base; merged in place, the adapter would change the embeddings too."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = get_peft_model(base, lora_config(target_modules=["q_proj", "lm_head"], ensure_weight_tying=False))
    policy, tokens = away_from_identity(policy), torch.arange(2, 9)[None]
    with pytest.raises(ValueError, match="are tied in the base and in vLLM"):
        check_vllm_can_hold(policy, "server")
    expected = logits(policy)
    assert float((expected - base.base_model.embed_tokens(tokens) @ base.lm_head.weight.T).abs().max()) > 1e-3
    merge_and_save(policy, tmp_path / "merged")
    policy.save_pretrained(tmp_path / "adapter")
    merge_and_save(str(tmp_path / "adapter"), tmp_path / "again", tokenizer=tiny_tokenizer())
    for name in ("merged", "again"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_policy_without_adapters_is_merged_already(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("t5"))
    trainer.merge_and_save(tmp_path / "merged")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
    with pytest.raises(ValueError, match="dtype: the policy has no adapters"):
        trainer.merge_and_save(tmp_path / "merged", dtype=torch.bfloat16)


def test_a_quantised_base_from_nowhere_cannot_be_merged(tmp_path, base):
    policy = load_policy(base, "8bit", lora=4)
    policy.peft_config["default"].base_model_name_or_path = None
    with pytest.raises(ValueError, match="does not say from where"):
        merge_and_save(policy, tmp_path / "merged")
