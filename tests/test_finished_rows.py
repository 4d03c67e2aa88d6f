"""Rows that have ended are left out of the batch, a common prompt is read once, and nothing else changes."""

import pytest
import torch
from transformers import LogitsProcessorList, MistralConfig, MistralForCausalLM, StoppingCriteria

from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models.layouts import rows_can_be_selected, sampling_trial
from trl_apa.rollout import generation


QUERIES = tiny_rollouts(12, seed=3)[0]
LIMIT = 30


def windowed():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1}
    return MistralForCausalLM(MistralConfig(**sizes, **more, sliding_window=8))


class CountedRows:
    """How many rows the forward passes of a model have had, all together."""

    def __init__(self, model):
        self.rows = 0
        model.register_forward_hook(lambda _, args, output: setattr(self, "rows", self.rows + len(output.logits)))


@pytest.fixture(autouse=True)
def one_batch_after_the_other(monkeypatch):
    """No row takes the place of another: `tests/test_refilled_rows.py` is about that."""
    monkeypatch.setattr(generation, "rows_can_be_joined", lambda *given: False)


def sampled(trainer, queries=QUERIES, **options):
    torch.manual_seed(5)
    responses = trainer.generate(queries, return_prompt=False, **{"batch_size": 12, **options})
    like = torch.zeros(len(queries), max(map(len, responses)))
    cut = [response[: LIMIT if options.get("remove_padding", True) else 1] for response in responses]
    return responses, trainer._sampled_logprobs.take(queries, cut, like), torch.get_rng_state()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_model, {}),
        (tiny_model, {"top_k": 5, "top_p": 0.8}),
        (tiny_model, {"do_sample": False}),
        (tiny_model, {"stop_strings": ["w5"], "batch_size": 5}),
        (tiny_model, {"stop_strings": ["w5"], "remove_padding": False}),
        (tiny_model, {"max_length": 25, "max_new_tokens": None}),
        (lambda: tiny_model("gpt2"), {"stop_strings": ["w5"]}),
        (windowed, {"stop_strings": ["w5"]}),
    ],
)
def test_the_responses_are_those_of_generate_from_the_same_random_numbers(tmp_path, monkeypatch, make, options):
    model = make()
    trainer = tiny_trainer(tmp_path, model, max_completion_length=LIMIT, temperature=0.9)
    counted = CountedRows(model)
    ours, logprobs_BR, random_state = sampled(trainer, **options)
    dropping, counted.rows = counted.rows, 0
    monkeypatch.setattr(generation, "rows_can_be_selected", lambda *given: False)
    theirs, expected_BR, expected_state = sampled(trainer, **options)
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(random_state, expected_state)
    assert torch.allclose(logprobs_BR, expected_BR, atol=1e-6)
    assert dropping < counted.rows or options == {"do_sample": False}


def test_the_work_is_that_of_the_rows_that_are_left(tmp_path):
    """Rows are dropped when four and a quarter of those left have ended: at most so many are carried without need."""
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model, max_completion_length=LIMIT)
    sampled(trainer, stop_strings=["w5"])
    counted = CountedRows(model)
    lengths = [len(response) for response in sampled(trainer, stop_strings=["w5"])[0]]
    living = [sum(length > number for length in lengths) for number in range(max(lengths))]
    assert sum(lengths) <= counted.rows <= sum(max(rows + 3, rows * 4 / 3) for rows in living)
    assert counted.rows < 0.8 * len(lengths) * max(lengths)


def test_with_adapters_too(tmp_path):
    trainer = tiny_trainer(
        tmp_path, None, {"peft_config": lora_config(init_lora_weights=False)}, max_completion_length=9
    )
    sampled(trainer, stop_strings=["w5"])
    counted = CountedRows(trainer.model.policy.get_base_model())
    responses = sampled(trainer, stop_strings=["w5"])[0]
    assert counted.rows < len(responses) * max(map(len, responses))


class CountedTokens:
    """How many tokens the forward passes of a model have read, pads among them."""

    def __init__(self, model):
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(lambda _, args, output: self.count(args[0]))

    def count(self, input_ids):
        self.tokens += input_ids.numel()


ASKED = [query for query in tiny_rollouts(3, seed=4, max_query=20)[0] for _ in range(4)]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_model, {"do_sample": False}),
        (lambda: tiny_model().double(), {}),
        (tiny_model, {"top_k": 5, "top_p": 0.8, "stop_strings": ["w5"]}),
        (tiny_model, {"batch_size": 4, "remove_padding": False}),
        (tiny_model, {"batch_size": 3, "stop_strings": ["w5", "w7"]}),
        (tiny_model, {"max_new_tokens": 1}),
        (lambda: tiny_model("gpt2"), {"stop_strings": ["w5"]}),
        (windowed, {"stop_strings": ["w5"]}),
    ],
)
def test_a_prompt_that_is_asked_several_times_is_read_once(tmp_path, monkeypatch, make, options):
    model = make()
    trainer = tiny_trainer(tmp_path, model, max_completion_length=LIMIT, temperature=0.9)
    sampled(trainer, ASKED, max_new_tokens=2)
    counted = CountedTokens(model)
    ours, logprobs_BR, random_state = sampled(trainer, ASKED, **options)
    shared, counted.tokens = counted.tokens, 0
    monkeypatch.setattr(generation, "equal_queries", lambda queries: list(range(len(queries))))
    theirs, expected_BR, expected_state = sampled(trainer, ASKED, **options)
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(random_state, expected_state)
    assert torch.allclose(logprobs_BR, expected_BR, atol=1e-6)
    if options.get("batch_size", 12) != 3:  # the columns of 12 rows are read for 3, or those of 4 for 1
        wide = max(map(len, ASKED)) if options.get("batch_size", 12) == 12 else sum(map(len, ASKED[::4])) / 3
        assert counted.tokens - shared == round(9 * wide)


def test_two_rows_with_one_prompt_read_it_once(tmp_path):
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model, max_completion_length=LIMIT)
    query = torch.arange(2, 22)
    trainer.generate([query, query.flip(0)], max_new_tokens=1)
    counted = CountedTokens(model)
    trainer.generate([query, query], max_new_tokens=1)
    assert counted.tokens == 20


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(QUERIES)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": [Never()]},
        {"logits_processor": LogitsProcessorList([lambda input_ids, scores: scores])},
        {"repetition_penalty": 1.1},
        {"use_cache": False},
    ],
)
def test_what_a_caller_brings_sees_the_complete_batch(tmp_path, options):
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model, max_completion_length=LIMIT)
    sampled(trainer, max_new_tokens=2)
    counted = CountedRows(model)
    responses = sampled(trainer, stop_strings=["w5"], **options)[0]
    assert counted.rows == len(responses) * max(map(len, responses))


def test_a_cache_that_cannot_delete_rows_keeps_them(monkeypatch):
    model = tiny_model().eval()
    assert rows_can_be_selected(model, 20) and sampling_trial(model, 20).selected.relative < 1e-5
    assert not rows_can_be_selected(tiny_model("t5").eval(), 20)

    def refuse(self, indices):
        raise AttributeError("no rows here")

    monkeypatch.setattr("transformers.DynamicCache.batch_select_indices", refuse)
    other = tiny_model(seed=1, scale=2.5).eval()
    assert sampling_trial(other, 21).selected is None and not rows_can_be_selected(other, 21)


def test_a_cache_that_deletes_the_wrong_rows_keeps_them(monkeypatch):
    select = __import__("transformers").DynamicCache.batch_select_indices
    monkeypatch.setattr(
        "transformers.DynamicCache.batch_select_indices", lambda self, rows: select(self, torch.zeros_like(rows))
    )
    model = tiny_model(seed=2, scale=2.8).eval()
    assert sampling_trial(model, 22).selected.relative > 1e-3 and not rows_can_be_selected(model, 22)
