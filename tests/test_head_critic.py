"""`value_model="head"`: classic's critic, a linear head on the policy's own hidden states."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from tests.test_update import assert_same, row_advantages, row_logprobs
from tests.tiny import FAMILIES, lora_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import AutoModelForCausalLMWithValueHead
from trl_apa.models import ValueModel
from trl_apa.rollout.batch import pad_tokens


def wrapped(family="llama", seed=3, **kwargs):
    torch.manual_seed(seed)
    model = tiny_model(family, **kwargs)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="normal")


def head_trainer(tmp_path, wrapper, **config):
    return tiny_trainer(tmp_path, wrapper, {"value_model": "head"}, **config)


def row_values(wrapper, query, response):
    return wrapper(input_ids=torch.cat([query, response])[None])[2][0, len(query) - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_wrapper(tmp_path, family):
    wrapper = wrapped(family)
    trainer = head_trainer(tmp_path, wrapper)
    queries, responses, _ = tiny_rollouts()
    width = max(len(r) for r in responses)
    with torch.no_grad():
        values_BR = trainer.model(**pad_tokens(queries, responses, 0), response_width=width, with_policy=False)[
            "values"
        ]
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            torch.testing.assert_close(values_BR[row, : len(response)], row_values(wrapper, query, response))


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_step_equals_a_plain_autograd_script_in_which_one_network_serves_both(tmp_path, loss_type):
    """Row by row in float64: what is left is the float32 in which advantages are kept."""
    wrapper = wrapped(dtype=torch.float64)
    wrapper.v_head.double()
    options = {"optim": "sgd", "learning_rate": 0.05, "vf_coef": 0.5, "ppo_epochs": 2, "mini_batch_size": 2}
    trainer = head_trainer(
        tmp_path, wrapper, loss_type=loss_type, gradient_accumulation_steps=2, max_grad_norm=0.0, **options
    )
    mine, config, (queries, responses, scores) = copy.deepcopy(wrapper), trainer.config, tiny_rollouts()
    reference, rows = copy.deepcopy(mine.pretrained_model), range(len(queries))
    with torch.no_grad():
        ref_logprobs = [row_logprobs(reference, queries[i], responses[i], 1.0) for i in rows]
        old_values = [row_values(mine, queries[i], responses[i]) for i in rows]
    raw = []
    for i in rows:
        rewards = [0.0] * (len(responses[i]) - 1) + [float(scores[i])]
        raw.append(torch.tensor(row_advantages(rewards, old_values[i].tolist(), [True] * len(rewards), 1.0, 0.95)))
    flat = torch.cat(raw)
    returns = [raw[i] + old_values[i] for i in rows]
    advantages = [(row - flat.mean()) / (flat.var() + 1e-8).sqrt() for row in raw]
    optimizer = torch.optim.SGD(mine.parameters(), lr=config.learning_rate)
    for _ in range(2):
        loss = 0.0
        for i in rows:
            logprobs = row_logprobs(mine.pretrained_model, queries[i], responses[i], 1.0)
            if loss_type == "apa":
                terms = (logprobs - ref_logprobs[i] - advantages[i] / config.kl_coef) ** 2
            else:
                ratio = torch.exp(logprobs - ref_logprobs[i])
                terms = -torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
            values = row_values(mine, queries[i], responses[i])
            loss = loss + (terms + config.vf_coef * 0.5 * (values - returns[i]) ** 2).sum()
        (loss / len(flat)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = dict(copy.deepcopy(wrapper).named_parameters())
    trainer.step(queries, responses, scores)
    actual = dict(wrapper.named_parameters())
    assert float((actual["v_head.summary.weight"] - before["v_head.summary.weight"]).detach().abs().max()) > 1e-3
    assert_same(actual, dict(mine.named_parameters()), tolerance=1e-7)


def test_the_value_loss_moves_the_policys_trunk(tmp_path):
    """With a policy loss of weight zero in effect (equal scores, lambda huge) only the critic's gradient is left."""
    trainer = head_trainer(tmp_path, wrapped(), kl_coef=1e12, whiten_advantages=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = dict(trainer.model.policy.named_parameters())[name].detach().clone()
    trainer.step(*tiny_rollouts())
    assert not dict(trainer.model.policy.named_parameters())[name].equal(before)
    own = tiny_trainer(tmp_path, wrapped(), kl_coef=1e12, whiten_advantages=False)
    assert isinstance(own.model.value_model, ValueModel)
    before = dict(own.model.policy.named_parameters())[name].detach().clone()
    own.step(*tiny_rollouts())
    assert float((dict(own.model.policy.named_parameters())[name] - before).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_head_are_saved_side_by_side_and_come_back(tmp_path, lora):
    tiny_model().save_pretrained(tmp_path / "base")
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tmp_path / "base"), peft_config=lora_config() if lora else None, v_head_init_strategy="normal"
    )
    trainer = head_trainer(tmp_path, wrapper)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "v_head.safetensors")) == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    assert not (tmp_path / "saved" / "value_model").exists()
    # The wrapper in the script's hands is what was trained; what it writes itself is the same.
    wrapper.save_pretrained(tmp_path / "by_wrapper")
    ids = torch.arange(2, 8)[None]
    expected = [tensor.detach() for tensor in wrapper(input_ids=ids)[::2]]
    for folder in ("saved", "by_wrapper"):
        again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / folder), is_trainable=True).eval()
        for tensor, wanted in zip(again(input_ids=ids)[::2], expected, strict=True):
            torch.testing.assert_close(tensor.detach(), wanted)
    by_name = head_trainer(tmp_path, str(tmp_path / "saved"))
    assert by_name.is_peft_model == lora
    assert by_name.model.value_model.head.summary.weight.equal(wrapper.v_head.summary.weight)
    if lora:
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_plain_model_gets_a_head(tmp_path):
    trainer = head_trainer(tmp_path, tiny_model("opt"), gradient_checkpointing=True)
    head = trainer.model.value_model.head
    assert head.summary.in_features == 8
    before = head.summary.weight.detach().clone()
    trainer.step(*tiny_rollouts())
    assert not head.summary.weight.equal(before) and not head.dropout.training


def test_gradient_checkpointing_and_a_rate_of_its_own_change_nothing_else(tmp_path):
    results = []
    for options in ({}, {"gradient_checkpointing": True}, {"value_learning_rate": 0.05}):
        wrapper = wrapped()
        head_trainer(tmp_path, wrapper, optim="sgd", learning_rate=0.05, **options).step(*tiny_rollouts())
        results.append(dict(wrapper.named_parameters()))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_a_classic_optimizer_over_the_wrapper_trains_the_head(tmp_path):
    wrapper = wrapped()
    optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, wrapper.parameters()), lr=0.05)
    before = wrapper.v_head.summary.weight.detach().clone()
    trainer = tiny_trainer(tmp_path, wrapper, {"value_model": "head", "optimizer": optimizer})
    trainer.step(*tiny_rollouts())
    assert not wrapper.v_head.summary.weight.equal(before)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})


def test_a_rate_for_values_that_the_callers_optimizer_holds_already_is_refused(tmp_path):
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model())
    kwargs = {"value_model": "head", "optimizer": torch.optim.SGD(wrapper.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match="optimizer holds the value model's parameters already"):
        tiny_trainer(tmp_path, wrapper, kwargs, value_learning_rate=0.2)


def test_the_full_kl_penalty_is_the_exact_sum_over_the_vocabulary(tmp_path):
    """Against a loop over the positions; the reference is another model, so that the KL is not zero."""
    options = {"loss_type": "ppo", "kl_penalty": "full", "init_kl_coef": 0.3, "temperature": 0.7}
    other = tiny_model(seed=9).requires_grad_(False)
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"ref_model": other}, mini_batch_size=2, **options)
    queries, responses, scores = tiny_rollouts()
    rollouts, _ = trainer._collect(queries, responses, scores, None)
    trainer._prepare_for_updates()
    trainer._evaluate_rollouts(rollouts)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids = torch.cat([query, response])[None]
        with torch.no_grad():
            both = [
                model(input_ids=ids).logits[0, len(query) - 1 : -1] / 0.7 for model in (trainer.model.policy, other)
            ]
        log_pi, log_ref = (logits.log_softmax(-1) for logits in both)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)
        torch.testing.assert_close(rollouts.kl_penalty_BR[row, : len(response)], kl, rtol=1e-4, atol=1e-5)
    mask = rollouts.response_mask_BR
    stats = trainer.step(queries, responses, scores)
    assert stats["apa/mean_non_score_reward"] == pytest.approx(
        -0.3 * float(rollouts.kl_penalty_BR[mask].mean()), rel=1e-4
    )
