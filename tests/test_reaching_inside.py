"""Scripts for TRL <= 0.11 that override methods of the trainer."""

import copy
import types

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tests.test_adapter_value import learned, lora_policy
from tests.test_training import PROMPTS
from tests.test_update import assert_same, row_advantages, row_logprobs, row_outputs, row_values
from tests.tiny import tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer, PPOTrainer
from trl_apa.classic.core import masked_mean
from trl_apa.classic.hooks import CALLED, INSTEAD
from trl_apa.models import reference_policy
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
    trainer = make(tmp_path, loss_type=loss_type, exact_kl=False, **options)
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


def test_a_classic_statistic_of_an_override_is_not_replaced(tmp_path):
    class Named(APATrainer):
        def record_step_stats(self, kl_coef, **data):
            return {"ppo/mean_scores": torch.tensor(17.0)}

    trainer = Named(tiny_config(tmp_path), tiny_model(), processing_class=tiny_tokenizer())
    stats = trainer.step(*tiny_rollouts())
    assert stats["ppo/mean_scores"] == 17.0 and stats["ppo/std_scores"] > 0
