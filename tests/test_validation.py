"""Bad input is refused with a message that helps, before any forward pass, and the next correct step works."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.test_training import trainer_for
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
    "meta tokens": (
        lambda r: replace(r, "queries", 1, r["queries"][1].to("meta")),
        r"queries\[1\] is a meta tensor, which holds no values; it should be a dense tensor",
    ),
    "sparse tokens": (
        lambda r: replace(r, "responses", 0, r["responses"][0].to_sparse()),
        r"responses\[0\] is a tensor of layout torch.sparse_coo",
    ),
    "nested tokens": (
        lambda r: replace(r, "queries", 0, torch.nested.nested_tensor([torch.tensor([2])])),
        r"queries\[0\] is a nested tensor",
    ),
    **{
        f"{dtype} tokens": (
            lambda r, dtype=dtype: replace(r, "responses", 2, torch.tensor([2, 3]).to(dtype)),
            rf"responses\[2\] has dtype {dtype}; token ids should be integers",
        )
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float16)
    },
    "complex tokens": (lambda r: replace(r, "queries", 2, torch.ones(2) * 1j), r"queries\[2\] is complex"),
    "meta score": (lambda r: replace(r, "scores", 0, torch.zeros((), device="meta")), r"scores\[0\] is a meta tensor"),
    "sparse score": (
        lambda r: replace(r, "scores", 3, torch.ones(1).to_sparse()),
        r"scores\[3\] is a tensor of layout",
    ),
    "complex score": (lambda r: replace(r, "scores", 2, torch.tensor(1j)), r"scores\[2\] is complex"),
    "score beyond float32": (
        lambda r: replace(r, "scores", 1, torch.tensor(1e39, dtype=torch.float64)),
        r"scores\[1\] is 1e\+39; scores should be finite in float32",
    ),
    **{
        f"a mask of {value}": (
            lambda r, value=value: replace(r, "response_masks", 1, torch.full(r["responses"][1].shape, value)),
            rf"response_masks\[1\] holds {shown}; it should be bool, or hold 0 and 1",
        )
        for value, shown in ((0.5, "0.5"), (2, "2"), (-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), (1.5, "1.5"))
    },
    "a mask with one 2": (
        lambda r: replace(r, "response_masks", 3, torch.tensor([1] * (len(r["responses"][3]) - 1) + [2])),
        r"response_masks\[3\] holds 2",
    ),
    "meta mask": (
        lambda r: replace(r, "response_masks", 0, r["response_masks"][0].to("meta")),
        r"response_masks\[0\] is a meta tensor",
    ),
    "sparse mask": (
        lambda r: replace(r, "response_masks", 0, r["response_masks"][0].to_sparse()),
        r"response_masks\[0\] is a tensor of layout",
    ),
    "complex mask": (
        lambda r: replace(r, "response_masks", 2, r["response_masks"][2] * (1 + 0j)),
        r"response_masks\[2\] is complex",
    ),
    "no list of masks": (
        lambda r: {**r, "response_masks": torch.ones(4, 3)},
        "response_masks is a Tensor; it should be a list",
    ),
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


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    return tiny_trainer(tmp_path_factory.mktemp("validation"), tiny_model("t5"))


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


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"beyond the positions"}))  # T5 has no limit
def test_an_encoder_decoder_refuses_the_same(encoder_decoder, case):
    """Whose responses are looked at before, for the start token."""
    spoil, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        encoder_decoder.step(**spoil(good()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_and_masks_of_short_types_are_taken(tmp_path, dtype):
    """And masks of 0 and 1 in any type; the step is that of int64 and bool."""
    given, short = good(), good()
    for masks in (given["response_masks"], short["response_masks"]):
        masks[0][0] = len(masks[0]) == 1
    given["response_masks"] = [mask.bool() for mask in given["response_masks"]]
    for name in ("queries", "responses", "response_masks"):
        short[name] = [tensor.to(dtype) for tensor in short[name]]
    short["response_masks"][1:3] = [short["response_masks"][1].float(), short["response_masks"][2].to(torch.uint16)]
    stats = [tiny_trainer(tmp_path).step(**rollouts) for rollouts in (given, short)]
    for name in ("apa/loss/total", "objective/kl", "tokens/counted"):
        assert stats[0][name] == stats[1][name]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "query_tensor is empty; it should hold at least one tensor of token ids"),
        ((), "query_tensor is empty"),
        (None, "query_tensor is a NoneType; it should be a list of tensors"),
        (5, "query_tensor is a int"),
        ("w5", "query_tensor is a str"),
        ({"input_ids": torch.tensor([5])}, "query_tensor is a dict"),
        ([[5]], r"query_tensor\[0\] is a list; it should be a tensor"),
        (torch.tensor(5), r"query_tensor\[0\] has shape \(\); it should be 1-D"),
        (torch.tensor([]).long(), r"query_tensor\[0\] is empty"),
        ([torch.tensor([5]), torch.tensor([5], device="meta")], r"query_tensor\[1\] is a meta tensor"),
        (torch.tensor([5]).to_sparse(), r"query_tensor\[0\] is a tensor of layout torch.sparse_coo"),
        (torch.tensor([5], dtype=torch.uint16), r"query_tensor\[0\] has dtype torch.uint16"),
        (torch.tensor([-1]), r"query_tensor\[0\] holds token ids from -1"),
    ],
)
def test_generate_refuses_what_is_no_query(trainer, queries, message):
    with pytest.raises(ValueError, match=message):
        trainer.generate(queries)


def spoilt_optimizer(model, spoil):
    """Adam after a step, then spoilt."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[2, 3]]), labels=torch.tensor([[2, 3]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    spoil(optimizer)
    return optimizer


def of_state(name, value):
    def spoil(optimizer):
        list(optimizer.state.values())[-1][name].flatten()[-1] = value

    return spoil


OPTIMIZERS = {
    "NaN moment": (
        of_state("exp_avg", math.nan),
        r"is not finite: exp_avg of a parameter of shape \(\d+.* holds NaN or",
    ),
    "infinite moment": (of_state("exp_avg_sq", math.inf), "is not finite: exp_avg_sq of a parameter of shape"),
    "NaN step": (
        lambda optimizer: next(iter(optimizer.state.values()))["step"].fill_(math.nan),
        "is not finite: step of",
    ),
    "infinite rate": (lambda optimizer: optimizer.param_groups[0].update(lr=math.inf), "has lr=inf in group 0"),
    "NaN decay": (lambda optimizer: optimizer.param_groups[0].update(weight_decay=math.nan), "has weight_decay=nan"),
    "NaN beta": (
        lambda optimizer: optimizer.param_groups[0].update(betas=(0.9, math.nan)),
        r"has betas=\(0\.9, nan\)",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_that_is_not_finite_is_refused(tmp_path, case):
    """When it is given, and when a script has spoilt it before the first step."""
    spoil, message = OPTIMIZERS[case]
    model = tiny_model()
    with pytest.raises(ValueError, match=f"optimizer {message}"):
        tiny_trainer(tmp_path, model, {"optimizer": spoilt_optimizer(model, spoil)})
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model, {"optimizer": spoilt_optimizer(model, lambda optimizer: None)})
    spoil(trainer.optimizer)
    trainer.model.forward = None  # no pass is made
    with pytest.raises(ValueError, match=f"optimizer {message}"):
        trainer.step(*tiny_rollouts())


def test_an_optimizer_with_finite_state_and_an_infinite_bound_of_its_own_is_taken(tmp_path):
    model = tiny_model()
    optimizer = spoilt_optimizer(model, lambda optimizer: optimizer.param_groups[0].update(growth_rate=math.inf))
    assert np.isfinite(
        tiny_trainer(tmp_path, model, {"optimizer": optimizer}).step(*tiny_rollouts())["apa/loss/total"]
    )


class SpoilOptimizer(TrainerCallback):
    """Before the checkpoint of a step is written, one number of the optimizer's state becomes infinite."""

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        of_state("exp_avg_sq", math.inf)(optimizer)


def test_a_checkpoint_whose_optimizer_is_not_finite_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, callbacks=[SpoilOptimizer()], max_steps=1, **saving).train()
    trainer = trainer_for(tmp_path, max_steps=3)
    trainer.generate = None  # nothing is sampled
    with pytest.raises(ValueError, match=r"the optimizer of .*checkpoint-1 is not finite: exp_avg_sq of a parameter"):
        trainer.train(resume_from_checkpoint=True)


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
    with pytest.raises(ValueError, match="processing_class and tokenizer are the same argument"):
        APATrainer(config, model, processing_class=tokenizer, tokenizer=tiny_tokenizer())


def test_a_tokenizer_needs_pad_or_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tokenizer)
    assert trainer.special_tokens.pad == tokenizer.eos_token_id
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tokenizer)
