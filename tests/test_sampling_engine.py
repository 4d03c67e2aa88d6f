"""`sampler=`: an inference engine of the user's own in place of the policy's `generate`."""

import copy

import pytest
import torch

from tests.test_docs import ROOT, fenced
from tests.test_training import trainer_for
from tests.test_update import assert_same
from tests.tiny import EOS, lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models import merged_parameters
from trl_apa.rollout.sampling import Sampler


class Greedy:
    """One token after the other from a copy of the policy that it updates when the step has changed; no cache."""

    def __init__(self, more_tokens=0):
        self.network, self.step, self.requests, self.more_tokens = None, None, [], more_tokens

    def sample(self, policy, prompts, request):
        self.requests.append(request)
        if self.step != request.step:
            self.network, self.step = self.dense(policy), request.step
        return [self.answer(prompt, limit) for prompt, limit in zip(prompts, request.limits, strict=True)]

    def dense(self, policy):
        if not hasattr(policy, "peft_config"):
            return copy.deepcopy(policy)
        network = tiny_model()
        network.load_state_dict(dict(merged_parameters(policy)), strict=False)
        return network

    def answer(self, prompt, limit):
        ids = list(prompt)
        for _ in range(limit + self.more_tokens):
            ids.append(int(self.network(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


class Fixed:
    def __init__(self, responses):
        self.responses = responses

    def sample(self, policy, prompts, request):
        return self.responses


GREEDY = {"top_k": 1, "max_completion_length": 5}


@pytest.mark.parametrize("options", [{}, {"peft_config": lora_config()}], ids=["full", "lora"])
def test_a_run_with_an_engine_is_that_without(tmp_path, options):
    """Every token greedy, so that both sample the same; the engine goes on behind the end, and is cut there."""
    kwargs = {"model": tiny_model(), **options}

    def run(name, **engine):
        model, adapters = copy.deepcopy(kwargs["model"]), options
        return trainer_for(tmp_path / name, model=model, **GREEDY, learning_rate=1e-2, **adapters, **engine)

    plain, engine = run("plain"), Greedy(more_tokens=3)
    plain.train()
    with_engine = run("engine", sampler=engine)
    with_engine.train()
    responses = [t.run_state.iteration.rollouts.responses for t in (plain, with_engine)]
    assert [r.tolist() for r in responses[0]] == [r.tolist() for r in responses[1]]
    assert_same(dict(with_engine.model.named_parameters()), dict(plain.model.named_parameters()), tolerance=1e-6)
    assert [request.step for request in engine.requests] == [0]
    assert engine.requests[0].limits == [5] * 4 and engine.requests[0].generation_config.top_k == 1


def test_generate_takes_it_too_and_cuts_at_ends_limits_and_stop_strings(tmp_path):
    queries, _, _ = tiny_rollouts()
    answers = [[5, EOS, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [EOS]]
    trainer = tiny_trainer(tmp_path, None, {"sampler": Fixed(answers)})
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
    assert [r.tolist() for r in responses] == [[5, EOS], [5, 6, 7, 8], [5, 6], [EOS]]
    with_prompts = trainer.generate(queries, max_new_tokens=4)
    assert [r.tolist() for r in with_prompts] == [
        [*q.tolist(), *r.tolist()] for q, r in zip(queries, responses, strict=True)
    ]
    pair = trainer.generate(queries, return_prompt=False, max_new_tokens=4, generate_ref_response=True)
    assert [r.tolist() for r in pair[0]] == [r.tolist() for r in responses] and len(pair[1]) == len(queries)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[5]], "sampler gave 1 responses to 4 prompts"),
        ([[5], [], [5], [5]], "gave no token for row 1"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(tmp_path, answers, message):
    queries, _, _ = tiny_rollouts()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, None, {"sampler": Fixed(answers)}).generate(queries, max_new_tokens=4)


def test_what_is_no_engine_is_refused(tmp_path):
    assert isinstance(Greedy(), Sampler)
    with pytest.raises(ValueError, match="sampler is a str; it should have a method sample"):
        tiny_trainer(tmp_path, None, {"sampler": "vllm"})
    with pytest.raises(ValueError, match="sampler: model is an encoder-decoder"):
        tiny_trainer(tmp_path, tiny_model("t5"), {"sampler": Greedy()})


def test_gradient_checkpointing_is_off_while_an_engine_calls_the_policy(tmp_path):
    seen = []

    class Looks(Greedy):
        def sample(self, policy, prompts, request):
            seen.append((policy.is_gradient_checkpointing, torch.is_grad_enabled()))
            return super().sample(policy, prompts, request)

    trainer_for(tmp_path, **GREEDY, gradient_checkpointing=True, sampler=Looks()).train()
    assert seen == [(False, False)]


def test_the_engine_of_the_page_on_extending_runs(tmp_path):
    """Sampled from the policy's own network, in equal parts: as likely as the trainer's own sampling."""
    (block,) = [b for b in fenced(ROOT / "docs" / "extending.md", "python") if "class OneByOne" in b]
    namespace = {}
    exec(block, namespace)
    trainer = trainer_for(tmp_path, sampler=namespace["OneByOne"](), max_completion_length=5)
    trainer.train()
    assert trainer.num_iterations_done == 1
    assert {len(r) for r in trainer.run_state.iteration.rollouts.responses} <= set(range(1, 6))
