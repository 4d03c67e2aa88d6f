"""Scripts for TRL <= 0.11 that override the trainer's methods, call its stages, or call its models as wrappers."""

import copy
import itertools
import os
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.utils import PushToHubMixin

from tests.test_adapter_value import learned, lora_policy
from tests.test_encoder_decoder import decoder_values
from tests.test_models import reward_model
from tests.test_training import PROMPTS
from tests.test_update import assert_same, row_advantages, row_logprobs, row_outputs, row_values
from tests.test_value_head import away_from_identity
from tests.tiny import (
    ENCODER_DECODERS,
    PAD,
    START,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
)
from trl_apa import (
    APATrainer,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOTrainer,
)
from trl_apa.classic.core import masked_mean
from trl_apa.classic.hooks import CALLED, INSTEAD
from trl_apa.models import reference_policy
from trl_apa.models.adapters import only_adapter
from trl_apa.models.logprobs import last_hidden_states
from trl_apa.models.network_identity import identity_of
from trl_apa.models.value_adapter import VALUE_ADAPTER


OPTIONS = {
    "loss_type": "ppo",
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "ppo_epochs": 2,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "init_kl_coef": 0.3,
    "adap_kl_ctrl": False,
    "vf_coef": 0.5,
}


def make(tmp_path, cls=PPOTrainer, model=None, trainer_kwargs=None, **config):
    """A trainer whose reference is another model, so that the KL is not 0 at the first step."""
    kwargs = {"ref_model": tiny_model(seed=1, dtype=torch.float64), **(trainer_kwargs or {})}
    model = tiny_model(dtype=torch.float64) if model is None else model
    trainer = cls(tiny_config(tmp_path, **{**OPTIONS, **config}), model, tokenizer=tiny_tokenizer(), **kwargs)
    head = getattr(trainer.model.value_model, "head", None)
    if head is not None and hasattr(head, "out"):
        torch.manual_seed(1)
        torch.nn.init.normal_(head.out.weight)
        head.to(trainer.model.dtype)
    return trainer


# ---- overrides, and the same in a plain script ----


def rewards_row_by_row(self, scores, logprobs, ref_logprobs, masks):
    """As scripts copied it from classic, with a reward for each token."""
    rewards, non_score_rewards, kls = [], [], []
    for score, logprob, ref_logprob, mask in zip(scores, logprobs, ref_logprobs, masks, strict=True):
        kl = self._kl_penalty(logprob, ref_logprob)
        non_score_reward = -self.kl_ctl.value * kl + 0.25
        reward = non_score_reward.clone()
        reward[mask.nonzero()[-1]] += score
        for kept, value in zip((rewards, non_score_rewards, kls), (reward, non_score_reward, kl), strict=True):
            kept.append(value)
    return torch.stack(rewards), torch.stack(non_score_rewards), torch.stack(kls)


def twice_k3(self, logprob, ref_logprob):
    assert logprob.dim() == 1
    return 2 * (torch.expm1(ref_logprob - logprob) + logprob - ref_logprob)


def milder_advantages(self, values, rewards, mask):
    values, advantages, returns = APATrainer.compute_advantages(self, values, rewards, mask)
    return values + 0.125 * mask, 0.5 * advantages, returns + 0.25 * mask


def loss_with_entropy(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
    policy, value, stats = APATrainer.loss(
        self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
    )
    distribution = logits.log_softmax(-1)
    entropy = masked_mean(-(distribution.exp() * distribution).sum(-1), mask)
    stats["policy/bonus"] = entropy.detach()
    return policy - entropy, value, stats


OVERRIDES = {
    "compute_rewards": rewards_row_by_row,
    "_kl_penalty": twice_k3,
    "compute_advantages": milder_advantages,
    "loss": loss_with_entropy,
}


def plain_step(trainer, queries, responses, scores, changed):
    """One step in float64, row by row, with what the override of `changed` does; returns the parameters after it."""
    config, rows = trainer.config, range(len(queries))
    policy, value_model = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model)
    with torch.no_grad(), reference_policy(trainer.model.policy, trainer.ref_model) as reference:
        ref = [row_logprobs(reference, queries[i], responses[i], 1.0) for i in rows]
        old = [row_logprobs(policy, queries[i], responses[i], 1.0) for i in rows]
        old_values = [row_values(value_model, queries[i], responses[i]) for i in rows]
    raw = []
    for i in rows:
        x = old[i] - ref[i]
        rewards = -config.kl_coef * (2 * (torch.expm1(-x) + x) if changed == "_kl_penalty" else x)
        rewards = rewards + (0.25 if changed == "compute_rewards" else 0.0)
        rewards[-1] += scores[i]
        raw.append(torch.tensor(row_advantages(rewards.tolist(), old_values[i].tolist(), [True] * len(x), 1.0, 0.95)))
    flat, milder = torch.cat(raw), changed == "compute_advantages"
    returns = [raw[i] + old_values[i] + 0.25 * milder for i in rows]
    old_values = [values + 0.125 * milder for values in old_values]
    advantages = [(row - flat.mean()) / (flat.var() + 1e-8).sqrt() * (0.5 if milder else 1.0) for row in raw]
    optimizer = torch.optim.SGD([*policy.parameters(), *value_model.parameters()], lr=config.learning_rate)
    for _ in range(config.ppo_epochs):
        loss = 0.0
        for i in rows:
            ratio = torch.exp(row_logprobs(policy, queries[i], responses[i], 1.0) - old[i])
            loss = loss - torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i]).sum()
            values = row_values(value_model, queries[i], responses[i])
            error = (values - returns[i]) ** 2
            if config.cliprange_value is not None:
                clip = config.cliprange_value
                clipped = values.clamp(old_values[i] - clip, old_values[i] + clip)
                error = torch.maximum(error, (clipped - returns[i]) ** 2)
            loss = loss + config.vf_coef * 0.5 * error.sum()
            if changed == "loss":
                logits = row_outputs(policy, queries[i], responses[i])
                distribution = logits.log_softmax(-1)
                loss = loss + (distribution.exp() * distribution).sum()
        (loss / len(flat)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        **{f"policy.{name}": p.detach() for name, p in policy.named_parameters()},
        **{f"value_model.{name}": p.detach() for name, p in value_model.named_parameters()},
    }


def with_override(tmp_path, monkeypatch, name, override, how, **kwargs):
    if how == "subclass":
        return make(tmp_path, type("Mine", (PPOTrainer,), {name: override}), **kwargs)
    if how == "mixin":
        return make(tmp_path, type("Mine", (type("Mixin", (), {name: override}), PPOTrainer), {}), **kwargs)
    if how == "patched":
        monkeypatch.setattr(PPOTrainer, name, override, raising=False)
        return make(tmp_path, **kwargs)
    trainer = make(tmp_path, **kwargs)
    setattr(trainer, name, types.MethodType(override, trainer))
    return trainer


@pytest.mark.parametrize("how", ["subclass", "instance"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_is_in_the_update(tmp_path, monkeypatch, name, how):
    trainer = with_override(tmp_path, monkeypatch, name, OVERRIDES[name], how, cliprange_value=0.2)
    rollouts = tiny_rollouts()
    expected, unchanged = plain_step(trainer, *rollouts, name), plain_step(trainer, *rollouts, None)
    stats = trainer.step(*rollouts)
    actual = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert_same(actual, expected, tolerance=2e-7)
    assert max(float((unchanged[n] - expected[n]).abs().max()) for n in expected) > 1e-3
    if name == "loss":
        assert stats["apa/policy/bonus"] > 0.1
        assert stats["apa/loss/total"] == pytest.approx(
            stats["apa/loss/policy"] + 0.5 * stats["apa/loss/value"], abs=1e-6
        )


@pytest.mark.parametrize("how", ["mixin", "patched"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_by_a_mixin_or_a_patch_of_the_class_is_called_too(tmp_path, monkeypatch, name, how):
    seen = []

    def override(self, *args):
        seen.append(name)
        return OVERRIDES[name](self, *args)

    trainer = with_override(tmp_path, monkeypatch, name, override, how)
    trainer.step(*tiny_rollouts())
    assert seen


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_overrides_that_change_nothing_change_nothing(tmp_path, loss_type):
    """In APA, too, whose loss reads log pi_init, which classic's arguments do not have."""

    class Mine(APATrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            return super().compute_rewards(scores, logprobs, ref_logprobs, masks)

        def compute_advantages(self, values, rewards, mask):
            return super().compute_advantages(values, rewards, mask)

        def loss(self, *args):
            return super().loss(*args)

        def record_step_stats(self, kl_coef, **data):
            return super().record_step_stats(kl_coef, **data)

    options = {"loss_type": loss_type, "score_clip": 0.5, "scale_rewards": True}
    if loss_type != "ppo":
        options |= {"init_kl_coef": None, "kl_coef": 1.0, "adap_kl_ctrl": None}
    trainers = [make(tmp_path, cls, **options) for cls in (Mine, APATrainer)]
    for seed in range(2):
        stats = [trainer.step(*tiny_rollouts(seed=seed)) for trainer in trainers]
    assert_same(*(dict(trainer.model.named_parameters()) for trainer in trainers), tolerance=1e-6)
    mine, plain = stats
    assert plain.keys() <= mine.keys()
    for name in ("loss/total", "policy/advantages_mean", "val/var_explained", "returns/var", "mean_non_score_reward"):
        assert mine[f"apa/{name}"] == pytest.approx(plain[f"apa/{name}"], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_networks_on_one_base_an_override_of_the_loss_is_as_with_separate_ones(tmp_path, checkpointing):
    """Policy and value model are trained in a pass each; the override ties them together, so that both matter."""

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        policy, value, stats = loss_with_entropy(
            self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        return policy + 0.5 * masked_mean(logprobs * vpreds, mask), value, stats

    mine, options = type("Mine", (APATrainer,), {"loss": loss}), {**OPTIONS, "gradient_checkpointing": checkpointing}
    separate = mine(tiny_config(tmp_path, **options), lora_policy(trained=True), tokenizer=tiny_tokenizer())
    separate.model.value_model.head.load_state_dict(new_head(separate).state_dict())
    twin = mine(
        tiny_config(tmp_path, **options), lora_policy(trained=True), tokenizer=tiny_tokenizer(), value_model="adapter"
    )
    state = get_peft_model_state_dict(separate.model.value_model.network)
    set_peft_model_state_dict(twin.model.policy, state, adapter_name=VALUE_ADAPTER)
    twin.model.value_model.head.load_state_dict(separate.model.value_model.head.state_dict())
    before = learned(separate)
    assert_same(learned(twin), before)
    stats = [trainer.step(*tiny_rollouts()) for trainer in (separate, twin)]
    assert_same(learned(twin), learned(separate), tolerance=1e-5)
    assert max(float((learned(twin)[name] - before[name]).abs().max()) for name in before) > 1e-3
    for name in ("loss/policy", "loss/value", "loss/total", "policy/bonus", "policy/entropy", "val/error"):
        assert stats[0][f"apa/{name}"] == pytest.approx(stats[1][f"apa/{name}"], rel=1e-4, abs=1e-5), name


def new_head(trainer):
    """A head like the value model's that is not zero."""
    head = copy.deepcopy(trainer.model.value_model.head)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.out.weight)
    return head


def test_what_overrides_are_given(tmp_path):
    """Scores as they enter the rewards; masks of numbers; keyword arguments of record_step_stats."""
    seen = {}

    class Mine(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            seen["rewards"] = (scores, logprobs, ref_logprobs, masks)
            return super().compute_rewards(scores, logprobs, ref_logprobs, masks)

        def loss(self, *args):
            seen["loss"] = dict(zip(CALLED["loss"], args, strict=True))
            return super().loss(*args)

        def record_step_stats(self, kl_coef, **data):
            seen["stats"] = {"kl_coef": kl_coef, **data}
            return {**super().record_step_stats(kl_coef, **data), "my/number": torch.tensor(3.0), "objective/kl": 7.0}

    trainer = make(tmp_path, Mine, score_clip=0.5, adap_kl_ctrl=True, target=1.0, horizon=1000)
    queries, responses, scores = tiny_rollouts()
    masks = [torch.ones_like(response) for response in responses]
    longest = max(range(4), key=lambda row: len(responses[row]))
    masks[longest][1] = 0
    stats = trainer.step(queries, responses, scores, masks)
    given_scores, logprobs, _, given_masks = seen["rewards"]
    torch.testing.assert_close(given_scores, torch.stack(scores).clamp(-0.5, 0.5))
    width = max(len(response) for response in responses)
    assert logprobs.shape == given_masks.shape == (4, width) and given_masks.dtype == torch.int64
    assert [row[: len(mask)].tolist() for row, mask in zip(given_masks, masks, strict=True)] == [
        mask.tolist() for mask in masks
    ]
    assert seen["loss"]["logits"].shape[-1] == 32 and seen["loss"]["logits"].requires_grad
    assert seen["loss"]["vpreds"].requires_grad and not seen["loss"]["old_logprobs"].requires_grad
    data = seen["stats"]
    assert data["kl_coef"] == pytest.approx(0.3) and len(data["queries"]) == len(data["responses"]) == 4
    torch.testing.assert_close(data["scores"], given_scores)
    torch.testing.assert_close(data["non_score_reward"], -0.3 * data["kls"])
    assert {"loss/total", "policy/ratio", "returns/var", "val/error"} <= data["train_stats"].keys()
    assert stats["my/number"] == 3.0 and isinstance(stats["my/number"], float)
    # Of the override's KL the controller learns, as in classic.
    assert stats["objective/kl"] == 7.0 and trainer.kl_ctl.value == pytest.approx(0.3 * (1 + 0.2 * 4 / 1000))


def test_full_distributions_are_given_for_the_full_kl(tmp_path):
    shapes = []

    class Mine(PPOTrainer):
        def _kl_penalty(self, logprob, ref_logprob):
            shapes.append(tuple(logprob.shape))
            assert torch.allclose(logprob[0].exp().sum(), torch.ones(()))
            return super()._kl_penalty(logprob, ref_logprob)

    mine, plain = make(tmp_path, Mine, kl_penalty="full"), make(tmp_path, kl_penalty="full")
    rollouts = tiny_rollouts()
    kls = [trainer.step(*rollouts)["objective/kl"] for trainer in (mine, plain)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)
    assert shapes == [(max(len(r) for r in rollouts[1]), 32)] * 4
    assert_same(dict(mine.model.named_parameters()), dict(plain.model.named_parameters()), tolerance=1e-6)


def test_rewards_without_a_kl_among_them_are_those_of_older_versions(tmp_path):
    def two(self, *args):
        return PPOTrainer.compute_rewards(self, *args)[:2]

    mine, plain = make(tmp_path, type("Mine", (PPOTrainer,), {"compute_rewards": two})), make(tmp_path)
    kls = [trainer.step(*tiny_rollouts())["objective/kl"] for trainer in (mine, plain)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)


@pytest.mark.parametrize("name", ["compute_rewards", "compute_advantages", "loss", "record_step_stats"])
def test_a_wrong_result_is_an_error_that_names_the_method(tmp_path, name):
    trainer = make(tmp_path, type("Mine", (PPOTrainer,), {name: lambda self, *args, **kwargs: torch.zeros(())}))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=name):
        trainer.step(*tiny_rollouts())
    if name != "record_step_stats":
        assert_same(dict(trainer.model.named_parameters()), before, tolerance=1e-12)


def test_overrides_are_called_in_train_too(tmp_path):
    """Rows that were not scored are left out of what they get; rewards of tokens are refused."""
    seen = []

    class Mine(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
            seen.append(scores.tolist())
            assert masks.any(dim=1).all()
            return super().compute_rewards(scores, logprobs, ref_logprobs, masks)

    def score(prompts, completions, completion_ids, **columns):
        return [None if row == 1 else float(row) for row in range(len(completions))]

    data = {"train_dataset": PROMPTS, "reward_funcs": score}
    options = {"max_completion_length": 4, "max_steps": 2, "skip_unscored": True, "save_strategy": "no"}
    trainer = make(tmp_path, Mine, trainer_kwargs=data, **options)
    trainer.train()
    assert seen == [[0.0, 2.0, 3.0]]

    def score_tokens(prompts, completions, completion_ids, **columns):
        return [[1.0] * len(ids) for ids in completion_ids]

    trainer = make(tmp_path, Mine, trainer_kwargs={**data, "reward_funcs": score_tokens}, **options)
    with pytest.raises(ValueError, match="compute_rewards"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_without_an_override_nothing_more_is_computed(tmp_path, loss_type, monkeypatch):
    options = {} if loss_type == "ppo" else {"init_kl_coef": None, "adap_kl_ctrl": None, "kl_coef": 0.3}
    trainer = make(tmp_path, loss_type=loss_type, **options)
    asked = []
    original = trainer.model.response_outputs

    def counted(**inputs):
        asked.append({name: inputs.get(name, False) for name in ("with_policy", "with_logits", "with_entropy")})
        return original(**inputs)

    monkeypatch.setattr(trainer.model, "response_outputs", counted)
    trainer.step(*tiny_rollouts())
    assert len(asked) == 2 + 4 and not any(call["with_logits"] for call in asked)
    assert [call["with_policy"] for call in asked[:2]] == [loss_type == "ppo"] * 2


# ---- overrides that are never called ----


@pytest.mark.parametrize("base", [APATrainer, PPOTrainer])
@pytest.mark.parametrize("name", INSTEAD)
def test_an_override_that_would_be_ignored_is_an_error(name, base):
    def override(self, *args, **kwargs):
        return None

    for bases, body in (((base,), {name: override}), ((type("Mixin", (), {name: override}), base), {})):
        with pytest.raises(TypeError, match=f"{name} is overridden") as raised:
            type("Mine", bases, body)
        assert INSTEAD[name] in str(raised.value)
    for kind in (staticmethod(override), property(override)):
        with pytest.raises(TypeError, match=name):
            type("Mine", (base,), {name: kind})
    type("Other", (base,), {"my_own_method": override})


def test_so_it_is_on_the_instance_or_the_class_before_anything_is_trained(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name in sorted(set(INSTEAD) - {"optional_peft_ctx", "model_params"}):  # which have no setter
        setattr(trainer, name, lambda *args: None)
        with pytest.raises(TypeError, match=f"trainer.{name} is overridden"):
            trainer.step(*tiny_rollouts())
        delattr(trainer, name)
        with monkeypatch.context() as patched:
            patched.setattr(PPOTrainer, name, lambda self, *args: None, raising=False)
            with pytest.raises(TypeError, match=f"PPOTrainer.{name} is overridden"):
                trainer.step(*tiny_rollouts())
    assert_same(dict(trainer.model.named_parameters()), before, tolerance=1e-12)
    monkeypatch.setattr(PPOTrainer, "train_minibatch", lambda self, *args: None, raising=False)
    with pytest.raises(TypeError, match="train_minibatch"):
        make(tmp_path)


def test_an_override_with_the_arguments_of_another_version_is_an_error(tmp_path):
    with pytest.raises(TypeError, match=r"loss.*it should take \(old_logprobs, values, logits"):

        class OfTRL04(PPOTrainer):
            def loss(self, old_logprobs, values, rewards, logits, vpreds, logprobs, mask):
                return None

    with pytest.raises(TypeError, match="compute_advantages"):

        class NoMask(PPOTrainer):
            def compute_advantages(self, values, rewards):
                return None

    with pytest.raises(TypeError, match=r"record_step_stats.*\(kl_coef, \*\*data\)"):

        class NoData(PPOTrainer):
            def record_step_stats(self, kl_coef, scores):
                return None

    class OtherNames(PPOTrainer):
        @staticmethod
        def _kl_penalty(a, b):
            return a - b

        def compute_rewards(self, *tensors, extra=1):
            return None

    trainer = make(tmp_path)
    trainer.loss = lambda old_logprobs: None
    with pytest.raises(TypeError, match="loss"):
        trainer.step(*tiny_rollouts())


def test_an_override_that_has_no_place_in_the_algorithm_is_an_error(tmp_path):
    mine = type("Mine", (APATrainer,), {"_kl_penalty": twice_k3})
    options = {"loss_type": "apa", "init_kl_coef": None, "adap_kl_ctrl": None, "kl_coef": 0.3}
    with pytest.raises(ValueError, match="_kl_penalty is overridden, but with loss_type='apa'"):
        make(tmp_path, mine, **options)
    # With rewards of its own that read it, it has one.
    both = type("Both", (mine,), {"compute_rewards": rewards_row_by_row})
    stats = make(tmp_path, both, **options).step(*tiny_rollouts())
    assert stats["apa/mean_non_score_reward"] != 0.0


def test_a_step_copied_from_classic_is_told_what_is_missing(tmp_path):
    class Mine(PPOTrainer):
        def step(self, queries, responses, scores):
            return self.train_minibatch()

    trainer = make(tmp_path, Mine)
    with pytest.raises(AttributeError, match=r"train_minibatch\. Instead, override loss"):
        trainer.step(*tiny_rollouts())
    assert not hasattr(trainer, "_early_stop") and not hasattr(trainer, "no_such_name")


def test_the_checks_of_step_can_be_called(tmp_path):
    trainer, (queries, responses, scores) = make(tmp_path), tiny_rollouts()
    masks = [torch.ones_like(response) for response in responses]
    checked = trainer._step_safety_checker(4, queries, responses, [score.reshape(1) for score in scores], masks)
    assert all(torch.equal(a, b) for a, b in zip(checked[0] + checked[1], queries + responses, strict=True))
    assert checked[2] == scores and len(checked[3]) == 4
    assert trainer._step_safety_checker(4, queries, responses, scores)[3] is None
    with pytest.raises(ValueError, match="scores"):
        trainer._step_safety_checker(4, queries, responses, scores[:3])


# ---- calling the stages ----


def plain_network(policy, query, response):
    """Logits `(R, V)` that predict the response, from the row alone."""
    with torch.no_grad():
        return row_outputs(policy, query, response)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_forward_pass_of_the_stages_is_that_of_each_row_alone(tmp_path, family, side):
    kwargs = {"ref_model": tiny_model(family, seed=1)}
    trainer = make(tmp_path, model=tiny_model(family), trainer_kwargs=kwargs, temperature=0.7)
    trainer.tokenizer.padding_side = side
    queries, responses, _ = tiny_rollouts()
    masks = [torch.ones_like(response) for response in responses]
    masks[1][0] = 0
    inputs = trainer.prepare_model_inputs(queries, responses)
    total = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
    assert inputs["input_ids"].shape == (4, max(total)) and inputs["attention_mask"].sum(1).tolist() == total
    assert (inputs.input_ids[inputs.attention_mask == 0] == PAD).all()
    for model, network in ((trainer.model, trainer.model.policy), (trainer.ref_model, trainer.ref_model)):
        with torch.no_grad():
            logprobs, logits, values, mask = trainer.batched_forward_pass(
                model, queries, responses, inputs, return_logits=True, response_masks=masks
            )
            without = trainer.batched_forward_pass(model, queries, responses, inputs)
        assert logprobs.shape == mask.shape == (4, max(total) - 1) and logits.shape == (4, max(total) - 1, 32)
        assert without[1] is None and without[3].sum(1).tolist() == [len(response) for response in responses]
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            expected = plain_network(network, query, response) / 0.7
            here = without[3][row].bool()
            torch.testing.assert_close(logits[row][here], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                logprobs[row][here], expected.log_softmax(-1)[range(len(response)), response], atol=1e-4, rtol=1e-4
            )
            assert mask[row][here].tolist() == masks[row].tolist()
            if model is trainer.model:
                torch.testing.assert_close(
                    values[row][here], row_values(trainer.model.value_model, query, response).detach()
                )
    assert values is None


@pytest.mark.parametrize("with_start", [True, False])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_so_it_is_for_an_encoder_decoder(tmp_path, family, with_start):
    """Every generated token counts, the first one too, whether the responses begin with the start token or not."""
    trainer = make(tmp_path, model=tiny_model(family), trainer_kwargs={"ref_model": tiny_model(family, seed=1)})
    queries, responses, _ = tiny_rollouts()
    given = [torch.cat([torch.tensor([START]), r]) for r in responses] if with_start else responses
    inputs = trainer.prepare_model_inputs(queries, given)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert (inputs["decoder_input_ids"][:, 0] == START).all()
    with torch.no_grad():
        logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, given, inputs)
    assert mask.sum(1).tolist() == [len(response) for response in responses]
    expected_values = decoder_values(trainer.model.value_model, queries, responses)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        expected = row_logprobs(trainer.model.policy, query, response, 1.0)
        torch.testing.assert_close(logprobs[row][mask[row].bool()], expected.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values[row][mask[row].bool()], expected_values[row], atol=1e-4, rtol=1e-4)


def test_the_reference_of_a_peft_policy_is_reached_by_its_context(tmp_path):
    policy = away_from_identity(get_peft_model(tiny_model(), lora_config()))
    trainer = make(tmp_path, model=policy, trainer_kwargs={"ref_model": None})
    before = copy.deepcopy(policy)
    trainer.step(*tiny_rollouts())
    queries, responses, _ = tiny_rollouts()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        now = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        with trainer.optional_peft_ctx():
            reference = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        again = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    expected = row_logprobs(before, queries[0], responses[0], 1.0).detach()
    torch.testing.assert_close(reference[0][0][reference[3][0].bool()], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(now[0], reference[0], atol=1e-3) and torch.equal(now[0], again[0])
    with make(tmp_path).optional_peft_ctx():  # which has a reference of its own
        pass


def test_stages_called_one_after_the_other_give_the_numbers_of_step(tmp_path):
    """As a script does that looks at the KL before it updates; against the formulas, and against what step reports."""
    trainer = make(tmp_path, cliprange_value=0.2, mini_batch_size=4, gradient_accumulation_steps=1, ppo_epochs=1)
    queries, responses, scores = tiny_rollouts()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, values, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=True
        )
        ref_logprobs, *_ = trainer.batched_forward_pass(trainer.ref_model, queries, responses, inputs)
    rewards, non_score, kls = trainer.compute_rewards(torch.stack(scores), logprobs, ref_logprobs, masks)
    torch.testing.assert_close(kls, logprobs - ref_logprobs)
    torch.testing.assert_close(non_score, -0.3 * kls)
    on_last = torch.zeros_like(rewards)
    for row, score in enumerate(scores):
        on_last[row, masks[row].nonzero()[-1]] = score.to(rewards)
    torch.testing.assert_close(rewards, non_score + on_last)
    of_list = trainer.compute_rewards(scores, logprobs, ref_logprobs, masks)
    assert torch.equal(of_list[0], rewards)

    kept_values, advantages, returns = trainer.compute_advantages(values, rewards, masks)
    counted = masks.bool()
    raw = [
        row_advantages(rewards[i][counted[i]].tolist(), values[i][counted[i]].tolist(), [True] * 9, 1.0, 0.95)
        for i in range(4)
    ]
    flat = torch.tensor(list(itertools.chain(*raw)), dtype=torch.float64)
    torch.testing.assert_close(advantages[counted].double(), (flat - flat.mean()) / flat.std(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns[counted].double(), flat + values[counted].double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept_values, values * masks) and not advantages[~counted].any()

    shifted, moved = logprobs + 0.3 * torch.randn_like(logprobs), values + torch.randn_like(values)
    policy, value, stats = trainer.loss(logprobs, values, logits, moved, shifted, masks, advantages, returns)
    ratio, clipped = torch.exp(shifted - logprobs), moved.clamp(values - 0.2, values + 0.2)
    terms = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    errors = torch.max((moved - returns) ** 2, (clipped - returns) ** 2)
    assert float(policy) == pytest.approx(float(terms[counted].mean()), rel=1e-5)
    assert float(value) == pytest.approx(0.5 * 0.5 * float(errors[counted].mean()), rel=1e-5)
    assert float(stats["loss/total"]) == pytest.approx(float(policy + value))
    assert float(stats["policy/policykl"]) == pytest.approx(float((logprobs - shifted)[counted].mean()), abs=1e-6)
    assert stats["policy/ratio"].shape == masks.shape
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)[counted].mean()
    assert float(stats["policy/entropy"]) == pytest.approx(float(entropy), rel=1e-5)

    recorded = trainer.record_step_stats(
        kl_coef=0.3, scores=torch.stack(scores), logprobs=logprobs, ref_logprobs=ref_logprobs, kls=kls, masks=masks,
        non_score_reward=non_score, queries=queries, responses=responses,
        train_stats={name: value.reshape(1, -1) for name, value in stats.items()},
    )  # fmt: skip
    reported = trainer.step(queries, responses, scores)
    names = ["objective/kl", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/returns/var"]
    for name in [*names, "ppo/policy/entropy", "tokens/responses_len_mean", "objective/kl_coef"]:
        assert float(recorded[name]) == pytest.approx(reported[name], rel=1e-4), name
    assert float(recorded["ppo/val/var_explained"]) == pytest.approx(
        1 - float(stats["val/error"]) / float(stats["returns/var"]), rel=1e-5
    )


@pytest.mark.parametrize(("kind", "formula"), [
    ("abs", lambda x: x.abs()), ("mse", lambda x: 0.5 * x**2), ("k3", lambda x: torch.expm1(-x) + x),
])  # fmt: skip
def test_the_kl_of_each_kind_is_its_formula(tmp_path, kind, formula):
    trainer = make(tmp_path, kl_penalty=kind)
    a, b = torch.randn(2, 3, 5)
    torch.testing.assert_close(trainer._kl_penalty(a, b), formula(a - b))
    torch.testing.assert_close(trainer.compute_rewards(torch.ones(3), a, b, torch.ones(3, 5))[2], formula(a - b))


def test_in_apa_rewards_have_no_kl_and_the_loss_is_for_overrides(tmp_path):
    trainer = make(tmp_path, loss_type="apa", init_kl_coef=None, adap_kl_ctrl=None, kl_coef=0.3)
    a, b = torch.randn(2, 3, 5)
    rewards, non_score, _ = trainer.compute_rewards(torch.tensor([1.0, 2.0, 3.0]), a, b, torch.ones(3, 5))
    assert rewards[:, -1].tolist() == [1, 2, 3] and not rewards[:, :-1].any() and not non_score.any()
    with pytest.raises(ValueError, match=r"loss.*reads the reference's log-probs"):
        trainer.loss(a, a, None, a, a, torch.ones(3, 5), a, a)


# ---- the models as wrappers ----


IDS = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def outputs(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def trunk_values(trunk, head, **inputs):
    with torch.no_grad():
        return head(last_hidden_states(trunk(**inputs, output_hidden_states=True)))


def critic_trainer(tmp_path, critic):
    """A trainer with a wrapper and that kind of critic, and what the critic says of `IDS` by a plain computation."""
    kwargs = {"ref_model": None, "value_model": reward_model() if critic == "classifier" else critic}
    model = get_peft_model(tiny_model(), lora_config()) if critic == "adapter" else tiny_model()
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="normal")
    trainer = make(tmp_path, model=wrapper, trainer_kwargs=kwargs)
    module, inputs = trainer.model, {"input_ids": IDS, "attention_mask": MASK}
    if critic == "head":
        hidden = last_hidden_states(outputs(module.policy, **inputs, output_hidden_states=True))
        return trainer, wrapper.v_head.summary(hidden).squeeze(-1)
    if critic == "adapter":
        away_from_identity(module.policy)
        with only_adapter(module.policy, VALUE_ADAPTER):
            trunk = module.policy.get_base_model().model
            return trainer, trunk_values(trunk, module.value_model.head, **inputs)
    return trainer, trunk_values(module.value_model.network, module.value_model.head, **inputs)


@pytest.mark.parametrize("critic", ["separate", "head", "adapter", "classifier"])
def test_the_model_answers_as_a_wrapper_with_the_values_of_its_critic(tmp_path, critic):
    trainer, wanted = critic_trainer(tmp_path, critic)
    module = trainer.accelerator.unwrap_model(trainer.model)
    for model in (trainer.model, module):
        logits, loss, values = outputs(model, input_ids=IDS, attention_mask=MASK)
        torch.testing.assert_close(logits, outputs(module.policy, input_ids=IDS, attention_mask=MASK).logits)
        torch.testing.assert_close(values, wanted)
        assert logits.dtype == values.dtype == torch.float32 and loss is None
    assert values.shape == IDS.shape and values.abs().max() > 0.01
    labels = outputs(module.policy, input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    torch.testing.assert_close(outputs(trainer.model, input_ids=IDS, attention_mask=MASK, labels=IDS)[1], labels)
    # By place, and with the gradient of both.
    by_place = trainer.model(IDS, attention_mask=MASK)
    (by_place[0].sum() + by_place[2].sum()).backward()
    trained = module.trainable_parameters()
    assert all(any(p.grad is not None and p.grad.any() for p in trained[name]) for name in ("policy", "value"))
    trainer.step(*tiny_rollouts())
    now = outputs(trainer.model, input_ids=IDS, attention_mask=MASK)
    assert not torch.equal(now[0], logits) and not torch.equal(now[2], values)


def test_what_scripts_reach_through_the_model(tmp_path):
    trainer, _ = critic_trainer(tmp_path, "head")
    model = trainer.model
    assert model.pretrained_model is model.policy and model.v_head is model.value_model.head
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.config is model.policy.config and not model.supports_rm_adapter and not model.is_peft_model
    tokens = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False)
    expected = model.policy.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens, expected)
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {"policy", "value_model"} == {name.partition(".")[0] for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"))
    mine, loaded = (outputs(m, input_ids=IDS, attention_mask=MASK) for m in (model, again.eval()))
    torch.testing.assert_close(mine[0], loaded[0])
    torch.testing.assert_close(mine[2], loaded[2])
    separate, _ = critic_trainer(tmp_path, "separate")
    assert not hasattr(separate.model, "v_head") and separate.model.pretrained_model is separate.model.policy


def test_the_model_pushes_what_it_saves(tmp_path, monkeypatch):
    pushed = {}

    def upload(self, folder, *args, **kwargs):
        pushed.update({path.name: path.stat().st_size for path in Path(folder).iterdir()})

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    hub = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", hub.create_repo, raising=False)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    trainer, _ = critic_trainer(tmp_path, "head")
    trainer.model.push_to_hub("someone/policy")
    assert {"model.safetensors", "v_head.safetensors"} <= pushed.keys()


def test_the_cache_of_the_policy_is_no_other_critics(tmp_path):
    trainer, _ = critic_trainer(tmp_path, "head")
    complete = outputs(trainer.model, input_ids=IDS)
    *_, cache = outputs(trainer.model, input_ids=IDS[:, :4], return_past_key_values=True, use_cache=True)
    rest = outputs(trainer.model, input_ids=IDS[:, 4:], past_key_values=cache)
    torch.testing.assert_close(rest[0], complete[0][:, 4:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest[2], complete[2][:, 4:], atol=1e-4, rtol=1e-4)
    trainer, _ = critic_trainer(tmp_path, "separate")
    with pytest.raises(ValueError, match="past_key_values"):
        trainer.model(IDS[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("critic", ["separate", "head"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_answers_as_a_wrapper(tmp_path, family, critic):
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_model(family), v_head_init_strategy="normal")
    trainer = make(tmp_path, model=wrapper, trainer_kwargs={"ref_model": None, "value_model": critic})
    decoder = {"decoder_input_ids": IDS.flip(0), "decoder_attention_mask": torch.ones_like(IDS)}
    inputs = {"input_ids": IDS, "attention_mask": MASK, **decoder}
    logits, loss, values = outputs(trainer.model, **inputs)
    expected = outputs(trainer.model.policy, **inputs, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    assert loss is None and values.shape == IDS.shape
    module = trainer.model.value_model
    if critic == "head":
        torch.testing.assert_close(values, outputs(wrapper, **inputs)[2])
    else:
        torch.testing.assert_close(values, trunk_values(module.trunk, module.head, **inputs))
    torch.testing.assert_close(outputs(trainer.ref_model, **inputs)[0], logits)
    # The decoder's tokens are made of labels by the policy, and the critic reads the same.
    shifted = torch.cat([torch.full((2, 1), START), IDS.flip(0)[:, :-1]], dim=1)
    by_labels = outputs(trainer.model, input_ids=IDS, attention_mask=MASK, labels=IDS.flip(0))
    by_hand = outputs(trainer.model, input_ids=IDS, attention_mask=MASK, decoder_input_ids=shifted)
    torch.testing.assert_close(by_labels[0], by_hand[0])
    torch.testing.assert_close(by_labels[2], by_hand[2])
    assert by_labels[1] > 0


@pytest.mark.parametrize("given", ["none", "wrapper", "plain", "peft"])
def test_the_reference_answers_with_a_tuple(tmp_path, given):
    other = tiny_model(seed=1)
    references = {
        "none": lambda: None,
        "wrapper": lambda: AutoModelForCausalLMWithValueHead.from_pretrained(other),
        "plain": lambda: other,
        "peft": lambda: away_from_identity(get_peft_model(other, lora_config())),
    }
    trainer = make(tmp_path, model=tiny_model(), trainer_kwargs={"ref_model": references[given]()})
    again = make(tmp_path, model=tiny_model(), trainer_kwargs={"ref_model": trainer.ref_model})  # shared by two
    assert again.ref_model is trainer.ref_model and (given != "plain" or trainer.ref_model is other)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    plain = outputs(trainer.ref_model, **inputs, return_dict=True)
    answer = outputs(trainer.ref_model, **inputs, labels=IDS, output_hidden_states=True)
    logits, loss, values = answer
    assert isinstance(answer, tuple) and torch.equal(answer[0], logits) and loss > 0 and values is None
    assert torch.equal(logits, plain.logits) and logits.dtype == torch.float32
    # The names of the network's own output lead to it still.
    assert answer.logits is answer["logits"] and "hidden_states" in answer and len(answer.hidden_states) == 3
    assert torch.equal(copy.deepcopy(answer).logits, logits)
    assert torch.equal(outputs(trainer.ref_model.pretrained_model, **inputs)[0], logits)
    tokens = trainer.ref_model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=True)
    without_cache = trainer.ref_model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(tokens, without_cache)


def test_a_reference_that_answers_with_a_tuple_is_saved_and_copied_as_ever(tmp_path):
    trainer = make(tmp_path, model=tiny_model(), trainer_kwargs={"ref_model": None})
    reference = trainer.ref_model
    assert reference.state_dict().keys() == tiny_model().state_dict().keys()
    assert [name for name, _ in reference.named_modules()] == [name for name, _ in tiny_model().named_modules()]
    reference.save_pretrained(tmp_path / "reference")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    twin = copy.deepcopy(reference)
    for model in (loaded, twin):
        torch.testing.assert_close(outputs(model, input_ids=IDS)[0], outputs(reference, input_ids=IDS)[0])
    plain = copy.deepcopy(reference)
    plain._forward_hooks.clear()
    del plain.pretrained_model
    assert identity_of(twin) == identity_of(reference) == identity_of(plain) is not None
    with reference_policy(trainer.model.policy, reference) as inside:
        assert not isinstance(inside(input_ids=IDS), tuple)


def test_peft_policies_without_a_separate_reference_have_none(tmp_path):
    trainer = make(tmp_path, model=get_peft_model(tiny_model(), lora_config()), trainer_kwargs={"ref_model": None})
    assert trainer.ref_model is None


# ---- attributes ----


def test_attributes_that_scripts_set_and_read(tmp_path):
    config = tiny_config(tmp_path, **{**OPTIONS, "ppo_epochs": 1})
    trainer = make(tmp_path)
    other = tiny_tokenizer()
    other.pad_token = "w5"
    trainer.tokenizer = other
    assert trainer.tokenizer is trainer.processing_class is other
    trainer.tokenizer.padding_side = "left"
    queries, responses, _ = tiny_rollouts()
    assert (trainer.prepare_model_inputs(queries, responses)["input_ids"] == 5).any()
    trainer.dataset = [1, 2, 3]
    assert trainer.dataset == trainer.train_dataset == [1, 2, 3]
    trainer.current_device, trainer.is_distributed = "cpu", False
    assert trainer.current_device == torch.device("cpu")
    for name, value in (("current_device", "meta"), ("is_distributed", True), ("tokenizer", "name"), ("config", 3)):
        with pytest.raises(ValueError, match=name):
            setattr(trainer, name, value)
    trainer.config = config
    assert trainer.config is trainer.args is config and config.global_batch_size == 4
    trainer.step(*tiny_rollouts())
    assert trainer.state.global_step == 1
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert [id(p) for p in trainer.model_params] == [id(p) for p in trained]
    assert trainer.running.count == 0 and trainer.gather_stats({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="loss_type='apa'"):
        trainer.config = tiny_config(tmp_path)


def test_dataloaders_are_made_by_the_method_that_scripts_override(tmp_path):
    class InOrder(PPOTrainer):
        def prepare_dataloader(self, dataset, data_collator=None):
            dataset = self._remove_unused_columns(dataset)
            return DataLoader(dataset, batch_size=self.config.batch_size, collate_fn=data_collator, drop_last=True)

    rows = Dataset.from_list([{"input_ids": [i, i], "query": str(i), "other": i} for i in range(2, 12)])
    trainer = make(tmp_path, InOrder, trainer_kwargs={"train_dataset": rows})
    batches = list(trainer.dataloader)
    assert [batch["query"] for batch in batches] == [["2", "3", "4", "5"], ["6", "7", "8", "9"]]
    assert batches[0].keys() == {"input_ids", "query"}
    data = {"train_dataset": rows, "reward_funcs": lambda prompts, completions, **columns: [0.0] * len(prompts)}
    with pytest.raises(ValueError, match=r"prepare_dataloader is overridden, but train\(\)"):
        make(tmp_path, InOrder, trainer_kwargs=data).train()
    plain = make(tmp_path, trainer_kwargs={"train_dataset": rows})
    assert [len(batch["query"]) for batch in plain.prepare_dataloader(rows)] == [4, 4]


def test_what_a_subclass_saves_is_saved_and_pushed(tmp_path, monkeypatch):
    class WithNotes(PPOTrainer):
        def _save_pretrained(self, save_directory):
            super()._save_pretrained(save_directory)
            (Path(save_directory) / "notes.txt").write_text("mine")

    trainer = make(tmp_path / "out", WithNotes)
    trainer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "notes.txt").exists() and (tmp_path / "saved" / "model.safetensors").exists()
    monkeypatch.setattr(
        "transformers.Trainer.push_to_hub", lambda self, **kwargs: sorted(os.listdir(self.args.output_dir))
    )
    assert "notes.txt" in trainer.push_to_hub("someone/policy")
