"""`value_model=` as a module of the user's own: the values it gives in every layout, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.test_docs import ROOT, fenced
from tests.test_training import StopAt, parameters, trainer_for
from tests.test_update import SPLITS, assert_same, row_advantages, row_logprobs
from tests.tiny import VOCABULARY, lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa import AutoModelForCausalLMWithValueHead
from trl_apa.models import ValueModel
from trl_apa.models.own_critic import OwnValueModel, own_value_model, right_padded
from trl_apa.rollout.batch import Layout, lay_out
from trl_apa.trainer.checkpoints import problem_with


(BLOCK,) = [block for block in fenced(ROOT / "docs" / "extending.md", "python") if "class RecurrentCritic" in block]
exec(BLOCK)  # RecurrentCritic, as the page has it


def critic(seed=0):
    torch.manual_seed(seed)
    return RecurrentCritic(VOCABULARY, 8)  # noqa: F821  # of the page


def learner(tmp_path, **config):
    given = {"value_model": critic(), **config.pop("trainer_kwargs", {})}
    return tiny_trainer(tmp_path, trainer_kwargs=given, **{"optim": "sgd", "learning_rate": 0.1, **config})


def row_values(module, query, response):
    """Of one row without pads."""
    ids = torch.cat([query, response])[None]
    return module(ids, torch.ones_like(ids))[0, len(query) - 1 : -1]


def shared_rollouts():
    queries, responses, scores = tiny_rollouts(6)
    return [queries[number] for number in (0, 1, 0, 2, 0, 1)], responses, scores


@pytest.mark.parametrize("layout", list(Layout))
def test_every_layout_gives_the_values_of_the_row_alone(layout):
    queries, responses, _ = shared_rollouts()
    tokens = lay_out(layout, queries, responses, pad_token_id=5, prompts=[0, 1, 0, 2, 0, 1])
    input_ids, attention_mask, _ = right_padded(tokens)
    rows = sorted(row[: int(mask.sum())].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
    assert rows == sorted(torch.cat(pair).tolist() for pair in zip(queries, responses, strict=True))
    module, width = critic(), max(len(response) for response in responses)
    values = OwnValueModel(module)(tokens, width)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        torch.testing.assert_close(values[row, : len(response)], row_values(module, query, response))
        assert not values[row, len(response) :].any()


def test_a_step_equals_a_plain_script_of_policy_and_critic(tmp_path):
    trainer = learner(tmp_path, max_grad_norm=0.0, vf_coef=0.5, mini_batch_size=2, gradient_accumulation_steps=2)
    policy, module = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model.module)
    queries, responses, scores = tiny_rollouts()
    rows = list(zip(queries, responses, scores, strict=True))
    optimizer = torch.optim.SGD([*policy.parameters(), *module.parameters()], lr=0.1)
    with torch.no_grad():
        values = [row_values(module, q, r) for q, r, _ in rows]
        reference = [row_logprobs(policy, q, r, 1.0) for q, r, _ in rows]
    raw = []
    for value, (_, response, score) in zip(values, rows, strict=True):
        rewards = [0.0] * (len(response) - 1) + [float(score)]
        raw.append(torch.tensor(row_advantages(rewards, value.tolist(), [True] * len(response), 1.0, 0.95)))
    flat, loss = torch.cat(raw), 0.0
    for (query, response, _), value, ref, advantage in zip(rows, values, reference, raw, strict=True):
        target = (advantage - flat.mean()) / (flat.var() + 1e-8).sqrt() / 0.1
        loss = loss + (row_logprobs(policy, query, response, 1.0) - ref - target).square().sum()
        loss = loss + 0.5 * 0.5 * (row_values(module, query, response) - value - advantage).square().sum()
    (loss / len(flat)).backward()
    optimizer.step()
    stats = trainer.step(queries, responses, scores)
    expected = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    expected |= {f"value_model.module.{name}": p.detach() for name, p in module.named_parameters()}
    assert_same(parameters(trainer), expected, tolerance=1e-4)
    assert stats["apa/grad_norm/value"] > 0 and stats["apa/val/error"] > 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_split_and_the_layout_do_not_matter(tmp_path, lora):
    kwargs = {"peft_config": lora_config()} if lora else {}
    results = []
    for options in (*SPLITS, {"mini_batch_size": 8, "padding_free": False}):
        trainer = learner(tmp_path, batch_size=8, ppo_epochs=2, trainer_kwargs=kwargs, **options)
        trainer.step(*tiny_rollouts(8))
        results.append(parameters(trainer))
    for result in results[1:]:
        assert_same(result, results[0], tolerance=1e-5)


def test_a_run_learns_values_and_resumes_with_them(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    unbroken = trainer_for(tmp_path / "unbroken", value_model=critic(), **options)
    before = parameters(unbroken)
    unbroken.train()
    moved = {name for name, p in parameters(unbroken).items() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("value_model.")} <= moved
    trainer_for(tmp_path / "stopped", value_model=critic(), callbacks=[StopAt(3)], **options).train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert problem_with(checkpoint) is None
    resumed = trainer_for(tmp_path / "stopped", value_model=critic(seed=1), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), parameters(unbroken), tolerance=1e-30)
    # Another run's module takes the weights as they are.
    critic().load_state_dict(load_file(checkpoint / "value_model" / "value_head.safetensors"))
    with pytest.raises(ValueError, match="RecurrentCritic, a module of your own: make it, load value_head"):
        ValueModel.from_pretrained(checkpoint / "value_model")
    (checkpoint / "value_model" / "value_head.safetensors").unlink()
    assert "value_head.safetensors is missing" in problem_with(checkpoint)


def test_scripts_that_call_the_model_get_its_values(tmp_path):
    """At every position of a batch with pads on the left."""
    trainer = learner(tmp_path)
    queries, responses, _ = tiny_rollouts()
    inputs = trainer.prepare_model_inputs(queries, responses)
    values = trainer.batched_forward_pass(trainer.model, queries, responses, inputs).values
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        pads = int((inputs["attention_mask"][row].cumsum(0) == 0).sum())
        start = pads + len(query) - 1
        expected = row_values(trainer.model.value_model.module, query, response)
        torch.testing.assert_close(values[row, start : start + len(response)], expected)


class Looks(nn.Module):
    """Gives what `forward` is made to."""

    def __init__(self, values):
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.ones(())), values

    def forward(self, input_ids, attention_mask):
        return self.values(input_ids, attention_mask) * self.weight


class OtherArguments(Looks):
    def forward(self, tokens):
        return tokens * self.weight


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (lambda: OtherArguments(None), "its forward takes tokens"),
        (lambda: Looks(lambda ids, mask: ids.float()).requires_grad_(False), "it has no trainable parameter"),
        (lambda: Looks(lambda ids, mask: ids.float()[:, -1]), r"it gives \(2,\) for input_ids of shape \(2, 6\)"),
        (lambda: Looks(lambda ids, mask: ids.float()[..., None]), r"it gives \(2, 6, 1\)"),
        (lambda: Looks(lambda ids, mask: ids.float().flip(1).cumsum(1).flip(1)), "depend on later tokens"),
        (lambda: Looks(lambda ids, mask: ids * mask.sum(1, keepdim=True)), "depend on the pads behind a row"),
        (lambda: Looks(lambda ids, mask: nn.Embedding(3, 1)(ids)), "it failed with IndexError"),
        (lambda: AutoModelForCausalLMWithValueHead(tiny_model()), "it gives tuple|its forward takes"),
    ],
)
def test_a_module_that_gives_something_else_is_refused(tmp_path, module, text):
    with pytest.raises(ValueError, match=f"value_model is a .*({text}).*; it should be an nn.Module whose forward"):
        tiny_trainer(tmp_path, trainer_kwargs={"value_model": module()})


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="reads one row of tokens, but model is an encoder-decoder"):
        tiny_trainer(tmp_path, tiny_model("t5"), trainer_kwargs={"value_model": critic()})


def test_weights_that_are_tied_are_saved_and_loaded(tmp_path):
    module, other = critic(), critic(seed=1)
    module.also = module.embed
    other.also = other.embed
    OwnValueModel(module).save_pretrained(tmp_path)
    OwnValueModel(other).load_weights(tmp_path)
    assert_same(other.state_dict(), module.state_dict(), tolerance=1e-30)


def test_its_random_numbers_are_off(tmp_path):
    module = critic()
    module.read.dropout, module.embed = 0.5, nn.Sequential(module.embed, nn.Dropout(0.5))
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"value_model": module.train()})
    trainer.step(*tiny_rollouts())
    assert trainer.model.value_model.module is module and not module.training


def test_recurrent_layers_are_in_train_mode_without_dropout():
    """cuDNN has no gradient of them in eval mode; torch's kernels for CPUs do not tell."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.read = nn.LSTM(8, 8, num_layers=2, dropout=0.9, batch_first=True)
            self.drop, self.value = nn.Dropout(0.9), nn.Linear(8, 1)

        def forward(self, input_ids, attention_mask):
            return self.value(self.drop(self.read(self.embed(input_ids))[0])).squeeze(-1)

    module = Stacked()
    made = own_value_model(module, VOCABULARY, torch.device("cpu")).train()
    assert module.read.training and not module.drop.training
    ids_BT = torch.arange(6)[None] + 2
    given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    assert torch.equal(made.module(**given), made.module(**given))
