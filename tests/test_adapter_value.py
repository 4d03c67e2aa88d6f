"""Policy, reference, value and reward model on one base: networks of their own, equal to separate ones."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.test_models import batch, opinionated
from tests.test_training import PROMPTS, StopAt
from tests.test_update import assert_same
from tests.test_value_head import away_from_identity, save_reward_adapter
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.models import ValueModel
from trl_apa.models.adapters import adapter_parameters, only_adapter
from trl_apa.models.value_adapter import VALUE_ADAPTER
from trl_apa.rollout.batch import pad_tokens


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def lora_policy(family="llama", trained=False):
    policy = get_peft_model(tiny_model(family), lora_config())
    return away_from_identity(policy) if trained else policy


def on_one_base(tmp_path, policy=None, value_model="adapter", trainer_kwargs=None, **config):
    policy = lora_policy() if policy is None else policy
    return tiny_trainer(tmp_path, policy, {"value_model": value_model, **(trainer_kwargs or {})}, **config)


def twin_of(separate, tmp_path, policy, **config):
    """A trainer on one base whose value adapter and head start as those of a separate value model."""
    trainer = on_one_base(tmp_path, policy, **config)
    state = get_peft_model_state_dict(separate.model.value_model.network)
    set_peft_model_state_dict(trainer.model.policy, state, adapter_name=VALUE_ADAPTER)
    trainer.model.value_model.head.load_state_dict(separate.model.value_model.head.state_dict())
    return trainer


def learned(trainer):
    """What was trained, under the same names whether the value adapter lies on the policy's base or on its own."""
    module = trainer.model
    on_policy = module.base_is_shared
    network, name = (module.policy, VALUE_ADAPTER) if on_policy else (module.value_model.network, "default")
    return {
        **{f"policy {k}": v.clone() for k, v in get_peft_model_state_dict(module.policy).items()},
        **{f"value {k}": v.clone() for k, v in get_peft_model_state_dict(network, adapter_name=name).items()},
        **{f"head {k}": v.clone() for k, v in module.value_model.head.state_dict().items()},
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"mini_batch_size": 1, "gradient_accumulation_steps": 4},
        {"loss_type": "ppo", "mini_batch_size": 2},
        {"family": "gpt2", "gradient_checkpointing": True},
        {"family": "t5"},
        {"trained": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_the_update_is_that_of_a_separate_value_model(tmp_path, options):
    options = {"ppo_epochs": 2, "vf_coef": 0.5, **options}
    family, trained = options.pop("family", "llama"), options.pop("trained", False)
    separate = tiny_trainer(tmp_path, lora_policy(family, trained), **options)
    opinionated(separate.model.value_model)
    shared = twin_of(separate, tmp_path, lora_policy(family, trained), **options)
    before = learned(shared)
    for name, weight in learned(separate).items():
        assert torch.equal(weight, before[name]), name
    for seed in range(2):
        stats = separate.step(*tiny_rollouts(seed=seed)), shared.step(*tiny_rollouts(seed=seed))
    after = learned(shared)
    assert_same(after, learned(separate), tolerance=1e-5)
    for part in ("policy", "value", "head"):
        assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(part))
    assert stats[0].keys() == stats[1].keys()
    for name in [name for name in stats[0] if not name.startswith("time/")]:
        assert stats[1][name] == pytest.approx(stats[0][name], rel=1e-4, abs=1e-5), name


def gradients(trainer, leave_adapter_before_backward=False):
    """Of both networks, from the sum of their outputs."""
    module, (tokens, width) = trainer.model, batch()
    module.zero_grad()
    for networks in module.passes:
        with module.adapter_for(**networks):
            outputs = module(**tokens, response_width=width, **networks)
            loss = sum(output.sum() for output in outputs.values())
            if not leave_adapter_before_backward:
                loss.backward()
        if leave_adapter_before_backward:
            loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_no_gradient_of_one_network_reaches_the_other(tmp_path):
    trainer = on_one_base(tmp_path, lora_policy(trained=True))
    module, (tokens, width) = opinionated_on_base(trainer), batch()
    for networks, own in zip(module.passes, ("policy", "value"), strict=True):
        module.zero_grad()
        with module.adapter_for(**networks):
            sum(out.sum() for out in module(**tokens, response_width=width, **networks).values()).backward()
        for name, parameters in module.trainable_parameters().items():
            touched = [p for p in parameters if p.grad is not None and p.grad.any()]
            assert len(touched) == (len(parameters) if name == own else 0)
    assert {len(parameters) for parameters in module.trainable_parameters().values()} == {28, 28 + 4}
    with pytest.raises(RuntimeError, match="one after the other"):
        module(**tokens, response_width=width)


def opinionated_on_base(trainer, seed=1):
    torch.manual_seed(seed)
    for name, parameter in adapter_parameters(trainer.model.policy, VALUE_ADAPTER).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    return trainer.model


def test_checkpointing_recomputes_each_layer_with_its_own_adapter(tmp_path):
    """The trap: a backward pass outside the adapter's context gives other gradients, and says nothing."""
    plain = on_one_base(tmp_path, lora_policy(trained=True))
    opinionated_on_base(plain)
    checkpointed = on_one_base(tmp_path, lora_policy(trained=True), gradient_checkpointing=True)
    opinionated_on_base(checkpointed)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.model.train()
    expected = gradients(plain)
    assert_same(gradients(checkpointed), expected, tolerance=1e-6)
    trapped = gradients(checkpointed, leave_adapter_before_backward=True)
    assert not all(name in trapped and torch.allclose(trapped[name], expected[name]) for name in expected)


def test_the_base_is_held_once_and_does_not_move(tmp_path):
    trainer = on_one_base(tmp_path)
    module, base_size = trainer.model, sum(p.numel() for p in tiny_model().parameters())
    adapters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(p.numel() for p in module.parameters()) == base_size + adapters
    assert trainer.ref_model is None
    before = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    trainer.step(*tiny_rollouts())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)


def test_a_trained_adapter_keeps_its_frozen_copy_as_reference(tmp_path):
    trainer = on_one_base(tmp_path, lora_policy(trained=True))
    assert set(trainer.model.policy.peft_config) == {"default", VALUE_ADAPTER, "trl_apa_reference"}
    assert trainer.step(*tiny_rollouts())["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(trainer.step(*tiny_rollouts())["objective/kl"]) > 1e-4
    frozen = adapter_parameters(trainer.model.policy, "trl_apa_reference").values()
    assert frozen and not any(p.requires_grad for p in frozen)


def values(module):
    with torch.no_grad():
        return module(**batch()[0], response_width=batch()[1], with_policy=False)["values"]


def logprobs(module):
    with torch.no_grad():
        return module(**batch()[0], response_width=batch()[1], with_value=False)["logprobs"]


def test_policy_and_value_adapter_come_back(tmp_path, base):
    """The policy by plain peft; the value adapter on another policy's base, or as a value model of its own."""
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config())
    trainer = on_one_base(tmp_path, policy)
    opinionated_on_base(trainer)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "saved")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert list(plain.peft_config) == ["default"]
    expected = get_peft_model_state_dict(trainer.model.policy)
    assert_same(get_peft_model_state_dict(plain), expected, tolerance=1e-30)
    again = APATrainer(
        tiny_config(tmp_path),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", is_trainable=True),
        tokenizer=tiny_tokenizer(),
        value_model=f"adapter:{tmp_path / 'saved' / 'value_model'}",
    )
    assert torch.equal(values(again.model), values(trainer.model))
    assert torch.equal(logprobs(again.model), logprobs(trainer.model))
    alone = ValueModel.from_pretrained(tmp_path / "saved" / "value_model", base_model=tiny_model())
    torch.testing.assert_close(alone(*batch()), values(trainer.model))


def test_a_value_adapter_starts_as_the_reward_model(tmp_path, base):
    classifier = save_reward_adapter(tmp_path / "reward", base, num_labels=1)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config())
    trainer = on_one_base(tmp_path, policy, f"adapter:{tmp_path / 'reward'}")
    query, response, _ = (column[0] for column in tiny_rollouts(1))
    ids = torch.cat([query, response])
    with torch.no_grad():
        expected = [classifier(input_ids=ids[None, :end]).logits[0, 0] for end in range(len(query), len(ids))]
    with torch.no_grad():
        outputs = trainer.model(**pad_tokens([query], [response], 0), response_width=len(response), with_policy=False)
    torch.testing.assert_close(outputs["values"][0], torch.stack(expected))
    before = values(trainer.model)
    trainer.step(*tiny_rollouts())
    assert not torch.equal(values(trainer.model), before)


def test_one_base_serves_all_four_models(tmp_path, base):
    classifier = save_reward_adapter(tmp_path / "reward", base, num_labels=1)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config())
    options = {"reward_funcs": f"adapter:{tmp_path / 'reward'}", "train_dataset": PROMPTS}
    trainer = on_one_base(tmp_path, policy, trainer_kwargs=options, max_steps=2, max_completion_length=4)
    queries, responses, _ = tiny_rollouts()
    with torch.no_grad():
        rows = [torch.cat(row)[None] for row in zip(queries, responses, strict=True)]
        expected = torch.cat([classifier(input_ids=row).logits[:, 0] for row in rows])
    torch.testing.assert_close(torch.stack(trainer.score(queries, responses)), expected)
    reward = {name: p.detach().clone() for name, p in adapter_parameters(policy, "reward_adapter").items()}
    trainer.train()
    assert trainer.state.global_step == 2
    torch.testing.assert_close(torch.stack(trainer.score(queries, responses)), expected)
    assert reward and all(torch.equal(p, reward[n]) for n, p in adapter_parameters(policy, "reward_adapter").items())


def cut_trainer(folder, stop=None):
    config = tiny_config(
        folder,
        mini_batch_size=2,
        ppo_epochs=2,
        max_steps=6,
        max_completion_length=4,
        seed=3,
        gradient_checkpointing=True,
    )
    return APATrainer(
        config,
        lora_policy(),
        tokenizer=tiny_tokenizer(),
        train_dataset=PROMPTS,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        value_model="adapter",
        callbacks=[] if stop is None else [StopAt(stop)],
    )


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = cut_trainer(tmp_path / "whole")
    whole.train()
    cut_trainer(tmp_path / "cut", stop=3).train()
    again = cut_trainer(tmp_path / "cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same(learned(again), learned(whole), tolerance=1e-30)


@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_quantised_base(tmp_path, base, bits):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    policy = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    trainer = on_one_base(tmp_path, policy, trainer_kwargs={"peft_config": lora_config()}, gradient_checkpointing=True)
    before = learned(trainer)
    # Policy and reference go through the same kernels from the first step on.
    assert abs(trainer.step(*tiny_rollouts())["objective/kl"]) < 1e-7
    trainer.step(*tiny_rollouts())
    after = learned(trainer)
    moved = {name.split()[0] for name in before if not torch.equal(after[name], before[name])}
    assert moved == {"policy", "value", "head"}
    assert len(trainer.generate(tiny_rollouts()[0], return_prompt=False, max_new_tokens=3)) == 4


def test_bfloat16_autocast_stays_near_float32(tmp_path):
    results = []
    for bf16 in (False, True):
        trainer = on_one_base(tmp_path, lora_policy(trained=True), bf16=bf16, learning_rate=1e-3, optim="sgd")
        stats = trainer.step(*tiny_rollouts())
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        results.append((stats["apa/grad_norm/policy"], stats["apa/loss/value"], stats["apa/loss/policy"]))
    assert results[1] == pytest.approx(results[0], rel=0.05)
    assert results[1] != results[0]


def test_the_value_adapter_has_a_learning_rate_of_its_own(tmp_path):
    trainer = on_one_base(tmp_path, value_learning_rate=0.5)
    module = trainer.model
    rate_of = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(p)] for p in module.trainable_parameters()["policy"]} == {1e-2}
    assert {rate_of[id(p)] for p in module.trainable_parameters()["value"]} == {0.5}


def test_a_callers_optimizer_also_trains_the_value_adapter(tmp_path):
    policy = lora_policy()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    trainer = on_one_base(tmp_path, policy, trainer_kwargs={"optimizer": optimizer})
    before = learned(trainer)
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    moved = {name.split()[0] for name, weight in learned(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {"policy", "value", "head"}


def test_an_adapter_that_computes_inside_leaves_the_others_as_they_were():
    policy = lora_policy(trained=True)
    policy.add_adapter("other", lora_config())
    away_from_identity(policy, seed=5)
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    ids = torch.arange(2, 9)[None]
    outputs = [policy(ids).logits]
    for name in ("other", None):
        with only_adapter(policy, name):
            outputs.append(policy(ids).logits)
        with pytest.raises(KeyError), only_adapter(policy, name):
            raise KeyError
        assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
        assert policy.active_adapter == "default" and torch.equal(policy(ids).logits, outputs[0])
    assert not torch.equal(outputs[1], outputs[0]) and not torch.equal(outputs[2], outputs[0])
    torch.testing.assert_close(outputs[2], tiny_model()(ids).logits)


SWITCHED_BY_PEFT = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("options", [{}, SWITCHED_BY_PEFT], ids=["flags", "peft"])
def test_switching_adapters_computes_what_peft_s_own_switch_does(options):
    """Nested, on a policy whose adapter is replaced by one on other layers, and with two active together."""
    policy = get_peft_model(tiny_model(), lora_config(**options))
    policy.add_adapter("other", lora_config(**options))
    away_from_identity(policy, seed=5)
    ids = torch.arange(2, 9)[None]

    def by_peft(name):
        twin = copy.deepcopy(policy)
        if name is None:
            with twin.disable_adapter():
                return twin(ids).logits
        twin.set_adapter(name)
        return twin(ids).logits

    def agree(*names):
        for name in names:
            expected = by_peft(name)
            with only_adapter(policy, name):
                assert torch.equal(policy(ids).logits, expected), name
                for inner in names:
                    expected_inner = by_peft(inner)
                    with only_adapter(policy, inner):
                        if name is not None:
                            assert torch.equal(policy(ids).logits, expected_inner), (name, inner)
                assert torch.equal(policy(ids).logits, expected), name

    with torch.no_grad():
        agree("default", "other", None)
        policy.delete_adapter("other")  # and one of the same name on other layers
        policy.add_adapter("other", lora_config(target_modules=["v_proj", "down_proj"], r=2))
        away_from_identity(policy, seed=6)
        agree("default", "other", None)
        before = policy(ids).logits
        policy.base_model.set_adapter(["default", "other"])
        together = policy(ids).logits
        with only_adapter(policy, "other"):
            pass
        assert torch.equal(policy(ids).logits, together) and not torch.equal(together, before)


def test_an_adapter_that_is_not_there_is_refused_and_nothing_is_switched():
    policy = lora_policy(trained=True)
    ids = torch.arange(2, 9)[None]
    expected = policy(ids).logits
    with pytest.raises(ValueError, match="missing"), only_adapter(policy, "missing"):
        pass
    assert policy.active_adapter == "default" and torch.equal(policy(ids).logits, expected)


def test_set_ups_in_which_one_base_cannot_serve_are_refused(tmp_path, base):
    with pytest.raises(ValueError, match="needs a policy with adapters"):
        on_one_base(tmp_path, tiny_model())
    with pytest.raises(ValueError, match="trains more than its adapter"):
        on_one_base(tmp_path, get_peft_model(tiny_model("gpt2"), lora_config(bias="lora_only")))
    policy = lora_policy()
    on_one_base(tmp_path, policy)
    with pytest.raises(ValueError, match="belongs to another trainer"):
        on_one_base(tmp_path, policy)
    save_reward_adapter(tmp_path / "two", base, num_labels=2)
    save_reward_adapter(tmp_path / "one", base, num_labels=1)
    scored = lora_policy()
    with pytest.raises(ValueError, match="has 2 labels; it should have one"):
        on_one_base(tmp_path, value_model=f"adapter:{tmp_path / 'two'}")
    with pytest.raises(ValueError, match="has 2 labels; it should have one"):
        on_one_base(tmp_path, trainer_kwargs={"reward_funcs": f"adapter:{tmp_path / 'two'}"})
    with pytest.raises(ValueError, match=r"reward_funcs='adapter:.*' needs a PEFT policy"):
        tiny_trainer(tmp_path, trainer_kwargs={"reward_funcs": f"adapter:{tmp_path / 'two'}"})
    with pytest.raises(ValueError, match=r"reward_funcs='adapter:.*first call its delete_adapter"):
        for _ in range(2):
            tiny_trainer(tmp_path, scored, trainer_kwargs={"reward_funcs": f"adapter:{tmp_path / 'one'}"})
    with pytest.raises(ValueError, match="the policy has no reward adapter"):
        on_one_base(tmp_path, trainer_kwargs={"reward_funcs": "adapter"})
    lora_policy("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="no score"):
        on_one_base(tmp_path, value_model=f"adapter:{tmp_path / 'gpt2'}")
    tiny_model("gpt2").save_pretrained(tmp_path / "other-base")
    save_reward_adapter(tmp_path / "misfit", str(tmp_path / "other-base"), num_labels=1)
    with pytest.raises(ValueError, match="does not fit the policy's base"):
        on_one_base(tmp_path, value_model=f"adapter:{tmp_path / 'misfit'}")
