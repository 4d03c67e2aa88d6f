"""Scripts for TRL <= 0.11 that call the trainer's stages, call its models as wrappers, or set its attributes."""

import copy
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.utils import PushToHubMixin

from tests.test_encoder_decoder import decoder_values
from tests.test_models import reward_model
from tests.test_reaching_inside import OPTIONS, make
from tests.test_update import row_advantages, row_logprobs, row_outputs, row_values
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
from trl_apa import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOTrainer
from trl_apa.models import reference_policy
from trl_apa.models.adapters import only_adapter
from trl_apa.models.logprobs import last_hidden_states
from trl_apa.models.network_identity import identity_of
from trl_apa.models.value_adapter import VALUE_ADAPTER


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
