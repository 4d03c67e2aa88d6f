"""Waiting prompts take the places of rows that have ended, and each row is answered as it is alone."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from tests.test_finished_rows import CountedTokens, Never, windowed
from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models import layouts
from trl_apa.models.layouts import rows_can_be_joined
from trl_apa.rollout import generation
from trl_apa.rollout.cache_merging import fitted
from trl_apa.rollout.refilled_rows import StreamChoice


QUERIES = tiny_rollouts(8, seed=3, max_query=20)[0]
LIMIT = 16


def trainer_for(tmp_path, model, **config):
    return tiny_trainer(tmp_path, model, max_completion_length=LIMIT, temperature=0.9, **config)


def sampled(trainer, queries=QUERIES, seed=5, **options):
    torch.manual_seed(seed)
    return trainer.generate(queries, return_prompt=False, **options)


def noted(trainer, responses, queries=QUERIES):
    like = torch.zeros(len(queries), max(map(len, responses)))
    return trainer._sampled_logprobs.take(queries, responses, like)


CASES = [
    (tiny_model, {"stop_strings": ["w5", "w7 w9"]}),
    (tiny_model, {"max_length": 28, "max_new_tokens": None, "stop_strings": ["w5"]}),
    (lambda: tiny_model("gpt2"), {"stop_strings": ["w5"]}),
    (lambda: tiny_model("opt"), {"stop_strings": ["w5"]}),
    (windowed, {"stop_strings": ["w5"]}),
]


@pytest.mark.parametrize(("make", "options"), CASES)
def test_greedy_answers_are_those_of_each_prompt_alone(tmp_path, monkeypatch, make, options):
    trainer = trainer_for(tmp_path, make().double())
    expected = sampled(trainer, do_sample=False, batch_size=1, **options)
    expected_BR = noted(trainer, expected)
    responses = sampled(trainer, do_sample=False, batch_size=3, **options)
    assert all(map(torch.equal, responses, expected))
    assert torch.allclose(noted(trainer, responses), expected_BR, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options"), [*CASES[::2], (tiny_model, {"top_k": 7, "top_p": 0.8, "stop_strings": ["w5", "w9"]})]
)
def test_a_sampled_row_does_not_depend_on_what_else_is_in_the_batch(tmp_path, make, options):
    trainer = trainer_for(tmp_path, make().double())
    responses = sampled(trainer, batch_size=2, **options)
    random_state = torch.get_rng_state()
    assert len({len(response) for response in responses}) > 2
    for batch_size in (3, 7):
        assert all(map(torch.equal, sampled(trainer, batch_size=batch_size, **options), responses))
        assert torch.equal(torch.get_rng_state(), random_state)
    others = [query.flip(0) if row % 3 else query for row, query in enumerate(QUERIES)]
    again = sampled(trainer, others, batch_size=4, **options)
    assert all(map(torch.equal, again[::3], responses[::3]))
    other_seed = sampled(trainer, seed=6, batch_size=4, **options)
    assert sum(map(torch.equal, other_seed, responses)) < len(QUERIES) - 2


def test_rows_with_one_prompt_have_streams_of_their_own_and_read_it_once(tmp_path):
    model = tiny_model().double()
    trainer = trainer_for(tmp_path, model)
    asked = [query for query in QUERIES[:3] for _ in range(5)]
    expected = sampled(trainer, asked, batch_size=2, stop_strings=["w5"])
    assert len({tuple(response.tolist()) for response in expected}) > 7
    for batch_size in (4, 8):
        counted = CountedTokens(model)
        responses = sampled(trainer, asked, batch_size=batch_size, max_new_tokens=1)
        assert counted.tokens <= 3 * max(map(len, asked))
        assert [len(response) for response in responses] == [1] * len(asked)
        assert all(map(torch.equal, sampled(trainer, asked, batch_size=batch_size, stop_strings=["w5"]), expected))


def test_log_probs_are_noted_of_every_token(tmp_path):
    trainer = trainer_for(tmp_path, tiny_model().double())
    responses = sampled(trainer, batch_size=3, stop_strings=["w5"])
    found_BR = noted(trainer, responses)
    model = trainer.model.policy
    for query, response, found_R in zip(QUERIES, responses, found_BR, strict=True):
        logits_TV = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1] / 0.9
        expected = logits_TV.log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert torch.allclose(found_R[: len(response)], expected.float(), atol=1e-5)


class Widths:
    """Rows and columns of each forward pass, cached ones among them."""

    def __init__(self, model):
        self.rows, self.columns, self.passes = 0, 0, 0
        model.register_forward_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs, output):
        self.passes += 1
        self.rows = max(self.rows, len(output.logits))
        self.columns = max(self.columns, output.past_key_values.get_seq_length())


def test_the_places_are_filled_and_the_cache_is_no_longer_than_the_longest_row(tmp_path, monkeypatch):
    model = tiny_model().double()
    trainer = trainer_for(tmp_path, model)
    queries = tiny_rollouts(24, seed=8)[0]
    trainer.generate(queries, batch_size=4)
    seen = Widths(model)
    responses = sampled(trainer, queries, batch_size=4, stop_strings=["w5"])
    passes = seen.passes
    assert seen.rows == 4
    assert seen.columns <= max(len(query) for query in queries) + max(map(len, responses))
    assert passes <= sum(map(len, responses)) / 4 + LIMIT + len(queries)
    monkeypatch.setattr(generation, "rows_can_be_joined", lambda *given: False)
    batches = Widths(model)
    sampled(trainer, queries, batch_size=4, stop_strings=["w5"])
    assert passes - len(queries) < 0.9 * batches.passes


def test_with_adapters_too(tmp_path):
    kwargs = {"peft_config": lora_config(init_lora_weights=False)}
    trainer = tiny_trainer(tmp_path, tiny_model().double(), kwargs, max_completion_length=LIMIT)
    first, other = (sampled(trainer, batch_size=size, stop_strings=["w5"]) for size in (2, 5))
    assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}])
def test_a_stream_samples_from_the_distribution(options):
    """Each token as often as its probability says, within four standard deviations; none without probability."""
    num_rows = 20_000
    torch.manual_seed(0)
    logits_V = 2 * torch.randn(8)
    config = GenerationConfig(do_sample=True, temperature=0.7, **{"top_k": 0, "top_p": 1.0, **options})
    choice = StreamChoice(config, num_rows, 1, torch.device("cpu"))
    choice.rows_A, choice.starts_A = torch.arange(num_rows), torch.ones(num_rows, dtype=torch.long)
    choice.uniform_BR[:3, 0] = torch.tensor([0.0, 1 - 2.0**-53, 1.0])
    ids = torch.zeros(num_rows, 1, dtype=torch.long)
    chosen = choice(ids, logits_V.expand(num_rows, -1).clone()).argmax(-1)
    scores_V = choice.warpers(ids[:1], logits_V[None].clone())[0]
    expected_V = scores_V.softmax(-1)
    share_V = torch.bincount(chosen, minlength=8) / num_rows
    assert ((share_V - expected_V).abs() <= 4 * (expected_V * (1 - expected_V) / num_rows).sqrt()).all()
    assert not share_V[expected_V == 0].any()


@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": [Never()]},
        {"logits_processor": LogitsProcessorList([lambda input_ids, scores: scores])},
        {"repetition_penalty": 1.1},
        {"use_cache": False},
        {"remove_padding": False},
        {"pad_to_multiple_of": 8},
        {"length_sampler": lambda: 9},
    ],
)
def test_what_is_about_a_batch_is_sampled_batch_after_batch(tmp_path, monkeypatch, options):
    monkeypatch.setattr(generation, "RefilledRows", None)
    monkeypatch.setattr(Never, "__call__", lambda self, ids, scores: torch.zeros(len(ids), dtype=torch.bool))
    trainer = trainer_for(tmp_path, tiny_model())
    assert len(sampled(trainer, batch_size=4, **options)) == len(QUERIES)
    assert len(sampled(trainer, batch_size=len(QUERIES))) == len(QUERIES)


def test_an_encoder_decoder_is_sampled_batch_after_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "RefilledRows", None)
    assert len(sampled(trainer_for(tmp_path, tiny_model("t5")), batch_size=4)) == len(QUERIES)


def test_a_cache_of_another_kind_is_not_joined(monkeypatch):
    assert rows_can_be_joined(tiny_model().eval(), 20)
    assert not rows_can_be_joined(tiny_model("t5").eval(), 20)
    monkeypatch.setattr("trl_apa.rollout.cache_merging.DynamicCache", type("Other", (), {}))
    model = tiny_model(seed=21, scale=2.5).eval()
    assert layouts.rows_can_be_selected(model, 21) and not rows_can_be_joined(model, 21)


def test_rows_that_go_on_otherwise_once_joined_are_not(monkeypatch):
    """Columns at the wrong end, say, which the attention mask hides."""

    def wrong(rows, num_columns, dim=-1, value=0):
        return fitted(rows, num_columns, dim, value).roll(1, dims=-2 if dim == -2 else 0)

    monkeypatch.setattr("trl_apa.rollout.cache_merging.fitted", wrong)
    assert not rows_can_be_joined(tiny_model(seed=22, scale=2.8).eval(), 22)
