"""`step` and `train` on two ranks against one process that sees both ranks' rollouts."""

import os
import tempfile

import datasets
import pytest
import torch
import torch.distributed as dist

from tests._two_processes import WORLD_SIZE, run_in_two_processes
from tests.test_training import PROMPTS, StopAt, few_nines
from tests.test_update import assert_same, learner
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer


OPTIONS = {"ppo_epochs": 2, "gamma": 0.9, "scale_rewards": True, "score_clip": 1.5}


def announce_rank(rank):
    """What torchrun tells accelerate."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def step_on_half(rank, options, accumulate):
    announce_rank(rank)
    split = {"mini_batch_size": 2, "gradient_accumulation_steps": 2} if accumulate else {"mini_batch_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        trainer = learner(folder, batch_size=4, **split, **options)
        halves = [column[4 * rank : 4 * rank + 4] for column in tiny_rollouts(8)]
        stats = [trainer.step(*halves) for _ in range(2)][-1]
        assert trainer.accelerator.num_processes == WORLD_SIZE
        return {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}, stats


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_two_ranks_equal_one_process_on_the_concatenated_batch(tmp_path, loss_type):
    """Also the whitening, the running score scale and every statistic are those of the union."""
    options = {**OPTIONS, "loss_type": loss_type}
    single = learner(tmp_path, batch_size=8, mini_batch_size=8, **options)
    stats = [single.step(*tiny_rollouts(8)) for _ in range(2)][-1]
    ranks = run_in_two_processes(step_on_half, options, loss_type == "apa")
    expected = {name: p.detach() for name, p in single.model.named_parameters()}
    for parameters, rank_stats in ranks:
        assert_same({name: torch.from_numpy(p) for name, p in parameters.items()}, expected, tolerance=1e-5)
        assert rank_stats.keys() == stats.keys()
        for name, value in stats.items():
            if not name.startswith("time/"):
                assert rank_stats[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def live_a_little(rank):
    announce_rank(rank)
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_list([{"input_ids": [2, 3], "query": f"q{i}"} for i in range(16)])
        trainer = APATrainer(
            tiny_config(folder),
            tiny_model(),
            tokenizer=tiny_tokenizer(),
            dataset=rows,
            peft_config=lora_config(),
        )
        queries, responses, scores = tiny_rollouts(4, seed=rank)
        bad = [torch.tensor(float("nan")), *scores[1:]] if rank == 1 else scores
        with pytest.raises(ValueError) as refused:
            trainer.step(queries, responses, bad)
        trainer.step(queries, responses, scores)
        parameters = {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
        sampled = trainer.generate([torch.tensor([2, 3])] * 4, return_prompt=False, max_new_tokens=8)
        seen = [query for batch in trainer.dataloader for query in batch["query"]]
        return str(refused.value), parameters, [r.tolist() for r in sampled], seen, dist.get_rank()


def test_ranks_refuse_together_stay_together_and_see_and_sample_different_things():
    (first, lora_0, sampled_0, seen_0, _), (second, lora_1, sampled_1, seen_1, rank) = run_in_two_processes(
        live_a_little
    )
    assert rank == 1
    assert "scores[0] is nan" in second
    assert "1 other process" in first
    assert sampled_0 != sampled_1
    # After the good step both hold the same LoRA weights, of which some have moved.
    assert all((lora_0[name] == lora_1[name]).all() for name in lora_0)
    assert any("lora_B" in name and weight.any() for name, weight in lora_0.items())
    # Each process has its own half of one shuffled order.
    assert sorted(seen_0 + seen_1) == sorted(f"q{i}" for i in range(16))


def train_here(folder, batch_size, stop=None, resume=None, **config):
    """Greedy sampling, so that how many processes draw random numbers does not matter."""
    options = {"optim": "sgd", "learning_rate": 0.1, "top_k": 1, "max_completion_length": 5, "max_steps": 4, "seed": 3}
    options |= {"batch_size": batch_size, "mini_batch_size": batch_size, "ppo_epochs": 2, "logging_steps": 1, **config}
    trainer = APATrainer(
        tiny_config(folder, **options),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        train_dataset=PROMPTS,
        reward_funcs=few_nines,
        callbacks=[] if stop is None else [StopAt(stop)],
    )
    trainer.train(resume_from_checkpoint=resume)
    rows = [row for row in trainer.state.log_history if "apa/mean_scores" in row]
    return {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}, rows


def train_on_two_ranks(rank, folder):
    announce_rank(rank)
    whole = train_here(f"{folder}/whole", 2)
    train_here(f"{folder}/cut", 2, stop=3)
    return whole, train_here(f"{folder}/cut", 2, resume=f"{folder}/cut/checkpoint-3")


def test_train_on_two_ranks_equals_one_process_and_goes_on_where_it_stopped(tmp_path):
    results = run_in_two_processes(train_on_two_ranks, str(tmp_path))
    alone, alone_rows = train_here(tmp_path / "alone", 4)
    for (whole, rows), (resumed, _) in results:
        as_tensors = [{name: torch.from_numpy(p) for name, p in named.items()} for named in (whole, resumed, alone)]
        assert_same(as_tensors[0], as_tensors[2], tolerance=1e-5)
        assert_same(as_tensors[1], as_tensors[0], tolerance=1e-30)
        assert len(rows) == len(alone_rows) == 2
        for row, alone_row in zip(rows, alone_rows, strict=True):
            for name in ("apa/mean_scores", "objective/kl", "apa/loss/total", "tokens/responses_len_mean"):
                assert row[name] == pytest.approx(alone_row[name], rel=1e-4, abs=1e-5), name
