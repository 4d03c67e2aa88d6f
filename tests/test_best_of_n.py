"""`BestOfNSampler`: the best of several responses, for one query and several, in every form that classic took."""

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import tiny_model, tiny_tokenizer
from trl_apa import AutoModelForCausalLMWithValueHead, BestOfNSampler


QUERY = [3, 4, 5]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def sampler_of(model, score, **kwargs):
    return BestOfNSampler(model, tiny_tokenizer(), score, length_sampler=lambda: 6, **{"seed": 0, **kwargs})


def test_the_best_come_first_and_each_text_begins_with_its_query(model):
    seen = []

    def score(texts):
        seen.append(texts)
        return [float(sum(map(ord, text))) for text in texts]

    best = sampler_of(model, score, sample_size=8, n_candidates=3).generate(torch.tensor(QUERY), do_sample=True)
    (texts,) = seen
    assert len(texts) == 8 and len(set(texts)) > 1
    assert best == [sorted(texts, key=lambda text: -sum(map(ord, text)))[:3]]
    assert all(text.startswith(tiny_tokenizer().decode(QUERY)) for text in best[0])


@pytest.mark.parametrize(
    "several",
    [
        [QUERY, [6, 7]],
        [torch.tensor(QUERY), torch.tensor([6, 7])],
        [torch.tensor([QUERY]), torch.tensor([[6, 7]])],
    ],
)
def test_several_queries_in_every_form(model, several):
    best = sampler_of(model, lambda texts: [0.0] * len(texts)).generate(several)
    assert [len(texts) for texts in best] == [1, 1]
    starts = [tiny_tokenizer().decode(query) for query in (QUERY, [6, 7])]
    assert all(texts[0].startswith(start) for texts, start in zip(best, starts, strict=True))


@pytest.mark.parametrize("query", [QUERY, torch.tensor(QUERY), torch.tensor([QUERY])])
def test_one_query_in_every_form_and_one_sample(model, query):
    assert len(sampler_of(model, lambda texts: [1.0], sample_size=1).generate(query)) == 1


def test_the_seed_decides_and_a_wrapper_samples_as_its_model(model):
    def best(of):
        return sampler_of(of, lambda texts: torch.arange(4.0)).generate(QUERY, do_sample=True)

    assert best(model) == best(model) == best(AutoModelForCausalLMWithValueHead(model))


def test_options_of_generation_reach_the_model(model):
    config = GenerationConfig(do_sample=False, eos_token_id=None)
    (greedy,) = sampler_of(model, lambda texts: [0.0] * 4, n_candidates=4, generation_config=config).generate(QUERY)
    assert len(set(greedy)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer is a str"),
        ({"model": object()}, "model is a object; it should be a language model"),
        ({"n_candidates": 5}, "n_candidates is 5, it should be 1 to sample_size, 4"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    right = {"model": model, "tokenizer": tiny_tokenizer(), "queries_to_scores": len, "length_sampler": lambda: 3}
    with pytest.raises(ValueError, match=message):
        BestOfNSampler(**{**right, **change})


def test_wrong_queries_and_scores_are_named(model):
    with pytest.raises(ValueError, match="scores of shape"):
        sampler_of(model, lambda texts: [1.0]).generate(QUERY)
    with pytest.raises(ValueError, match="tokenized_query is empty"):
        sampler_of(model, lambda texts: [1.0]).generate([])
    with pytest.raises(ValueError, match=r"tokenized_query\[0\] has shape \(2, 3\)"):
        sampler_of(model, lambda texts: [1.0]).generate([torch.zeros(2, 3)])
