"""Masks from lengths, padding on both sides, trimmed micro-batches, and log-probs at response positions only."""

import pytest
import torch

from tests.tiny import FAMILIES, lora_config, tiny_model, tiny_trainer
from trl_apa.models.logprobs import forward_parameters, response_logprobs, response_rows
from trl_apa.rollout.batch import Rollouts, pack_tokens, pad_tokens, response_mask


QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8])]
RESPONSES = [torch.tensor([0]), torch.tensor([9, 0, 1])]  # 0 is the pad id, and a legitimate token too


def test_masks_come_from_lengths_and_from_the_caller_never_from_ids():
    assert response_mask(RESPONSES).tolist() == [[True, False, False], [True, True, True]]
    masks = [torch.tensor([1]), torch.tensor([1.0, 0.0, 1.0])]
    assert response_mask(RESPONSES, masks).tolist() == [[True, False, False], [True, False, True]]


def test_queries_pad_left_responses_pad_right_and_positions_count_real_tokens():
    batch = pad_tokens(QUERIES, RESPONSES, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0], [0, 0, 8, 9, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 3], [0, 0, 0, 1, 2, 3]]


def test_padded_and_packed_layouts_say_where_the_responses_are():
    """Packed 5 6 7|0, 8|9 0 1; padded as above, six tokens a row. Each token is predicted at the one before it."""
    packed = pack_tokens(QUERIES, RESPONSES)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 0, 8, 9, 0, 1]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert packed["sequence_lengths"] == (4, 4)
    assert packed["predicting_index"].tolist() == [2, 4, 5, 6]
    padded = pad_tokens(QUERIES, RESPONSES, pad_token_id=0)
    assert padded["predicting_index"].tolist() == [2, 8, 9, 10]
    for batch in (packed, padded):
        assert batch["response_index"].tolist() == [0, 3, 4, 5]
        assert torch.equal(batch["token_index"], batch["predicting_index"] + 1)
        tokens = batch["input_ids"].flatten()[batch["token_index"]]
        assert response_rows(tokens, batch, 3).tolist() == [[0, 0, 0], [9, 0, 1]]


def test_a_micro_batch_is_trimmed_to_its_own_rows():
    field = torch.arange(6.0).reshape(2, 3)
    rollouts = Rollouts(
        QUERIES, RESPONSES, response_mask(RESPONSES), torch.ones(2), values_BR=field, returns_BR=-field
    )
    batch = rollouts.micro_batch([0], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0]]
    assert batch["values"].tolist() == [[0.0]] and batch["returns"].tolist() == [[-0.0]]
    assert "old_logprobs" not in batch
    batch = rollouts.micro_batch([1, 0], pad_token_id=0)
    assert batch["rows"].tolist() == [1, 0]
    assert batch["values"].tolist() == [[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]
    assert batch["response_mask"].tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_logprobs_equal_a_token_by_token_loop(tmp_path, family, lora):
    trainer = tiny_trainer(tmp_path, tiny_model(family), {"peft_config": lora_config()} if lora else None)
    model, batch = trainer.model.policy, pad_tokens(QUERIES, RESPONSES, pad_token_id=0)
    logprobs_BR, entropy_BR = response_logprobs(model, batch, 3, temperature=0.5, with_entropy=True)
    assert logprobs_BR.requires_grad and not entropy_BR.requires_grad
    logprobs_BR, entropy_BR = logprobs_BR.detach(), entropy_BR.detach()
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        for t, token in enumerate(response):
            ids = torch.cat([query, response[:t]])[None]
            log_softmax = torch.log_softmax(model(input_ids=ids).logits[0, -1].detach() / 0.5, dim=-1)
            assert float(logprobs_BR[row, t]) == pytest.approx(float(log_softmax[token]), abs=2e-5)
            entropy = -(log_softmax.exp() * log_softmax).sum()
            assert float(entropy_BR[row, t]) == pytest.approx(float(entropy), abs=2e-5)


def test_the_vocabulary_head_runs_at_response_positions_only():
    model, batch = tiny_model(), pad_tokens([torch.arange(2, 22)], [torch.tensor([5, 6])], 0)
    response_logprobs(model, batch, 2)  # the first call also tries the model out
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    response_logprobs(model, batch, 2)
    assert seen == [2]


def test_the_softmax_of_a_bfloat16_model_is_taken_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    batch = pad_tokens(QUERIES, RESPONSES, pad_token_id=0)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logprobs_BR, _ = response_logprobs(model, batch, 3)
    logits, targets = seen[-1], torch.cat(RESPONSES)
    assert logits.dtype == torch.bfloat16
    exact = torch.log_softmax(logits.detach().double(), dim=-1).gather(-1, targets[:, None])[:, 0]
    rough = torch.log_softmax(logits.detach(), dim=-1).gather(-1, targets[:, None])[:, 0]
    logprobs = logprobs_BR.detach()[response_mask(RESPONSES)]
    assert logprobs.dtype == torch.float32
    assert float((logprobs - exact).abs().max()) < 1e-5 < 1e-3 < float((rough - exact).abs().max())


def test_forward_parameters_look_inside_a_peft_wrapper(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"peft_config": lora_config()})
    assert {"position_ids", "logits_to_keep"} <= forward_parameters(trainer.model.policy)
