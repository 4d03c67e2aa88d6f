"""The trainer's optimizer and scheduler as classic scripts read and patch them, before and after the first step."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau
from transformers import AutoModelForSeq2SeqLM, FSMTConfig

from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead


def head_trainer(tmp_path, kind="full", optimizer=None, scheduler=None, **config):
    options = {"peft_config": lora_config()} if kind == "lora" else {}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(), **options)
    arguments = {"value_model": "head"}
    if optimizer is not None:
        arguments["optimizer"] = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if scheduler is not None:
            arguments["lr_scheduler"] = scheduler(arguments["optimizer"])
    return tiny_trainer(tmp_path, model, arguments, **config), model


SGD = torch.optim.SGD
SIZES = ({}, {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 2})


@pytest.mark.parametrize("kind, optimizer", [("full", None), ("full", SGD), ("lora", None), ("lora", SGD)])
@pytest.mark.parametrize("config", SIZES, ids=["one update", "several"])
def test_gradients_are_kept_after_a_step_where_the_script_asks_for_it_and_nowhere_else(
    tmp_path, kind, optimizer, config
):
    results = []
    for keeps in (False, True):
        trainer, model = head_trainer(tmp_path, kind, optimizer, **config)
        if keeps:
            trainer.optimizer.zero_grad = partial(trainer.optimizer.zero_grad, set_to_none=False)
        for _ in range(2):
            trainer.step(*tiny_rollouts())
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all((p.grad is not None) is keeps for p in trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert not any(p.grad.any() for p in trained if keeps)
        results.append([p.detach().clone() for p in trained])
    for without, with_gradients in zip(*results, strict=True):
        assert torch.equal(without, with_gradients)


@pytest.mark.parametrize("optimizer", [None, SGD, torch.optim.Adam])
def test_the_optimizer_is_wrapped_once_and_from_the_start(tmp_path, optimizer):
    trainer, _ = head_trainer(tmp_path, optimizer=optimizer)
    wrapper, inner = trainer.optimizer, trainer.optimizer.optimizer
    assert isinstance(inner, optimizer or torch.optim.AdamW)
    calls = []
    for owner in (wrapper, inner):
        owner.register_step_post_hook(lambda *_, owner=owner: calls.append(owner))
    wrapper.param_groups[0]["lr"] = 0.003
    stats = trainer.step(*tiny_rollouts())
    assert trainer.optimizer is wrapper and trainer.optimizer.optimizer is inner
    assert calls == [wrapper, inner] and stats["apa/learning_rate"] == 0.003


@pytest.mark.parametrize("schedule", [partial(ExponentialLR, gamma=0.5), lambda o: LambdaLR(o, lambda n: 0.5**n)])
def test_a_given_scheduler_is_there_by_both_names_and_moves_once_a_step(tmp_path, schedule):
    trainer, _ = head_trainer(tmp_path, optimizer=SGD, scheduler=schedule)
    given = trainer.lr_scheduler.scheduler
    assert isinstance(given, ExponentialLR | LambdaLR)
    rates = [trainer.step(*tiny_rollouts())["apa/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])
    assert trainer.lr_scheduler.scheduler is given and trainer.lr_scheduler.last_epoch == given.last_epoch == 3
    assert trainer.lr_scheduler.get_last_lr() == given.get_last_lr()


def test_a_scheduler_that_a_metric_leads_stays_what_the_trainer_knows(tmp_path):
    trainer, _ = head_trainer(tmp_path, optimizer=SGD, scheduler=ReduceLROnPlateau)
    assert type(trainer.lr_scheduler) is ReduceLROnPlateau


@pytest.mark.parametrize("shape", [(1, 1), (2,), (1, 1, 1)])
def test_a_score_of_more_dimensions_than_one_is_refused_as_in_classic(tmp_path, shape):
    trainer, _ = head_trainer(tmp_path)
    queries, responses, scores = tiny_rollouts()
    with pytest.raises(ValueError, match=r"scores\[2\] has shape .*; a response has one score: shape \(\) or \(1,\)"):
        trainer.step(queries, responses, [*scores[:2], torch.ones(shape), scores[3]])
    trainer.step(queries, responses, [score.reshape(1) for score in scores])


def test_a_model_whose_vocabularys_head_is_its_embedding_trains(tmp_path):
    sizes = {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "langs": ["en", "de"], "src_vocab_size": 32, "tgt_vocab_size": 32}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(FSMTConfig(**sizes, decoder_start_token_id=2, pad_token_id=0))
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model)
    before = wrapper.v_head.summary.weight.detach().clone()
    trainer = tiny_trainer(tmp_path, wrapper, {"value_model": "head"})
    queries, _, scores = tiny_rollouts()
    responses = [response.squeeze(0)[1:] for response in map(trainer.generate, queries)]
    trainer.step(queries, responses, scores)
    assert not torch.equal(wrapper.v_head.summary.weight, before)
