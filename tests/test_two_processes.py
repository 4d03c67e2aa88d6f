"""`step` and `train` with DDP on two ranks against one process that sees both ranks' rollouts."""

import os
import re
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, TrainerCallback

from tests._engines import (
    ACCUMULATED,
    alone,
    announce_rank,
    assert_equal_outcome,
    normalized,
    on_one_8bit_base,
    on_one_base,
    rows_of,
    stepped,
)
from tests._two_processes import WORLD_SIZE, run_in_two_processes
from tests.fake_vllm import Server, install
from tests.families import family_model
from tests.test_reward_faults import FAULTS, fails_at
from tests.test_token_budget import UNEVEN, step_on_uneven_rows, uneven_rollouts
from tests.test_training import PROMPTS, StopAt, few_nines, logged, parameters
from tests.test_update import assert_same, learner
from tests.tiny import CONFIGS, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.algorithms.estimators import AdvantageEstimator
from trl_apa.models.value_adapter import VALUE_ADAPTER
from trl_apa.rollout import shared_prompts
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.trainer.checkpoints import MANIFEST
from trl_apa.trainer.resuming import is_complete, last_complete_checkpoint


OPTIONS = {"ppo_epochs": 2, "gamma": 0.9, "scale_rewards": True, "score_clip": 1.5}


def step_on_half(rank, folder, loss_type):
    split = ACCUMULATED if loss_type == "apa" else {"mini_batch_size": 4}
    trainer = learner(folder, batch_size=4, loss_type=loss_type, **split, **OPTIONS)
    halves = [[column[row] for row in rows_of(rank)] for column in tiny_rollouts(8)]
    stats = [trainer.step(*halves) for _ in range(2)][-1]
    assert trainer.accelerator.num_processes == WORLD_SIZE
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, stats


def step_on_half_of_groups(rank, folder):
    """`step_on_half` of rows with two prompts on each rank, which read them once."""
    trainer = learner(folder, batch_size=4, shuffle="groups", **ACCUMULATED, **OPTIONS)
    halves = [[column[row] for row in rows_of(rank)] for column in rollouts_of_groups()]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompts, "SHORTEST", 1)
        patch.setattr(shared_prompts, "SMALLEST_SHARE", 0.0)
        patch.setattr(Rollouts, "micro_batch", noting_layouts(seen))
        trainer.step(*halves)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, seen


def step_on_half_without_critic(rank, folder, loss_type, name, whiten):
    """`step_on_half_of_groups` without a value model; one of the prompts has rows on both ranks."""
    options = {"advantage_estimator": name, "whiten_advantages": whiten, "loss_type": loss_type, **ACCUMULATED}
    trainer = without_critic(folder, batch_size=4, **options)
    halves = [[column[row] for row in rows_of(rank)] for column in rollouts_of_groups()]
    given = {} if name in COMPARED else {"ref_rewards": [REF_REWARDS[row] for row in rows_of(rank)]}
    stats = [trainer.step(*halves, **given) for _ in range(2)][-1]
    if not trainer.args.estimator.needs_groups or loss_type == "rebel":  # whose groups are those of a forward pass
        return parameters(trainer), stats, ""
    queries, responses, scores = halves
    lone = [*queries[:2], torch.tensor([9, 9]), queries[3]] if rank == 1 else queries
    with pytest.raises(ValueError) as refused:
        trainer.step(lone, responses, scores)
    return parameters(trainer), stats, str(refused.value)


def without_critic(folder, **config):
    options = {"optim": "sgd", "learning_rate": 0.1, "ppo_epochs": 2, "scale_rewards": True, **config}
    if options["loss_type"] == "grpo":
        options |= {"loss_aggregation": "grpo", "kl_coef": 0.3}  # a mean over responses, of all ranks
    if options["loss_type"] == "response_apa":
        options |= {"normalizer": "group"}  # a mean over the responses of all ranks
    return APATrainer(tiny_config(folder, **options), tiny_model(), tokenizer=tiny_tokenizer())


WITHOUT_CRITIC = [
    ("ppo", "group", True),
    ("grpo", "group", False),
    ("rloo", "leave_one_out", False),
    ("response_apa", "group_log_mean_exp", False),
    ("ppo", "batch", False),
    ("cispo", "group", False),
    ("mirror_descent", "group", True),
    ("rebel", "group", False),
    ("qrpo", "quantile", False),
    ("astar_po", "optimal_value", False),
    ("rloo", "tests.test_two_processes:ABOVE_THE_BEST", False),
]
# A loss, and where its advantages come from.
NORMALIZED = [("apa", "gae"), ("response_apa", "batch")]
COMPARED = ("group", "leave_one_out", "group_log_mean_exp", "batch")
# One to three for each of the eight rows, and five for the last: on one of two ranks alone.
REF_REWARDS = [[0.3 * row - 1.0] * (row % 3) + [0.5] for row in range(7)] + [[-1.0, 0.0, 1.0, 0.5, -0.5]]


def above_the_best(rows, args):
    """A user's estimator: the reward less the best of pi_init's, and less the mean of that over all rows."""
    above_B = rows.rewards_BR.sum(dim=1) - rows.ref_rewards_BN.nan_to_num(nan=-9.0).amax(dim=1)
    return (above_B - above_B.mean())[:, None].expand_as(rows.rewards_BR), None


ABOVE_THE_BEST = AdvantageEstimator(above_the_best, needs_ref_rewards=True)


def ref_rewards_of_rank(rank, folder):
    """Three prompts on the first rank, one of them alone on the second."""
    calls = []

    def lengths(completions, **_):
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    config = tiny_config(folder, loss_type="qrpo", num_ref_samples=2, seed=rank, max_completion_length=6)
    trainer = APATrainer(config, tiny_model(), tokenizer=tiny_tokenizer(), reward_funcs=lengths)
    first, second, third = torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7])
    queries = [first, second, first, third] if rank == 0 else [first] * 4
    rewards = trainer.reference_rewards(queries)
    return rewards, trainer.reference_rewards(queries), trainer.run_state.ref_rewards, calls


def noting_layouts(seen):
    def micro_batch(self, rows, pad_token_id, layout, original=Rollouts.micro_batch):
        seen.append(layout)
        return original(self, rows, pad_token_id, layout)

    return micro_batch


def rollouts_of_groups():
    """Eight rollouts of three prompts: of the first on one half, of the last on the other, of one on both."""
    queries, responses, scores = tiny_rollouts(8)
    return [queries[number] for number in (0, 1, 1, 0, 1, 2, 1, 2)], responses, scores


def step_on_half_by_overrides(rank, folder):
    """`step_on_half` of a subclass that overrides every method that `step` calls, and changes nothing."""
    names = ("compute_rewards", "compute_advantages", "_kl_penalty", "loss", "record_step_stats")

    def passed_on(name):
        return lambda self, *args, **kwargs: getattr(APATrainer, name)(self, *args, **kwargs)

    kwargs = {"optim": "sgd", "learning_rate": 0.1, "batch_size": 4, **ACCUMULATED, **OPTIONS, "loss_type": "ppo"}
    trainer = type("Mine", (APATrainer,), {name: passed_on(name) for name in names})(
        tiny_config(folder, **kwargs), tiny_model(), tokenizer=tiny_tokenizer()
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    halves = [[column[row] for row in rows_of(rank)] for column in tiny_rollouts(8)]
    stats = [trainer.step(*halves) for _ in range(2)][-1]
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, stats


def live_a_little(rank, folder):
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
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    sampled = trainer.generate([torch.tensor([2, 3])] * 4, return_prompt=False, max_new_tokens=8)
    seen = [query for batch in trainer.dataloader for query in batch["query"]]
    return str(refused.value), parameters, [r.tolist() for r in sampled], seen, dist.get_rank()


def fail_in_one_process(rank, folder):
    """What each process says of a function that fails in the second, beside a network that talks to both as ZeRO-3's
    does, and of a policy that the first cannot write; then the number of passes of the network."""
    config, passes = CONFIGS["llama"](), []
    config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(config)
    network.base_model.register_forward_pre_hook(lambda *_: passes.append(dist.all_reduce(torch.ones(()))))

    def one_side(prompts, **_):
        return [1.0 if rank == 0 or fine else float("nan")] * len(prompts)

    trainer = APATrainer(
        tiny_config(folder, max_completion_length=3, max_steps=1),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        peft_config=lora_config(),
        train_dataset=PROMPTS,
        reward_funcs=[network, one_side],
    )
    next(network.parameters()).ds_id = 0  # as ZeRO-3 marks what it has sharded
    fine, messages = False, []
    with pytest.raises(ValueError) as failed:
        trainer.train()
    messages.append(str(failed.value))
    passes_then, fine = len(passes), True
    trainer.train()
    Path(folder, "file").touch()
    with pytest.raises((OSError, ValueError)) as failed:
        trainer.merge_and_save(Path(folder, "file", "merged"))
    messages.append(f"{type(failed.value).__name__}: {failed.value}")
    return messages, passes_then, len(passes)


def end_in_one_process(rank, folder):
    """What each process says of a function that ends the second one, in training and in an evaluation, and what is
    saved then. With one folder for both, where the first writes the checkpoint."""
    told = {}
    for place, fault, call, options in (
        ("training", "SystemExit", 2, {"reward_timeout": 60.0}),
        ("training", "KeyboardInterrupt", 2, {}),
        ("training", "1e39", 2, {}),
        ("evaluation", "CancelledError", 2, {"eval_strategy": "steps", "eval_steps": 2}),
    ):
        own = f"{folder}/{place}-{fault}"
        config = {"mini_batch_size": 2, "ppo_epochs": 2, "max_completion_length": 3, "max_steps": 6, **options}
        trainer = APATrainer(
            tiny_config(own, **config),
            tiny_model(),
            tokenizer=tiny_tokenizer(),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS[:2],
            reward_funcs=fails_at(call, fault) if rank == 1 else few_nines,
        )
        with pytest.raises((KeyboardInterrupt, RuntimeError, ValueError)) as failed:
            trainer.train()
        message = f"{type(failed.value).__name__}: {failed.value}"
        dist.barrier()  # the first process writes the last file
        told[place, fault] = (message, os.path.basename(last_complete_checkpoint(own)))
    return told


def spoil_in_one_process(rank, folder):
    """The second of four gradients is NaN in one process: what each says, how many updates it began, its weights."""
    trainer, begun = learner(folder, mini_batch_size=2, ppo_epochs=2, optim="adamw_torch_fused"), []
    trainer.optimizer.register_step_post_hook(lambda *_: begun.append(parameters(trainer)))
    trainer.model.policy.lm_head.weight.register_hook(
        lambda gradient: gradient * (float("nan") if rank == 1 and trainer.state.global_step == 1 else 1.0)
    )
    with pytest.raises(FloatingPointError) as failed:
        trainer.step(*tiny_rollouts(4, seed=rank))
    return str(failed.value), begun, parameters(trainer)


class TerminateOneProcess(TrainerCallback):
    """Sends SIGTERM to this process, if it is the one, while it takes an optimizer step."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank
        self.stopped_at = None

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped_at = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def trained_here(folder, batch_size, callback=None, resume=None, **config):
    """Greedy sampling, so that how many processes draw random numbers does not matter."""
    options = {"optim": "sgd", "learning_rate": 0.1, "top_k": 1, "max_completion_length": 5, "max_steps": 4, "seed": 3}
    options |= {"batch_size": batch_size, "mini_batch_size": batch_size, "ppo_epochs": 2, "logging_steps": 1, **config}
    trainer = APATrainer(
        tiny_config(folder, **options),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        train_dataset=PROMPTS,
        reward_funcs=few_nines,
        callbacks=[] if callback is None else [callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_here(folder, batch_size, callback=None, resume=None, **config):
    """Weights, and the rows of the log at the end of an iteration."""
    trainer = trained_here(folder, batch_size, callback, resume, **config)
    rows = [row for row in trainer.state.log_history if "apa/mean_scores" in row]
    return parameters(trainer), rows


def terminate_here(folder, callback):
    """The exit status, and the step at which the run has stopped."""
    with pytest.raises(SystemExit) as ended:
        train_here(folder, 2, callback)
    return ended.value.code, callback.stopped_at


def sample_here(folder, stop=None, resume=None):
    """All that has a state: random numbers, AdamW, a schedule, a running scale of the scores."""
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "top_k": 0, "scale_rewards": True}
    callback = None if stop is None else StopAt(stop)
    trainer = trained_here(folder, 2, callback, resume, lr_scheduler_type="linear", **options)
    return parameters(trainer), trainer.optimizer.state_dict(), logged(trainer, "train_loss")[:-1]


def train_without_critic(folder):
    options = {"advantage_estimator": "group", "num_generations": 2, "top_k": 0}
    complete = train_here(f"{folder}/no-critic", 2, **options)
    train_here(f"{folder}/no-critic-stopped", 2, StopAt(3), **options)
    checkpoint = f"{folder}/no-critic-stopped/checkpoint-3"
    return complete[0], train_here(f"{folder}/no-critic-stopped", 2, resume=checkpoint, **options)[0]


def train_on_two_ranks(rank, folder):
    whole = train_here(f"{folder}/whole", 2)
    train_here(f"{folder}/cut", 2, StopAt(3))
    resumed = train_here(f"{folder}/cut", 2, resume=f"{folder}/cut/checkpoint-3")
    terminated = terminate_here(f"{folder}/terminated", TerminateOneProcess(3, rank=1))
    resumed_again = train_here(f"{folder}/terminated", 2, resume=True)
    return whole, resumed, terminated, resumed_again, train_with_one_server(rank, folder)


def resume_without_manifest(rank, folder):
    """From a checkpoint as 0.1.0 wrote it: the weights, and the files of the next checkpoint."""
    if rank == 0:
        shutil.copytree(f"{folder}/cut/checkpoint-3", f"{folder}/old/checkpoint-3")
        os.remove(f"{folder}/old/checkpoint-3/{MANIFEST}")
    dist.barrier()
    resumed, _ = train_here(f"{folder}/old", 2, resume=True, save_strategy="steps", save_steps=1)
    return resumed, set(os.listdir(f"{folder}/old/checkpoint-4"))


def sample_on_two_ranks(folder):
    whole = sample_here(f"{folder}/sampled")
    sample_here(f"{folder}/sampled-cut", stop=3)
    return whole, sample_here(f"{folder}/sampled-cut", resume=f"{folder}/sampled-cut/checkpoint-3")


def train_with_one_server(rank, folder):
    """The first rank asks for both; the server is a thread of it."""
    server = Server(f"{folder}/model") if rank == 0 else None
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url if server else None}
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, server)
        trained, _ = train_here(f"{folder}/served", 2, **options)
        requests = [] if server is None else [len(b["prompt"]) for path, b in server.requests if "completions" in path]
        ahead = {**options, "rollouts_ahead": 1}
        one_behind, _ = train_here(f"{folder}/ahead", 2, **ahead)
        train_here(f"{folder}/ahead-stopped", 2, StopAt(1), **ahead)
        resumed, _ = train_here(f"{folder}/ahead-stopped", 2, resume=f"{folder}/ahead-stopped/checkpoint-1", **ahead)
        if rank == 0:
            server.failing = True
        with pytest.raises((RuntimeError, ValueError)) as failed:
            train_here(f"{folder}/unserved", 2, **options)
    return trained, requests, (one_behind, resumed), str(failed.value)


def everything(rank, folder):
    """All that the tests look at, so that two processes are started once."""
    announce_rank(rank)
    rows, own = rows_of(rank), f"{folder}/{rank}"
    results = {loss_type: step_on_half(rank, f"{own}/{loss_type}", loss_type) for loss_type in ("apa", "awr", "ppo")}
    results["groups"] = step_on_half_of_groups(rank, f"{own}/groups")
    for options in WITHOUT_CRITIC:
        results[options] = step_on_half_without_critic(rank, "/".join((own, *options[:2])), *options)
    results["reference rewards"] = ref_rewards_of_rank(rank, f"{own}/reference")
    for loss_type in ("apa", "ppo"):
        results["uneven", loss_type] = step_on_uneven_rows(rank, f"{own}/uneven", loss_type)
    results["train without critic"] = train_without_critic(folder)
    results["overridden"] = step_on_half_by_overrides(rank, f"{own}/overridden")
    results["on one base"] = on_one_base(tiny_config, f"{folder}/base", rows, mini_batch_size=4)
    results["on one base, accumulated"] = on_one_base(tiny_config, f"{folder}/accumulated", rows, **ACCUMULATED)
    results["on one 8-bit base"] = on_one_8bit_base(
        tiny_config, f"{folder}/quantised", f"{folder}/model", rows, mini_batch_size=4
    )
    results["row by row"] = stepped(
        tiny_config, f"{folder}/griffin", rows, family_model("griffin", scale=1.0), ACCUMULATED
    )[1]
    for loss_type, estimator in NORMALIZED:
        options = {"loss_type": loss_type, "advantage_estimator": estimator, **ACCUMULATED}
        results["normalized", loss_type] = normalized(tiny_config, f"{folder}/normalized-{loss_type}", rows, **options)
    results["life"] = live_a_little(rank, f"{own}/life")
    results["failures"] = fail_in_one_process(rank, f"{own}/failures")
    results["ended"] = end_in_one_process(rank, f"{folder}/ended")
    results["spoilt"] = spoil_in_one_process(rank, f"{own}/spoilt")
    results["sample"] = sample_on_two_ranks(folder)
    results["train"] = train_on_two_ranks(rank, folder)
    results["without manifest"] = resume_without_manifest(rank, folder)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    tiny_model().save_pretrained(folder / "model")
    return run_in_two_processes(everything, str(folder))


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_two_ranks_equal_one_process_on_the_concatenated_batch(tmp_path, ranks, loss_type):
    """Also the whitening, the running score scale and every statistic are those of the union."""
    single = learner(tmp_path, batch_size=8, mini_batch_size=8, loss_type=loss_type, **OPTIONS)
    stats = [single.step(*tiny_rollouts(8)) for _ in range(2)][-1]
    expected = {name: p.detach() for name, p in single.model.named_parameters()}
    for weights, rank_stats in (rank[loss_type] for rank in ranks):
        assert_same(weights, expected, tolerance=1e-5)
        assert rank_stats.keys() == stats.keys()
        for name, value in stats.items():
            if not name.startswith("time/"):
                assert rank_stats[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_two_ranks_that_read_common_prompts_once_equal_one_process_that_does_not(tmp_path, ranks):
    single = learner(tmp_path, batch_size=8, mini_batch_size=8, **OPTIONS)
    single.step(*rollouts_of_groups())
    expected = {name: p.detach() for name, p in single.model.named_parameters()}
    for weights, seen in (rank["groups"] for rank in ranks):
        assert set(seen) == {Layout.SHARED}
        assert_same(weights, expected, tolerance=1e-5)


@pytest.mark.parametrize(("loss_type", "name", "whiten"), WITHOUT_CRITIC)
def test_two_ranks_without_a_critic_equal_one_process(tmp_path, ranks, loss_type, name, whiten):
    """The responses to a prompt are compared wherever they are; a prompt with one row is refused by both ranks."""
    options = {"advantage_estimator": name, "whiten_advantages": whiten, "loss_type": loss_type, "mini_batch_size": 8}
    single = without_critic(tmp_path, batch_size=8, **options)
    given = {} if name in COMPARED else {"ref_rewards": REF_REWARDS}
    stats = [single.step(*rollouts_of_groups(), **given) for _ in range(2)][-1]
    for weights, rank_stats, _ in (rank[loss_type, name, whiten] for rank in ranks):
        assert_same(weights, parameters(single), tolerance=1e-5)
        assert rank_stats.keys() == stats.keys()
        for statistic, value in stats.items():
            if not statistic.startswith("time/"):
                assert rank_stats[statistic] == pytest.approx(value, rel=1e-3, abs=1e-4), statistic
    if single.args.estimator.needs_groups and loss_type != "rebel":
        first, second = (rank[loss_type, name, whiten][2] for rank in ranks)
        assert "(the first: of another process)" in first and "(the first: queries[2], 'w9 w9')" in second


@pytest.mark.parametrize(("loss_type", "estimator"), NORMALIZED)
def test_two_ranks_learn_log_z_of_the_states_of_both(tmp_path, ranks, loss_type, estimator):
    expected = normalized(alone, tmp_path, loss_type=loss_type, advantage_estimator=estimator)
    for rank in ranks:
        assert_equal_outcome(rank["normalized", loss_type], expected)


def test_two_ranks_sample_pi_init_for_each_prompt_once_and_agree(ranks):
    """Also where one of them has no new prompt: it makes the same calls. Equal prompts have equal rewards on both."""
    for rewards, again, known, calls in (rank["reference rewards"] for rank in ranks):
        assert [len(part) for part in rewards] == [2, 2, 2, 2]
        assert torch.equal(rewards[0], rewards[2]) and all(map(torch.equal, rewards, again))
        assert known == ranks[0]["reference rewards"][2] and len(known) == 3
        assert calls == [6]  # three prompts of the first rank, two samples each
    assert torch.equal(ranks[0]["reference rewards"][0][0], ranks[1]["reference rewards"][0][3])


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_two_ranks_with_passes_of_so_many_tokens_equal_one_process(tmp_path, ranks, loss_type):
    """The second rank's rows are several times as long; both make as many passes as it needs."""
    single = learner(tmp_path, loss_type=loss_type, **{**UNEVEN, "batch_size": 8, "mini_batch_size": 4})
    stats = [single.step(*uneven_rollouts()) for _ in range(2)][-1]
    for weights, loss, num_passes in (rank["uneven", loss_type] for rank in ranks):
        assert_same(weights, parameters(single), tolerance=1e-5)
        assert loss == pytest.approx(stats["apa/loss/total"], rel=1e-3)
        assert num_passes == 2 * 4 + 2 * 2 * 4


def test_two_ranks_without_a_critic_go_on_with_the_same_bits(ranks, folder):
    for complete, resumed in (rank["train without critic"] for rank in ranks):
        assert_same(resumed, complete, tolerance=1e-30)
    assert not (folder / "no-critic-stopped" / "checkpoint-3" / "value_model").exists()


def test_two_ranks_equal_one_process_where_overrides_are_called(tmp_path, ranks):
    """Parameters, and the statistics that the override and the trainer agree on: means over the processes."""
    single = learner(tmp_path, batch_size=8, mini_batch_size=8, loss_type="ppo", **OPTIONS)
    stats = [single.step(*tiny_rollouts(8)) for _ in range(2)][-1]
    expected = {name: p.detach() for name, p in single.model.named_parameters()}
    for weights, rank_stats in (rank["overridden"] for rank in ranks):
        assert_same(weights, expected, tolerance=1e-5)
        assert rank_stats.keys() >= stats.keys()
        for name in (
            "objective/kl",
            "objective/entropy",
            "ppo/mean_non_score_reward",
            "ppo/loss/policy",
            "ppo/loss/value",
        ):
            assert rank_stats[name] == pytest.approx(stats[name], rel=1e-3, abs=1e-4), name
    assert ranks[0]["overridden"][1]["objective/kl"] == ranks[1]["overridden"][1]["objective/kl"]


def test_two_ranks_equal_one_process_with_all_networks_on_one_base(tmp_path, ranks):
    """With gradient checkpointing; over one micro-batch a step and over two."""
    expected = on_one_base(alone, tmp_path)
    moved = [name for name, weight in expected["weights"].items() if "lora_B" in name and weight.any()]
    assert any(VALUE_ADAPTER in name for name in moved) and any(".default." in name for name in moved)
    for rank in ranks:
        assert_equal_outcome(rank["on one base"], expected)
        assert_equal_outcome(rank["on one base, accumulated"], expected)


@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_two_ranks_equal_one_process_where_rows_are_read_separately(tmp_path, ranks):
    """Each process groups its own rows by length."""
    expected = stepped(alone, tmp_path, model=family_model("griffin", scale=1.0))[1]
    for rank in ranks:
        assert_equal_outcome(rank["row by row"], expected)


def test_two_ranks_equal_one_process_on_an_8bit_base(tmp_path, folder, ranks):
    expected = on_one_8bit_base(alone, tmp_path, str(folder / "model"))
    assert torch.int8 in {weight.dtype for weight in expected["weights"].values()}
    for rank in ranks:
        assert_equal_outcome(rank["on one 8-bit base"], expected)


def test_a_gradient_that_is_not_finite_in_one_process_changes_no_weight_in_any(ranks):
    """Every optimizer is told by its own device: all begin three more steps, and none of them changes anything."""
    for message, begun, weights in (rank["spoilt"] for rank in ranks):
        assert message.startswith("the gradient norm is nan at optimizer step 1; this update was not made")
        assert len(begun) == 4
        assert_same(weights, begun[0], tolerance=1e-30)
        assert_same(weights, ranks[0]["spoilt"][2], tolerance=1e-30)


def test_ranks_refuse_together_stay_together_and_see_and_sample_different_things(ranks):
    (first, lora_0, sampled_0, seen_0, _), (second, lora_1, sampled_1, seen_1, rank) = (rank["life"] for rank in ranks)
    assert rank == 1
    assert "scores[0] is nan" in second
    assert "1 other process" in first
    assert sampled_0 != sampled_1
    # After the good step both hold the same LoRA weights, of which some have moved.
    assert all((lora_0[name] == lora_1[name]).all() for name in lora_0)
    assert any("lora_B" in name and weight.any() for name, weight in lora_0.items())
    # Each process has its own half of one shuffled order.
    assert sorted(seen_0 + seen_1) == sorted(f"q{i}" for i in range(16))


def test_a_failure_of_one_rank_leaves_the_other_neither_in_a_reward_model_nor_before_a_merge(ranks):
    (scored_0, merged_0), *passes_0 = ranks[0]["failures"]
    (scored_1, merged_1), *passes_1 = ranks[1]["failures"]
    assert passes_0 == passes_1 == [0, 4]  # three of them a trial
    assert "1 other process" in scored_0 and "reward function one_side gave nan for row 0" in scored_1
    assert "NotADirectoryError" in merged_0 and "ValueError: 1 other process" in merged_1


@pytest.mark.parametrize(
    ("place", "fault", "saved"),
    [
        ("training", "SystemExit", "checkpoint-4"),
        ("training", "KeyboardInterrupt", "checkpoint-4"),
        ("training", "1e39", "checkpoint-4"),
        ("evaluation", "CancelledError", "checkpoint-2"),
    ],
)
def test_a_reward_function_that_ends_one_rank_is_named_by_both_and_what_was_learned_is_saved(
    ranks, place, fault, saved
):
    (first, of_first), (second, of_second) = (rank["ended"][place, fault] for rank in ranks)
    error, message = FAULTS[fault]
    assert re.match(f"{error.__name__}: {message}", second)
    assert first == f"ValueError: 1 other process(es) failed at the same point: process 1: {second}"
    assert of_first == of_second == saved


def test_train_on_two_ranks_equals_one_process_and_goes_on_where_it_stopped(tmp_path, ranks):
    single, alone_rows = train_here(tmp_path / "alone", 4)
    for (whole, rows), (resumed, _), *_ in (rank["train"] for rank in ranks):
        assert_same(whole, single, tolerance=1e-5)
        assert_same(resumed, whole, tolerance=1e-30)
        assert len(rows) == len(alone_rows) == 2
        for row, alone_row in zip(rows, alone_rows, strict=True):
            for name in ("apa/mean_scores", "objective/kl", "apa/loss/total", "tokens/responses_len_mean"):
                assert row[name] == pytest.approx(alone_row[name], rel=1e-4, abs=1e-5), name


def test_two_ranks_resume_a_checkpoint_without_manifest_and_write_one_for_both(ranks, folder):
    for rank in ranks:
        weights, files = rank["without manifest"]
        assert_same(weights, rank["train"][0][0], tolerance=1e-30)
        assert {f"{kind}_{number}" for kind in ("apa_state", "rng_state") for number in range(2)} <= {
            file.partition(".")[0] for file in files
        }
    assert is_complete(folder / "old" / "checkpoint-4") and not list((folder / "old").glob("_*"))


def test_two_ranks_that_sample_go_on_with_the_same_bits(ranks):
    """In the middle of the second iteration: weights, the states of AdamW, and all that is logged but the clock's."""
    for (weights, optimizer, log), (resumed_weights, resumed_optimizer, resumed_log) in (r["sample"] for r in ranks):
        assert_same(resumed_weights, weights, tolerance=1e-30)
        assert resumed_log == log and {row["step"] for row in log} == {1, 2, 3, 4}
        assert resumed_optimizer["param_groups"] == optimizer["param_groups"]
        assert len(resumed_optimizer["state"]) == len(optimizer["state"]) > 0
        for index, state in optimizer["state"].items():
            assert all(resumed_optimizer["state"][index][name].equal(value) for name, value in state.items())


def test_sigterm_to_one_of_two_ranks_stops_both_at_one_step_with_a_whole_checkpoint(ranks, folder):
    checkpoint = folder / "terminated" / "checkpoint-3"
    assert is_complete(str(checkpoint)) and {f"apa_state_{rank}.pt" for rank in range(2)} <= set(
        os.listdir(checkpoint)
    )
    for (whole, _), _, terminated, (resumed, _), _ in (rank["train"] for rank in ranks):
        assert terminated == (128 + signal.SIGTERM, 3)
        assert_same(resumed, whole, tolerance=1e-30)


def test_two_ranks_share_a_vllm_server_and_fail_together_if_it_fails(ranks):
    messages = []
    for (whole, _), *_, (served, requests, _, failure) in (rank["train"] for rank in ranks):
        assert_same(served, whole, tolerance=1e-6)
        messages.append((requests, failure))
    (asked, first), (not_asked, second) = messages
    assert (asked, not_asked) == ([4, 4], [])
    assert "the vLLM server failed" in first and "1 other process(es) failed at the same point" in second


def test_two_ranks_sample_ahead_as_one_process_does_and_resume(tmp_path, ranks, folder, monkeypatch):
    server = Server(str(folder / "model"))
    install(monkeypatch, server)
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "rollouts_ahead": 1}
    single, _ = train_here(tmp_path, 4, **options)
    server.close()
    for *_, (served, _, (one_behind, resumed), _) in (rank["train"] for rank in ranks):
        assert_same(one_behind, single, tolerance=1e-5)
        assert_same(resumed, one_behind, tolerance=1e-30)
        assert any(not served[name].allclose(weight, atol=1e-4) for name, weight in one_behind.items())
