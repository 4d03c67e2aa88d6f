"""Bad input is refused with a message that helps, before any forward pass, and the next correct step works."""

import numpy as np
import pytest
import torch

from tests.tiny import tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer


def replace(rollouts, name, row, value):
    rollouts = {key: list(column) for key, column in rollouts.items()}
    rollouts[name][row] = value
    return rollouts


def good():
    queries, responses, scores = tiny_rollouts()
    masks = [torch.ones_like(response) for response in responses]
    return {"queries": queries, "responses": responses, "scores": scores, "response_masks": masks}


CASES = {
    "not a list": (lambda r: {**r, "queries": tuple(r["queries"])}, "queries is a tuple; it should be a list"),
    "stacked": (lambda r: {**r, "scores": torch.stack(r["scores"])}, "scores is a Tensor; it should be a list"),
    "empty list": (lambda r: {**r, "responses": []}, r"responses has 0 elements.*batch_size = 4"),
    "wrong length": (lambda r: {**r, "scores": r["scores"][:3]}, r"scores has 3 elements.*batch_size = 4"),
    "a list inside": (lambda r: replace(r, "queries", 2, [1, 2]), r"queries\[2\] is a list; it should be a tensor"),
    "a float score": (lambda r: replace(r, "scores", 3, 1.0), r"scores\[3\] is a float; it should be a tensor"),
    "2-D query": (lambda r: replace(r, "queries", 1, torch.ones(1, 2).long()), r"queries\[1\] has shape \(1, 2\)"),
    "empty response": (lambda r: replace(r, "responses", 0, torch.tensor([]).long()), r"responses\[0\] is empty"),
    "float tokens": (lambda r: replace(r, "queries", 0, torch.ones(2)), r"queries\[0\] has dtype torch.float32"),
    "unknown token": (lambda r: replace(r, "responses", 1, torch.tensor([2, 32])), r"responses\[1\].*to 32.*0 to 31"),
    "negative token": (lambda r: replace(r, "queries", 1, torch.tensor([-1, 3])), r"queries\[1\] holds.*from -1"),
    "NaN score": (lambda r: replace(r, "scores", 1, torch.tensor(float("nan"))), r"scores\[1\] is nan"),
    "infinite score": (lambda r: replace(r, "scores", 1, torch.tensor(float("inf"))), r"scores\[1\] is inf"),
    # 2e19 squared is 4e38, and float32 ends at 3.4e38; 1e18 squared is 1e36.
    "score too large": (
        lambda r: replace(r, "scores", 1, torch.tensor(-2e19)),
        r"scores\[1\] is -1\.99.*e\+19; .*its square overflows float32",
    ),
    "two scores": (lambda r: replace(r, "scores", 2, torch.ones(2)), r"scores\[2\] has shape \(2,\)"),
    "mask of another length": (
        lambda r: replace(r, "response_masks", 0, torch.ones(50)),
        r"response_masks\[0\] has shape \(50,\)",
    ),
    "nothing counts": (
        lambda r: replace(r, "response_masks", 1, torch.zeros_like(r["responses"][1])),
        r"response_masks\[1\] drops every token",
    ),
    "beyond the positions": (
        lambda r: replace(r, "queries", 3, torch.full((64,), 5)),
        r"row 3 has \d+ tokens, but the model has 64 positions",
    ),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return tiny_trainer(tmp_path_factory.mktemp("validation"), scale_rewards=True)


@pytest.mark.parametrize("case", CASES)
def test_step_refuses_and_nothing_has_changed(trainer, case, monkeypatch):
    spoil, message = CASES[case]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    counters = trainer.state.global_step, trainer.num_iterations_done, trainer.running_scores.state_dict()
    rng = torch.get_rng_state()

    def forbidden(*args, **kwargs):
        raise AssertionError("a forward pass was made")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "forward", forbidden)
        with pytest.raises(ValueError, match=message):
            trainer.step(**spoil(good()))
    assert (trainer.state.global_step, trainer.num_iterations_done, trainer.running_scores.state_dict()) == counters
    assert torch.equal(torch.get_rng_state(), rng)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_next_correct_step_works(trainer):
    with pytest.raises(ValueError):
        trainer.step([], [], [])
    before = trainer.model.value_model.head.out.weight.detach().clone()
    trainer.step(**good())
    assert not torch.equal(trainer.model.value_model.head.out.weight, before)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    trainer = tiny_trainer(tmp_path)
    rollouts = tiny_rollouts()
    trainer.step(*rollouts)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    hook = trainer.model.value_model.head.out.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf) at optimizer step 1"):
        trainer.step(*rollouts)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
    hook.remove()
    assert all(np.isfinite(value).all() for value in trainer.step(*rollouts).values())


def test_the_largest_scores_that_are_taken_leave_a_finite_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="sgd", learning_rate=0.0)
    queries, responses, _ = tiny_rollouts()
    stats = trainer.step(queries, responses, [torch.tensor(9e17)] * 4)
    # V is 0 and the return 9e17: half of its square, over the counted tokens, is below 4.1e35.
    assert 0 < stats["apa/loss/value"] < 4.1e35


def test_fp16_is_refused_where_float32_would_be_computed_in(tmp_path):
    with pytest.raises(ValueError, match="fp16=True: on a CPU accelerate would compute in float32; leave it out, or"):
        tiny_trainer(tmp_path, fp16=True)


def test_one_token_responses_with_equal_scores_leave_finite_parameters(tmp_path):
    """Nothing to whiten: the variance of the only advantages is zero."""
    trainer = tiny_trainer(tmp_path, scale_rewards=True)
    queries = [torch.tensor([3])] * 4
    stats = trainer.step(queries, [torch.tensor([5])] * 4, [torch.tensor(1)] * 4)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(np.isfinite(value).all() for value in stats.values())


def test_wrong_constructor_arguments_are_named(tmp_path):
    config, model, tokenizer = tiny_config(tmp_path), tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="config is a dict; it should be a APAConfig"):
        APATrainer({}, model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="model is a Linear"):
        APATrainer(config, torch.nn.Linear(1, 1), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="ref_model is a int"):
        APATrainer(config, model, 3, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer is a NoneType"):
        APATrainer(config, model)
    with pytest.raises(ValueError, match="optimizer is a float"):
        APATrainer(config, model, tokenizer=tokenizer, optimizer=1e-3)
    with pytest.raises(ValueError, match="dataset is a str; it should have __getitem__ or __iter__"):
        APATrainer(config, model, tokenizer=tokenizer, dataset="imdb")
    with pytest.raises(ValueError, match="data_collator is a dict; it should have __call__"):
        APATrainer(config, model, tokenizer=tokenizer, data_collator={})
    with pytest.raises(ValueError, match="num_shared_layers is a str"):
        APATrainer(config, model, tokenizer=tokenizer, num_shared_layers="all")
    with pytest.raises(ValueError, match="lr_scheduler is a str; it should have step"):
        APATrainer(config, model, tokenizer=tokenizer, lr_scheduler="linear")
    with pytest.raises(ValueError, match="value_model is a int"):
        APATrainer(config, model, tokenizer=tokenizer, value_model=3)
    with pytest.raises(ValueError, match="processing_class and tokenizer name one argument"):
        APATrainer(config, model, processing_class=tokenizer, tokenizer=tiny_tokenizer())


def test_a_tokenizer_needs_pad_or_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tokenizer)
    assert trainer._pad_token_id == tokenizer.eos_token_id
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tokenizer)
