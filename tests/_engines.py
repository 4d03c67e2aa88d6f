"""What a trainer does on one process, or on two under an engine that cuts up weights: the same, to be compared."""

import os

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests._two_processes import WORLD_SIZE
from tests.test_training import PROMPTS, StopAt, few_nines
from tests.test_update import assert_same
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.models import ValueModel, load_policy
from trl_apa.models.value_adapter import VALUE_ADAPTER


QUERIES = [torch.tensor([2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7])]
STEPS = {"optim": "sgd", "learning_rate": 0.1, "ppo_epochs": 2, "gamma": 0.9, "scale_rewards": True, "score_clip": 1.5}
# Greedy sampling, so that how many processes draw random numbers does not matter.
RUN = {"optim": "sgd", "learning_rate": 0.1, "top_k": 1, "max_completion_length": 5, "max_steps": 4, "seed": 3}
RUN |= {"ppo_epochs": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
ACCUMULATED = {"mini_batch_size": 2, "gradient_accumulation_steps": 2}
# Fewer than two of the longest rows have, so that the two processes need unequally many passes.
BY_TOKENS = {**ACCUMULATED, "tokens_per_micro_batch": 20}
# Its constants are 0 in the first step, one for all states in the second, and of states after that.
NORMALIZED = {"normalizer": "learned", "whiten_advantages": False}


def announce_rank(rank):
    """What torchrun tells accelerate."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def rows_of(rank):
    return range(4 * rank, 4 * rank + 4)


def alone(folder, **config):
    return tiny_config(folder, **{"mini_batch_size": config["batch_size"], **config})


def whole_weights(trainer):
    """On the first process."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name: tensor.clone() for name, tensor in state.items()}


def stepped(make_config, folder, rows=range(8), model=None, config=None, num_steps=2, **kwargs):
    """A trainer after some steps on its rows of eight rollouts, and what there is to compare of it."""
    model = (
        tiny_model() if model is None else model
    )  # before the config, so that ZeRO-3 does not shard it as it is made
    args = make_config(folder, batch_size=len(rows), **STEPS, **(config or {}))
    trainer = APATrainer(args, model, tokenizer=tiny_tokenizer(), **kwargs)
    torch.manual_seed(1)
    if hasattr(trainer.model.value_model, "head"):
        torch.nn.init.normal_(trainer.model.value_model.head.out.weight)  # sends gradient to the trunk at once
    own = [[column[row] for row in rows] for column in tiny_rollouts(8)]
    stats = [trainer.step(*own) for _ in range(num_steps)][-1]
    answers = trainer.generate(QUERIES, generate_ref_response=True, do_sample=False, max_new_tokens=4)
    trainer.save_pretrained(f"{folder}/saved")
    return trainer, {
        "stats": stats,
        "answers": [[answer.tolist() for answer in part] for part in answers],
        "weights": whole_weights(trainer),
    }


def normalized(make_config, folder, rows=range(8), model=None, **config):
    """Four steps with a learned log Z(s)."""
    outcome = stepped(make_config, folder, rows, model, {**NORMALIZED, **config}, num_steps=4)[1]
    assert abs(outcome["stats"]["apa/normalizer/log_normalizer"]) > 1e-3
    return outcome


def on_one_base(make_config, folder, rows=range(8), model=None, **config):
    """Policy and value adapter on one base, the reference below them, recomputed in the backward pass."""
    config = {"gradient_checkpointing": True, **config}
    peft_config = None if isinstance(model, PeftModel) else lora_config()
    return stepped(make_config, folder, rows, model, config, peft_config=peft_config, value_model="adapter")[1]


def on_one_8bit_base(make_config, folder, base, rows=range(8), **config):
    """The same where bitsandbytes quantises the base, a folder."""
    torch.manual_seed(2)
    policy = load_policy(base, "8bit", lora=4)
    return on_one_base(make_config, folder, rows, policy, **config)


def trained(
    make_config, folder, model, stop=None, resume=None, evaluate_first=False, reward_funcs=few_nines, **config
):
    """A run of `train` over two iterations of two steps, or a part of it."""
    trainer = APATrainer(
        make_config(folder, **RUN, **config),
        model,
        tokenizer=tiny_tokenizer(),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:3],
        reward_funcs=reward_funcs,
        callbacks=[] if stop is None else [StopAt(stop)],
    )
    if evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    rows = [row for row in trainer.state.log_history if row["step"] and row.keys() & {"apa/mean_scores", "eval_kl"}]
    return {"weights": whole_weights(trainer), "rows": rows}


def trained_in_parts(make_config, folder, model, **config):
    """A run in one piece, and one that was stopped in the middle of an iteration and taken up by a new trainer."""
    config = {"batch_size": 2, "mini_batch_size": 2, **config}
    whole = trained(make_config, f"{folder}/whole", model, evaluate_first=True, **config)
    trained(make_config, f"{folder}/cut", model, stop=3, **config)
    checkpoint = f"{folder}/cut/checkpoint-3"
    return whole, trained(make_config, f"{folder}/cut", model, resume=checkpoint, **config)


def assert_equal_outcome(actual, expected, missing=()):
    """Weights to 1e-5, greedy answers, and every statistic but the clock's and those in `missing`, by both names."""
    missing = [*missing, *(name.replace("apa/", "ppo/") for name in missing)]
    if actual["weights"]:
        assert_same(actual["weights"], expected["weights"], tolerance=1e-5)
    assert actual["answers"] == expected["answers"]
    assert_equal_numbers(actual["stats"], expected["stats"], missing)


def assert_equal_numbers(actual, expected, missing=()):
    assert expected.keys() - actual.keys() == set(missing)
    assert not actual.keys() - expected.keys()
    for name in actual:
        if not name.startswith("time/") and "runtime" not in name:
            assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def assert_equal_runs(ranks, expected, missing=()):
    """The run in one piece is that of one process; the one in two parts is that in one piece."""
    for whole, resumed in ranks:
        assert len(whole["rows"]) == len(expected["rows"]) == 4
        for row, alone_row in zip(whole["rows"], expected["rows"], strict=True):
            assert_equal_numbers(row, alone_row, missing if "apa/mean_scores" in row else ())
        if whole["weights"]:
            assert_same(whole["weights"], expected["weights"], tolerance=1e-5)
            assert_same(resumed["weights"], whole["weights"], tolerance=1e-7)


def assert_reloads(folder, weights, with_adapters=False):
    """Plain transformers, or peft, reads the policy, and `ValueModel` the value model: weights as they were."""
    if with_adapters:
        policy = PeftModel.from_pretrained(tiny_model(), folder)
        own = {name: weight for name, weight in policy.state_dict().items() if "lora_" in name}
    else:
        own = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert_same(own, {name: weights[f"policy.{name}"] for name in own}, tolerance=1e-5)
    value_model = ValueModel.from_pretrained(f"{folder}/value_model", base_model=tiny_model())
    if with_adapters:
        own = {n: w for n, w in value_model.network.state_dict().items() if "lora_" in n}
        expected = {n: weights["policy." + n.replace(".default.", f".{VALUE_ADAPTER}.")] for n in own}
    else:
        own = value_model.state_dict()
        expected = {name: weights[f"value_model.{name}"] for name in own}
    assert_same(own, expected, tolerance=1e-5)
