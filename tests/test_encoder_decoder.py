"""Encoder-decoders: the query goes to the encoder, the response and its start token to the decoder."""

import copy

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM

from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import ENCODER_DECODERS, EOS, START, lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa import AutoModelForSeq2SeqLMWithValueHead, ValueModel
from trl_apa.models.logprobs import response_logprobs
from trl_apa.rollout.batch import Rollouts, pad_tokens, response_mask, without_start_tokens


QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8])]
RESPONSES = [torch.tensor([9]), torch.tensor([10, 11, EOS])]


def seq2seq_lora():
    return lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])


def decoder_values(value_model, queries, responses):
    """Row by row, unpadded."""
    values = []
    for query, response in zip(queries, responses, strict=True):
        decoder_ids = torch.cat([torch.tensor([START]), response[:-1]])
        with torch.no_grad():
            output = value_model.trunk(
                input_ids=query[None], decoder_input_ids=decoder_ids[None], output_hidden_states=True
            )
            values.append(value_model.head(output.decoder_hidden_states[-1][0]))
    return values


def test_a_micro_batch_holds_queries_for_the_encoder_and_responses_behind_a_start_token():
    rollouts = Rollouts(QUERIES, RESPONSES, response_mask(RESPONSES), torch.ones(2), decoder_start_token_id=START)
    batch = rollouts.micro_batch([0, 1], pad_token_id=0)
    assert batch["encoder_input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["encoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[START, 9, 0, 0], [START, 10, 11, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["response_mask"].tolist() == [[True, False, False], [True, True, True]]


def test_start_tokens_are_taken_off_where_they_are():
    with_start = [torch.tensor([START, 9]), torch.tensor([10, START])]
    masks = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    responses, kept = without_start_tokens(with_start, masks, START)
    assert [r.tolist() for r in responses] == [[9], [10, START]]
    assert [m.tolist() for m in kept] == [[1], [1, 0]]
    # Masks that were made for the response alone, and what is no tensor, stay.
    _, kept = without_start_tokens(with_start, [torch.tensor([1]), "odd"], START)
    assert kept[0].tolist() == [1] and kept[1] == "odd"
    assert without_start_tokens([3, torch.zeros(1, 1)], None, START)[0][0] == 3


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_logprobs_equal_a_token_by_token_loop(tmp_path, family):
    model = tiny_trainer(tmp_path, tiny_model(family)).model.policy
    tokens = pad_tokens(QUERIES, RESPONSES, 0, START)
    logprobs_BR, entropy_BR = response_logprobs(model, tokens, 3, temperature=0.5, with_entropy=True)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        for t, token in enumerate(response):
            decoder_ids = torch.cat([torch.tensor([START]), response[:t]])[None]
            logits = model(input_ids=query[None], decoder_input_ids=decoder_ids).logits[0, -1].detach()
            log_softmax = torch.log_softmax(logits / 0.5, dim=-1)
            assert float(logprobs_BR[row, t].detach()) == pytest.approx(float(log_softmax[token]), abs=2e-5)
            entropy = -(log_softmax.exp() * log_softmax).sum()
            assert float(entropy_BR[row, t]) == pytest.approx(float(entropy), abs=2e-5)


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_batched_greedy_generation_equals_one_by_one_and_begins_with_the_start_token(tmp_path, family):
    trainer = tiny_trainer(tmp_path, tiny_model(family, scale=2.0))
    queries = tiny_rollouts(num_rows=6)[0]
    options = {"do_sample": False, "max_new_tokens": 8}
    responses = trainer.generate(queries, batch_size=6, return_prompt=True, **options)
    plain = trainer.model.policy
    for query, response in zip(queries, responses, strict=True):
        alone = trainer.generate(query, **options)
        assert alone.shape[0] == 1 and alone[0].equal(response)
        reference = [START]
        while len(reference) < 9 and reference[-1] != EOS:
            with torch.no_grad():
                logits = plain(input_ids=query[None], decoder_input_ids=torch.tensor([reference])).logits
            reference.append(int(logits[0, -1].argmax()))
        assert response.tolist() == reference
    pair = trainer.generate(queries, generate_ref_response=True, **options)
    assert [r.tolist() for r in pair[0]] == [r.tolist() for r in pair[1]]


def test_step_takes_responses_with_the_start_token_or_without(tmp_path):
    queries, responses, scores = tiny_rollouts()
    responses = [torch.where(r == START, START + 1, r) for r in responses]
    with_start = [torch.cat([torch.tensor([START]), r]) for r in responses]
    masks = [torch.ones_like(r) for r in responses]
    masks[0][0] = 0 if len(responses[0]) > 1 else 1
    shifted = [torch.cat([torch.tensor([1]), m]) for m in masks]
    plain = parameters_after_step(learner(tmp_path, tiny_model("t5")), queries, responses, scores, masks)
    same = parameters_after_step(learner(tmp_path, tiny_model("t5")), queries, with_start, scores, shifted)
    assert_same(same, plain, tolerance=1e-9)
    trainer = learner(tmp_path, tiny_model("t5"))
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        trainer.step(queries, [with_start[0], torch.tensor([START]), *with_start[2:]], scores)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_update_does_not_depend_on_padding_or_split(tmp_path, family):
    rollouts = tiny_rollouts(num_rows=4)
    results = [
        parameters_after_step(learner(tmp_path, tiny_model(family), mini_batch_size=size, **split), *rollouts)
        for size, split in ((4, {}), (1, {"gradient_accumulation_steps": 4}))
    ]
    assert_same(*results, tolerance=2e-6)


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_value_model_are_saved_and_come_back(tmp_path, family, lora):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    target = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    peft_config = lora_config(task_type="SEQ_2_SEQ_LM", target_modules=target) if lora else None
    trainer = learner(tmp_path, model, trainer_kwargs={"peft_config": peft_config}, max_grad_norm=0.0)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "saved")
    auto_class = AutoPeftModelForSeq2SeqLM if lora else AutoModelForSeq2SeqLM
    loaded = auto_class.from_pretrained(tmp_path / "saved")
    tokens = {"input_ids": QUERIES[0][None], "decoder_input_ids": torch.tensor([[START, 9]])}
    with torch.no_grad():
        expected = trainer.model.policy(**tokens).logits
        torch.testing.assert_close(loaded(**tokens).logits, expected)
        assert not torch.allclose(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")(**tokens).logits, expected)
    value_model = ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    values = decoder_values(value_model, QUERIES, RESPONSES)
    for loaded_row, row in zip(values, decoder_values(trainer.model.value_model, QUERIES, RESPONSES), strict=True):
        torch.testing.assert_close(loaded_row, row)
        assert float(row.abs().max()) > 1e-3
    # Goes on from there, by name.
    again = tiny_trainer(tmp_path, str(tmp_path / "saved"), {"value_model": str(tmp_path / "saved" / "value_model")})
    assert again.is_encoder_decoder and again.is_peft_model == lora
    assert again.step(*tiny_rollouts())["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_values_of_a_padded_batch_equal_those_of_single_rows(tmp_path):
    for lora in (False, True):
        peft_config = seq2seq_lora() if lora else None
        trainer = learner(tmp_path, tiny_model("t5"), trainer_kwargs={"peft_config": peft_config})
        with torch.no_grad():
            values_BR = trainer.model.value_model(pad_tokens(QUERIES, RESPONSES, 0, START), 3)
        for row, values in enumerate(decoder_values(trainer.model.value_model, QUERIES, RESPONSES)):
            torch.testing.assert_close(values_BR[row, : len(values)], values)


def test_the_lora_reference_is_the_base_and_a_copy_stays_behind(tmp_path):
    trainer = learner(tmp_path, tiny_model("t5"), trainer_kwargs={"peft_config": seq2seq_lora()})
    assert trainer.ref_model is None
    full = learner(tmp_path, tiny_model("t5"))
    before = copy.deepcopy(full.ref_model.state_dict())
    for learning in (trainer, full):
        learning.step(*tiny_rollouts())
        assert abs(learning.step(*tiny_rollouts())["objective/kl"]) > 1e-4
    assert_same(full.ref_model.state_dict(), before, tolerance=1e-12)


def test_a_seq2seq_wrapper_is_a_policy_and_its_head_a_critic(tmp_path):
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_model("t5"), v_head_init_strategy="normal")
    trainer = tiny_trainer(tmp_path, wrapper, {"value_model": "head"})
    tokens = pad_tokens(QUERIES, RESPONSES, 0, START)
    with torch.no_grad():
        values_BR = trainer.model(**tokens, response_width=3)["values"]
        for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
            decoder_ids = torch.cat([torch.tensor([START]), response[:-1]])[None]
            values = wrapper(input_ids=query[None], decoder_input_ids=decoder_ids)[2][0]
            torch.testing.assert_close(values_BR[row, : len(response)], values)
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "saved")
    assert loaded.v_head.summary.weight.equal(wrapper.v_head.summary.weight)


def test_sequences_longer_than_either_stacks_positions_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("bart"))
    long, short = torch.full((65,), 5), torch.tensor([5])
    fits = torch.full((64,), 5)
    for queries, responses in (([long, *[short] * 3], [short] * 4), ([short] * 4, [fits, *[short] * 3])):
        with pytest.raises(ValueError, match="row 0 has 65 tokens, but the model has 64 positions"):
            trainer.step(queries, responses, [torch.tensor(1.0)] * 4)
    trainer.step([fits] * 4, [fits[1:]] * 4, [torch.tensor(float(i)) for i in range(4)])
    with pytest.raises(ValueError, match="row 0 has 65 tokens"):
        trainer.generate([short], max_new_tokens=64)
