"""`rollouts_ahead=1`: a server samples the next iteration while this one is learned."""

import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.test_training import PROMPTS, StopAt, few_nines, logged, parameters, trainer_for
from tests.test_update import assert_same
from tests.test_vllm import GREEDY, folder, policy_from, server, vllm  # noqa: F401  # fixtures
from tests.tiny import tiny_config, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.rollout.prompts import PromptSource
from trl_apa.rollout.vllm_requests import ServerRequests
from trl_apa.trainer import rollouts_ahead
from trl_apa.trainer.rollouts_ahead import STALENESS, RolloutsAhead


STEPS = 4  # optimizer steps of an iteration of `trainer_for`
FAR = {"learning_rate": 0.1, "max_steps": 4 * STEPS}  # greedy answers change with each update


def ahead(tmp_path, folder, server, adapted=False, **options):  # noqa: F811
    served = {"vllm_mode": "server", "vllm_server_base_url": server.url, "rollouts_ahead": 1}
    return trainer_for(tmp_path, model=policy_from(folder, adapted), **{**GREEDY, **FAR, **served, **options})


def asked(server):  # noqa: F811
    """The prompts of each request for samples."""
    return [body["prompt"] for path, body in server.requests if path == "/v1/completions"]


def looped(tmp_path, folder, adapted, behind, iterations=4, **options):  # noqa: F811
    """The classic loop: each iteration sampled `behind` iterations before it is learned. Its trainer and responses."""
    options = {**GREEDY, **FAR, "use_vllm": False, **options}
    trainer = trainer_for(tmp_path, model=policy_from(folder, adapted), **options)
    source, tokenizer, sampled = PromptSource(trainer.train_dataset, 4, seed=3), tiny_tokenizer(), {}

    def sample(iteration):
        queries = [torch.tensor(tokenizer(row["prompt"])["input_ids"]) for row in source.rows(iteration)]
        sampled[iteration] = queries, trainer.generate(queries, batch_size=4, return_prompt=False)

    for iteration in range(iterations):
        for wanted in range(iteration + behind + 1):
            if wanted not in sampled:
                sample(wanted)
        queries, responses = sampled[iteration]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        trainer.step(queries, responses, [torch.tensor(score) for score in few_nines(texts)])
    return trainer, [sampled[iteration][1] for iteration in range(iterations)]


@pytest.mark.parametrize(("adapted", "normalizer"), [(False, "none"), (True, "none"), (False, "learned")])
def test_each_iteration_is_sampled_before_the_update_on_the_one_before(
    tmp_path,
    folder,  # noqa: F811
    server,  # noqa: F811
    adapted,
    normalizer,
):
    """Iteration k by the policy that learned from 0 to k-2: a loop over `generate` and `step` says the same."""
    expected, stale = looped(tmp_path / "loop", folder, adapted, behind=1, normalizer=normalizer)
    _, fresh = looped(tmp_path / "fresh", folder, adapted, behind=0, normalizer=normalizer)
    assert [torch.cat(rows).tolist() for rows in stale] != [torch.cat(rows).tolist() for rows in fresh]
    trainer = ahead(tmp_path, folder, server, adapted, normalizer=normalizer)
    trainer.train()
    assert_same(parameters(trainer), parameters(expected), tolerance=1e-30)
    assert len(asked(server)) == 4, "none is asked for that is not learned"
    staleness = [row[STALENESS] for row in trainer.state.log_history if STALENESS in row]
    assert staleness == [0, STEPS, STEPS, STEPS]


def test_the_server_samples_while_the_trainer_learns(tmp_path, folder, server):  # noqa: F811
    """It answers for iteration k only when an optimizer step on iteration k-1 has been made."""
    learning, late = [threading.Event() for _ in range(5)], []
    learning[0].set()
    complete = server.complete

    def wait_for_a_step(body):
        number = len(asked(server)) - 1
        if not learning[number].wait(timeout=60):
            late.append(number)
        return complete(body)

    class Learning(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            learning[1 + (state.global_step - 1) // STEPS].set()

    server.complete = wait_for_a_step
    trainer = ahead(tmp_path, folder, server, callbacks=[Learning()])
    trainer.train()
    assert not late and trainer.num_iterations_done == len(asked(server)) == 4


@pytest.mark.parametrize(("stop", "normalizer"), [(2, "none"), (4, "none"), (9, "none"), (9, "learned")])
def test_a_resumed_run_is_the_run_that_did_not_stop(tmp_path, folder, server, stop, normalizer):  # noqa: F811
    """The checkpoint holds what was sampled ahead: the policy that sampled it is gone."""
    through = ahead(tmp_path / "through", folder, server, normalizer=normalizer)
    through.train()
    ahead(tmp_path / "stopped", folder, server, normalizer=normalizer, callbacks=[StopAt(stop)]).train()
    before = len(asked(server))
    again = ahead(tmp_path / "stopped", folder, server, normalizer=normalizer)
    again.train(resume_from_checkpoint=True)
    assert_same(parameters(again), parameters(through), tolerance=1e-30)
    assert logged(again, "train_loss")[:-1] == logged(through, "train_loss")[:-1]
    # Of the four iterations those that the checkpoint holds were not asked for again.
    held = (stop - 1) // STEPS + 2
    assert len(asked(server)) - before == 4 - held


def test_a_run_that_is_resumed_twice_is_the_run_that_did_not_stop(tmp_path, folder, server):  # noqa: F811
    """The second stop is in the iteration of the first, before the trainer has read what the checkpoint held."""
    through = ahead(tmp_path / "through", folder, server)
    through.train()
    for stop in (5, 6):
        trainer = ahead(tmp_path / "stopped", folder, server, callbacks=[StopAt(stop)])
        trainer.train(resume_from_checkpoint=stop == 6)
    again = ahead(tmp_path / "stopped", folder, server)
    again.train(resume_from_checkpoint=True)
    assert_same(parameters(again), parameters(through), tolerance=1e-30)


def test_a_run_whose_reward_failed_is_resumed_with_what_was_sampled(tmp_path, folder, server):  # noqa: F811
    """Both of the iteration that was not scored and of the one behind it, by the policies that sampled them."""
    through = ahead(tmp_path / "through", folder, server)
    through.train()
    calls = []

    def fails_at_the_third(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 3:
            raise OSError("gone")
        return few_nines(completions, **columns)

    fails_at_the_third.__name__ = few_nines.__name__
    failing = ahead(tmp_path / "failed", folder, server, reward_funcs=fails_at_the_third)
    with pytest.raises(RuntimeError, match="gone"):
        failing.train()
    before = len(asked(server))
    again = ahead(tmp_path / "failed", folder, server, reward_funcs=fails_at_the_third)
    again.train(resume_from_checkpoint=True)
    assert len(asked(server)) == before, "all four were sampled already"
    assert_same(parameters(again), parameters(through), tolerance=1e-30)


def test_processes_agree_on_what_a_checkpoint_holds(monkeypatch):
    """Where the process that talks to the server has no answer, the others do not look for one."""
    sent, states = [], [{"iteration": 3, "step": 8, "answer": None}]
    engine = SimpleNamespace(
        requests=None,
        send_ahead=lambda request, step: sent.append(request),
        answer_ahead=lambda request, notes: [torch.tensor([1])],
    )
    for others, expected in (([[3]], []), ([[]], [["row 3"]])):
        sent.clear()
        monkeypatch.setattr(rollouts_ahead, "gather_object", lambda own, others=others: [*others, *own])
        rollouts = RolloutsAhead(
            engine,
            rows_of=lambda iteration: [f"row {iteration}"],
            request_of=lambda rows: SimpleNamespace(queries=rows, rows=rows),
            notes=lambda: None,
        )
        rollouts.load_state_dict(states)
        _, episodes = rollouts(3, 12, is_last=True)
        assert [request.rows for request in sent] == expected
        assert episodes.statistics == {STALENESS: 0.0 if expected else 4.0}


def test_evaluation_waits_and_leaves_the_run_as_it_is(tmp_path, folder, server):  # noqa: F811
    """Its weights go over when the server has answered what was sent ahead."""
    plain = ahead(tmp_path / "plain", folder, server)
    plain.train()
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": PROMPTS[:3]}
    evaluated = ahead(tmp_path, folder, server, **options)
    evaluated.train()
    assert sum("eval_reward" in row for row in evaluated.state.log_history) == 4 * STEPS
    assert_same(parameters(evaluated), parameters(plain), tolerance=1e-30)


def test_a_server_that_fails_is_named_and_what_was_learned_can_be_resumed(tmp_path, folder, server):  # noqa: F811
    through = ahead(tmp_path / "through", folder, server)
    through.train()

    class FailsAtTheThird(list):
        def append(self, request):
            super().append(request)
            server.failing = len(asked(server)) == 3

    server.requests = FailsAtTheThird()
    with pytest.raises(RuntimeError, match=r"(?s)the vLLM server failed: .*out of memory"):
        ahead(tmp_path / "failed", folder, server).train()
    assert (tmp_path / "failed" / "checkpoint-8" / "trainer_state.json").is_file()
    again = ahead(tmp_path / "failed", folder, server)
    again.train(resume_from_checkpoint=True)
    # Sampled again, by the policy of the checkpoint: not the numbers of a run without a failure.
    staleness = [row[STALENESS] for row in again.state.log_history if STALENESS in row]
    assert staleness == [0, STEPS, 0, STEPS]


def test_another_run_does_not_read_what_the_last_one_sent_for(tmp_path, folder, server):  # noqa: F811
    stopped = ahead(tmp_path, folder, server, callbacks=[StopAt(STEPS)])
    stopped.train()
    stopped.pop_callback(StopAt)
    stopped.train()
    staleness = [row[STALENESS] for row in stopped.state.log_history if STALENESS in row]
    assert staleness == [0, STEPS, STEPS, STEPS]


def test_ppo_weighs_by_the_policy_that_sampled(tmp_path, folder, server):  # noqa: F811
    """The second iteration's tokens were sampled by another policy than the one before its update."""
    server.reports = True
    options = {"loss_type": "ppo", "importance_correction": "truncate", "top_k": 0, "max_steps": 2 * STEPS}
    trainer = ahead(tmp_path, folder, server, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if STALENESS in row]
    apart = [row["sampling/importance_weight_max"] - row["sampling/importance_weight_min"] for row in rows]
    assert [row[STALENESS] for row in rows] == [0, STEPS]
    assert apart[0] < 1e-3 < 0.1 < apart[1]
    iteration = trainer.run_state.iteration.rollouts
    ratio = (iteration.old_logprobs_BR - iteration.sampling_logprobs_BR).exp().clamp(max=3.0)
    torch.testing.assert_close(
        iteration.importance_weights_BR[iteration.response_mask_BR], ratio[iteration.response_mask_BR]
    )


def test_ppo_without_the_servers_log_probs_stops_before_it_learns(tmp_path, folder, server):  # noqa: F811
    options = {"loss_type": "ppo", "importance_correction": "truncate", "temperature": 0.7, "top_k": 0}
    server.reports = True
    trainer = ahead(tmp_path, folder, server, **options)
    with (
        pytest.warns(UserWarning, match="before temperature"),
        pytest.raises(ValueError, match=r"rollouts_ahead=1, but the vLLM server does not report the log-probs"),
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rollouts_ahead": 2}, "rollouts_ahead=2: it should be 0 or 1"),
        ({"use_vllm": False}, "use_vllm=False and vllm_mode='server': only a vLLM server samples while"),
        ({"vllm_mode": "colocate"}, "use_vllm=True and vllm_mode='colocate': only a vLLM server samples while"),
        ({"loss_type": "ppo"}, "rollouts_ahead=1 with loss_type='ppo': .* set importance_correction="),
        ({"loss_type": "grpo", "num_generations": 2}, "rollouts_ahead=1 with loss_type='grpo'"),
        ({"normalizer": "group", "num_generations": 2}, "rollouts_ahead=1 with normalizer='group'"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(tmp_path, vllm, options, problem):  # noqa: F811
    with pytest.raises(ValueError, match=problem):
        tiny_config(tmp_path, **{"use_vllm": True, "vllm_mode": "server", "rollouts_ahead": 1, **options})


def test_rollouts_of_several_turns_are_not_sampled_ahead(tmp_path, folder, server):  # noqa: F811
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "rollouts_ahead": 1}
    with pytest.raises(ValueError, match="rollouts_ahead=1 with tools, environment_factory or rollout_func"):
        APATrainer(
            tiny_config(tmp_path, **served),
            policy_from(folder),
            tokenizer=tiny_tokenizer(),
            reward_funcs=few_nines,
            train_dataset=PROMPTS,
            rollout_func=lambda prompts, trainer: {},
        )


def test_step_and_generate_sample_from_the_policy_as_it_is(tmp_path, folder, server):  # noqa: F811
    """The option is of `train`: a classic loop decides by itself when it samples."""
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    queries, _, scores = tiny_rollouts()
    found = []
    for number in (0, 1):
        options = {**served, "rollouts_ahead": number, "learning_rate": 0.1, "max_completion_length": 5}
        trainer = tiny_trainer(tmp_path, policy_from(folder), **options)
        for _ in range(2):
            responses = trainer.generate(queries, return_prompt=False, do_sample=False)
            trainer.step(queries, responses, scores)
        found.append(torch.cat(responses).tolist())
    assert found[0] == found[1]


def test_one_request_at_a_time_by_hand():
    """Whatever follows a request that was sent ahead waits for it; its answer, or its failure, is read once."""
    order, release = [], threading.Event()

    class Client:
        def generate(self, prompts, **options):
            if options["n"] == 1:
                assert release.wait(timeout=60)
            order.append(options["n"])
            if options["n"] == 3:
                raise OSError("gone")
            return {"completion_ids": [[options["n"]]]}

    client = Client()
    requests = ServerRequests(client)
    with requests.sending_ahead():
        assert client.generate([[5]], n=1)["completion_ids"] == [[]]
    assert order == []
    threading.Timer(0.05, release.set).start()
    assert client.generate([[5]], n=2)["completion_ids"] == [[2]] and order == [1, 2]
    assert requests.answer() == {"completion_ids": [[1]]}
    with requests.reading_ahead():
        assert client.generate([[5]], n=1)["completion_ids"] == [[1]] and order == [1, 2]
    assert requests.answer() is None
    with requests.sending_ahead():
        client.generate([[5]], n=3)
    assert requests.answer() is None and requests.failure is None
    with requests.reading_ahead():
        assert client.generate([[5]], n=3)["completion_ids"] == [[]]
    assert str(requests.failure) == "gone"
