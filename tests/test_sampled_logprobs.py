"""Log-probs that `generate` notes, and the KL of the policy that sampled."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.rollout.sampled_logprobs import SampledLogprobs


QUERIES = tiny_rollouts(6, seed=3)[0]
SCORES = [torch.tensor(0.5 * (row % 3)) for row in range(6)]
SIZES = {"batch_size": 6, "mini_batch_size": 2, "gradient_accumulation_steps": 1, "max_completion_length": 9}


def sampled(trainer, queries=QUERIES, **options):
    return trainer.generate(queries, return_prompt=False, **options)


def taken(trainer, responses, queries=QUERIES):
    like = torch.zeros(len(queries), max(map(len, responses)))
    return trainer._sampled_logprobs.take(queries, responses, like)


def slow_logprobs(model, query, response, temperature):
    """Token by token, each from a forward of everything before it."""
    found = []
    with torch.no_grad():
        for number, token in enumerate(response):
            if model.config.is_encoder_decoder:
                start = torch.tensor([model.config.decoder_start_token_id])
                inputs = {"input_ids": query[None], "decoder_input_ids": torch.cat([start, response[:number]])[None]}
            else:
                inputs = {"input_ids": torch.cat([query, response[:number]])[None]}
            logits_V = model(**inputs).logits[0, -1].double() / temperature
            found.append(logits_V.log_softmax(-1)[token])
    return torch.stack(found).float()


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)


PROCESSED = {"repetition_penalty": 1.7, "min_new_tokens": 4, "logits_processor": LogitsProcessorList([OnlyEven()])}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"do_sample": False}),
        ("llama", {"batch_size": 6, "top_k": 3, "top_p": 0.8}),
        ("llama", PROCESSED),
        ("llama", {"stop_strings": ["w5"], "remove_padding": False}),
        ("llama", {"use_cache": False}),
        ("gpt2", {"batch_size": 6}),
        ("t5", {}),
        ("t5", PROCESSED),
    ],
)
def test_they_are_those_of_the_models_own_forward(tmp_path, family, options):
    model = tiny_model(family)
    trainer = tiny_trainer(tmp_path, model, **SIZES, temperature=0.7)
    responses = [r[1:] if family == "t5" else r for r in sampled(trainer, **options)]
    cut = trainer._sampled_logprobs._kept
    if "remove_padding" in options:
        responses = [response[: len(logprobs)] for response, logprobs in zip(responses, _by_row(cut), strict=True)]
    noted_BR = taken(trainer, responses)
    for query, response, noted_R in zip(QUERIES, responses, noted_BR, strict=True):
        expected = slow_logprobs(model, query, response, 0.7)
        assert torch.allclose(noted_R[: len(response)], expected, atol=1e-5)
        assert not noted_R[len(response) :].any()


def _by_row(kept):
    """What was kept, in the order of the queries."""
    by_query = {query: logprobs for (query, _), logprobs in kept.items()}
    return [by_query[query.numpy().tobytes()] for query in QUERIES]


@pytest.mark.parametrize("options", [{"loss_type": "apa"}, {"loss_type": "awr"}, {"loss_type": "ppo"}])
@pytest.mark.parametrize("given", [{}, {"peft_config": lora_config()}, {"value_model": "head"}])
def test_a_policy_that_has_not_moved_has_no_kl(tmp_path, options, given):
    trainer = tiny_trainer(tmp_path, None, given, **SIZES, **options, ppo_epochs=2, learning_rate=0.05)
    stats = trainer.step(QUERIES, sampled(trainer), SCORES)
    assert abs(stats["objective/kl"]) < 1e-4 and abs(stats["objective/kl_k3"]) < 1e-4
    assert stats["sampling/logprob_difference_mean"] <= stats["sampling/logprob_difference_max"] < 1e-4
    assert trainer.step(QUERIES, sampled(trainer), SCORES)["objective/kl_k3"] > 1e-3  # it has moved by then


@pytest.mark.parametrize("elsewhere", ["order", "beginning", "another loop", "two calls"])
def test_the_kl_is_that_of_the_policy_before_the_update_wherever_responses_come_from(tmp_path, elsewhere):
    trainer = tiny_trainer(tmp_path, **SIZES, ppo_epochs=2, learning_rate=0.02)
    trainer.step(QUERIES, sampled(trainer), SCORES)
    queries, responses = QUERIES, sampled(trainer)
    if elsewhere == "order":
        queries, responses = QUERIES[::-1], responses[::-1]
    elif elsewhere == "beginning":
        responses = [response[: max(1, len(response) - 2)] for response in responses]
    elif elsewhere == "another loop":
        responses = tiny_rollouts(6, seed=9)[1]
    else:
        responses = [*sampled(trainer, QUERIES[:3]), *sampled(trainer, QUERIES[3:])]
    policy, reference = trainer.model.policy, trainer.ref_model
    pairs = list(zip(queries, responses, strict=True))
    expected = sum(
        (slow_logprobs(policy, *pair, 1.0) - slow_logprobs(reference, *pair, 1.0)).sum().item() for pair in pairs
    ) / len(pairs)
    stats = trainer.step(queries, responses, SCORES)
    assert stats["objective/kl"] == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-3
    assert ("sampling/logprob_difference_max" in stats) == (elsewhere != "another loop")
    assert "objective/kl_at_first_visits" not in stats


def test_what_was_noted_is_for_one_step(tmp_path):
    trainer = tiny_trainer(tmp_path, **SIZES)
    responses = sampled(trainer)
    assert "sampling/logprob_difference_max" in trainer.step(QUERIES, responses, SCORES)
    assert "sampling/logprob_difference_max" not in trainer.step(QUERIES, responses, SCORES)


def test_without_the_pass_the_name_says_so(tmp_path):
    passes = {}
    for exact in (True, False):
        trainer = tiny_trainer(tmp_path, **SIZES, exact_kl=exact)
        calls = []
        trainer.model.policy.model.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        stats = trainer.step(QUERIES, tiny_rollouts(6, seed=9)[1], SCORES)
        passes[exact] = len(calls)
        assert ("objective/kl_at_first_visits" in stats) is not exact
        if not exact:
            assert stats["objective/kl"] == stats["objective/kl_at_first_visits"]
    assert passes[True] == passes[False] + 3  # six rows, two a pass


def test_noted_responses_cost_no_pass(tmp_path):
    trainer = tiny_trainer(tmp_path, **SIZES)
    responses, calls = sampled(trainer), []
    trainer.model.policy.model.register_forward_hook(lambda *given: calls.append(1))
    trainer.step(QUERIES, responses, SCORES)
    assert len(calls) == 3  # the update alone


def test_responses_of_the_reference_are_not_taken_for_the_policys(tmp_path):
    trainer = tiny_trainer(tmp_path, **SIZES, learning_rate=0.05)
    trainer.step(QUERIES, sampled(trainer), SCORES)
    _, of_reference = sampled(trainer, generate_ref_response=True, do_sample=False)
    known = [key[1] for key in trainer._sampled_logprobs._kept]
    assert all(response.numpy().tobytes() not in known for response in of_reference)


def test_a_call_that_samples_several_tokens_a_pass_notes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, **SIZES)
    responses = [sampled(trainer, [query], prompt_lookup_num_tokens=3, do_sample=False)[0] for query in QUERIES]
    assert taken(trainer, responses) is None
    assert not trainer.model.policy._forward_hooks


def test_every_process_makes_the_pass_if_one_has_to(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, **SIZES)
    monkeypatch.setattr(trainer.processes, "sum", lambda tensor: tensor + 1.0)
    like = torch.zeros(6, 9, dtype=torch.bool)
    rollouts = trainer._collect(QUERIES, sampled(trainer), SCORES, None)[0]
    assert rollouts.response_mask_BR.shape <= like.shape
    assert trainer._noted_logprobs(rollouts) is None


def test_train_reports_a_kl_of_zero_first(tmp_path):
    rows = [{"prompt": f"w{2 + i % 9} w{3 + i % 7}"} for i in range(12)]
    config = tiny_config(tmp_path, **SIZES, ppo_epochs=2, learning_rate=0.05, num_train_epochs=1, logging_steps=1)
    trainer = APATrainer(
        config,
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        dataset=rows,
        reward_funcs=lambda completions, **_: [0.1] * len(completions),
    )
    trainer.train()
    kls = [entry["objective/kl_k3"] for entry in trainer.state.log_history if "objective/kl_k3" in entry]
    assert len(kls) == 2 and kls[0] < 1e-4 < kls[1]


def test_the_newest_are_kept_and_those_of_another_temperature_forgotten():
    notes = SampledLogprobs().at(1.0, capacity=2)
    queries = [torch.tensor([number]) for number in range(3)]
    notes.keep(queries, queries, torch.tensor([[0.1], [0.2], [0.3]]))
    assert [key[0] for key in notes._kept] == [query.numpy().tobytes() for query in queries[1:]]
    assert notes.at(1.0, 2).take(queries[1:], queries[1:], torch.zeros(2, 1)).tolist() == [
        pytest.approx([0.2]),
        pytest.approx([0.3]),
    ]
    notes.keep(queries, queries, torch.tensor([[0.1], [0.2], [0.3]]))
    assert notes.at(0.5, 2).take(queries[1:], queries[1:], torch.zeros(2, 1)) is None
