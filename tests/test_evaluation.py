"""What is measured on held-out prompts: against hand-worked values and a naive loop."""

import math

import pytest
import torch

from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer, tiny_trainer
from trl_apa.evaluation.held_out import distinct_ngrams


PROMPTS = ["w2 w3 w4", "w5", "w6 w7", "w8 w9 w10"]


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a", "b c"], 1, 3 / 5),
        # ab, ba, bc: no pair goes over the end of a text
        (["a b a", "b c"], 2, 1.0),
        (["a b", "a b", "a"], 2, 1 / 2),
        (["a", ""], 2, 0.0),
    ],
)
def test_distinct_ngrams_by_hand(texts, n, expected):
    assert distinct_ngrams(texts, n) == expected


def measured(tmp_path, model, **options):
    trainer_kwargs = {"reward_funcs": lambda completions, **columns: [1.0] * len(completions), "eval_dataset": PROMPTS}
    options = {"per_device_eval_batch_size": 3, "max_completion_length": 5, **options}
    return tiny_trainer(tmp_path, model, trainer_kwargs, **options).evaluate()


def test_a_policy_that_draws_any_token_has_the_largest_entropy(tmp_path):
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    metrics = measured(tmp_path, model)
    assert metrics["eval_entropy"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert 0 < metrics["eval_distinct_1"] <= 1


def test_entropy_is_a_mean_over_tokens_and_does_not_depend_on_the_batches(tmp_path, monkeypatch):
    seen = []
    decode = type(tiny_tokenizer()).batch_decode
    monkeypatch.setattr(
        type(tiny_tokenizer()), "batch_decode", lambda self, ids, **kw: seen.append(ids) or decode(self, ids, **kw)
    )
    model = tiny_model(scale=1.5)
    metrics = measured(tmp_path, model, per_device_eval_batch_size=4)
    # The last texts that are made are the policy's responses.
    total, count = 0.0, 0
    tokenizer = tiny_tokenizer()
    for prompt, response in zip(PROMPTS, seen[-1], strict=True):
        query = torch.tensor(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        total += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        count += len(response)
    assert len({len(response) for response in seen[-1]}) > 1, "all responses have one length: the mean is not tested"
    assert metrics["eval_entropy"] == pytest.approx(total / count, rel=1e-4)
